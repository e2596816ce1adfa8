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
    from .api.result import TrainedRun
    from .api.training import resume, train
    from .errors import NftError, UsageError
    from .evaluation.api import evaluate
    from .evaluation.sample import sample
    from .scoring.composer import compose, reward
    from .scoring.images import score_images

__all__ = [
    "NftError",
    "TrainedRun",
    "UsageError",
    "compose",
    "evaluate",
    "resume",
    "reward",
    "sample",
    "score_images",
    "train",
]

#: Where each name is. It is imported on demand, so that `nft --help` and `import nft_core` import no torch.
PLACES = {
    "NftError": "errors",
    "TrainedRun": "api.result",
    "UsageError": "errors",
    "compose": "scoring.composer",
    "evaluate": "evaluation.api",
    "resume": "api.training",
    "reward": "scoring.composer",
    "sample": "evaluation.sample",
    "score_images": "scoring.images",
    "train": "api.training",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
