"""Asks the Hugging Face hub for small files, before any library of models is imported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

#: How a card names what its reward loads: a hub id, and behind a colon one of its files.
NAMED = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::.*)?", re.DOTALL)


def fetch_file(repository: str, name: str) -> Path:
    """Find a file of a hub repository among those fetched before, or fetch it. Raises OSError and ValueError.

    Where there is no network this fails at once: huggingface_hub alone would try for half a minute.
    """
    from huggingface_hub import hf_hub_download

    if not is_fetched(repository, name):
        ask_hub(repository, name)
    return Path(hf_hub_download(repository, name))


def is_fetched(repository: str, name: str) -> bool:
    """Say whether a file of a hub repository was fetched. Raises ValueError for names of another form."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, name), str)


def ask_hub(repository: str, name: str) -> None:
    """Ask the hub once for a file. Raises ConnectionError where no hub answers, OSError where it has none."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repository, name))
    except OSError:  # What the hub answers, or its own ConnectionError where HF_HUB_OFFLINE is set.
        raise
    except Exception as error:  # Each of its clients has errors of its own for a network that is not there.
        raise ConnectionError(f"the Hugging Face hub cannot be reached: {error}.") from error


def find_unfetched(files: Iterable[str]) -> list[str]:
    """Find the hub repositories, of those that a card names, from which nothing was fetched yet."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    named = dict.fromkeys(match[1] for file in files if (match := NAMED.fullmatch(file)))
    return [
        name
        for name in named
        if not (Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots").is_dir()
    ]
