"""The built-in rewards' cards."""

from __future__ import annotations

from collections.abc import Callable

from nft_plugins import RewardInfo, hookimpl

REWARDS = (
    RewardInfo(
        "pickscore",
        "PickScore: human preference, CLIP ViT-H/14",
        "nft_rewards.pickscore:PickScore",
        source="arXiv 2305.01569; yuvalkirstain/PickScore_v1",
        licence="MIT",
        range="about 18 to 24",
    ),
    RewardInfo(
        "clipscore",
        "CLIPScore: agreement of image and prompt, CLIP ViT-L/14",
        "nft_rewards.clipscore:CLIPScore",
        source="arXiv 2104.08718; openai/clip-vit-large-patch14",
        licence="MIT",
        range="cosine, about 0.2 to 0.35",
    ),
    RewardInfo(
        "ocr",
        "Words of the prompt that can be read in the image",
        "nft_rewards.ocr:OCR",
        source="arXiv 2505.05470, section 5; engine RapidOCR (PP-OCR)",
        licence="Apache-2.0",
        range="0 to 1",
        metadata=('text, or "quoted words" in the prompt',),
        modules=("rapidocr", "onnxruntime", "rapidfuzz"),
        extra="ocr",
    ),
    RewardInfo(
        "geneval",
        "GenEval: objects, counts, colours and positions, as detected",
        "nft_rewards.geneval:GenEval",
        source="arXiv 2310.11513",
        licence="MIT",
        range="0 to 1",
        metadata=("include",),
    ),
    RewardInfo(
        "jpeg_compressibility",
        "Small JPEG files: minus the size at quality 95",
        "nft_rewards.jpeg:JPEGCompressibility",
        source="arXiv 2305.13301",
        range="kB / 500 below 0",
    ),
    RewardInfo(
        "jpeg_incompressibility",
        "Large JPEG files: the size at quality 95",
        "nft_rewards.jpeg:JPEGIncompressibility",
        source="arXiv 2305.13301",
        range="kB / 500 above 0",
    ),
)


@hookimpl
def nft_register_rewards(register: Callable[[RewardInfo], None]) -> None:
    for info in REWARDS:
        register(info)
