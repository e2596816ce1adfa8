"""Weights from local paths and the Hugging Face hub: safetensors, or old pickles read as tensors only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

CUT = "The file may be cut short or of another kind; download it again."


def find_file(checkpoint: str, name: str) -> Path:
    """A local file, `name` in a local folder, or `name` of a hub id. Raises OSError where there is none."""
    path = Path(checkpoint).expanduser()
    if path.is_file():
        return path
    if (path / name).is_file():
        return path / name
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(checkpoint, name))
    except Exception as error:  # Bad ids, no network, no access: each its own class.
        raise OSError(
            f"Looked for a file {checkpoint!r}, for {name} in a folder of that name and on the Hugging Face "
            f"hub: {' '.join(str(error).split())[:300]} checkpoint=PATH takes a local file or folder, which "
            "works offline."
        ) from error


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a file, by name; a `state_dict` inside is taken out. No code in it is run.

    Raises OSError for a file that is cut short, or that holds anything but tensors and plain values.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise OSError(f"Cannot read weights from {path}: {' '.join(str(error).split())[:200]} {CUT}") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise OSError(f"{path} holds no state dict of tensors but {type(content).__name__}.")
    return dict(content)


def load_exactly(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    name: Callable[[str], str] = str,
    unused: Collection[str] = (),
) -> None:
    """Load every tensor of the file into the module, and leave none of its weights out.

    name: what the file calls a weight of the module. unused: names that the file may hold beside them.
    Raises OSError that names missing, unexpected and mis-shaped weights.
    """
    mine = {name(key): (key, weight) for key, weight in module.state_dict().items()}
    wrong = {
        "missing": [n for n in mine if n not in tensors],
        "unexpected": [n for n in tensors if n not in mine and n not in unused],
        "of another shape": [
            f"{n} {list(tensors[n].shape)} for {list(weight.shape)}"
            for n, (_, weight) in mine.items()
            if n in tensors and tensors[n].shape != weight.shape
        ],
    }
    said = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
        for what, names in wrong.items()
        if names
    ]
    if said:
        raise OSError(
            f"{path} does not hold the {len(mine)} weights of {type(module).__name__}: {'; '.join(said)}."
        )
    module.load_state_dict({key: tensors[n] for n, (key, _) in mine.items()}, assign=True)


def load_pretrained(cls: Any, checkpoint: str, unused: Callable[[str], bool]) -> Any:
    """A transformers model in float32, in safetensors, from a local folder or the hub.

    unused: which tensors the file may hold that the model has no place for.
    Raises OSError where there is none, and where it lacks a weight or holds one too many.
    """
    try:
        model, info = cls.from_pretrained(
            checkpoint,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except SafetensorError as error:
        raise OSError(f"Cannot read weights from {checkpoint!r}: {error}. {CUT}") from error
    except (OSError, ValueError) as error:
        raise OSError(
            f"Looked for a {cls.__name__} in safetensors in a folder {checkpoint!r} and on the Hugging Face "
            f"hub: {' '.join(str(error).split())[:300]} checkpoint=PATH takes a local folder, which works "
            "offline."
        ) from error
    # transformers would put random numbers in the place of what is wrong, and warn.
    parameters = {name for name, _ in model.named_parameters()}
    wrong = {
        "missing": sorted(set(info["missing_keys"]) & parameters),
        "unexpected": sorted(name for name in info["unexpected_keys"] if not unused(name)),
        "of another shape": sorted(str(name) for name, *_ in info["mismatched_keys"]),
    }
    said = [f"{len(names)} {what}, such as {names[0]!r}" for what, names in wrong.items() if names]
    if said:
        raise OSError(f"{checkpoint!r} is no whole {cls.__name__}; tensors {'; '.join(said)}.")
    return model
