"""The rewards on CLIP beside the libraries' own computation, on files of the published form and size.

python benchmarks/parity_clip.py [--size full|small] [pickscore clipscore aesthetic hpsv2]

The files are made here with the published names and shapes and random weights, in a temporary folder (up to
4 GB) that is removed; memory to hold the model twice is needed, 8 GB for ViT-H/14 in fp32. They go through the
real loaders, which refuse a file with a name missing or more. The other side is transformers' processor and
CLIPModel on PIL images (pickscore, clipscore, aesthetic), or open_clip and torchvision as in HPSv2's published
code (hpsv2, which needs both): one image at a time, float32.
"""

import argparse
import importlib.util
import math
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

if importlib.util.find_spec("torchvision") and torch.version.cuda is None:
    # PyPI's torchvision beside a CPU build of torch lacks these two, and transformers trips over it.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from nft_plugins import Batch
from nft_rewards.aesthetic import Aesthetic
from nft_rewards.clipscore import CLIPScore
from nft_rewards.pickscore import PickScore

#: Width, layers and heads of the image and the text tower; width of embeddings; activation.
H14 = ((1280, 32, 16), (1024, 24, 16), 1024, "gelu")
L14 = ((1024, 24, 16), (768, 12, 12), 768, "quick_gelu")
SMALL = ((128, 4, 4), (96, 3, 4), 768, "gelu")
PROMPTS = ("a photo of a red fox", "two cats and a dog under a very large blue tree at night")
HEAD = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}


def pictures():
    """`[3, H, W]`: gradients, noise, waves; not square, tiny and huge."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:1:600j, 0:1:360j]
    waves = 0.5 + 0.5 * np.sin(40 * x * y)
    yield "gradient 600 x 360", np.stack([x, y, 1 - x])
    yield "waves 600 x 360", np.stack([waves, 1 - waves, x])
    yield "noise 512 x 512", rng.random((3, 512, 512))
    yield "as it is 224 x 224", rng.random((3, 224, 224))
    yield "tiny 20 x 31", rng.random((3, 20, 31))
    yield "huge 1500 x 2000", np.kron(rng.random((3, 30, 40)), np.ones((1, 50, 50)))


def batches():
    for name, picture in pictures():
        images = torch.from_numpy(picture).float().expand(len(PROMPTS), -1, -1, -1)
        yield name, Batch(images, list(PROMPTS), [{}] * len(PROMPTS), torch.arange(len(PROMPTS)))


def randomise(model):
    """Weights that let images and prompts make a difference: of the size of 1 / sqrt(inputs), norms about 1."""
    source = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        inputs = math.prod(p.shape[1:]) if p.ndim > 1 and "embed" not in name else 25
        p.data.normal_(0, inputs**-0.5, generator=source)
        if p.ndim == 1 and "norm" in name + "ln_" and name.endswith("weight"):
            p.data.add_(1)
        if name.endswith("logit_scale"):
            p.data.fill_(math.log(100))
    return model


def clip_folder(folder, vision, text, width, activation):
    """A checkpoint as the hub has it: names of older files included, tokens by letters."""
    from safetensors.torch import save_file

    def sizes(tower):
        hidden, layers, heads = tower
        return {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers,
                "num_attention_heads": heads, "hidden_act": activation}  # fmt: skip

    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=[], model_max_length=77)
    config = CLIPConfig(
        text_config=sizes(text) | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 1},
        vision_config=sizes(vision) | {"image_size": 224, "patch_size": 14},
        projection_dim=width,
    )
    model = randomise(CLIPModel(config))
    state = dict(model.state_dict())
    patches = (224 // 14) ** 2 + 1
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(patches)[None]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessorPil(), tokenizer).save_pretrained(folder)
    return str(folder)


def reference(folder):
    """Image features `[1, D]` of a PIL image and text features of a prompt, of unit length; logit scale."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    # Where torchvision is, the processor's own would resize with it and not with PIL.
    processor.image_processor = CLIPImageProcessorPil.from_pretrained(folder)

    def image(picture):
        inputs = processor(images=picture, return_tensors="pt")
        return torch.nn.functional.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)

    def text(prompt):
        inputs = processor(text=prompt, padding="max_length", truncation=True, return_tensors="pt")
        inputs = {"input_ids": inputs.input_ids}
        return torch.nn.functional.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)

    return image, text, float(model.logit_scale.exp())


def pickscore(place, size):
    folder = clip_folder(place, *(H14 if size == "full" else SMALL))
    image, text, scale = reference(folder)
    return PickScore(folder, precision="fp32"), lambda i, p: scale * (image(i) @ text(p).T)


def clipscore(place, size):
    folder = clip_folder(place, *(L14 if size == "full" else SMALL))
    image, text, _ = reference(folder)
    return CLIPScore(folder, precision="fp32"), lambda i, p: image(i) @ text(p).T


def aesthetic(place, size):
    folder = clip_folder(place, *(L14 if size == "full" else SMALL))
    source = torch.Generator().manual_seed(1)
    state = {}
    for i, (n, m) in HEAD.items():
        state[f"layers.{i}.weight"] = torch.randn(n, m, generator=source) / m**0.5
        state[f"layers.{i}.bias"] = torch.randn(n, generator=source)
    file = place / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(state, file)
    image, _, _ = reference(folder)

    def score(picture, prompt):
        x = image(picture)
        for i in HEAD:
            x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
        return x

    return Aesthetic(str(file), clip=folder, precision="fp32"), score


def hpsv2(place, size):
    import open_clip
    import torchvision.transforms.functional as F

    from nft_rewards import hpsv2 as module

    if size == "small":
        module.ARCHITECTURE = "ViT-S-32"
    model = randomise(open_clip.create_model(module.ARCHITECTURE)).eval()
    state = {name: weight.half() for name, weight in model.state_dict().items()}
    torch.save({"state_dict": state}, place / "HPS_v2.1_compressed.pt")
    model.load_state_dict({name: weight.float() for name, weight in state.items()})
    tokenizer = open_clip.get_tokenizer(module.ARCHITECTURE)

    def score(picture, prompt):
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

    return module.HPSv2(str(place), precision="fp32"), score


REWARDS = {f.__name__: f for f in (pickscore, clipscore, aesthetic, hpsv2)}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rewards", nargs="*", default=list(REWARDS))
    parser.add_argument("--size", choices=("full", "small"), default="full")
    args = parser.parse_args()
    print(f"{args.size}, torch {torch.__version__}\n")
    print("| reward | scores | their deviation | largest difference | of the score | of the deviation |")
    print("|---|---|---|---|---|---|")
    for name in args.rewards:
        if name == "hpsv2" and not importlib.util.find_spec("open_clip"):
            print("| hpsv2 | needs open_clip and torchvision |||||")
            continue
        with tempfile.TemporaryDirectory() as place:
            start = perf_counter()
            reward, score = REWARDS[name](Path(place), args.size)
            ours, theirs = [], []
            for _, batch in batches():
                ours.append(reward(batch).values)
                pairs = zip(batch.pil, batch.prompts, strict=True)
                theirs.append(torch.cat([score(*pair)[:, 0] for pair in pairs]))
            a, b = torch.cat(ours), torch.cat(theirs)
            worst, relative = (a - b).abs().max(), ((a - b) / b).abs().max()
            print(
                f"| {name} | {b.min():.4f} to {b.max():.4f} | {b.std():.4f} | {worst:.1e} | {relative:.1e} "
                f"| {worst / b.std():.1e} | ({perf_counter() - start:.0f} s)",
                flush=True,
            )
            del reward, score


if __name__ == "__main__":
    main()
