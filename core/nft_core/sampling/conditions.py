"""Encodes prompts once, keeps their conditions in memory or in a file, and hands out rows of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from nft_plugins import Condition, FlowModel

from ..environment import read_number
from ..parallel import processes
from ..parallel.devices import copy_to_device
from ..prompts import Prompt

CPU = torch.device("cpu")
#: Bytes of encodings that each process may hold in memory.
MOST_HELD = 2 * 2**30
#: Texts that a model encodes at once: few enough to be held in memory twice.
AT_ONCE = 1024
#: Beside the model's files, what an encoding depends on.
LIBRARIES = ("torch", "transformers", "diffusers")
#: As safetensors names dtypes.
DTYPES = {
    **{torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"},
    **{torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"},
    **{torch.uint8: "U8", torch.bool: "BOOL"},
}


@dataclass(frozen=True)
class Encoded:
    """Holds the conditions of a file's prompts. Equal texts share a row, and prompts never drawn have none.

    condition: tensors with a row for each text. row: `[prompts]` int64, each prompt's row, or -1.
    """

    condition: Condition
    row: Tensor

    def take_rows(self, prompts: Tensor, device: torch.device) -> Condition:
        """Take the row of each prompt, `prompts [B]` being their indices; copies each different row once.

        A group's images have one prompt, so there are fewer rows than images.
        """
        rows, places = torch.unique(self.row[prompts], return_inverse=True)
        places = copy_to_device(places, device)
        return {
            name: copy_to_device(c[rows.to(c.device)], device)[places] for name, c in self.condition.items()
        }


def encode_prompts(
    model: FlowModel,
    prompts: Sequence[Prompt],
    drawn: Iterable[int],
    cache: Path | None = None,
    device: torch.device = CPU,
) -> Encoded:
    """Encode the prompts at these indices, or read them from a folder, the cache, where they are.

    Of several processes the first one of each machine writes the cache, and all of them map the same file. More
    than MOST_HELD bytes go to such a file without a cache too: 25,000 prompts of a model with a T5 are 40 GB,
    which each process would hold. Once all have mapped that file its name is removed: it goes with the run.

    device: the one that processes use to send things to one another.
    """
    texts = list(dict.fromkeys(prompts[i].text for i in drawn))
    row = {text: i for i, text in enumerate(texts)}
    rows = torch.tensor([row.get(p.text, -1) for p in prompts], dtype=torch.int64, device="cpu")
    if not texts:
        return Encoded(model.encode(texts), rows)
    if cache is not None:
        return Encoded(encode_to_file(model, texts, cache), rows)
    # All rows of a model have one size, so one text tells how much memory all will take.
    one = model.encode(texts[:1])
    if len(texts) * sum(r.nbytes for r in one.values()) <= MOST_HELD:
        return Encoded(model.encode(texts), rows)
    folder = make_scratch(device)
    try:
        condition = encode_to_file(model, texts, folder)
        # Nobody removes the file's name before all have opened it.
        processes.barrier()
    finally:
        if is_first_on_machine():
            shutil.rmtree(folder, ignore_errors=True)
    return Encoded(condition, rows)


def encode_negative(model: FlowModel, text: str, device: torch.device) -> Condition:
    """Encode the negative prompt of guidance, as the model's pipeline does: one row, on `device`."""
    row = getattr(model, "encode_negative", model.encode)([text])
    return {name: copy_to_device(c, device) for name, c in row.items()}


def encode_to_file(model: FlowModel, texts: Sequence[str], folder: Path) -> Condition:
    """Encode texts to a file of the folder and map it; returns them in memory where it cannot be written."""
    file = folder / f"{digest_encodings(model, texts)}.safetensors"
    if is_first_on_machine() and not is_readable(file):
        write_encodings(model, texts, file)
    # The others wait until the file is whole.
    processes.barrier()
    # `load_file` maps the file: pages are read when they are needed, and shared by all processes.
    return load_file(file) if is_readable(file) else model.encode(texts)


def is_readable(file: Path) -> bool:
    """Tell whether a file of the cache can be read; one that was cut short, as by a full disk, cannot."""
    if not file.is_file():
        return False
    try:
        with safe_open(file, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def is_first_on_machine() -> bool:
    """Tell whether this is the first process of its machine."""
    return read_number("LOCAL_RANK", 0) == 0


def make_scratch(device: torch.device) -> Path:
    """Make a folder among the machine's temporary files, the same for all processes of a machine."""
    folder = tempfile.mkdtemp(prefix="nft-encoded-") if is_first_on_machine() else ""
    mine = json.dumps([socket.gethostname(), folder])
    everyones = [json.loads(text) for text in processes.gather_texts(mine, device)]
    # Only processes of one machine see the same folder, and hosts' names tell machines apart.
    here = [path for host, path in everyones if host == socket.gethostname() and path]
    return Path(here[0] if here else tempfile.gettempdir())


def digest_encodings(model: FlowModel, texts: Sequence[str]) -> str:
    """Digest all that encodings depend on: another model, file, option, library or text gives another name."""
    plain = (int, float, str, torch.dtype)
    # Plain attributes are the family's options; modules and tensors are known by their files.
    options = {n: repr(v) for n, v in sorted(vars(model).items()) if isinstance(v, plain)}
    files = sorted(f for f in Path(model.name).rglob("*") if f.is_file()) if Path(model.name).is_dir() else []
    parts: list[Any] = [
        type(model).__qualname__,
        options,
        # For a model of the hub this is the folder of its revision, whose name changes with its files.
        str(getattr(getattr(model.transformer, "config", None), "_name_or_path", "")),
        [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files],
        str(getattr(model, "device", "")).partition(":")[0],
        [version(name) for name in LIBRARIES],
        list(texts),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def write_encodings(model: FlowModel, texts: Sequence[str], file: Path) -> None:
    """Encode texts into a file, a part at a time, so that it may be larger than the memory.

    A cache is a convenience: where it cannot be written, the user is told, and the run goes on without.
    """
    # Written aside and renamed, so that a run that is cut off leaves no half of a file under the final name.
    aside = file.with_name(f".{uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        views: dict[str, Tensor] = {}
        for start in range(0, len(texts), AT_ONCE):
            condition = model.encode(texts[start : start + AT_ONCE])
            views = views or map_new_file(aside, condition, len(texts))
            for name, rows in condition.items():
                views[name][start : start + len(rows)] = rows.cpu()
        aside.replace(file)
    except OSError as error:
        print(f"Encoded prompts are not kept in {file.parent}: {error}.", file=sys.stderr)
    finally:
        with suppress(OSError):  # It is there only after an error or an interrupt.
            aside.unlink()


def map_new_file(file: Path, condition: Condition, count: int) -> dict[str, Tensor]:
    """Make a safetensors file for `count` rows of each tensor, and map it: writing to a tensor writes to the
    file.

    Raises OSError where the disk is too small: to write into a map without room behind it would kill the
    process.
    """
    # By hand, since safetensors itself can only write tensors that are in memory as a whole.
    header: dict[str, Any] = {}
    end = 0
    # The widest numbers first, so that each begins at a multiple of its size.
    for name, rows in sorted(condition.items(), key=lambda item: -item[1].element_size()):
        start, end = end, end + count * rows[0].numel() * rows.element_size()
        shape = [count, *rows.shape[1:]]
        header[name] = {"dtype": DTYPES[rows.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)  # With 8 bytes of length before it: a multiple of 64.
    free = shutil.disk_usage(file.parent).free
    if end > free:
        raise OSError(f"they take {end / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB left")
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        begin = opened.tell()
        opened.truncate(begin + end)
        if hasattr(os, "posix_fallocate") and end:  # Reserves the room, which another program might take.
            os.posix_fallocate(opened.fileno(), begin, end)
    whole = torch.from_file(str(file), shared=True, size=begin + end, dtype=torch.uint8)[begin:]
    views = {}
    for name, rows in condition.items():
        start, end = header[name]["data_offsets"]
        views[name] = whole[start:end].view(rows.dtype).view(header[name]["shape"])
    return views
