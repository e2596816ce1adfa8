"""What every family of base models must do, as one check: `check_model(model)` in a plug-in's own tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from ..cards import ModelInfo
from ..interfaces import Condition, FlowModel
from .breaches import Broken, hold, may_not_raise
from .cards import check_card, make

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

ATTRIBUTES = ("name", "transformer", "lora_targets", "resolution")
METHODS = ("encode", "velocity", "decode", "latent_shape", "times", "save_lora")
PROMPTS = ("a cat", "", "a big red bed, a bag")
TIMES = (0.9, 0.5, 0.1)
#: Equal rows may differ by this share of the largest entry: the kernel, and so the rounding, depends on the
#: size of the batch, and a float32 transformer of a few dozen layers makes some 1e-5 of it.
TOLERANCE = 1e-3
#: Suffixes of files that are unpickled when they are read, which can run anything.
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_model(
    model: FlowModel | ModelInfo,
    *,
    checkpoint: str | None = None,
    height: int | None = None,
    width: int | None = None,
    device: str = "cpu",
) -> None:
    """Hold a model to the contract. Raises AssertionError, which says what a correct plug-in does.

    At the end it adds a LoRA to the transformer, as the trainer does: do not use the model afterwards. Small
    random weights will do, unless they are such that the output is zero.

    model: one that is made, or a card, which is checked too.
    checkpoint: path or hub id of which a card's factory makes the model, on `device` in float32.
    height, width: of the images in pixels; by default the model's resolution.

    Raises TypeError for a card without a checkpoint, and for a checkpoint without a card.
    """
    if isinstance(model, ModelInfo) != (checkpoint is not None):
        raise TypeError(f"a card, a ModelInfo, and checkpoint= go together, got {model!r} and {checkpoint=}")
    if isinstance(model, ModelInfo):
        model = made(model, checkpoint or "", device)
    check_attributes(model)
    size = (height or model.resolution[0], width or model.resolution[1])
    shape = check_sizes(model, size)
    check_times(model, size)
    condition = {name: rows.to(device) for name, rows in check_encode(model).items()}
    check_velocity(model, shape, condition, device)
    check_weights(model, shape, condition, device)
    check_decode(model, shape, size, device)
    check_lora(model)


def made(card: ModelInfo, checkpoint: str, device: str) -> FlowModel:
    """Make a model from its card, which is checked first."""
    import torch

    check_card(card)
    return cast(FlowModel, make(card, (checkpoint,), {"device": device, "dtype": torch.float32}))


def check_attributes(model: FlowModel) -> None:
    """Check the model's own attributes: name, transformer, LoRA targets, resolution."""
    import torch

    lacking = [name for name in ATTRIBUTES if not hasattr(model, name)]
    lacking += [name for name in METHODS if not callable(getattr(model, name, None))]
    hold(
        not lacking,
        "a model must have the attributes and methods of FlowModel",
        f"it lacks {', '.join(lacking)}",
    )
    hold(isinstance(model.name, str), "a model's name must be a string", f"got {model.name!r}")
    hold(
        isinstance(model.transformer, torch.nn.Module),
        "a model's transformer must be a torch.nn.Module",
        f"got {type(model.transformer).__name__}",
    )
    hold(
        whole_numbers(model.resolution, 2),
        "a model's resolution must be a tuple (height, width) in pixels",
        f"got {model.resolution!r}",
    )


def whole_numbers(value: object, count: int) -> bool:
    """Tell whether it is a tuple of that many ints above 0."""
    return isinstance(value, tuple) and len(value) == count and all(type(n) is int and n > 0 for n in value)


def check_sizes(model: FlowModel, size: tuple[int, int]) -> tuple[int, ...]:
    """Check the latents' shape, and return it."""
    with may_not_raise("latent_shape must take the model's own resolution", f"{size[0]} x {size[1]}"):
        shape = model.latent_shape(*size)
    hold(whole_numbers(shape, 3), "latent_shape must return a tuple (C, h, w) of ints", f"got {shape!r}")
    for odd in ((size[0] + 1, size[1]), (size[0], size[1] - 1)):
        try:
            model.latent_shape(*odd)
        except ValueError:
            continue
        except Exception as error:
            rule = "latent_shape must raise ValueError for an impossible size, and name the nearest one"
            raise Broken(rule, f"for {odd[0]} x {odd[1]} it raised {error!r}") from error
    return shape


def check_times(model: FlowModel, size: tuple[int, int]) -> None:
    """Check the sampling grid for several numbers of steps."""
    for steps in (1, 2, 5, 28):
        with may_not_raise("times must give a grid for any number of steps", f"{steps} steps"):
            times = model.times(steps, *size)
        hold(
            len(times) == steps + 1 and all(isinstance(t, float) for t in times),
            "times must give steps + 1 floats",
            f"got {times!r} for {steps} steps",
        )
        hold(
            times[0] == 1.0 and times[-1] == 0.0 and all(t > s for t, s in zip(times, times[1:])),
            "times must descend from exactly 1.0 to exactly 0.0",
            f"got {times!r}",
        )


def check_encode(model: FlowModel) -> Condition:
    """Check the condition of `PROMPTS`, and return it."""
    import torch

    condition = encoded(model, PROMPTS)
    again = encoded(model, PROMPTS)
    for name, rows in condition.items():
        hold(
            isinstance(rows, torch.Tensor) and rows.ndim > 0 and len(rows) == len(PROMPTS),
            "encode must return tensors whose first dimension is the prompt's",
            f"{name!r} is {described(rows)} for {len(PROMPTS)} prompts",
        )
        hold(not rows.requires_grad, "encode must return tensors without gradients", f"{name!r} requires them")
        hold(close(rows, again[name]), "the same prompts must be encoded the same a second time", repr(name))
    for i, prompt in enumerate(PROMPTS):
        for name, rows in encoded(model, [prompt]).items():
            hold(
                close(rows[0], condition[name][i]),
                "a prompt's rows must not depend on the prompts that are encoded with it",
                f"{name!r} of {prompt!r}, {described(rows[0])} alone, is other among {len(PROMPTS)} prompts, "
                f"{described(condition[name][i])}",
            )
    return condition


def encoded(model: FlowModel, prompts: Sequence[str]) -> Condition:
    with may_not_raise("encode must take any prompts, an empty one too", f"{list(prompts)}"):
        condition = model.encode(prompts)
    hold(isinstance(condition, Mapping), "encode must return a mapping", f"got {type(condition).__name__}")
    return condition


def described(value: object) -> str:
    import torch

    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.detach().double(), b.detach().double()
    largest = float(a.abs().max()) if a.numel() else 0.0
    return bool(((a - b).abs() <= TOLERANCE * largest + 1e-6).all())


def pick(condition: Condition, indices: list[int]) -> Condition:
    return {name: rows[indices] for name, rows in condition.items()}


def normal(shape: Sequence[int], seed: int, device: str) -> Tensor:
    import torch

    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu"
    ).to(device)


def asked(
    model: FlowModel,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    rule: str = "velocity must take x_t [B, C, h, w], times [B] and what encode returned for B prompts",
) -> Tensor:
    import torch

    with may_not_raise(rule, f"{list(x_t.shape)}"):
        v = model.velocity(x_t, t, condition)
    good = isinstance(v, torch.Tensor) and v.shape == x_t.shape and v.is_floating_point()
    hold(
        good,
        "velocity must return floating-point numbers in x_t's shape",
        f"got {described(v)} for {list(x_t.shape)}",
    )
    hold(bool(v.isfinite().all()), "velocity must be finite")
    return v


def check_velocity(model: FlowModel, shape: tuple[int, ...], condition: Condition, device: str) -> None:
    """Check the velocity's form, and that each image has its own."""
    import torch

    x_t, t = normal((3, *shape), 0, device), torch.tensor(TIMES, device=device, dtype=torch.float32)
    with torch.no_grad():
        v = asked(model, x_t, t, condition)
        for i in (2, 0):
            alone = asked(model, x_t[i : i + 1], t[i : i + 1], pick(condition, [i]))
            hold(
                close(alone[0], v[i]),
                "a row of velocity must depend on its own x_t, time and prompt alone",
                f"row {i} differs by {(alone[0] - v[i]).abs().max():.2g} when it is alone",
            )
        one = x_t[:1].expand(2, *shape)
        by_time = asked(model, one, t[:2], pick(condition, [0, 0]))
        hold(not torch.equal(by_time[0], by_time[1]), "velocity must depend on the time")
        by_prompt = asked(model, one, t[[1, 1]], pick(condition, [0, 2]))
        hold(not torch.equal(by_prompt[0], by_prompt[1]), "velocity must depend on the prompt")
        half = torch.autocast(torch.device(device).type, torch.bfloat16)
        with half:
            asked(model, x_t, t, condition, "velocity must work under torch.autocast in bfloat16")


def check_weights(model: FlowModel, shape: tuple[int, ...], condition: Condition, device: str) -> None:
    """Check that velocity uses the transformer's parameters, whatever the trainer does with them."""
    import torch

    x_t, t = normal((3, *shape), 0, device), torch.tensor(TIMES, device=device, dtype=torch.float32)

    def velocity() -> Tensor:
        with torch.no_grad():
            return asked(model, x_t, t, condition)

    parameter, before = steepest(model, lambda: asked(model, x_t, t, condition)), velocity()
    weights = parameter.data
    kept, other = weights.clone(), weights + 0.1 * (1 + weights.abs())
    weights.copy_(other)
    changed = velocity()
    weights.copy_(kept)
    hold(
        not torch.equal(before, changed),
        "velocity must call model.transformer without gradients, too: a change of its weights must change v",
    )
    parameter.data = other
    swapped = velocity()
    parameter.data = weights
    hold(
        close(changed, swapped) and close(before, velocity()),
        "velocity must follow when weights are swapped, by parameter.data = another tensor, and swapped back",
    )


def steepest(model: FlowModel, velocity: Callable[[], Tensor]) -> Parameter:
    """Find the parameter of the transformer with the largest gradient. All require one from then on."""
    import torch

    parameters = list(model.transformer.parameters())
    model.transformer.requires_grad_(True)
    v = velocity()
    gradients: Sequence[Tensor | None] = [None]
    if v.requires_grad:
        gradients = torch.autograd.grad(v.float().square().mean(), parameters, allow_unused=True)
    sizes = [0.0 if g is None else float(g.norm()) for g in gradients]
    hold(
        max(sizes) > 0,
        "velocity must call model.transformer: its gradient must reach the transformer's parameters",
        "it is zero, or there is none; with weights that make the output zero it cannot reach them",
    )
    return parameters[sizes.index(max(sizes))]


def check_decode(model: FlowModel, shape: tuple[int, ...], size: tuple[int, int], device: str) -> None:
    """Check the images that are made of latents."""
    import torch

    x_0 = normal((3, *shape), 1, device)
    with may_not_raise("decode must take latents [B, C, h, w]", f"{list(x_0.shape)}"):
        # It would show gradients through a decoder whose weights are frozen.
        images = model.decode(x_0.clone().requires_grad_(True))
        ends = {i: model.decode(x_0[i : i + 1]) for i in (0, 2)}
    hold(
        isinstance(images, torch.Tensor) and images.shape == (3, 3, *size),
        "decode must return images [B, 3, H, W] of the size that latent_shape was given",
        f"got {described(images)} for {size[0]} x {size[1]}",
    )
    hold(images.dtype == torch.float32, "decoded images must be float32", f"got {images.dtype}")
    hold(not images.requires_grad, "decode must return images without gradients")
    low, high = images.min().item(), images.max().item()
    hold(low >= 0 and high <= 1, "decoded images must be in [0, 1]", f"got {low:.3g} to {high:.3g}")
    hold(
        all(close(alone[0], images[i]) for i, alone in ends.items()),
        "a decoded image must not depend on the latents beside its own",
    )


def check_lora(model: FlowModel) -> None:
    """Check that a LoRA, added as the trainer does it, is saved."""
    import torch
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    targets, layers = model.lora_targets, dict(model.transformer.named_modules())
    hold(
        not isinstance(targets, str) and len(targets) > 0 and all(isinstance(name, str) for name in targets),
        "lora_targets must be a sequence of names",
        f"got {targets!r}",
    )
    for target in targets:
        named = [layer for name, layer in layers.items() if name == target or name.endswith(f".{target}")]
        hold(
            bool(named) and all(isinstance(layer, torch.nn.Linear) for layer in named),
            "each of lora_targets must name linear layers of the transformer, by the ends of their names",
            f"{target!r} names {', '.join(sorted({type(layer).__name__ for layer in named})) or 'none'}",
        )
    config: Any = LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), init_lora_weights="gaussian")
    inject_adapter_in_model(config, model.transformer, adapter_name="default")
    state = get_peft_model_state_dict(model.transformer, adapter_name="default")
    state = {name.removeprefix("base_model.model."): w for name, w in state.items()}
    with TemporaryDirectory() as folder:
        with may_not_raise("save_lora must write peft's state dict and config", f"{len(state)} tensors"):
            model.save_lora(Path(folder), state, plain(config.to_dict()))
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
    hold(bool(files), "save_lora must write files into the folder that it is given")
    pickled = [file.name for file in files if file.suffix in PICKLED]
    hold(not pickled, "save_lora must write safetensors, not pickled files", ", ".join(pickled))


def plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Tell what of a config JSON can hold."""
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.items()
        if value is None or isinstance(value, (str, int, float, bool, list, set, dict))
    }
