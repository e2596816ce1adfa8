"""Checkpoints of the published forms and sizes with random weights, for the other benchmarks."""

import importlib.util
import json
import math
import string
from itertools import product
from pathlib import Path
from typing import Any

import torch

if importlib.util.find_spec("torchvision") and torch.version.cuda is None:
    # PyPI's torchvision beside a CPU build of torch lacks these two, and transformers trips over it.
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

#: Width, layers and heads of the image and the text tower; width of embeddings; activation.
CLIPS: dict[str, dict[str, tuple[tuple[int, int, int], tuple[int, int, int], int, str]]] = {
    "full": {
        "vit-h": ((1280, 32, 16), (1024, 24, 16), 1024, "gelu"),
        "vit-l": ((1024, 24, 16), (768, 12, 12), 768, "quick_gelu"),
    },
    "small": dict.fromkeys(("vit-h", "vit-l"), ((128, 4, 4), (96, 3, 4), 768, "gelu")),
}
#: HPSv2's architecture, by open_clip's name.
HPSV2 = {"full": "ViT-H-14", "small": "ViT-S-32"}


#: Words of three letters, of which a tokenizer can have as many as the published ones.
WORDS = ["".join(letters) for letters in product(string.ascii_lowercase, repeat=3)]


def randomise(model: Any) -> Any:
    """Fill a model with weights that let images and prompts make a difference."""
    source = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, p in model.named_parameters():
        inputs = math.prod(p.shape[1:]) if p.ndim > 1 and "embed" not in name else 25
        p.data.normal_(0, inputs**-0.5, generator=source)
        if p.ndim == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight"):
            p.data.add_(1)
        if name.endswith("logit_scale"):
            p.data.fill_(math.log(100))
    return model


def clip(folder: Path, kind: str, size: str = "full") -> str:
    """Save a CLIPModel as the hub has it, with older files' names; tokens are short. Returns the folder."""
    vision, text, width, activation = CLIPS[size][kind]

    def sizes(tower: tuple[int, int, int]) -> dict[str, Any]:
        hidden, layers, heads = tower
        shape = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "hidden_act": activation}
        return shape | {"num_hidden_layers": layers, "num_attention_heads": heads}

    letters, pairs = string.ascii_lowercase, list(product(string.ascii_lowercase, repeat=2))
    merges = [*pairs, *((w[:2], w[2]) for w in WORDS)]
    merges += [(first, last + "</w>") for first, last in merges]
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    vocab += [first + last for first, last in merges]
    ids: dict[str, Any] = {"vocab": {t: i for i, t in enumerate(vocab)}, "merges": merges}
    tokenizer = CLIPTokenizer(**ids, model_max_length=77)
    config = CLIPConfig(
        text_config=sizes(text) | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 1},
        vision_config=sizes(vision) | {"image_size": 224, "patch_size": 14},
        projection_dim=width,
    )
    state = dict(randomise(CLIPModel(config)).state_dict())
    state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange((224 // 14) ** 2 + 1)[None]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessorPil(), tokenizer).save_pretrained(folder)
    return str(folder)


def hpsv2(folder: Path, size: str = "full") -> str:
    """Save HPSv2's file, in half precision as published. Returns the folder."""
    import open_clip

    model = randomise(open_clip.create_model(HPSV2[size]))
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: weight.half() for name, weight in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "HPS_v2.1_compressed.pt")
    return str(folder)


def mask2former(folder: Path, size: str = "full") -> str:
    """Save a model of facebook/mask2former-swin-small-coco-instance's sizes that is sure to find objects."""
    from nft_rewards.mask2former import COCO

    torch.manual_seed(0)
    stages: dict[str, Any] = {"out_features": [f"stage{i}" for i in range(1, 5)]}
    names: dict[str, Any] = {
        "id2label": dict(enumerate(COCO)),
        "label2id": {name: i for i, name in enumerate(COCO)},
    }
    if size == "full":
        swin = SwinConfig(embed_dim=96, depths=[2, 2, 18, 2], num_heads=[3, 6, 12, 24], **stages)
        config = Mask2FormerConfig(backbone_config=swin, **names)
    else:
        swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=4, **stages)
        sizes: dict[str, Any] = {
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_layers": 1,
        }
        config = Mask2FormerConfig(backbone_config=swin, decoder_layers=2, num_queries=12, **sizes, **names)
    model = Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data.mul_(60)
    model.save_pretrained(folder)
    return str(folder)


def imagereward(folder: Path, size: str = "full") -> str:
    """Save ImageReward's weights under their published names, and a tokenizer. Returns the folder."""
    from nft_rewards.blip import MED_CONFIG, SAFETENSORS, TEXT, VISION, BLIPScore, get_published_name

    less: dict[str, Any] = {"num_hidden_layers": 2} if size == "small" else {}
    config: dict[str, Any] = TEXT | less | {"vision": VISION | less}
    model = randomise(BLIPScore(VISION | less, TEXT | less))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({get_published_name(name): w for name, w in model.state_dict().items()}, folder / SAFETENSORS)
    (folder / MED_CONFIG).write_text(json.dumps(config))
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *WORDS]
    vocab += [f"[unused{i}]" for i in range(config["vocab_size"] - 2 - len(vocab))]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    return str(folder)
