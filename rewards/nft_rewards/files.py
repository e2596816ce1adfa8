"""Reads weights from local paths and the Hugging Face hub: safetensors, or torch files, of tensors only.

Both are mapped into memory before they are read: weights that do not fit the model are refused before any
memory is allocated for them.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nft_plugins.files import PICKLED, TABLES, check_attention, explain_pickles, limit_tensors, read_header

CUT = "The file may be cut short or of another kind; download it again."


def resolve_path(checkpoint: str) -> str:
    """Write a local path in its one absolute form, so that equal checkpoints compare equal.

    A hub id stays as it is. Of `open_clip:ARCHITECTURE/FILE` the file's path is changed.
    """
    start, path = "", checkpoint
    if checkpoint.startswith("open_clip:"):
        start, _, path = checkpoint.partition("/")
        start += "/"
    place = Path(path).expanduser()
    return f"{start}{place.resolve() if path and place.exists() else path}"


def find_file(checkpoint: str, name: str) -> Path:
    """Find a checkpoint's file: a local file, `name` in a local folder, or `name` of a hub id.

    Raises OSError where there is none, and for a local pickle where `name` is of safetensors.
    """
    path = Path(checkpoint).expanduser()
    if path.is_file():
        if name.endswith(".safetensors") and path.suffix in PICKLED:
            raise explain_pickles([path], path.with_suffix(".safetensors"))
        return path
    if (path / name).is_file():
        return path / name
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(checkpoint, name))
    except Exception as error:  # A bad id, no network and no access each raise a class of their own.
        raise OSError(
            f"Looked for a file {checkpoint!r}, for {name} in a folder of that name and on the Hugging Face "
            f"hub: {' '.join(str(error).split())[:300]} checkpoint=PATH takes a local file or folder, which "
            "works offline."
        ) from error


def read_tensors(path: Path) -> dict[str, Any]:
    """Read the tensors of a file, by name. No code in it is run. A `state_dict` inside is taken out.

    Raises OSError for a file that is cut short, that claims more than it holds, or that holds anything but
    tensors and plain values.
    """
    if path.suffix != ".safetensors":
        check_archive(path)  # Before torch.load, which may allocate as much as the file claims.
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise OSError(
            f"Cannot read weights from {path}: it is a pickle of more than tensors, which can run code, and "
            f"was not loaded{describe_code(path)}. Use the published file, or safetensors."
        ) from error
    except Exception as error:
        raise OSError(f"Cannot read weights from {path}: {' '.join(str(error).split())[:200]} {CUT}") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(is_plain_tensor(v) for v in content.values()):
        raise OSError(f"{path} holds no state dict of tensors but {type(content).__name__}.")
    return dict(content)


def is_plain_tensor(value: Any) -> bool:
    """Tell whether a value is a dense tensor on the CPU, the only kind that a model's weights are."""
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def check_archive(path: Path) -> None:
    """Raise OSError for a file that torch.save did not write, or that would take more memory than its size."""
    said = f"Cannot read weights from {path}: "
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            old = file.read(1) == pickle.PROTO
        # Before torch 1.6 the sizes stood in the pickle alone, and torch allocates whatever stands there.
        if old:
            raise OSError(
                f"{said}it is a bare pickle. {explain_pickles([path], path.with_suffix('.safetensors'))}"
            )
        raise OSError(f"{said}it was not written by torch.save. {CUT}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise OSError(f"{said}{error}. {CUT}") from error
    # A compressed entry can unpack to a thousand times its size.
    packed = any(e.compress_type != zipfile.ZIP_STORED for e in entries)
    if packed or sum(e.file_size for e in entries) > path.stat().st_size:
        raise OSError(f"{said}it unpacks to more than its own size, which torch.save never writes. {CUT}")


def describe_code(path: Path) -> str:
    """Say which code a pickle names, as `: it asks for os.system`; "" where that cannot be told."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # The file is refused anyway; this was only to say more about it.
        return ""
    return f": it asks for {', '.join(map(str, names))[:200]}" if names else ""


def load_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    name: Callable[[str], str] = str,
    unused: Collection[str] = (),
) -> None:
    """Put a file's tensors into a module. Every weight must be there, with the right shape, and no other.

    tensors: those of the file, by name. path: of the file, for messages.
    name: maps the module's name of a weight to the file's. unused: names that the file may have besides.
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
    if said := list_wrong_weights(wrong):
        raise OSError(f"{path} does not hold the {len(mine)} weights of {type(module).__name__}: {said}.")
    # `assign` takes the tensors themselves, so that a module on the meta device needs no memory of its own.
    module.load_state_dict({key: tensors[n] for n, (key, _) in mine.items()}, assign=True)


@contextmanager
def explain_errors(what: str, checkpoint: str, option: str = "checkpoint") -> Iterator[None]:
    """Turn whatever transformers raises inside, for bad or missing files, into an OSError that says what to do.

    what: the thing that is loaded. checkpoint: where from. option: the reward's option that gives it.
    """
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"Cannot read weights from {checkpoint!r}: {error}. {CUT}") from error
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        # A file in a wrong form gives a KeyError or the like, whose text alone says nothing.
        if not isinstance(error, OSError | ValueError):
            said = f"{type(error).__name__}: {said}."
        raise OSError(
            f"Looked for {what} in a folder {checkpoint!r} and on the Hugging Face hub: {said} "
            f"{option}=PATH takes a local folder that holds all of its files, which works offline."
        ) from error


def read_checked_config(cls: Any, checkpoint: str) -> Any:
    """Read and check the config of a transformers model before any weight is read.

    cls: the model's class. checkpoint: hub id or local folder.
    Raises OSError for a config that names code, or that is of another or a larger model than the files hold.
    transformers would allocate the larger model first, and then fill it with random numbers.
    """
    # In the cache of huggingface_hub files are links, whose targets may have been removed.
    for file in Path(checkpoint).glob("*"):
        if file.suffix in (".json", ".safetensors") and not file.is_file():
            raise OSError(f"{file} is no file, or a link to one that is not there.")
    check_kind(cls.config_class, checkpoint)
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    config = cls.config_class.from_pretrained(checkpoint)
    check_attention(config, "its config.json")
    if not Path(checkpoint).is_dir():
        # On the hub there may be no such file, or one in parts; then transformers alone checks it.
        with suppress(OSError):
            files = [find_file(checkpoint, "model.safetensors")]
    if not files:
        return config
    headers = [read_header(file) for file in files]
    for header in headers:
        check_dtypes(header)
    # On the meta device a model of any size can be made and counted without memory for its weights.
    with torch.device("meta"), limit_tensors(sum(map(len, headers))):
        model = cls(config)
    needed = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    held = sum(math.prod(shape) for header in headers for _, shape in header.values())
    # This only bounds the memory. A weight that is missing is reported later, by its name.
    if needed > 2 * held + TABLES:
        raise OSError(f"the config is of a model of {needed:,} numbers, the files hold {held:,}.")
    return config


def check_kind(cls: Any, checkpoint: str) -> None:
    """Raise OSError where the config is not of class `cls`, or says that the weights are quantised.

    transformers itself takes default sizes where there is no config, and only warns of one of another kind.
    """
    config, _ = cls.get_config_dict(checkpoint)
    if not isinstance(config, dict):
        raise OSError(f"its config.json holds no JSON object but {type(config).__name__}.")
    if config.get("model_type") != cls.model_type:
        came = f"is of model_type {config['model_type']!r}" if config.get("model_type") else "is missing"
        raise OSError(f"expected a config.json of model_type {cls.model_type!r}, and it {came}.")
    if packed := config.get("quantization_config"):
        method = packed.get("quant_method") if isinstance(packed, dict) else packed
        raise OSError(f"its weights are quantised ({method}), which cannot be read; take the original ones.")


def check_dtypes(header: Mapping[str, tuple[str, list[int]]]) -> None:
    """Raise OSError for weights in whole numbers, of which a quantised model's config should tell."""
    for name, (kind, _) in header.items():
        if kind in ("I8", "U8"):
            raise OSError(f"its weights are quantised, such as {name!r} ({kind}); take the original ones.")


def load_pretrained(cls: Any, checkpoint: str, unused: Callable[[str], bool]) -> Any:
    """Load a transformers model in float32 from safetensors, in a local folder or on the hub.

    unused: tells by its name whether the file may hold a tensor that the model has no place for.
    Raises OSError where there is no such file, and where it lacks a weight or holds one too many.
    """
    folder = Path(checkpoint)
    # Without this transformers would only say that there are no safetensors.
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise explain_pickles(pickles, folder / "model.safetensors")
    with explain_errors(f"a {cls.__name__} in safetensors", checkpoint):
        read_checked_config(cls, checkpoint)
        model, info = cls.from_pretrained(
            checkpoint,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    # transformers only warns of these, and puts random numbers in their places. Buffers may be missing:
    # those that are in no file are computed.
    parameters = {name for name, _ in model.named_parameters()}
    wrong = {
        "missing": sorted(set(info["missing_keys"]) & parameters),
        "unexpected": sorted(name for name in info["unexpected_keys"] if not unused(name)),
        "of another shape": sorted(str(name) for name, *_ in info["mismatched_keys"]),
    }
    if said := list_wrong_weights(wrong):
        raise OSError(f"{checkpoint!r} is no whole {cls.__name__}: {said}.")
    return model


def list_wrong_weights(wrong: Mapping[str, Sequence[str]]) -> str:
    """Say how many weights are wrong in which way, with three names of each; "" where none is."""
    return "; ".join(
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if names[3:] else ''})"
        for what, names in wrong.items()
        if names
    )
