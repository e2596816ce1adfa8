"""Small checkpoints in the published formats, for rewards that otherwise need a download.

Their weights are drawn by numpy, so that no library's way to initialise a module changes them.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn


@torch.no_grad()
def draw(module: nn.Module, spread: float = 0.2) -> nn.Module:
    source = np.random.RandomState(0)
    for name, p in sorted(module.named_parameters()):
        mean = 1.0 if p.ndim == 1 and "norm" in name and "weight" in name else 0.0
        p.copy_(torch.as_tensor(mean + spread * source.standard_normal(tuple(p.shape))))
    return module


def make_clip(folder: Path, width: int = 768) -> str:
    """Write a CLIP of two layers with letters as words; returns its folder."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip import CLIPImageProcessor

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(words)}, merges=[], model_max_length=12)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": 1}
    vision = sizes | {"image_size": 48, "patch_size": 16}
    model = draw(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)))
    nn.init.constant_(model.logit_scale, math.log(100))
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return str(folder)


def make_aesthetic(folder: Path) -> str:
    folder.mkdir()
    widths = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    source, state = np.random.RandomState(0), {}
    for i, (out, into) in widths.items():
        state[f"layers.{i}.weight"] = drawn(source, (out, into), into**-0.5)
        state[f"layers.{i}.bias"] = drawn(source, (out,), 1)
    torch.save(state, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return str(folder)


def drawn(source: np.random.RandomState, shape: tuple[int, ...], spread: float) -> Tensor:
    return torch.from_numpy(spread * source.standard_normal(shape)).float()


def make_mask2former(folder: Path) -> str:
    """Write a Mask2Former that is sure of its classes: some of its queries are seen."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    stages = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], window_size=4, out_features=stages
    )
    names = json.loads((Path(__file__).parent / "coco.json").read_text())
    config = Mask2FormerConfig(
        backbone_config=swin,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
    )
    model = draw(Mask2FormerForUniversalSegmentation(config))
    with torch.no_grad():
        model.class_predictor.weight.mul_(60)
    model.save_pretrained(folder)
    return str(folder)


def make_hpsv3(folder: Path) -> dict[str, str]:
    """Write a Qwen2-VL of two layers with the published head beside it, and its tokenizer."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    base = folder / "base"
    special = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.save_pretrained(base)
    config = {
        "model_type": "qwen2_vl",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "sliding_window": 4096,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "vision_config": {
            **{"depth": 2, "embed_dim": 32, "mlp_ratio": 2, "num_heads": 2, "in_chans": 3, "hidden_size": 64},
            **{"patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2},
        },
        **{"image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"), "video_token_id": 9},
        **{"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 1},
    }
    (base / "config.json").write_text(json.dumps(config))
    whole = Qwen2VLConfig.from_pretrained(base)
    whole.text_config.vocab_size = len(tokenizer) + 1
    model = draw(Qwen2VLForConditionalGeneration(whole))
    layers = [
        nn.Linear(64, 1024),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(1024, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    ]
    head = draw(nn.Sequential(*layers))
    state = {f"rm_head.{k}": v for k, v in head.state_dict().items()}
    for name, weight in model.state_dict().items():
        name = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
        state[name] = weight.clone()
    save_file(state, folder / "HPSv3.safetensors")
    return {"checkpoint": str(folder), "base": str(base)}


def make_imagereward(folder: Path) -> dict[str, str]:
    """Write a BLIP of two layers under the published names, with letters as words."""
    (folder / "bert").mkdir(parents=True)
    v, w, d, f, layers = 24, 40, 32, 48, 2
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "bert" / "vocab.txt").write_text("\n".join(words) + "\n")
    bert = {
        "vocab_size": len(words) + 2,
        "hidden_size": d,
        "intermediate_size": f,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "layer_norm_eps": 1e-12,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    vision = {
        "hidden_size": v,
        "intermediate_size": w,
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "image_size": 32,
        "patch_size": 8,
    }
    (folder / "med_config.json").write_text(json.dumps(bert | {"vision": vision}))
    eye, text = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{eye}cls_token": (1, 1, v),
        f"{eye}pos_embed": (1, 17, v),
        f"{eye}patch_embed.proj.weight": (v, 3, 8, 8),
        f"{eye}patch_embed.proj.bias": (v,),
        f"{text}embeddings.word_embeddings.weight": (bert["vocab_size"], d),
        f"{text}embeddings.position_embeddings.weight": (40, d),
    }
    norms = {f"{eye}norm": v, f"{text}embeddings.LayerNorm": d}
    linears = {"blip.vision_proj": (256, v), "blip.text_proj": (256, d)}
    for i in range(layers):
        block, layer = f"{eye}blocks.{i}.", f"{text}encoder.layer.{i}."
        norms |= {f"{block}norm1": v, f"{block}norm2": v, f"{layer}output.LayerNorm": d}
        linears |= {f"{block}attn.qkv": (3 * v, v), f"{block}attn.proj": (v, v)}
        linears |= {f"{block}mlp.fc1": (w, v), f"{block}mlp.fc2": (v, w)}
        linears |= {f"{layer}intermediate.dense": (f, d), f"{layer}output.dense": (d, f)}
        for part, width in (("attention", d), ("crossattention", v)):
            linears |= {f"{layer}{part}.self.query": (d, d), f"{layer}{part}.output.dense": (d, d)}
            linears |= {f"{layer}{part}.self.{name}": (d, width) for name in ("key", "value")}
            norms[f"{layer}{part}.output.LayerNorm"] = d
    sizes = (d, 1024, 128, 64, 16, 1)
    for place, m, n in zip((0, 2, 4, 6, 7), sizes[:-1], sizes[1:], strict=True):
        linears[f"mlp.layers.{place}"] = (n, m)
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.{part}": (n,) for name, n in norms.items() for part in ("weight", "bias")}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    source = np.random.RandomState(0)
    state = {}
    for name, shape in sorted(shapes.items()):
        flat = len(shape) < 2 or "embed" in name
        state[name] = drawn(source, shape, 0.3 if flat else 1.2 * math.prod(shape[1:]) ** -0.5)
        state[name] += float("norm" in name.lower() and name.endswith("weight"))
    state[f"{text}embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(state, folder / "ImageReward.pt")
    return {"checkpoint": str(folder), "tokenizer": str(folder / "bert")}


class Judge(BaseHTTPRequestHandler):
    """Answers as OpenAI's protocol has it, with a score that follows the length of the question."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"][1]["text"]
        message = {"role": "assistant", "content": f"Final Score: {1 + len(text) % 17 / 4}"}
        data = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def serve_judge() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()


def make_checkpoints(folder: Path) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Write all; returns rewards with their options."""
    clip = make_clip(folder / "clip")
    photographs = {"checkpoint": make_mask2former(folder / "mask2former"), "clip": clip}
    return {
        "pickscore of a checkpoint": ("pickscore", {"checkpoint": clip}),
        "aesthetic": ("aesthetic", {"checkpoint": make_aesthetic(folder / "aesthetic"), "clip": clip}),
        "imagereward": ("imagereward", make_imagereward(folder / "imagereward")),
        "hpsv3": ("hpsv3", make_hpsv3(folder / "hpsv3")),
        "photographs": ("photographs", photographs),
    }
