"""What a reward, a solver and a model offer. Plug-ins may inherit from these classes or just look like them.

One convention everywhere: `x_t = (1 - t) x_0 + t noise`, `v = noise - x_0`, and t runs from 1 down to 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .data import Batch, Scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from typing_extensions import TypeAlias  # typing's came with Python 3.10

#: Where a solver draws its noise, for annotations: one `torch.Generator` for the whole batch; a list with one
#: for each image, so that an image's noise does not depend on the batch it is in; or None for torch's own.
#: diffusers' schedulers take the same union.
Generator: TypeAlias = "torch.Generator | list[torch.Generator] | None"

#: `velocity(x_t [B, ...], t) -> v [B, ...]` for one time t in [0, 1] shared by the batch.
Velocity: TypeAlias = "Callable[[Tensor, float], Tensor]"

#: What `FlowModel.encode` returns: named tensors whose first dimension is the prompt's.
Condition: TypeAlias = "Mapping[str, Tensor]"


@runtime_checkable
class Reward(Protocol):
    """Scores images; bigger is better. Holds no state that changes from call to call.

    A reward may also define `check_prompt(prompt, metadata)`, which raises `PromptError` for a prompt
    that it can never score. A run calls it for every prompt before it starts.

    A batch of a run holds parts of groups: the rest is in other batches and on other processes. A reward
    that compares the images of a group with one another also defines `regroup(scores, groups) -> Scores`.
    A run calls it, on every process, with what `__call__` returned for all N images of an epoch and with
    their groups `[N]`; all that it needs must be in the values, `valid` and `details`.

    A reward in another process is sent images of 8 bits, and its `batch.images` are `uint8 / 255`. One that
    needs the exact floats defines `needs_floats = True`, an attribute.
    """

    def __call__(self, batch: Batch) -> Scores: ...


@runtime_checkable
class Solver(Protocol):
    """Integrates the flow from noise to an image's latents. Any black box will do."""

    def solve(self, velocity: Velocity, noise: Tensor, times: Sequence[float], generator: Generator) -> Tensor:
        """Latents `x_0` from `noise [B, ...]`.

        times: descending, from 1.0 to 0.0; one more than the number of steps.
        generator: where a stochastic solver draws its noise, through `randn_like`.
        """
        ...


class SteppedSolver:
    """A solver that goes from one time to the next: `init` and `step`, state in and state out."""

    def init(self, noise: Tensor, times: Sequence[float]) -> Any:
        """The state before the first step. One-step methods have none."""
        return None

    def step(
        self, velocity: Velocity, x: Tensor, t: float, s: float, state: Any, generator: Generator
    ) -> tuple[Tensor, Any]:
        """From `x` at time t to time s < t; returns the new `x` and the new state."""
        raise TypeError(f"{type(self).__name__} must define step(velocity, x, t, s, state, generator)")

    def solve(self, velocity: Velocity, noise: Tensor, times: Sequence[float], generator: Generator) -> Tensor:
        x, state = noise, self.init(noise, times)
        for t, s in zip(times[:-1], times[1:]):
            x, state = self.step(velocity, x, t, s, state, generator)
        return x


@runtime_checkable
class FlowModel(Protocol):
    """A family of text-to-image flow models, as the trainer sees it.

    name: the path or hub id that it was loaded from.
    transformer: the module that is trained; `velocity` must call this attribute, so that adapters
        and swapped weights take effect.
    lora_targets: names of the transformer's linear layers that LoRA adapts by default.
    resolution: the default image height and width in pixels.

    A model may also define

    - `release()`, which gives up what `encode` alone needs. A run calls it when all prompts are encoded; an
      `encode` after it loads that again.
    - `decode_in(dtype)`, after which `decode` computes in that dtype; its images stay float32.
    - `needs_autocast = False`, where `velocity` works on a transformer of bfloat16 without `torch.autocast`.
    - `can_guide = False`, an attribute of the class, where classifier-free guidance means nothing to the model,
      as where guidance is distilled into its weights: generation with guidance is then refused.
    - `encode_negative(prompts)`, where negative prompts are encoded otherwise than prompts.
    - `guide(v, v_neg, scale)`, the velocity under guidance where it is not `v_neg + scale (v - v_neg)`.
    """

    name: str
    transformer: torch.nn.Module
    lora_targets: Sequence[str]
    resolution: tuple[int, int]

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Condition tensors for B prompts, without gradients, on any device; B may be tens of thousands."""
        ...

    def velocity(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """v `[B, C, h, w]` for `x_t [B, C, h, w]` at times `t [B]` in [0, 1]."""
        ...

    def decode(self, x_0: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` float32 in [0, 1] from latents, without gradients."""
        ...

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """`(C, h, w)` of the latents of an image of that size in pixels."""
        ...

    def times(self, steps: int, height: int, width: int) -> tuple[float, ...]:
        """The family's own sampling grid: steps + 1 times from 1.0 down to 0.0."""
        ...

    def save_lora(self, folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
        """Write a LoRA as the family's diffusers pipeline loads it with `load_lora_weights`.

        state: peft's state dict of the transformer's adapter.
        config: the adapter's `LoraConfig` as a dictionary.
        """
        ...


def randn_like(x: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise of x's shape, dtype and device; row i from `generator[i]` if it is a list.

    Drawn in float32 on the generator's own device, so that it does not depend on x's.
    """
    import torch

    def draw(shape: Sequence[int], source: torch.Generator | None) -> Tensor:
        device = source.device if source is not None else x.device
        return torch.randn(shape, generator=source, device=device, dtype=torch.float32)

    if isinstance(generator, list):
        if len(generator) != len(x):
            raise ValueError(f"{len(x)} images need {len(x)} generators, got {len(generator)}")
        noise = torch.stack([draw(x.shape[1:], source) for source in generator])
    else:
        noise = draw(x.shape, generator)
    if x.is_cuda and not noise.is_cuda:
        noise = noise.pin_memory()  # Or the copy would wait for all that the GPU has to do.
    return noise.to(x, non_blocking=x.is_cuda)
