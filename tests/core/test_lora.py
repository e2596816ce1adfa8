"""Our LoRA layer beside peft's own, whose parameters and names it keeps."""

import copy

import pytest
import torch
from peft.tuners.lora import Linear

from nft_core.models.sd3 import SD3
from nft_core.training.lora import LeanLinear, adapted_layers, add_lora


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def layers(request):
    """A module with a LoRA that changes what it computes, by our layer and by peft's."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 48)).to(request.param)
    add_lora(module, rank=4, alpha=12, targets=["0"])
    assert type(module[0]) is LeanLinear
    with torch.no_grad():
        module[0].lora_B["default"].weight.normal_()
    theirs = copy.deepcopy(module)
    theirs[0].__class__ = Linear
    return module, theirs, request.param


def test_values_and_gradients_are_pefts(layers):
    ours, theirs, dtype = layers
    x = torch.randn(7, 5, 64).to(dtype)
    found = []
    for module in (ours, theirs):
        module.zero_grad()
        y = module(x)
        y.float().square().sum().backward()
        layer = module[0]
        found.append([y.float(), *(w["default"].weight.grad for w in (layer.lora_A, layer.lora_B))])
        assert y.dtype == dtype and all(g.dtype == torch.float32 for g in found[-1][1:])
    # In 16 bits peft's narrow products are float32, and ours are rounded.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < tolerance * b.norm()
        assert b.norm() > 1


def test_a_layer_without_its_lora_is_the_base(layers):
    ours, _, dtype = layers
    x = torch.randn(3, 64).to(dtype)
    ours[0]._disable_adapters = True
    assert torch.equal(ours(x), ours[0].base_layer(x))


def test_every_adapted_layer_is_lean(sd3_folder):
    transformer = SD3(str(sd3_folder)).transformer
    add_lora(transformer, 2, 4, SD3.lora_targets)
    layers = adapted_layers(transformer)
    assert layers and all(type(layer) is LeanLinear for layer in layers)
    assert all(p.dtype == torch.float32 for name, p in transformer.named_parameters() if "lora_" in name)
