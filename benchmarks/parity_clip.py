"""The rewards on CLIP beside the libraries' own computation, on files of the published form and size.

python benchmarks/parity_clip.py [--size full|small] [pickscore clipscore aesthetic hpsv2]

The files are made here with the published names and shapes and random weights, in a temporary folder (up to
4 GB) that is removed; memory to hold the model twice is needed, 8 GB for ViT-H/14 in fp32. They go through the
real loaders, which refuse a file with a name missing or more. The other side is transformers' processor and
CLIPModel on PIL images (pickscore, clipscore, aesthetic), or open_clip and torchvision as in HPSv2's published
code (hpsv2, which needs both): one image at a time, float32. `bf16`: how far our scores move in half precision,
in their deviations.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import checkpoints
import numpy as np
import torch
from transformers import CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from nft_plugins import Batch, Reward
from nft_rewards.aesthetic import Aesthetic
from nft_rewards.clipscore import CLIPScore
from nft_rewards.pickscore import PickScore

#: A reward of ours, given its precision, and the library's score `[1, 1]` of an image and a prompt.
Sides = tuple[Callable[..., Reward], Callable[[Any, str], torch.Tensor]]
Embed = Callable[[Any], torch.Tensor]
PROMPTS = ("a photo of a red fox", "two cats and a dog under a very large blue tree at night")
HEAD = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def pictures() -> Iterator[tuple[str, np.ndarray]]:
    """Make pictures `[3, H, W]`: gradients, noise, waves; not square, tiny and huge."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:1:600j, 0:1:360j]
    waves = 0.5 + 0.5 * np.sin(40 * x * y)
    yield "gradient 600 x 360", np.stack([x, y, 1 - x])
    yield "waves 600 x 360", np.stack([waves, 1 - waves, x])
    yield "noise 512 x 512", rng.random((3, 512, 512))
    yield "as it is 224 x 224", rng.random((3, 224, 224))
    yield "tiny 20 x 31", rng.random((3, 20, 31))
    yield "huge 1500 x 2000", np.kron(rng.random((3, 30, 40)), np.ones((1, 50, 50)))


def batches() -> Iterator[tuple[str, Batch]]:
    """Make a batch of each picture with each prompt."""
    for name, picture in pictures():
        images = torch.from_numpy(picture).float().expand(len(PROMPTS), -1, -1, -1)
        yield name, Batch(images, list(PROMPTS), [{}] * len(PROMPTS), torch.arange(len(PROMPTS)))


def reference(folder: str) -> tuple[Embed, Embed, float]:
    """Load the library's own CLIP; returns features of an image and of a prompt, and its logit scale."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    # Where torchvision is, the processor's own would resize with it and not with PIL.
    processor.image_processor = CLIPImageProcessorPil.from_pretrained(folder)

    def image(picture: Any) -> torch.Tensor:
        inputs = processor(images=picture, return_tensors="pt")
        return torch.nn.functional.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)

    def text(prompt: str) -> torch.Tensor:
        inputs = processor(text=prompt, padding="max_length", truncation=True, return_tensors="pt")
        inputs = {"input_ids": inputs.input_ids}
        return torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)

    return image, text, float(model.logit_scale.exp())


def pickscore(place: Path, size: str) -> Sides:
    """Make our PickScore and the library's computation."""
    folder = checkpoints.clip(place, "vit-h", size)
    image, text, scale = reference(folder)
    return partial(PickScore, folder), lambda i, p: scale * (image(i) @ text(p).T)


def clipscore(place: Path, size: str) -> Sides:
    """Make our CLIPScore and the library's computation."""
    folder = checkpoints.clip(place, "vit-l", size)
    image, text, _ = reference(folder)
    return partial(CLIPScore, folder), lambda i, p: image(i) @ text(p).T


def aesthetic(place: Path, size: str) -> Sides:
    """Make our aesthetic score and the published computation."""
    folder = checkpoints.clip(place, "vit-l", size)
    source = torch.Generator().manual_seed(1)
    state = {}
    for i, (n, m) in HEAD.items():
        state[f"layers.{i}.weight"] = torch.randn(n, m, generator=source) / m**0.5
        state[f"layers.{i}.bias"] = torch.randn(n, generator=source)
    file = place / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(state, file)
    image, _, _ = reference(folder)

    def score(picture: Any, prompt: str) -> torch.Tensor:
        x = image(picture)
        for i in HEAD:
            x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
        return x

    return partial(Aesthetic, str(file), clip=folder), score


def hpsv2(place: Path, size: str) -> Sides:
    """Make our HPSv2 and open_clip's computation."""
    import open_clip
    import torchvision.transforms.functional as F

    from nft_rewards import hpsv2 as module

    module.ARCHITECTURE = checkpoints.HPSV2[size]
    checkpoints.hpsv2(place, size)
    model = open_clip.create_model(module.ARCHITECTURE).eval()
    state = torch.load(place / "HPS_v2.1_compressed.pt", weights_only=True)["state_dict"]
    model.load_state_dict({name: weight.float() for name, weight in state.items()})
    tokenizer = open_clip.get_tokenizer(module.ARCHITECTURE)

    def score(picture: Any, prompt: str) -> torch.Tensor:
        x = F.to_tensor(picture)
        scale = 224 / max(x.shape[1:])
        h, w = (round(d * scale) for d in x.shape[1:])
        if scale != 1:
            x = F.resize(x, [h, w], F.InterpolationMode.BICUBIC, antialias=True)
        left, top = (224 - w) // 2, (224 - h) // 2
        x = F.pad(x, [left, top, 224 - w - left, 224 - h - top], fill=0)
        x = F.normalize(x, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
        image = model.encode_image(x[None], normalize=True)
        return image @ model.encode_text(tokenizer([prompt]), normalize=True).T

    return partial(module.HPSv2, str(place)), score


REWARDS = {f.__name__: f for f in (pickscore, clipscore, aesthetic, hpsv2)}


@torch.no_grad()
def main() -> None:
    """Compare the rewards that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rewards", nargs="*", default=list(REWARDS))
    parser.add_argument("--size", choices=("full", "small"), default="full")
    args = parser.parse_args()
    print(f"{args.size}, torch {torch.__version__}\n")
    heads = ["reward", "scores", "deviation", "largest difference", "of the score"]
    heads += ["of the deviation", "bf16", "seconds"]
    print(f"| {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.rewards:
        if name == "hpsv2" and not importlib.util.find_spec("open_clip"):
            print("| hpsv2 | needs open_clip and torchvision |||||||")
            continue
        with tempfile.TemporaryDirectory() as place:
            start = perf_counter()
            make, score = REWARDS[name](Path(place), args.size)
            reward = make(precision="fp32")
            ours = torch.cat([reward(batch).values for _, batch in batches()])
            pairs = [pair for _, batch in batches() for pair in zip(batch.pil, batch.prompts, strict=True)]
            theirs = torch.cat([score(*pair)[:, 0] for pair in pairs])
            del reward, score
            reward = make(precision="bf16")
            half = torch.cat([reward(batch).values for _, batch in batches()])
            del reward
        worst, relative = (ours - theirs).abs().max(), ((ours - theirs) / theirs).abs().max()
        spread, moved = theirs.std(), (half - ours).abs().max()
        print(
            f"| {name} | {theirs.min():.4f} to {theirs.max():.4f} | {spread:.4f} | {worst:.1e} "
            f"| {relative:.1e} | {worst / spread:.1e} | {moved / spread:.1e} | {perf_counter() - start:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
