"""What goes into a reward and what comes out: `Batch` and `Scores`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

T = TypeVar("T")


class PromptError(ValueError):
    """A prompt that a reward can never score, such as one without the words an OCR reward looks for."""


@dataclass(frozen=True)
class Batch:
    """Images to be scored together with what they were made for.

    images: `[B, 3, H, W]` float32 in [0, 1], RGB, on any device.
    prompts: B strings.
    metadata: one mapping an image (GenEval's `include`, OCR's `text`); empty where there is none.
    groups: `[B]` int64, the index of the prompt that each image was made for. Images of one group
        are those that advantages compare with one another.
    """

    images: Tensor
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]
    groups: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"images must be [B, 3, H, W], got {list(self.images.shape)}")
        sizes = {
            "prompts": len(self.prompts),
            "metadata": len(self.metadata),
            "groups": len(self.groups),
        }
        wrong = {name: size for name, size in sizes.items() if size != len(self)}
        if wrong:
            raise ValueError(f"a batch of {len(self)} images needs {len(self)} of each, got {wrong}")

    def __len__(self) -> int:
        return int(self.images.shape[0])

    @cached_property
    def uint8(self) -> Tensor:
        """`[B, 3, H, W]` uint8 in 0..255 on the images' device: quantised once, shared by all rewards."""
        return plain(lambda: self.images.mul(255).round().clamp(0, 255).byte())

    @cached_property
    def pil(self) -> list[Image]:
        """B RGB images, from `uint8`."""
        from PIL.Image import fromarray

        return [fromarray(array) for array in self.uint8.permute(0, 2, 3, 1).contiguous().cpu().numpy()]

    def shared(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return what `compute()` returns. It is computed once for a batch, and kept as long as the batch is.

        Rewards that want the same pixels or the same features share them so. key: everything but the
        batch that the result depends on; begin it with something of your own, such as a function.
        """
        if key not in self._shared:
            self._shared[key] = plain(compute)
        return cast(T, self._shared[key])

    @cached_property
    def _shared(self) -> dict[Hashable, Any]:
        return {}


@dataclass(frozen=True)
class Scores:
    """Holds what a reward says of a batch.

    values: `[B]` float32, bigger is better. Meaningless where `valid` is false.
    valid: `[B]` bool. A sample that could not be scored is marked here, never given a made-up number.
    details: named per-sample figures, `[B]` each (GenEval's `strict`, OCR's `distance`).
    parts: for a composed reward, each member's weight and scores by name.
    notes: named texts, B each, for people to read beside the score (what OCR read, what GenEval found). Nothing
        is computed from them. Evaluations keep them, of a composed reward as `NAME/NOTE`; training does not.
    """

    values: Tensor
    valid: Tensor
    details: Mapping[str, Tensor] = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.values.shape
        if self.values.ndim != 1 or self.valid.shape != shape:
            raise ValueError(f"values and valid must be [B], got {list(shape)} and {list(self.valid.shape)}")
        for name, figure in self.details.items():
            if figure.shape != shape:
                raise ValueError(f"detail {name!r} must be {list(shape)}, got {list(figure.shape)}")
        for name, texts in self.notes.items():
            if len(texts) != len(self):
                raise ValueError(f"note {name!r} must have {len(self)} texts, got {len(texts)}")

    @classmethod
    def of(cls, values: Tensor, **details: Tensor) -> Scores:
        """Scores whose samples are valid where the value is finite."""
        values = values.float()
        return cls(values, values.isfinite(), details)

    @classmethod
    def cat(cls, batches: Sequence[Scores]) -> Scores:
        """The scores of consecutive batches as one. A note is "" in a batch that lacks it.

        Raises ValueError where their details differ.
        """
        import torch

        first = batches[0]
        for other in batches:
            if other.details.keys() != first.details.keys():
                names = [", ".join(s.details) or "none" for s in (first, other)]
                raise ValueError(f"every batch must give the same details, got {names[0]}, and then {names[1]}")
        return cls(
            torch.cat([s.values for s in batches]),
            torch.cat([s.valid for s in batches]),
            {name: torch.cat([s.details[name] for s in batches]) for name in first.details},
            {n: Part(p.weight, cls.cat([s.parts[n].scores for s in batches])) for n, p in first.parts.items()},
            {
                name: [text for s in batches for text in s.notes.get(name, [""] * len(s))]
                for name in dict.fromkeys(name for s in batches for name in s.notes)
            },
        )

    def __len__(self) -> int:
        return int(self.values.shape[0])


def plain(compute: Callable[[], T]) -> T:
    """Call `compute` so that its tensors are everybody's, whatever mode the first who asks for it is in."""
    import torch

    with torch.inference_mode(False), torch.no_grad():
        return compute()


def find_finite(images: Tensor) -> Tensor:
    """Find the images `[B, ...]` without NaN or infinity, `[B]` bool."""
    flat = images.flatten(1)
    # NaN and infinity stay in a sum, which is 15 times as quick as a look at each number.
    finite = flat.sum(1).isfinite()
    # The sum of large numbers may be infinite too, so where one is, look at all.
    return finite if bool(finite.all()) else flat.isfinite().all(1)


class Part(NamedTuple):
    """One member of a composed reward."""

    weight: float
    scores: Scores
