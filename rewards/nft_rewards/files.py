"""Weights from local paths and the Hugging Face hub: safetensors, or torch files read as tensors only.

Both are mapped into memory, not read: what does not fit a model is refused before anything is allocated for it.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nft_plugins.files import PICKLED, TABLES, check_attention, explain_pickles, limit_tensors, read_header

CUT = "The file may be cut short or of another kind; download it again."


def absolute(checkpoint: str) -> str:
    """The one path of a local file or folder, however it was written; a hub id as it is.

    Of `open_clip:ARCHITECTURE/FILE`, that of the file.
    """
    start, path = "", checkpoint
    if checkpoint.startswith("open_clip:"):
        start, _, path = checkpoint.partition("/")
        start += "/"
    place = Path(path).expanduser()
    return f"{start}{place.resolve() if path and place.exists() else path}"


def find_file(checkpoint: str, name: str) -> Path:
    """A local file, `name` in a local folder, or `name` of a hub id.

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
    except Exception as error:  # Bad ids, no network, no access: each its own class.
        raise OSError(
            f"Looked for a file {checkpoint!r}, for {name} in a folder of that name and on the Hugging Face "
            f"hub: {' '.join(str(error).split())[:300]} checkpoint=PATH takes a local file or folder, which "
            "works offline."
        ) from error


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a file, by name; a `state_dict` inside is taken out. No code in it is run.

    Raises OSError for a file that is cut short, that claims more than it holds, or that holds anything but
    tensors and plain values.
    """
    if path.suffix != ".safetensors":
        check_archive(path)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise OSError(
            f"Cannot read weights from {path}: it is a pickle of more than tensors, which can run code, and "
            f"was not loaded{asked_for(path)}. Use the published file, or safetensors."
        ) from error
    except Exception as error:
        raise OSError(f"Cannot read weights from {path}: {' '.join(str(error).split())[:200]} {CUT}") from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(is_plain(v) for v in content.values()):
        raise OSError(f"{path} holds no state dict of tensors but {type(content).__name__}.")
    return dict(content)


def is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def check_archive(path: Path) -> None:
    """Raise OSError for what is no file of torch.save, or one that could want more memory than it has bytes."""
    said = f"Cannot read weights from {path}: "
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            old = file.read(1) == pickle.PROTO
        if old:  # Before torch 1.6 sizes stood in the pickle alone, and are allocated as they stand there.
            raise OSError(
                f"{said}it is a bare pickle. {explain_pickles([path], path.with_suffix('.safetensors'))}"
            )
        raise OSError(f"{said}it was not written by torch.save. {CUT}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise OSError(f"{said}{error}. {CUT}") from error
    packed = any(e.compress_type != zipfile.ZIP_STORED for e in entries)
    if packed or sum(e.file_size for e in entries) > path.stat().st_size:
        raise OSError(f"{said}it unpacks to more than its own size, which torch.save never writes. {CUT}")


def asked_for(path: Path) -> str:
    """What code a pickle names, as `: it asks for os.system`; "" where that cannot be told."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # It is hostile; whatever that raises is no news.
        return ""
    return f": it asks for {', '.join(map(str, names))[:200]}" if names else ""


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


@contextmanager
def explained(what: str, checkpoint: str, option: str = "checkpoint") -> Iterator[None]:
    """OSError for whatever transformers raises for files that are absent, cut short or of another kind."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"Cannot read weights from {checkpoint!r}: {error}. {CUT}") from error
    except Exception as error:
        said = " ".join(str(error).split())[:300]
        if not isinstance(error, OSError | ValueError):  # A file that is not in the form that it should have.
            said = f"{type(error).__name__}: {said}."
        raise OSError(
            f"Looked for {what} in a folder {checkpoint!r} and on the Hugging Face hub: {said} "
            f"{option}=PATH takes a local folder that holds all of its files, which works offline."
        ) from error


def checked_config(cls: Any, checkpoint: str) -> Any:
    """A transformers model's config, before any weight is read.

    Raises OSError for one that names code, or is of another or a larger model than the files hold.
    transformers would allocate the latter first, and then fill it with random numbers.
    """
    for file in Path(checkpoint).glob("*"):
        if file.suffix in (".json", ".safetensors") and not file.is_file():
            raise OSError(f"{file} is no file, or a link to one that is not there.")
    check_kind(cls.config_class, checkpoint)
    files = sorted(Path(checkpoint).glob("*.safetensors"))
    config = cls.config_class.from_pretrained(checkpoint)
    check_attention(config, "its config.json")
    if not Path(checkpoint).is_dir():
        with suppress(OSError):  # There is none, or it comes in parts.
            files = [find_file(checkpoint, "model.safetensors")]
    if not files:
        return config
    headers = [read_header(file) for file in files]
    for header in headers:
        check_dtypes(header)
    with torch.device("meta"), limit_tensors(sum(map(len, headers))):
        model = cls(config)
    wanted = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
    held = sum(math.prod(shape) for header in headers for _, shape in header.values())
    # A bound on memory: that a weight is missing is told later, by its name.
    if wanted > 2 * held + TABLES:
        raise OSError(f"the config is of a model of {wanted:,} numbers, the files hold {held:,}.")
    return config


def check_kind(cls: Any, checkpoint: str) -> None:
    """Raise OSError where there is no config of that class, or its weights are packed.

    transformers takes a default where there is none, and only warns of one of another kind.
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
    """A transformers model in float32, in safetensors, from a local folder or the hub.

    unused: which tensors the file may hold that the model has no place for.
    Raises OSError where there is none, and where it lacks a weight or holds one too many.
    """
    folder = Path(checkpoint)
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise explain_pickles(pickles, folder / "model.safetensors")
    with explained(f"a {cls.__name__} in safetensors", checkpoint):
        checked_config(cls, checkpoint)
        model, info = cls.from_pretrained(
            checkpoint,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
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
