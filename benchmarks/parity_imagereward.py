"""Our ImageReward beside the authors' package, on one file of the published format and size, random weights.

python benchmarks/parity_imagereward.py write FOLDER     ImageReward.pt (1.8 GB), med_config.json, a tokenizer
python benchmarks/parity_imagereward.py score FOLDER     with our engine
python benchmarks/parity_imagereward.py package FOLDER   with the package, and the difference between the two

The package does not work with transformers 5, so the last line wants an environment of its own, with
image-reward==1.5 openai-clip "transformers<4.48" "diffusers<0.33" "setuptools<80" pluggy, and this repository's
root and rewards/ on PYTHONPATH. The package reads bert-base-uncased from the working folder, which is made
FOLDER. The tokenizer that is written has 30522 entries as the real one has, but knows single letters only. With
the real files in FOLDER, leave `write` out.
"""

import importlib.util
import json
import math
import os
import string
import sys
import time
from pathlib import Path
from typing import Any

import torch
from pairs import batches

from nft_rewards.imagereward import ImageReward

PROMPTS = ["a red cat", "two dogs on a mat", "an ocean with clouds and birds", "x" * 20 + " a b c" * 30]
SIZES = ((512, 512), (300, 200), (224, 224))
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Return the names and shapes in the published file."""
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, 1024),
        "blip.visual_encoder.pos_embed": (1, 197, 1024),
    }

    def linear(name: str, n: int, *m: int) -> None:
        shapes.update({f"{name}.weight": (n, *m), f"{name}.bias": (n,)})

    linear("blip.visual_encoder.patch_embed.proj", 1024, 3, 16, 16)
    for block in (f"blip.visual_encoder.blocks.{i}" for i in range(24)):
        linear(f"{block}.norm1", 1024)
        linear(f"{block}.norm2", 1024)
        linear(f"{block}.attn.qkv", 3072, 1024)
        linear(f"{block}.attn.proj", 1024, 1024)
        linear(f"{block}.mlp.fc1", 4096, 1024)
        linear(f"{block}.mlp.fc2", 1024, 4096)
    linear("blip.visual_encoder.norm", 1024)
    embeddings = "blip.text_encoder.embeddings"
    shapes[f"{embeddings}.position_ids"] = (1, 512)
    shapes[f"{embeddings}.word_embeddings.weight"] = (30524, 768)
    shapes[f"{embeddings}.position_embeddings.weight"] = (512, 768)
    linear(f"{embeddings}.LayerNorm", 768)
    for layer in (f"blip.text_encoder.encoder.layer.{i}" for i in range(12)):
        for part, width in (("attention", 768), ("crossattention", 1024)):
            linear(f"{layer}.{part}.self.query", 768, 768)
            linear(f"{layer}.{part}.self.key", 768, width)
            linear(f"{layer}.{part}.self.value", 768, width)
            linear(f"{layer}.{part}.output.dense", 768, 768)
            linear(f"{layer}.{part}.output.LayerNorm", 768)
        linear(f"{layer}.intermediate.dense", 3072, 768)
        linear(f"{layer}.output.dense", 768, 3072)
        linear(f"{layer}.output.LayerNorm", 768)
    linear("blip.vision_proj", 256, 1024)
    linear("blip.text_proj", 256, 768)
    for place, n, m in ((0, 1024, 768), (2, 128, 1024), (4, 64, 128), (6, 16, 64), (7, 1, 16)):
        linear(f"mlp.layers.{place}", n, m)
    return shapes


def write(folder: Path) -> None:
    """Write a file of the published form, and the pictures that both score."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in published_shapes().items():
        if name.endswith("position_ids"):
            state[name] = torch.arange(512)[None]
            continue
        flat = len(shape) < 2 or ("embed" in name and "proj" not in name)
        spread = 0.1 if flat else 1 / math.sqrt(math.prod(shape[1:]))
        state[name] = torch.randn(shape, generator=generator).mul_(spread)
        if "norm" in name.lower() and name.endswith("weight"):
            state[name] += 1
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(MED_CONFIG))
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, ","]
    vocab += [f"##{letter}" for letter in string.ascii_lowercase]
    vocab += [f"[unused{i}]" for i in range(30522 - len(vocab))]
    (folder / "bert-base-uncased").mkdir(exist_ok=True)
    (folder / "bert-base-uncased" / "vocab.txt").write_text("\n".join(vocab) + "\n")
    (folder / "bert-base-uncased" / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    print(f"{len(state)} entries, {sum(t.numel() for t in state.values()) / 1e6:.1f} M numbers")


def score(folder: Path, **options: Any) -> tuple[Any, list[float]]:
    """Load our reward and score the pictures; returns both."""
    start = time.perf_counter()
    reward = ImageReward(str(folder), **options)
    loaded = time.perf_counter()
    values = [value for batch in batches(PROMPTS, SIZES) for value in reward(batch).values.tolist()]
    print(f"loaded in {loaded - start:.1f} s, {len(values)} pairs in {time.perf_counter() - loaded:.1f} s")
    return reward, values


def ours(folder: Path) -> None:
    """Score the pictures with our ImageReward."""
    # Loading raises where a key is missing, unexpected or of another shape.
    _, values = score(folder, tokenizer=str(folder / "bert-base-uncased"), precision="fp32")
    (folder / "ours.json").write_text(json.dumps(values))
    print("no key missing or unexpected; scores", *(f"{value:.4f}" for value in values))


def package(folder: Path) -> None:
    """Score the pictures with the authors' package."""
    if importlib.util.find_spec("torchvision") and torch.version.cuda is None:
        # PyPI's torchvision beside a CPU build of torch lacks these two, which are not used here.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    folder = folder.resolve()
    os.chdir(folder)
    reward, values = score(folder, engine="package")
    kept = {name: tuple(t.shape) for name, t in reward.engine.model.state_dict().items()}
    names = {name: shape for name, shape in published_shapes().items() if not name.endswith("position_ids")}
    kept = {name: shape for name, shape in kept.items() if not name.endswith("position_ids")}
    print(f"the package's own model has {len(kept)} weights; the same as in the file: {kept == names}")
    mine = torch.tensor(json.loads((folder / "ours.json").read_text()))
    theirs = torch.tensor(values)
    worst = (mine - theirs).abs().max()
    print(f"scores from {theirs.min():.4f} to {theirs.max():.4f}, standard deviation {theirs.std():.4f}")
    print(f"largest difference {worst:.2e}; relative to the largest score {worst / theirs.abs().max():.2e}")
    for size, difference in zip(SIZES, (mine - theirs).abs().view(len(SIZES), -1), strict=True):
        print(f"  {size[0]} x {size[1]}:", *(f"{d:.1e}" for d in difference))


if __name__ == "__main__":
    {"write": write, "score": ours, "package": package}[sys.argv[1]](Path(sys.argv[2]))
