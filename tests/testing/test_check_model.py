"""check_model: correct models pass, and each of its rules catches a model that is wrong in that alone."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nft_core.models.sd3 import SD3
from nft_plugins import ModelInfo
from nft_plugins.testing import check_model
from nft_tiny.plugin import DATA


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_in, self.norm, self.proj_out = nn.Linear(7, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.proj_out(self.norm(self.proj_in(x)).tanh())


class Tiny:
    """Latents of half the size, each pixel's v from its x_t, the time and three figures of the prompt."""

    lora_targets = ("proj_in", "proj_out")
    resolution = (8, 8)

    def __init__(self, checkpoint="tiny", *, device="cpu", dtype=torch.float32):
        self.name = checkpoint
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.transformer = Transformer().to(device, dtype)

    def encode(self, prompts):
        rows = [[len(p), sum(p.encode()) % 7, sum(p.encode()) % 11] for p in prompts]
        return {"prompt": torch.tensor(rows, dtype=torch.float32) / 10}

    def velocity(self, x_t, t, condition):
        return self.transformer(self.inputs(x_t, t, condition)).movedim(-1, 1)

    def inputs(self, x_t, t, condition):
        rows = torch.cat([t[:, None], condition["prompt"]], 1)[:, None, None]
        return torch.cat([x_t.movedim(1, -1), rows.expand(-1, *x_t.shape[2:], -1)], -1)

    def decode(self, x_0):
        return x_0.detach().sigmoid().repeat_interleave(2, 2).repeat_interleave(2, 3)

    def latent_shape(self, height, width):
        if height % 2 or width % 2:
            raise ValueError(f"sides must be even; the nearest size is {height // 2 * 2} x {width // 2 * 2}")
        return (3, height // 2, width // 2)

    def times(self, steps, height, width):
        return tuple(1 - i / steps for i in range(steps + 1))

    def save_lora(self, folder, state, config):
        save_file(dict(state), folder / "lora.safetensors", {"rank": str(config["r"])})


def card(factory=Tiny, name="tiny"):
    return ModelInfo(name, "linear layers", factory, ("TinyPipeline",))


class AnySize(Tiny):
    """Rounds an impossible size to the next possible one, which is no breach."""

    def latent_shape(self, height, width):
        return super().latent_shape(height + height % 2, width + width % 2)


class HalfPrecision(Tiny):
    def velocity(self, x_t, t, condition):
        return super().velocity(x_t, t, condition).to(torch.float16)


class BlackAndWhite(Tiny):
    def decode(self, x_0):
        return super().decode(x_0).round()


@pytest.mark.parametrize("model", [Tiny, AnySize, HalfPrecision, BlackAndWhite])
def test_correct_models_pass(model):
    check_model(model())
    check_model(model(), height=4, width=16)
    check_model(card(model), checkpoint="tiny")


def test_weights_are_as_they_were_before_the_lora():
    model = Tiny()
    model.transformer.requires_grad_(False)
    check_model(model)
    before, after = Tiny().transformer, model.transformer
    for name in ("proj_in", "proj_out"):
        assert torch.equal(getattr(before, name).weight, getattr(after, name).base_layer.weight)
    assert all(p.grad is None for p in after.parameters())


def test_the_embedded_world_keeps_the_contract():
    check_model(SD3(str(DATA / "pipeline"), max_sequence_length=0))


def but(**members):
    """A correct model but for these members; those that are functions take the model and what it would do."""

    def method(name, f):
        right = getattr(Tiny, name)
        return lambda self, *arguments: f(self, lambda *given: right(self, *given), *arguments)

    functions = {name: method(name, f) for name, f in members.items() if callable(f)}
    return type("Mutant", (Tiny,), members | functions)


class NoDecoder(Tiny):
    decode = None


class NoName(Tiny):
    def __init__(self):
        super().__init__()
        del self.name


class Path(Tiny):
    def __init__(self):
        super().__init__(DATA)


class Function(Tiny):
    def __init__(self):
        super().__init__()
        self.transformer = self.transformer.forward


class Copy(Tiny):
    """Velocity calls a copy of the transformer: always, or only when it samples."""

    always = True

    def __init__(self):
        super().__init__()
        self.copy = copy.deepcopy(self.transformer)

    def velocity(self, x_t, t, condition):
        called = self.copy if self.always or not torch.is_grad_enabled() else self.transformer
        return called(self.inputs(x_t, t, condition)).movedim(-1, 1)


class CopyForSampling(Copy):
    always = False


class Storage(CopyForSampling):
    """Sampling reads the storages that the weights had at first, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        for mine, theirs in zip(self.copy.parameters(), self.transformer.parameters(), strict=True):
            mine.data = theirs.data


class Slow(Tiny):
    """Takes up swapped weights once, and keeps them."""

    kept = None

    def velocity(self, x_t, t, condition):
        pointers = [p.data_ptr() for p in self.transformer.parameters()]
        self.first = getattr(self, "first", pointers)
        if pointers != self.first:
            self.kept = copy.deepcopy(self.transformer)
        called = self.kept or self.transformer
        return called(self.inputs(x_t, t, condition)).movedim(-1, 1)


def padded(self, right, prompts):
    """Pad to the longest prompt's length."""
    length = max(map(len, prompts))
    letters = [list(p.encode().ljust(length, b"\0")) for p in prompts]
    return {**right(prompts), "letters": torch.tensor(letters)}


def normalised(self, right, prompts):
    rows = right(prompts)["prompt"]
    return {"prompt": rows - rows.mean(0)}


def pickles(self, right, folder, state, config):
    torch.save(dict(state), folder / "lora.pt")


def encodes(change):
    return but(encode=lambda self, right, prompts: {"prompt": change(right(prompts)["prompt"])})


def moves(change):
    """x_t, t and the prompt's rows are changed before the velocity is asked."""

    def velocity(self, right, x_t, t, condition):
        x_t, t, rows = change(x_t, t, condition["prompt"])
        return right(x_t, t, {"prompt": rows})

    return but(velocity=velocity)


def gives(change):
    return but(velocity=lambda self, right, *given: change(right(*given)))


def decodes(change):
    return but(decode=lambda self, right, x_0: change(right(x_0)))


def without_gradient(self, right, *given):
    with torch.no_grad():
        return right(*given)


ATTRIBUTES = "a model must have the attributes and methods of FlowModel"
RESOLUTION = "a model's resolution must be a tuple"
SHAPE = "latent_shape must return a tuple (C, h, w)"
IMPOSSIBLE = "latent_shape must raise ValueError for an impossible size"
STEPS = "times must give a grid for any number of steps"
COUNT = "times must give steps + 1 floats"
DESCEND = "times must descend from exactly 1.0 to exactly 0.0"
ROWS = "encode must return tensors whose first dimension is the prompt's"
APART = "a prompt's rows must not depend on the prompts that are encoded with it"
V_SHAPE = "velocity must return floating-point numbers in x_t's shape"
V_ALONE = "a row of velocity must depend on its own x_t, time and prompt alone"
GRADIENT = "velocity must call model.transformer: its gradient"
SWAPPED = "velocity must follow when weights are swapped"
IMAGES = "decode must return images [B, 3, H, W]"
RANGE = "decoded images must be in [0, 1]"
TARGETS = "lora_targets must be a sequence of names"
LINEAR = "each of lora_targets must name linear layers"

MUTANTS = [
    ("a card's name must be", lambda: card(name="Tiny")),
    (ATTRIBUTES, NoDecoder),
    (ATTRIBUTES, NoName),
    ("a model's name must be a string", Path),
    ("a model's transformer must be a torch.nn.Module", Function),
    (RESOLUTION, but(resolution=[8, 8])),
    (RESOLUTION, but(resolution=(8,))),
    (RESOLUTION, but(resolution=(8.0, 8.0))),
    ("latent_shape must take the model's own resolution", but(resolution=(7, 8))),
    (SHAPE, but(latent_shape=lambda self, right, *size: list(right(*size)))),
    (SHAPE, but(latent_shape=lambda self, right, *size: (1, *right(*size)))),
    (IMPOSSIBLE, but(latent_shape=lambda self, right, *size: right(*size) if size[0] % 2 == 0 else {}[size])),
    (IMPOSSIBLE, but(latent_shape=lambda self, right, *size: right(*size) if size[1] % 2 == 0 else {}[size])),
    (STEPS, but(times=lambda self, right, *given: {28: right(28, 8, 8)}[given[0]])),
    (STEPS, but(times=lambda self, right, *given: (*right(*given), 1 / (given[0] - 1))[:-1])),
    (STEPS, but(times=lambda self, right, *given: (*right(*given), 1 / (given[0] - 28))[:-1])),
    (COUNT, but(times=lambda self, right, *given: right(*given)[:-1])),
    (COUNT, but(times=lambda self, right, *given: torch.tensor(right(*given)))),
    (DESCEND, but(times=lambda self, right, *given: right(*given)[::-1])),
    (DESCEND, but(times=lambda self, right, *given: (*right(*given)[:-1], 1e-3))),
    (DESCEND, but(times=lambda self, right, *given: (0.999, *right(*given)[1:]))),
    (DESCEND, but(times=lambda self, right, steps, *size: (1.0, *[0.5] * (steps - 1), 0.0))),
    (
        "encode must take any prompts, an empty one too",
        but(encode=lambda self, right, prompts: (right(prompts), [p[0] for p in prompts])[0]),
    ),
    ("encode must return a mapping", but(encode=lambda self, right, prompts: right(prompts)["prompt"])),
    (ROWS, but(encode=lambda self, right, prompts: {**right(prompts), "scale": torch.ones(1)})),
    (ROWS, encodes(lambda rows: rows.tolist())),
    (ROWS, encodes(lambda rows: rows[:2])),
    (ROWS, encodes(lambda rows: rows[0, 0])),
    ("encode must return tensors without gradients", encodes(lambda rows: rows.requires_grad_(True))),
    ("the same prompts must be encoded the same", encodes(lambda rows: rows + random.random())),
    (APART, but(encode=padded)),
    (APART, but(encode=normalised)),
    (
        "velocity must take x_t [B, C, h, w], times [B] and what",
        but(velocity=lambda self, right, x_t, t, condition: right(x_t, t.reshape(1), condition)),
    ),
    (V_SHAPE, gives(lambda v: (v,))),
    (V_SHAPE, gives(lambda v: v.flatten(1))),
    (V_SHAPE, gives(lambda v: v.int())),
    ("velocity must be finite", gives(lambda v: v / 0)),
    (V_ALONE, gives(lambda v: v - v.mean())),
    (V_ALONE, moves(lambda x_t, t, rows: (x_t, t[:1].expand_as(t), rows))),
    (V_ALONE, moves(lambda x_t, t, rows: (x_t, t[-1:].expand_as(t), rows))),
    (V_ALONE, moves(lambda x_t, t, rows: (x_t, t, rows[:1].expand_as(rows)))),
    ("velocity must depend on the time", moves(lambda x_t, t, rows: (x_t, 0 * t, rows))),
    ("velocity must depend on the prompt", moves(lambda x_t, t, rows: (x_t, t, 0 * rows))),
    (
        "velocity must work under torch.autocast",
        gives(lambda v: torch.zeros(v.shape).index_add_(0, torch.arange(len(v)), v)),
    ),
    (GRADIENT, but(velocity=without_gradient)),
    (GRADIENT, Copy),
    (GRADIENT, gives(lambda v: v.detach().requires_grad_(True))),
    ("velocity must call model.transformer without gradients", CopyForSampling),
    (SWAPPED, Storage),
    (SWAPPED, Slow),
    ("decode must take latents [B, C, h, w]", but(decode=lambda self, right, x_0: right(x_0[0]))),
    (IMAGES, decodes(lambda images: images.tolist())),
    (IMAGES, decodes(lambda images: images.movedim(1, -1))),
    (IMAGES, decodes(lambda images: images[..., ::2, ::2])),
    ("decoded images must be float32", decodes(lambda images: images.mul(255).byte())),
    (
        "decode must return images without gradients",
        but(decode=lambda self, right, x_0: right(x_0) + 0 * x_0.mean()),
    ),
    (RANGE, decodes(lambda images: 2 * images - 1)),
    (RANGE, decodes(lambda images: 255 * images)),
    ("a decoded image must not depend on the latents", decodes(lambda images: images / images.max())),
    (TARGETS, but(lora_targets="proj_in")),
    (TARGETS, but(lora_targets=())),
    (TARGETS, but(lora_targets=(nn.Linear,))),
    (LINEAR, but(lora_targets=("to_q", "proj_in"))),
    (LINEAR, but(lora_targets=("proj_in", "norm"))),
    (
        "save_lora must write peft's state dict and config",
        but(save_lora=lambda self, right, folder, state, config: state["lora_A"]),
    ),
    ("save_lora must write files", but(save_lora=lambda self, right, folder, state, config: None)),
    ("save_lora must write safetensors", but(save_lora=pickles)),
]


@pytest.mark.parametrize(("rule", "mutant"), MUTANTS, ids=[rule for rule, _ in MUTANTS])
def test_each_rule_catches_its_mutant(rule, mutant):
    model = mutant()
    with pytest.raises(AssertionError) as caught:
        check_model(model, checkpoint="tiny" if isinstance(model, ModelInfo) else None)
    assert caught.value.rule.startswith(rule), caught.value


def test_every_rule_has_a_mutant(gaps):
    assert gaps("models", [rule for rule, _ in MUTANTS]) == []


@pytest.mark.parametrize(("model", "arguments"), [(card(), {}), (Tiny(), {"checkpoint": "tiny"})])
def test_a_card_and_a_checkpoint_go_together(model, arguments):
    with pytest.raises(TypeError, match="go together"):
        check_model(model, **arguments)
