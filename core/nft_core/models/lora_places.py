"""Where the file of a LoRA lies: what --lora may name, on this machine or on the hub."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from nft_plugins.files import PICKLED

from ..errors import UsageError, shorten_error
from .hub import fetch_file, is_fetched
from .paths import describe_path, is_lora
from .run_folders import find_checkpoint
from .small_files import DIFFUSERS_FILE, PEFT_CONFIG, PEFT_FILE, list_files

#: A hub id, or one with the name of a file behind it.
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<file>[\w./ -]+\.safetensors))?")


def find_lora(name: str) -> Path:
    """Find the file of a LoRA by its path or hub id. Raises UsageError."""
    path = Path(name).expanduser()
    if path.is_file():
        file = path
    elif path.is_dir():
        file = find_lora_file(path)
    else:
        file = fetch_lora(name)
    if file.suffix != ".safetensors":
        raise UsageError(f"--lora {name}: {describe_path(file)} A LoRA is read from a safetensors file.")
    return file


def find_lora_file(folder: Path) -> Path:
    """Find the LoRA in a folder: of diffusers, of peft, of the published script or of a run."""
    checkpoint = find_checkpoint(folder)
    if checkpoint and (checkpoint / "transformer").is_dir():
        raise UsageError(
            f"--lora {folder}: this run trained the whole transformer, not a LoRA. Give it as the model: "
            f"--model {shlex.quote(str(folder))}"
        )
    for place in (checkpoint or folder, folder / "lora"):
        for name in (DIFFUSERS_FILE, PEFT_FILE):
            if (place / name).is_file():
                return place / name
    found = [file for file in list_files(folder, ".safetensors") if is_lora(file)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"--lora {folder}: it holds {len(found)} LoRAs: name one of {', '.join(f.name for f in found)}."
        )
    if pickles := list_files(folder, *PICKLED):
        raise UsageError(f"--lora {folder}: {describe_path(pickles[0])}")
    raise UsageError(
        f"--lora {folder}: there is no LoRA in this folder. Expected {DIFFUSERS_FILE}, or {PEFT_FILE} and "
        f"{PEFT_CONFIG}."
    )


def fetch_lora(name: str) -> Path:
    """Fetch a LoRA from the hub, or from what was fetched before.

    name: `OWNER/NAME`, or `OWNER/NAME/FILE.safetensors` for one of several files.
    """
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    match = HUB_ID.fullmatch(name)
    if not match:
        raise UsageError(f"--lora {name}: there is no such file or folder, and it is no hub id (OWNER/NAME).")
    repo, file = match["repo"], match["file"]
    try:
        if file:
            return fetch_file(repo, file)
        places = (DIFFUSERS_FILE, PEFT_FILE, f"lora/{PEFT_FILE}")
        # What was fetched before is found without a network.
        for expected in sorted(places, key=lambda place: not is_fetched(repo, place)):
            try:
                found = fetch_file(repo, expected)
                if expected.endswith(PEFT_FILE):
                    fetch_file(repo, expected.replace(PEFT_FILE, PEFT_CONFIG))
                return found
            except EntryNotFoundError:
                continue
        files = [f for f in list_repo_files(repo) if f.endswith(".safetensors") and "/" not in f]
        if len(files) == 1:
            return fetch_file(repo, files[0])
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UsageError(
            f"--lora {name}: there is no such file or folder, and it cannot be read from the Hugging Face hub: "
            f"{shorten_error(error)}"
        ) from error
    listed = ", ".join(f"{repo}/{f}" for f in files[:4]) or "none"
    raise UsageError(f"--lora {name}: which of its files is the LoRA? Give one as --lora: {listed}.")
