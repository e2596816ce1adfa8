"""Images of a model outside a run: the model is loaded, its prompts encoded, and images generated in batches.

Images of the same prompts, seed and settings are those of a run's evaluation, on a CPU bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nft_plugins import Batch, Condition, FlowModel, Solver

from ..host.host import Host
from ..parallel.devices import free_memory
from ..parallel.processes import list_owned
from ..prompts import Prompt
from ..runs.setup import autocast_dtype, decode_dtype, image_shape, load_model
from ..sampling.conditions import Encoded, encode_negative, encode_prompts
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
        velocity = Velocity(model, choose_autocast(s, model, self.device))
        return Sampler(
            model,
            velocity,
            self.solver,
            times,
            shape,
            s.rollout_batch,
            s.decode_batch,
            self.device,
            guidance=guidance,
            negative=self.negative,
        )

    def generate(self, draws: Draws, guidance: float = 1.0) -> Iterator[tuple[Tensor, Batch]]:
        """Generate this process's share of the images; yields each batch and which images n are in it."""
        sampler = self.make_sampler(guidance)
        todo, groups = list_owned(len(draws)), draws.list_groups()
        while len(todo):
            with torch.no_grad():
                rows, _, images = generate_batch(sampler, draws, todo, self.condition, groups)
            yield rows, draws.make_batch(rows, images)
            todo = todo[len(rows) :]


@dataclass(frozen=True)
class Velocity:
    """The velocity of a model. autocast: as in `training.policy.Policy`."""

    model: FlowModel
    autocast: torch.dtype | None

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v `[B, C, h, w]` float32."""
        with torch.autocast(x_t.device.type, self.autocast, enabled=self.autocast is not None):
            return self.model.velocity(x_t, t, condition).float()


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
    cache = Path(settings.cache).expanduser() if settings.cache else None
    negative = None
    if guided:
        negative = encode_negative(model, negative_prompt, device)
    condition = encode_prompts(model, prompts, range(len(prompts)), cache, device)
    if hasattr(model, "release"):  # A T5 alone takes more memory than some transformers.
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
