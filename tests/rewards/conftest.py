"""Small checkpoints in the published formats, with random weights, and pictures of many kinds."""

import math

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory):
    """`make_clip(width)`: the folder of a small CLIP whose embeddings have that width."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
    from transformers.models.clip import CLIPImageProcessor

    def make(width=16):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("clip")
        letters = "abcdefghijklmnopqrstuvwxyz"
        vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
        tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=[], model_max_length=12)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        text = sizes | {"vocab_size": len(vocab), "max_position_embeddings": 12, "eos_token_id": 1}
        vision = sizes | {"image_size": 48, "patch_size": 16}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.2)
        torch.nn.init.constant_(model.logit_scale, math.log(100))
        model.save_pretrained(folder)
        images = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
        CLIPProcessor(images, tokenizer).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def checkpoint(make_clip):
    return make_clip()


def _pictures():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:1:200j, 0:1:120j]
    waves = 0.5 + 0.5 * np.sin(40 * x * y)
    return {
        "gradient": np.stack([x, y, 1 - x]),
        "noise": rng.random((3, 96, 96)),
        "waves": np.stack([waves, 1 - waves, x]),
        "tiny": rng.random((3, 20, 20)),
        "exact": rng.random((3, 48, 48)),
        "huge": np.kron(rng.random((3, 25, 30)), np.ones((1, 40, 40))),
    }


PICTURES = _pictures()


@pytest.fixture(params=PICTURES)
def picture(request):
    """`[3, H, W]` in [0, 1]: gradients, noise, shapes; not square, tiny and huge."""
    return PICTURES[request.param]


@pytest.fixture
def pictures():
    return PICTURES
