"""The core of nft-hub: plug-in host, reward composer, the NFT loop and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .scoring.composer import compose, reward

__all__ = ["compose", "reward"]


def __getattr__(name: str) -> Any:
    # On demand, so that `nft --help` imports no torch.
    if name in __all__:
        from .scoring import composer

        return getattr(composer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
