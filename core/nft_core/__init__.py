"""The core of nft-hub: plug-in host, reward composer, the NFT loop and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    from nft_plugins import CONTRACT  # noqa: F401
except ImportError as error:
    if error.name != "nft_plugins":
        raise
    # An nft-hub of before nft-plugins brought these files itself, and takes them away when it is upgraded.
    raise ImportError(
        f"nft-hub needs the package nft-plugins, and its files are not here ({error}). Run pip install "
        "--force-reinstall --no-deps nft-plugins, or in nft-hub's folder pip install -e nft_plugins -e .",
        name=error.name,
    ) from error

if TYPE_CHECKING:
    from .scoring.composer import compose, reward

__all__ = ["compose", "reward"]


def __getattr__(name: str) -> Any:
    # On demand, so that `nft --help` imports no torch.
    if name in __all__:
        from .scoring import composer

        return getattr(composer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
