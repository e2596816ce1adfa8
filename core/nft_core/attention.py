"""Which of torch's kernels computes attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from .errors import NftError

Attention = Literal["auto", "cudnn", "flash", "flash3", "efficient", "math"]
ATTENTION: tuple[Attention, ...] = get_args(Attention)
KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,  # Which `activate_attention` has replaced.
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def activate_attention(name: Attention) -> None:
    """Load what a kernel needs that torch does not bring: FlashAttention 3 is a package of its own.

    Raises NftError where it is not installed, or this torch cannot use it.
    """
    if name != "flash3":
        return
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


@contextmanager
def attention_kernel(name: Attention) -> Iterator[None]:
    """Inside, `scaled_dot_product_attention` takes this kernel first, and another where it cannot.

    auto: torch's own choice. A mask or a head that is too wide is what a kernel may refuse.
    """
    if name == "auto":
        yield
        return
    with sdpa_kernel([KERNELS[name], SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], set_priority=True):
        yield
