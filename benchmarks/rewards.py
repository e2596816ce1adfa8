"""Rewards against the straightforward way to compute them, as a ratio in one run on one machine; peak memory.

python benchmarks/rewards.py [NAME ...] [--size full|small] [--device cuda] [--images 96] [--epochs 2]
    [--precision auto|bf16|fp32]

Names: pickscore, hpsv2, clipscore, imagereward, geneval, shared, memory; all without one. Checkpoints are
made here with random weights and the published sizes (`full`), so nothing is downloaded. The
straightforward way is that of published training code: images to PIL and the model's own preprocessing,
every image's prompt through the text tower, float32, and a model of its own for each reward; imagereward
one pair after the other, as its package; geneval one image after the other, and one object after the other
for its colour. A second epoch has the same prompts, as training does. `shared` scores pickscore and
clipscore together on one CLIP. `memory` is the peak of a process that holds pickscore, hpsv2 and clipscore
and scores two images. `precision` is that of the rewards here. hpsv2 needs open_clip and torchvision.
"""

import argparse
import importlib.util
import resource
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import checkpoints
import numpy as np
import torch
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor, Mask2FormerForUniversalSegmentation
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from nft_plugins import Batch
from nft_rewards import hpsv2 as hpsv2_module
from nft_rewards.clipscore import CLIPScore
from nft_rewards.colours import COLORS, GREY, TEMPLATES
from nft_rewards.geneval import GenEval
from nft_rewards.geneval_rules import evaluate_image, find_objects_to_color
from nft_rewards.imagereward import ImageReward
from nft_rewards.mask2former import CLASSES, COCO, find_objects
from nft_rewards.pickscore import PickScore

#: Makes the rewards of one side.
Build = Callable[[], list[Any]]
NOUNS = ("dog", "cat", "bus", "clock", "bird", "horse", "pizza", "chair")


class CLIPTheirs:
    """Scores cos(image, prompt) with transformers' CLIPModel and processor."""

    def __init__(self, folder: str, device: str) -> None:
        self.model = CLIPModel.from_pretrained(folder).eval().to(device)
        self.processor = CLIPProcessor.from_pretrained(folder)
        self.processor.image_processor = CLIPImageProcessorPil.from_pretrained(folder)
        self.device = device

    def images(self, pil: Any) -> Tensor:
        inputs = self.processor(images=pil, return_tensors="pt").to(self.device)
        return self.model.get_image_features(pixel_values=inputs.pixel_values).pooler_output

    def texts(self, prompts: list[str]) -> Tensor:
        inputs = self.processor(text=prompts, padding="max_length", truncation=True, return_tensors="pt")
        return self.model.get_text_features(input_ids=inputs.input_ids.to(self.device)).pooler_output

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[float]:
        image, text = self.images(batch.pil), self.texts(list(batch.prompts))
        return torch.nn.functional.cosine_similarity(image, text).tolist()


class HPSv2Theirs:
    """Applies HPSv2's published preprocessing on open_clip's model."""

    def __init__(self, folder: str, device: str) -> None:
        import open_clip

        name = hpsv2_module.ARCHITECTURE
        self.model = open_clip.create_model(name).eval().to(device)
        state = torch.load(Path(folder) / "HPS_v2.1_compressed.pt", map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["state_dict"])
        self.tokenizer, self.device = open_clip.get_tokenizer(name), device

    def prepared(self, picture: Any) -> Tensor:
        import open_clip
        import torchvision.transforms.functional as F

        x = F.to_tensor(picture)
        scale = 224 / max(x.shape[1:])
        x = F.resize(x, [round(d * scale) for d in x.shape[1:]], F.InterpolationMode.BICUBIC)
        height, width = x.shape[1:]
        left, top = (224 - width) // 2, (224 - height) // 2
        x = F.pad(x, [left, top, 224 - width - left, 224 - height - top])
        return F.normalize(x, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[float]:
        image = self.model.encode_image(
            torch.stack([self.prepared(i) for i in batch.pil]).to(self.device), True
        )
        text = self.model.encode_text(self.tokenizer(list(batch.prompts)).to(self.device), True)
        return (image * text).sum(-1).tolist()


class ImageRewardTheirs:
    """Scores a pair at a time, in float32."""

    def __init__(self, folder: str, device: str) -> None:
        self.reward = ImageReward(folder, tokenizer=folder, precision="fp32", device=device)

    def __call__(self, batch: Batch) -> list[float]:
        rows = zip(batch.pil, batch.prompts, strict=True)
        return [self.score(image, prompt) for image, prompt in rows]

    def score(self, image: Any, prompt: str) -> float:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        return float(self.reward(Batch(pixels, [prompt], [{}], torch.zeros(1, dtype=torch.long))).values)


class GenEvalTheirs:
    """Runs Mask2Former an image at a time, CLIP an object at a time; our post-processing and evaluator."""

    def __init__(self, detector: str, clip: str, device: str) -> None:
        self.model = Mask2FormerForUniversalSegmentation.from_pretrained(detector).eval().to(device)
        self.processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 800, "longest_edge": 1333})
        self.clip, self.device = CLIPTheirs(clip, device), device
        self.classifiers: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[float]:
        return [self.score(*pair) for pair in zip(batch.pil, batch.metadata, strict=True)]

    def score(self, picture: Any, metadata: Mapping[str, Any]) -> float:
        inputs = self.processor(picture, return_tensors="pt").pixel_values.to(self.device)
        out = self.model(pixel_values=inputs)
        size = (picture.height, picture.width)
        found = find_objects(
            out.class_queries_logits[0], out.masks_queries_logits[0], tuple(inputs.shape[-2:]), size
        )
        for item in find_objects_to_color(found, metadata):
            item.color = self.color(picture, item)
        return evaluate_image(found, metadata).soft

    def color(self, picture: Any, item: Any) -> str:
        from PIL import Image

        inside = Image.fromarray((item.mask.cpu().numpy() * 255).astype("uint8"))
        crop = Image.composite(picture, Image.new("RGB", picture.size, (GREY,) * 3), inside)
        left, top, right, bottom = (round(side) for side in item.box)
        crop = crop.crop((left, top, right, bottom))
        if item.label not in self.classifiers:
            texts = [t.format(color=c, label=item.label) for c in COLORS for t in TEMPLATES]
            sentences = torch.nn.functional.normalize(self.clip.texts(texts), dim=-1)
            self.classifiers[item.label] = sentences.view(len(COLORS), len(TEMPLATES), -1).mean(1)
        cosines = torch.nn.functional.cosine_similarity(self.clip.images([crop]), self.classifiers[item.label])
        return COLORS[int(cosines.argmax())]


def batches(args: Namespace, epoch: int) -> Iterator[Batch]:
    """Make images of `group` a prompt, 24 at once, new ones each epoch."""
    source = torch.Generator().manual_seed(epoch)
    nouns = [NOUNS[i % len(NOUNS)] for i in range(args.images // args.group) for _ in range(args.group)]
    for start in range(0, len(nouns), 24):
        chosen = nouns[start : start + 24]
        coarse = torch.rand(len(chosen), 3, 16, 16, generator=source)
        images = torch.nn.functional.interpolate(coarse, (args.side, args.side), mode="nearest").to(args.device)
        # The detector has random weights: whatever class it sees is asked for.
        metadata = [
            {"tag": "colors", "include": [{"class": c, "count": 1, "color": "red"} for c in CLASSES]}
            for _ in chosen
        ]
        prompts = [f"a photo of a red {noun} on the mat" for noun in chosen]
        yield Batch(images, prompts, metadata, torch.arange(len(chosen)))


def few(args: Namespace) -> Batch:
    """Make two images, to warm up with."""
    batch = next(batches(args, 99))
    return Batch(batch.images[:2], batch.prompts[:2], batch.metadata[:2], batch.groups[:2])


def seconds(args: Namespace, rewards: list[Any]) -> float:
    """Measure the seconds of `epochs` epochs; what warms up is not counted."""
    for reward in rewards:
        reward(few(args))
    total = 0.0
    for epoch in range(args.epochs):
        for batch in batches(args, epoch):
            start = perf_counter()
            scores = [reward(batch) for reward in rewards]
            for score in scores:  # Read, so that a GPU has finished.
                score if isinstance(score, list) else score.values.tolist()
            total += perf_counter() - start
    return total


def cases(place: Path, args: Namespace) -> dict[str, tuple[Build, Build]]:
    """Return by name how to make the straightforward way's rewards, and ours."""
    device = args.device
    vit_h, vit_l = str(place / "vit-h"), str(place / "vit-l")
    hps, detector = str(place / "hpsv2"), str(place / "mask2former")
    one = {"device": device, "precision": args.precision}
    return {
        "pickscore": (lambda: [CLIPTheirs(vit_h, device)], lambda: [PickScore(vit_h, **one)]),
        "hpsv2": (lambda: [HPSv2Theirs(hps, device)], lambda: [hpsv2_module.HPSv2(hps, **one)]),
        "clipscore": (lambda: [CLIPTheirs(vit_l, device)], lambda: [CLIPScore(vit_l, **one)]),
        "imagereward": (
            lambda: [ImageRewardTheirs(str(place / "imagereward"), device)],
            lambda: [ImageReward(str(place / "imagereward"), tokenizer=str(place / "imagereward"), **one)],
        ),
        "geneval": (
            lambda: [GenEvalTheirs(detector, vit_l, device)],
            lambda: [GenEval(checkpoint=detector, clip=vit_l, **one)],
        ),
        "shared": (
            lambda: [CLIPTheirs(vit_l, device), CLIPTheirs(vit_l, device)],
            lambda: [PickScore(vit_l, **one), CLIPScore(vit_l, **one)],
        ),
    }


TOGETHER = ("pickscore", "hpsv2", "clipscore")


def peak(place: Path, args: Namespace, ours: int) -> float:
    """Measure gigabytes of this process, or of its part of the GPU, with all three rewards and two images."""
    rewards = [reward for name in TOGETHER for reward in cases(place, args)[name][ours]()]
    batch = few(args)
    for reward in rewards:
        reward(batch)
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def make(place: Path, names: list[str], size: str, device: str) -> None:
    """Make the checkpoints that these need; many random numbers are drawn sooner on a GPU."""
    needs = {
        "pickscore": {"vit-h"},
        "hpsv2": {"hpsv2"},
        "clipscore": {"vit-l"},
        "imagereward": {"imagereward"},
        "geneval": {"mask2former", "vit-l"},
        "shared": {"vit-l"},
        "memory": {"vit-h", "hpsv2", "vit-l"},
    }
    for part in set().union(*(needs[name] for name in names)):
        # The detector finds something with weights that are drawn on a CPU.
        with torch.device("cpu" if part == "mask2former" else device):
            if part.startswith("vit"):
                checkpoints.clip(place / part, part, size)
            else:
                getattr(checkpoints, part)(place / part, size)


def main() -> None:
    """Run the comparisons that the command line names."""
    names = ["pickscore", "hpsv2", "clipscore", "imagereward", "geneval", "shared", "memory"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--size", choices=checkpoints.CLIPS, default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--group", type=int, default=24)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--peak", nargs=2, metavar=("FOLDER", "OURS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    hpsv2_module.ARCHITECTURE = checkpoints.HPSV2[args.size]
    assert all(name in COCO for name in NOUNS)
    if args.peak:
        print(f"{peak(Path(args.peak[0]), args, int(args.peak[1])):.2f}")
        return
    chosen = args.names or names
    if not importlib.util.find_spec("open_clip"):
        chosen = [name for name in chosen if name not in ("hpsv2", "memory")]
        print("without open_clip: no hpsv2, no memory")
    images = f"{args.images} images of {args.side} px, K = {args.group}, {args.epochs} epochs"
    print(f"{args.size}, {args.device}, torch {torch.__version__}, {torch.get_num_threads()} threads, {images}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make(place, chosen, args.size, args.device)
        print("| reward | straightforward, images/s | here, images/s | ratio |\n|---|---|---|---|")
        for name in chosen:
            if name == "memory":
                continue
            a, b = (seconds(args, build()) for build in cases(place, args)[name])
            count = args.images * args.epochs
            print(f"| {name} | {count / a:.2f} | {count / b:.2f} | {a / b:.2f} |", flush=True)
        if "memory" in chosen:
            options = [
                f"--{k}={getattr(args, k)}" for k in ("size", "device", "precision", "side", "group", "images")
            ]
            command = [sys.executable, __file__, *options]
            runs = [[*command, "--peak", folder, side] for side in "01"]
            a, b = (float(subprocess.run(run, check=True, stdout=subprocess.PIPE).stdout) for run in runs)
            print(f"peak memory of {', '.join(TOGETHER)}: straightforward {a:.2f} GB, here {b:.2f} GB")


if __name__ == "__main__":
    main()
