"""Which of torch's kernels computes attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import NftError
from ..settings import Attention

KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,  # Which `activate_flash3` replaces.
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@contextmanager
def attention_kernel(name: Attention) -> Iterator[None]:
    """Inside, torch's attention takes this kernel first, in all threads, and another where it cannot.

    auto: torch's own choice. A mask or a head that is too wide is what a kernel may refuse.
    Raises NftError where the kernel is not there.
    """
    if name == "auto":
        yield
        return
    if name == "flash3":
        activate_flash3()
    # The other two stand behind it: without them torch would raise where the first refuses its input.
    with sdpa_kernel([KERNELS[name], SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        yield


def activate_flash3() -> None:
    """Put FlashAttention 3, which is a package of its own, in the place of torch's own FlashAttention."""
    activate = getattr(attention, "activate_flash_attention_impl", None)
    if activate is None:
        raise NftError("attention = flash3 needs torch 2.11 or later; without it use attention=auto.")
    try:
        activate("FA3")
    except (ImportError, RuntimeError, ValueError) as error:
        raise NftError(
            f"attention = flash3 cannot be used here: {error}. It needs a Hopper GPU and FlashAttention 3, "
            "whose module is called flash_attn_interface; without it use attention=auto or attention=cudnn."
        ) from error
