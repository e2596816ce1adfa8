"""Turns batches and scores into bytes and back, for rewards in another process or on another machine.

A message is `NFTW`, its version, the lengths of its two parts, and the parts: JSON for texts and numbers, and
a safetensors file for images and scores. Nothing in it can run code. Whatever does not fit raises WireError,
before anything is computed, and a message takes a small multiple of its own length in memory.

Either side works with torch, or without it with NumPy. Messages with tensors need the package safetensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .data import Batch, Part, Scores, find_finite

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")

#: The version of this format. Both sides must have the same.
VERSION = 1
#: What a message begins with: `NFTW`, the version, and the bytes of JSON and of tensors.
PREFIX = struct.Struct("<4sHxxIQ")
MAGIC = b"NFTW"
#: Bytes of a message, and of its JSON, at most. Servers that strangers reach want less.
LARGEST, LARGEST_TEXT = 4 << 30, 8 << 20
#: Bytes that are asked for at once: a peer that promises much and sends little costs little.
CHUNK = 4 << 20
#: Rewards that are made of others are as deep as this at most.
DEEPEST = 8


class WireError(ValueError):
    """What came is no message that can be used, or what is to be sent cannot be a message."""


class Message(NamedTuple):
    """A message as it was read. tensors: torch's or NumPy's, by name."""

    head: dict[str, Any]
    tensors: dict[str, Any]


def encode_message(head: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> bytes:
    """Write a message. Raises WireError where `head` is not JSON.

    tensors: all torch's, or all NumPy's.
    """
    return b"".join(encode_pieces(head, tensors))


def encode_pieces(head: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> tuple[bytes, bytes]:
    """Write a message as `encode_message` does, in two pieces: what is sent so need not be copied into one."""
    try:
        text = json.dumps(head, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise WireError(f"texts and metadata must be JSON to be sent to another process: {error}") from error
    body = write_tensors(tensors) if tensors else b""
    return PREFIX.pack(MAGIC, VERSION, len(text), len(body)) + text, body


def decode_message(data: bytes, *, limit: int = LARGEST, text_limit: int = LARGEST_TEXT) -> Message:
    """Read a message. Raises WireError for anything that is not exactly one."""
    text, body = check_prefix(data[: PREFIX.size], limit, text_limit)
    if len(data) != PREFIX.size + text + body:
        raise WireError(f"a message of {PREFIX.size + text + body} bytes was announced, and {len(data)} came")
    start = PREFIX.size + text
    try:
        head = json.loads(bytes(data[PREFIX.size : start]), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the JSON of a message cannot be read: {error}") from error
    if not isinstance(head, dict):
        raise WireError(f"the JSON of a message must be an object, got {type(head).__name__}")
    return Message(head, read_tensors(bytes(data[start:])) if body else {})


def refuse_constant(name: str) -> None:
    """Raise ValueError for NaN and the infinities, which JSON does not have and Python reads."""
    raise ValueError(f"{name} is no number of JSON")


def check_prefix(prefix: bytes, limit: int = LARGEST, text_limit: int = LARGEST_TEXT) -> tuple[int, int]:
    """Read the lengths of JSON and of tensors from a message's first bytes. Raises WireError."""
    if len(prefix) != PREFIX.size or not prefix.startswith(MAGIC):
        raise WireError(f"expected a message of nft-hub, got {bytes(prefix[:20])!r}")
    _, version, text, body = PREFIX.unpack(prefix)
    if version != VERSION:
        raise WireError(f"expected a message of version {VERSION}, got one of version {version}")
    if text > text_limit or PREFIX.size + text + body > limit:
        raise WireError(
            f"a message may have {limit} bytes, {text_limit} of them JSON; this one has {text} of JSON "
            f"and {body} more"
        )
    return int(text), int(body)


def read_message(
    read: Callable[[int], bytes], *, limit: int = LARGEST, text_limit: int = LARGEST_TEXT
) -> bytes | None:
    """Read the bytes of one message from a stream; None where the stream has ended.

    read: returns at most as many bytes as it is asked for, and none at the end, as `socket.recv` does.
    Raises WireError where what comes is no message, or ends within one.
    """
    prefix = read_exactly(read, PREFIX.size, b"")
    if prefix is None:
        return None
    text, body = check_prefix(prefix, limit, text_limit)
    return read_exactly(read, PREFIX.size + text + body, prefix)


def read_exactly(read: Callable[[int], bytes], size: int, begun: bytes) -> bytes | None:
    """Read until there are `size` bytes, those that came before among them; None for nothing at all."""
    parts, have = [begun], len(begun)
    while have < size:
        part = read(min(size - have, CHUNK))
        if not part:
            if not have:
                return None
            raise WireError(f"a message of {size} bytes ended after {have}")
        parts.append(part)
        have += len(part)
    return b"".join(parts)


def write_tensors(tensors: Mapping[str, Any]) -> bytes:
    """Write tensors as a safetensors file."""
    if all(hasattr(tensor, "detach") for tensor in tensors.values()):
        from safetensors.torch import save

        return save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
    import numpy as np
    from safetensors.numpy import save as save_arrays

    return save_arrays({name: np.ascontiguousarray(array) for name, array in tensors.items()})


def read_tensors(data: bytes) -> dict[str, Any]:
    """Read a safetensors file: torch's tensors, or NumPy's arrays where torch is not installed."""
    try:
        if has_torch():
            from safetensors.torch import load

            return load(data)
        from safetensors.numpy import load as load_arrays

        return load_arrays(data)
    except ImportError:
        raise
    except Exception as error:  # The library has errors of its own, and raises KeyError for a dtype.
        raise WireError(f"the tensors of a message cannot be read: {type(error).__name__}: {error}") from error


def has_torch() -> bool:
    """Tell whether torch is installed, without importing it."""
    return find_spec("torch") is not None


def pack_batch(batch: Batch, *, floats: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make what a message about a batch has: its JSON and its tensors.

    floats: send the images as they are, float32, in place of 8 bits.
    """
    head = {"prompts": list(batch.prompts), "metadata": [dict(m) for m in batch.metadata]}
    tensors = {"images": batch.images if floats else batch.uint8, "groups": batch.groups}
    if not floats:
        # 8 bits cannot say that an image has NaN in it, which rewards mark as invalid.
        whole = find_finite(batch.images)
        if not bool(whole.all()):
            tensors["whole"] = whole
    return head, tensors


def unpack_batch(message: Message, device: str = "cpu") -> Batch:
    """Make the batch that a message is about. Raises WireError where it is none.

    device: where its images are put. Without torch it is not read, and the batch has NumPy's arrays.
    """
    prompts: Any = message.head.get("prompts")
    metadata: Any = message.head.get("metadata")
    if not is_list_of(prompts, str) or not is_list_of(metadata, dict):
        raise WireError("a batch needs prompts, a list of texts, and metadata, a list of objects")
    images, groups = message.tensors.get("images"), message.tensors.get("groups")
    shape = None if images is None else list(images.shape)
    if shape is None or len(shape) != 4 or shape[1] != 3 or name_dtype(images) not in ("uint8", "float32"):
        raise WireError(f"a batch needs images [B, 3, H, W] of uint8 or float32, got {describe_array(images)}")
    if groups is None or list(groups.shape) != shape[:1] or name_dtype(groups) != "int64":
        raise WireError(f"a batch needs groups [{shape[0]}] of int64, got {describe_array(groups)}")
    whole = message.tensors.get("whole")
    if whole is not None and (list(whole.shape) != shape[:1] or name_dtype(whole) != "bool"):
        raise WireError(f"whole must be [{shape[0]}] of bool, got {describe_array(whole)}")
    if not len(prompts) == len(metadata) == shape[0]:
        raise WireError(f"{shape[0]} images came with {len(prompts)} prompts and {len(metadata)} metadata")
    return assemble_batch(images, prompts, metadata, groups, whole, device)


def assemble_batch(
    images: Any,
    prompts: Sequence[str],
    metadata: Sequence[Mapping[str, Any]],
    groups: Any,
    whole: Any,
    device: str,
) -> Batch:
    """Put a batch together from its checked parts."""
    if torchs := hasattr(images, "detach"):
        images = images.to(device)
    floats = images
    if name_dtype(images) == "uint8":
        floats = images.float() if torchs else images.astype("float32")
        floats /= 255  # In place: another tensor of this size takes longer than the division.
        if whole is not None:
            floats[~whole.to(device) if torchs else ~whole] = float("nan")
    batch = (Batch if torchs else ArrayBatch)(floats, prompts, metadata, groups)
    if floats is not images:
        vars(batch)["uint8"] = images  # What the sender had, so it is not computed again.
    return batch


class ArrayBatch(Batch):
    """A batch of NumPy's arrays, for a reward that works without torch."""

    @cached_property
    def uint8(self) -> Any:
        images: Any = self.images
        return (images * 255).round().clip(0, 255).astype("uint8")

    @cached_property
    def pil(self) -> list[Image]:
        from PIL.Image import fromarray

        return [fromarray(array) for array in self.uint8.transpose(0, 2, 3, 1)]

    def shared(self, key: Hashable, compute: Callable[[], T]) -> T:
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]  # type: ignore[no-any-return]


def pack_scores(scores: Scores) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make what a message about scores has: its JSON and its tensors."""
    tensors: dict[str, Any] = {}
    return {"scores": _pack_part(scores, "", tensors)}, tensors


def _pack_part(scores: Scores, prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Add the tensors of scores under names with a prefix, and return their JSON."""
    figures: dict[str, Any] = {"values": scores.values, "valid": scores.valid}
    figures |= {f"detail{i}": figure for i, figure in enumerate(scores.details.values())}
    # Copies: safetensors refuses tensors that share memory, as those of equal parts do.
    tensors |= {f"{prefix}{n}": f.clone() if hasattr(f, "clone") else f.copy() for n, f in figures.items()}
    parts = [
        {"name": name, "weight": part.weight, **_pack_part(part.scores, f"{prefix}part{i}.", tensors)}
        for i, (name, part) in enumerate(scores.parts.items())
    ]
    notes = {name: list(texts) for name, texts in scores.notes.items()}
    return {"details": list(scores.details), "notes": notes, "parts": parts}


def unpack_scores(message: Message) -> Scores:
    """Make the scores that a message is about. Raises WireError where it has none."""
    try:
        return _unpack_part(message.head.get("scores"), "", message.tensors, DEEPEST)
    except WireError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise WireError(f"the scores of a message cannot be read: {type(error).__name__}: {error}") from error


def _unpack_part(head: Any, prefix: str, tensors: Mapping[str, Any], deepest: int) -> Scores:
    """Make the scores whose tensors have names with a prefix. deepest: how many parts may be in one another."""
    names: Any = head.get("details") if isinstance(head, dict) else None
    parts: Any = head.get("parts") if isinstance(head, dict) else None
    if not is_list_of(names, str) or not is_list_of(parts, dict) or len({*names}) != len(names):
        raise WireError("scores need details, a list of different names, and parts, a list of objects")
    notes: Any = head.get("notes", {})
    if not isinstance(notes, dict) or not all(is_list_of(texts, str) for texts in notes.values()):
        raise WireError("the notes of scores must be lists of texts by name")
    if not deepest:
        raise WireError(f"scores may have parts in parts {DEEPEST} deep")
    values, valid = tensors[f"{prefix}values"], tensors[f"{prefix}valid"]
    details = {name: tensors[f"{prefix}detail{i}"] for i, name in enumerate(names)}
    for what, figure in {"values": values, **details}.items():
        if not name_dtype(figure).startswith(("float", "bfloat", "int", "uint", "bool")):
            raise WireError(f"{what} must be numbers, got {describe_array(figure)}")
    if name_dtype(valid) != "bool":
        raise WireError(f"valid must be bool, got {describe_array(valid)}")
    inner = {}
    for i, part in enumerate(parts):
        name, weight = part.get("name"), part.get("weight")
        if not isinstance(name, str) or name in inner or not isinstance(weight, (int, float)):
            raise WireError("a part of scores needs a name of its own and a weight, a number")
        inner[name] = Part(float(weight), _unpack_part(part, f"{prefix}part{i}.", tensors, deepest - 1))
    return Scores(values, valid, details, inner, notes)


def is_list_of(value: object, kind: type) -> bool:
    """Tell whether a value from JSON is a list of these alone."""
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def name_dtype(array: Any) -> str:
    """Name the dtype of a tensor or an array: `uint8`."""
    return str(array.dtype).rpartition(".")[2]


def describe_array(array: Any) -> str:
    """Describe a tensor or an array by its shape and dtype."""
    return "none" if array is None else f"{list(array.shape)} of {name_dtype(array)}"
