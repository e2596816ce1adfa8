"""What is looked for in a model's files before they are loaded: pickles, code, and sizes that do not fit."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

#: Suffixes of pickles, which can run anything when they are read.
PICKLED = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
#: Makes one safetensors file of pickles, of tensors alone. Without quotation marks that shells differ in.
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "parts = [torch.load(f, map_location='cpu', weights_only=True) for f in sys.argv[2:]]; "
    "save_file({k: v.clone(memory_format=torch.contiguous_format) for p in parts "
    "for k, v in p.get('state_dict', p).items()}, sys.argv[1], {'format': 'pt'})"
)
#: Numbers that a model may have beside its file's: tables of positions and the like.
TABLES = 2**24


def explain_pickles(pickles: Iterable[Path], target: Path) -> OSError:
    """Make the error that says why pickles are not read, with the command that converts them to `target`."""
    paths = [str(target), *map(str, pickles)]
    files = subprocess.list2cmdline(paths) if os.name == "nt" else shlex.join(paths)
    return OSError(
        f"{', '.join(paths[1:])}: pickled weights can run code when they are read, so safetensors are read "
        f'alone. This converts tensors and refuses anything else: python -c "{CONVERT}" {files}'
    )


def read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Read the dtype and the shape of each tensor of a safetensors file. Raises OSError where it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()
            slices = {name: opened.get_slice(name) for name in names}
            return {name: (str(x.get_dtype()), x.get_shape()) for name, x in slices.items()}
    except SafetensorError as error:
        with file.open("rb") as raw:
            pointer = raw.read(20).startswith(b"version https://git")
        lfs = "it is a pointer of Git LFS: git lfs pull brings the file."
        cut = f"{error}. The file may be cut short or of another kind; download it again."
        raise OSError(f"Cannot read weights from {file}: {lfs if pointer else cut}") from error


def check_attention(config: Any, file: str) -> None:
    """Raise OSError where a transformers config, or one inside it, names a hub repository as its attention.

    transformers would run that repository's code. file: where the config is from.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        attention = getattr(part, "_attn_implementation", None)
        if attention and "/" in str(attention):
            raise OSError(
                f"{file} asks for code of {attention!r} as attn_implementation, and no code of a checkpoint is "
                "run; take that line out."
            )


@contextmanager
def limit_tensors(tensors: int, what: str = "the config") -> Iterator[None]:
    """Raise OSError as soon as a model that is made inside has far more weights than its files have tensors.

    A config can ask for so many layers that making them, even without memory for numbers, never ends.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > 4 * tensors + 1000:  # A file may hold in one tensor what a model has in a few.
            raise OSError(
                f"{what} is of more than {made - 1:,} tensors, expected about {tensors:,}. Its files may be "
                "cut short or of another model; download them again."
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
