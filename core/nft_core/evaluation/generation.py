"""Images of a model outside a run: the model is loaded, its prompts encoded, and images generated in batches.

Images of the same prompts, seed and settings are those of a run's evaluation, on a CPU bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from nft_plugins import Batch, Condition, FlowModel, Solver

from ..errors import UsageError
from ..host.factories import import_factory
from ..host.host import Host
from ..parallel.devices import copy_to_device, free_memory
from ..parallel.processes import list_owned
from ..prompts import Prompt
from ..runs.setup import autocast_dtype, decode_dtype, find_family, image_shape, load_model
from ..sampling.conditions import Encoded, encode_prompts
from ..sampling.draws import Draws
from ..sampling.rollout import Sampler, generate_batch
from ..settings import Settings


@dataclass(frozen=True)
class Generation:
    """A loaded model and its encoded prompts, ready to generate images of them.

    settings: solver, steps (`eval_steps`, or else `steps`), size, batches and dtypes are taken from them.
    condition: of `prompts`.
    negative: the encoding of the negative prompt, one row on the device; None: guidance is always 1.
    """

    settings: Settings
    model: FlowModel
    solver: Solver
    prompts: Sequence[Prompt]
    condition: Encoded
    negative: Condition | None
    device: torch.device

    def make_sampler(self, guidance: float = 1.0) -> Sampler:
        """Make what generates images under this guidance. Raises UsageError for an impossible size."""
        s, model = self.settings, self.model
        height, width, shape = image_shape(s, model)
        times = model.times(s.eval_steps or s.steps, height, width)
        velocity = Velocity(model, choose_autocast(s, model, self.device), guidance, self.negative)
        return Sampler(model, velocity, self.solver, times, shape, s.rollout_batch, s.decode_batch, self.device)

    def generate(self, draws: Draws, guidance: float = 1.0) -> Iterator[tuple[Tensor, Batch]]:
        """Generate this process's share of the images; yields each batch and which images n are in it."""
        sampler = self.make_sampler(guidance)
        todo, groups = list_owned(len(draws)), draws.groups()
        while len(todo):
            with torch.no_grad():
                rows, _, images = generate_batch(sampler, draws, todo, self.condition, groups)
            yield rows, draws.batch(rows, images)
            todo = todo[len(rows) :]


@dataclass(frozen=True)
class Velocity:
    """The velocity of a model under classifier-free guidance g: `v = v_neg + g (v_pos - v_neg)`.

    With g = 1 this is v_pos, in one pass; otherwise there are two. autocast: as in `training.policy.Policy`.
    """

    model: FlowModel
    autocast: torch.dtype | None
    guidance: float = 1.0
    negative: Condition | None = None

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v `[B, C, h, w]` float32."""
        with torch.autocast(x_t.device.type, self.autocast, enabled=self.autocast is not None):
            v = self.model.velocity(x_t, t, condition).float()
            if self.guidance == 1 or self.negative is None:
                return v
            rows = {name: c.expand(len(x_t), *c.shape[1:]) for name, c in self.negative.items()}
            v_neg = self.model.velocity(x_t, t, rows).float()
        guide = getattr(self.model, "guide", None)
        return guide(v, v_neg, self.guidance) if guide else v_neg + self.guidance * (v - v_neg)


def prepare_generation(
    settings: Settings,
    host: Host,
    device: torch.device,
    prompts: Sequence[Prompt],
    *,
    guided: bool = False,
    negative_prompt: str = "",
) -> Generation:
    """Load the model that the settings name, and encode all prompts.

    guided: whether a guidance other than 1 will be asked for.
    Raises UsageError and NftError, as a run does, for what cannot be found or loaded.
    """
    solver = host.make_solver(settings.solver, settings.solver_options)
    model = load_model(settings, host, device)
    model.transformer.requires_grad_(False)
    cache = Path(settings.cache).expanduser() if settings.cache else None
    negative = None
    if guided:
        row = getattr(model, "encode_negative", model.encode)([negative_prompt])
        negative = {name: copy_to_device(c, device) for name, c in row.items()}
    condition = encode_prompts(model, prompts, range(len(prompts)), cache, device)
    if hasattr(model, "release"):
        model.release()
        free_memory()
    if hasattr(model, "decode_in"):
        model.decode_in(decode_dtype(settings, device))
    return Generation(settings, model, solver, prompts, condition, negative, device)


def choose_autocast(settings: Settings, model: FlowModel, device: torch.device) -> torch.dtype | None:
    """Choose the dtype of torch.autocast around the transformer, as a run does; None: the transformer's own."""
    dtype = autocast_dtype(settings, device)
    native = settings.lora_rank > 0 and dtype == torch.bfloat16 and not getattr(model, "needs_autocast", True)
    return None if native else dtype


def check_guidance(settings: Settings, host: Host, guidance: float) -> None:
    """Raise UsageError for a guidance that is no possible number, or that the model does not know.

    Nothing is loaded: the model's family says whether it can be guided, or the model's own index says that
    guidance is distilled into it.
    """
    if not isfinite(guidance) or guidance < 0:
        raise UsageError(f"guidance = {guidance}: expected a number from 0 up; 1 is without guidance.")
    if guidance == 1:
        return
    family, index = find_family(settings, host)
    factory = import_factory(host.models[family].info.factory)
    if getattr(factory, "can_guide", True) and not index.get("is_distilled"):
        return
    raise UsageError(
        f"guidance = {guidance:g}: the model {settings.model!r} has learned without a negative prompt, so that "
        "classifier-free guidance means nothing to it; use guidance 1. Guidance that is distilled into a model "
        "is an option of its family: --set model_options={guidance=3.5}."
    )
