"""Counts what a computation takes, on the meta device: bytes that are alive at once, and FLOPs.

Meta tensors have shapes and dtypes and no numbers, so the real code of a model of any size runs there in
seconds, on any machine. What kernels use inside themselves is not seen, such as workspaces of convolutions.

torch's own FakeTensorMode knows CUDA's autocast and needs none of the rules below. But a backward pass on its
CUDA tensors ends the process where torch is built for the CPU alone, and plans are made on laptops too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

#: Operations that torch.autocast computes in 16 bits on CUDA, and in float32 (torch's "Autocast Op Reference").
# fmt: off
LOWER = frozenset((
    "matmul", "rmatmul", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "chain_matmul", "multi_dot",
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "einsum",
    "linear", "mm", "mv", "prelu", "scaled_dot_product_attention",
))
FLOAT32 = frozenset((
    "pow", "rpow", "square", "reciprocal", "rdiv", "rsqrt", "exp", "expm1", "log", "log10", "log1p", "log2",
    "acos", "asin", "cosh", "sinh", "tan", "erfinv", "cdist", "dist", "cosine_similarity", "normalize",
    "group_norm", "layer_norm", "rms_norm", "interpolate", "softplus", "mse_loss", "l1_loss", "smooth_l1_loss",
))
#: Those that compute in float32 and convert as they go, without a copy of what they are given.
ON_THE_WAY = frozenset(("cumprod", "cumsum", "linalg_vector_norm", "log_softmax", "prod", "softmax", "sum"))
# fmt: on
#: Images that computations are counted for. With one image, some operations are left out.
FEW, MORE = 2, 3


class AsOnGpu(TorchFunctionMode):
    """Makes operations treat meta tensors as those of a GPU: by autocast's rules, and with fused attention.

    torch.autocast itself does not know meta tensors.
    autocast: its dtype, or None.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.autocast = autocast
        self.casts: dict[int, Tensor] = {}

    def __exit__(self, *error: Any) -> None:
        self.casts.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        name = name.strip("_") if name.startswith("__") else name  # But `pow_`, in place, is not `pow`.
        if self.autocast and name in ON_THE_WAY and is_half(args[0]):
            given.setdefault("dtype", torch.float32)
        if self.autocast and name in LOWER | FLOAT32:
            to = self.autocast if name in LOWER else torch.float32
            args = [self.cast(x, to) for x in args]
            given = {key: self.cast(x, to) for key, x in given.items()}
        if func is F.scaled_dot_product_attention and any(map(on_meta, (*args, *given.values()))):
            return fuse_attention(*args, **given)
        return func(*args, **given)

    def cast(self, x: Any, to: torch.dtype) -> Any:
        """Convert a tensor as torch.autocast does; anything else is returned as it is."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype in (to, torch.float64):
            return x
        # Weights that are trained are cast once, and kept until autocast ends: they take memory all the while.
        if x.dtype == torch.float32 and x.is_leaf and x.requires_grad:
            if id(x) not in self.casts:
                self.casts[id(x)] = x.to(to)
            return self.casts[id(x)]
        return x.to(to)


def on_meta(x: Any) -> bool:
    """Say whether this is a tensor on the meta device."""
    return isinstance(x, Tensor) and x.is_meta


def is_half(x: Any) -> bool:
    """Say whether this is a tensor of 16-bit numbers."""
    return isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)


def fuse_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **options: Any
) -> Tensor:
    """Attend as CUDA's kernels do, which keep no matrix; torch uses the plain formula on meta tensors."""
    scale = options.get("scale")
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, False, False, scale=scale)[0]  # type: ignore[no-any-return]
    bias = attn_mask if attn_mask.is_floating_point() else torch.zeros_like(attn_mask, dtype=query.dtype)
    bias = bias.expand(*query.shape[:2], query.shape[2], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    saved = torch.is_grad_enabled() and query.requires_grad
    return efficient(query, key, value, bias, saved, scale=scale)[0]  # type: ignore[no-any-return]


def recompute_as_on_gpu(transformer: torch.nn.Module, autocast: torch.dtype | None) -> None:
    """Switch on gradient checkpointing, with `AsOnGpu` in the second forward pass too.

    That pass is a part of the backward one, in which no mode of the first is on any more.
    """
    again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), AsOnGpu(autocast)))
    transformer.enable_gradient_checkpointing(again)  # type: ignore[operator]


class Live(TorchDispatchMode):
    """Counts the bytes that operations inside leave alive, on one kind of device, and their FLOPs.

    now: bytes alive. after: the same after each operation. marked: the number of operations up to `mark`.
    flops: of matrix products, convolutions and attention.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.now = self.flops = self.marked = 0
        self.after: list[int] = []
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        # torch counts FLOPs only for its costly operations; the rest hardly matters.
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
        # A view, or a change in place, gives back memory that was there already.
        given = {storage._cdata for storage in self.list_storages((args, kwargs))}
        for storage in self.list_storages(result):
            if storage._cdata not in given and storage._cdata not in self._alive:
                self.now += storage.nbytes()
                # Python frees a tensor when its last name goes, and this is called then: what is alive is known
                # at any time.
                gone = partial(self._gone, storage._cdata, storage.nbytes())
                self._alive[storage._cdata] = weakref.ref(storage, gone)
        self.after.append(self.now)
        return result

    def mark(self) -> None:
        """Mark a point of interest, such as the end of the forward pass."""
        self.after.append(self.now)  # What the operation before had at hand may be gone.
        self.marked = len(self.after)

    def list_storages(self, value: Any) -> list[Any]:
        """List the memory of all tensors in a value, however deep it is nested."""
        tensors = (x for x in tree_leaves(value) if isinstance(x, Tensor))
        return [x.untyped_storage() for x in tensors if x.device.type == self.device]

    def _gone(self, key: int, size: int, reference: Any) -> None:
        del self._alive[key]
        self.now -= size


@dataclass(frozen=True, eq=False)
class Growth:
    """Knows a computation's memory for any number of images.

    few, more: bytes alive after each of its operations, int64, for FEW and for MORE images.
    mark: the number of operations up to a point of interest. flops: for an image.

    The same operations run for every number. The bytes that each leaves alive are a constant and an amount for
    each image; which operation has the most may change with the number.
    """

    few: Tensor
    more: Tensor
    mark: int
    flops: float

    def peak(self, images: int) -> int:
        """Count the most bytes that are alive at once."""
        return int(self._for(images).max())

    def held(self, images: int) -> int:
        """Count the bytes that are alive at the mark."""
        return int(self._for(images)[self.mark - 1])

    def _for(self, images: int) -> Tensor:
        return self.few + (images - FEW) * (self.more - self.few) // (MORE - FEW)


def count_growth(compute: Callable[[int, Callable[[], None]], object], device: str = "meta") -> Growth:
    """Count what `compute(images, mark)` takes; it may call `mark()` at the point of interest."""
    found = []
    for images in (FEW, MORE):
        with Live(device) as live:
            compute(images, live.mark)
        found.append(live)
    few, more = (torch.tensor(live.after, dtype=torch.int64, device="cpu") for live in found)
    marks = [live.marked or len(live.after) for live in found]
    if len(few) != len(more):  # A loop over images: only the mark and the largest of all can be compared.
        few, more = (torch.stack([x[at - 1], x.max()]) for x, at in zip((few, more), marks, strict=True))
        marks = [1]
    return Growth(few, more, marks[0], (found[1].flops - found[0].flops) / (MORE - FEW))
