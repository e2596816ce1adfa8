"""The built-in rewards' cards."""

from __future__ import annotations

from collections.abc import Callable

from nft_plugins import Environment, RewardInfo, hookimpl

CONTRACT = "1.4"
CLIP_L = "openai/clip-vit-large-patch14"

REWARDS = (
    RewardInfo(
        "pickscore",
        "PickScore: human preference, CLIP ViT-H/14",
        "nft_rewards.pickscore:PickScore",
        definition="exp(logit_scale) * cos(image, prompt); variant=nft: / 26",
        source="arXiv 2305.01569; yuvalkirstain/PickScore_v1",
        files=("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K: the processor"),
        memory="3.9 GB in fp32, 2.0 GB in bf16",
        licence="MIT",
        range="about 18 to 24",
        reads_prompt=True,
    ),
    RewardInfo(
        "hpsv2",
        "HPSv2: human preference, CLIP ViT-H/14",
        "nft_rewards.hpsv2:HPSv2",
        definition="cos(image, prompt) of the whole image with black around it; version=2.1 or 2.0",
        source="arXiv 2306.09341; xswu/HPSv2",
        files=("xswu/HPSv2: HPS_v2.1_compressed.pt",),
        memory="3.9 GB in fp32, 2.0 GB in bf16",
        licence="Apache-2.0",
        range="about 0.2 to 0.35",
        modules=("open_clip", "torchvision"),
        extra="open_clip",
        reads_prompt=True,
    ),
    RewardInfo(
        "hpsv3",
        "HPSv3: human preference, Qwen2-VL 7B",
        "nft_rewards.hpsv3:HPSv3",
        definition="the mean, of a mean and a spread, that a head reads behind the image and a question",
        source="arXiv 2508.03789; MizzenAI/HPSv3",
        files=(
            "MizzenAI/HPSv3: HPSv3.safetensors",
            "Qwen/Qwen2-VL-7B-Instruct: config.json and the tokenizer, not its weights",
        ),
        memory="31 GB in fp32, 16 GB in bf16",
        licence="MIT; Apache-2.0 (Qwen2-VL-7B)",
        range="no bounds",
        reads_prompt=True,
    ),
    RewardInfo(
        "clipscore",
        "CLIPScore: agreement of image and prompt, CLIP ViT-L/14",
        "nft_rewards.clipscore:CLIPScore",
        definition="cos(image, prompt); variant=nft: of bilinearly resized images; variant=hessel: "
        "2.5 * max(cos, 0) after 'A photo depicts '",
        source=f"arXiv 2104.08718; {CLIP_L}",
        files=(CLIP_L,),
        memory="1.7 GB in fp32, 0.9 GB in bf16",
        licence="MIT",
        range="cosine, about 0.2 to 0.35",
        reads_prompt=True,
    ),
    RewardInfo(
        "aesthetic",
        "LAION's improved aesthetic predictor, CLIP ViT-L/14",
        "nft_rewards.aesthetic:Aesthetic",
        definition="a linear head on the unit-length image embedding; the prompt plays no part",
        source="github.com/christophschuhmann/improved-aesthetic-predictor",
        files=("camenduru/improved-aesthetic-predictor: sac+logos+ava1-l14-linearMSE.pth", CLIP_L),
        memory="1.7 GB in fp32, 0.9 GB in bf16; shared with clipscore",
        licence="Apache-2.0",
        range="about 1 to 10",
    ),
    RewardInfo(
        "imagereward",
        "ImageReward: human preference, a BLIP that reads the prompt while it looks",
        "nft_rewards.imagereward:ImageReward",
        definition="(MLP(first token of BLIP's text encoder) - 0.16717) / 1.03334",
        source="arXiv 2304.05977; THUDM/ImageReward",
        files=(
            "THUDM/ImageReward: ImageReward.pt",
            "THUDM/ImageReward: med_config.json",
            "bert-base-uncased: the tokenizer",
        ),
        memory="1.8 GB in fp32, 0.9 GB in bf16",
        licence="Apache-2.0",
        range="about -2.3 to 2",
        # The authors' package needs functions that transformers 5 removed, and imports clip without saying so.
        environment=Environment(
            python=">=3.11,<3.13",
            requirements=(
                "image-reward==1.5",
                "openai-clip",
                "transformers<4.48",
                "diffusers<0.33",
                "setuptools<80",
                "torch>=2.4",
                "torchvision",
            ),
            options={"engine": "package"},
        ),
        reads_prompt=True,
    ),
    RewardInfo(
        "ocr",
        "Words of the prompt that can be read in the image",
        "nft_rewards.ocr:OCR",
        definition="1 - min(d, n) / n, d the Levenshtein distance of what was read to the n letters asked for",
        source="arXiv 2505.05470, section 5; RapidOCR (PP-OCR), or PaddleOCR 3 or 2.9",
        licence="Apache-2.0",
        range="0 to 1",
        metadata=('text, or "quoted words" in the prompt',),
        modules=("rapidocr", "onnxruntime", "rapidfuzz"),
        extra="ocr",
        environment=(
            Environment(
                python=">=3.11,<3.14",
                requirements=("paddleocr>=3.3,<4", "paddlepaddle>=3.0,<4", "rapidfuzz>=3.9", "torch>=2.4"),
                options={"engine": "paddle"},
            ),
            # What the published runs read with. Its albumentations needs NumPy 1, its paddle setuptools.
            Environment(
                python=">=3.11,<3.13",
                requirements=(
                    "paddleocr>=2.9,<2.10",
                    "paddlepaddle>=2.6,<3",
                    "numpy<2",
                    "setuptools<80",
                    "rapidfuzz>=3.9",
                    "torch>=2.4",
                ),
                options={"engine": "paddle2"},
            ),
        ),
        check_prompt="nft_rewards.words:find_target_text",
    ),
    RewardInfo(
        "geneval",
        "GenEval: objects, counts, colours and positions, as detected",
        "nft_rewards.geneval:GenEval",
        definition="the mean of count, colour and position terms; score=strict: all of them at once",
        source=f"arXiv 2310.11513; facebook/mask2former-swin-small-coco-instance; {CLIP_L}",
        files=("facebook/mask2former-swin-small-coco-instance", CLIP_L),
        memory="0.3 GB in fp32 (Mask2Former); 1.7 GB in fp32, 0.9 GB in bf16 (CLIP, shared with clipscore)",
        licence="MIT (GenEval, CLIP); the licence of Mask2Former's weights is on their hub page",
        range="0 to 1",
        metadata=("include",),
        check_prompt="nft_rewards.geneval_rules:check_metadata",
    ),
    RewardInfo(
        "vlm_judge",
        "A vision-language model's verdict, by any OpenAI-compatible server",
        "nft_rewards.vlm_judge:VLMJudge",
        definition="unified: x / 5 of 'Final Score: x'; yes_no: P(yes) / (P(yes) + P(no)); or a template",
        source="arXiv 2503.05236, CodeGoat24/UnifiedReward-7b-v1.5; arXiv 2404.01291",
        memory="none here: the model is the server's",
        licence="of the model that is served",
        range="unified 0.2 to 1, yes_no 0 to 1",
        extra="judge",
    ),
    RewardInfo(
        "rank",
        "An image's rank among those of its prompt, by another reward",
        "nft_rewards.rank:Rank",
        definition="(worse + equal others / 2) / (n - 1) within the group; alone 0.5",
        range="0 to 1",
        metadata=("what the other reward needs",),
        wraps="of",
    ),
    RewardInfo(
        "jpeg_compressibility",
        "Small JPEG files: minus the size at quality 95",
        "nft_rewards.jpeg:JPEGCompressibility",
        definition="-kB / 500, 1 kB = 1000 bytes; variant=ddpo: -kB",
        source="arXiv 2305.13301",
        range="kB / 500 below 0",
    ),
    RewardInfo(
        "jpeg_incompressibility",
        "Large JPEG files: the size at quality 95",
        "nft_rewards.jpeg:JPEGIncompressibility",
        definition="+kB / 500, 1 kB = 1000 bytes; variant=nft or ddpo: +kB",
        source="arXiv 2305.13301",
        range="kB / 500 above 0",
    ),
)


@hookimpl
def nft_register_rewards(register: Callable[[RewardInfo], None]) -> None:
    for info in REWARDS:
        register(info)
