"""Rewards against the straightforward way to compute them, as a ratio in one run on one machine.

python benchmarks/rewards.py [--size full|small] [--device cuda] [--images 96] [--group 24] [--epochs 2]

Checkpoints are made here with random weights and the published sizes (`full`), so nothing is downloaded. The
straightforward way is that of published training code: images to PIL, the checkpoint's own processor, every
image's prompt through the text tower, float32, and a model of its own for each reward. A second epoch has the
same prompts, as training does. `shared` scores pickscore and clipscore together on one CLIP.
"""

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip import CLIPImageProcessor

from nft_plugins import Batch
from nft_rewards.clipscore import CLIPScore
from nft_rewards.pickscore import PickScore

#: Width, layers and heads of the vision and the text tower, patch, and the width of embeddings.
SIZES = {
    "full": {
        "vit-h": ((1280, 32, 16), (1024, 24, 16), 14, 1024),
        "vit-l": ((1024, 24, 16), (768, 12, 12), 14, 768),
    },
    "small": {"vit-h": ((192, 6, 4), (128, 4, 4), 14, 64), "vit-l": ((128, 4, 4), (96, 3, 4), 14, 64)},
}
WORDS = ["a", "photo", "of", "red", "green", "cat", "dog", "on", "the", "mat", "under", "blue", "sky"]


def checkpoint(folder, vision, text, patch, width):
    """A CLIPModel with its processor, random weights."""

    def sizes(tower):
        hidden, layers, heads = tower
        shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden}
        return shape | {"num_hidden_layers": layers, "num_attention_heads": heads}

    vocab = {t: i for i, t in enumerate(["<|startoftext|>", "<|endoftext|>", *(w + "</w>" for w in WORDS)])}
    letters = sorted({c for w in WORDS for c in w})
    vocab |= {t: len(vocab) + i for i, t in enumerate([*letters, *(c + "</w>" for c in letters)])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    config = CLIPConfig(
        text_config=sizes(text) | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 1},
        vision_config=sizes(vision) | {"image_size": 224, "patch_size": patch},
        projection_dim=width,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(), tokenizer).save_pretrained(folder)
    return str(folder)


class Straightforward:
    """cos(image, prompt), in the way of the docstring above."""

    def __init__(self, folder, device):
        self.model = CLIPModel.from_pretrained(folder).eval().to(device)
        self.processor = CLIPProcessor.from_pretrained(folder)
        self.device = device

    @torch.no_grad()
    def __call__(self, batch):
        inputs = self.processor(
            text=list(batch.prompts), images=batch.pil, padding="max_length", truncation=True, max_length=77,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        image = self.model.get_image_features(pixel_values=inputs.pixel_values).pooler_output
        text = self.model.get_text_features(input_ids=inputs.input_ids).pooler_output
        return torch.nn.functional.cosine_similarity(image, text)


def batches(args, epoch):
    """Images of `group` a prompt, 24 at once, new ones each epoch."""
    source = torch.Generator().manual_seed(epoch)
    prompts = [
        f"a photo of a {WORDS[3 + i % 10]} {WORDS[5 + i % 7]} {i}" for i in range(args.images // args.group)
    ]
    names = [p for p in prompts for _ in range(args.group)]
    for i in range(0, args.images, 24):
        chosen = names[i : i + 24]
        images = torch.rand(len(chosen), 3, args.side, args.side, generator=source).to(args.device)
        yield Batch(images, chosen, [{}] * len(chosen), torch.arange(len(chosen)))


def seconds(args, *rewards):
    """Of `epochs` epochs; a batch beforehand is not counted."""
    for reward in rewards:
        reward(next(batches(args, 99)))
    total = 0.0
    for epoch in range(args.epochs):
        for batch in batches(args, epoch):
            synchronise(args)
            start = perf_counter()
            for reward in rewards:
                reward(batch)
            synchronise(args)
            total += perf_counter() - start
    return total


def synchronise(args):
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--group", type=int, default=24)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args()
    images = f"{args.images} images of {args.side} px, K = {args.group}"
    print(f"{args.size}, {args.device}, torch {torch.__version__}, {images}")
    with tempfile.TemporaryDirectory() as place:
        large, medium = (checkpoint(Path(place) / name, *size) for name, size in SIZES[args.size].items())
        cases = {
            "pickscore": ([Straightforward(large, args.device)], [PickScore(large, device=args.device)]),
            "clipscore": ([Straightforward(medium, args.device)], [CLIPScore(medium, device=args.device)]),
            "shared": (
                [Straightforward(medium, args.device), Straightforward(medium, args.device)],
                [PickScore(medium, device=args.device), CLIPScore(medium, device=args.device)],
            ),
        }
        print("| reward | straightforward, images/s | here, images/s | ratio |\n|---|---|---|---|")
        for name, (theirs, ours) in cases.items():
            a, b = seconds(args, *theirs), seconds(args, *ours)
            count = args.images * args.epochs
            print(f"| {name} | {count / a:.1f} | {count / b:.1f} | {a / b:.2f} |", flush=True)


if __name__ == "__main__":
    main()
