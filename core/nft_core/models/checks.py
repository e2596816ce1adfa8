"""What a pipeline's folder must be before anything of it is loaded: safe, whole, and of known classes."""

from __future__ import annotations

from . import libraries  # noqa: F401  isort: skip  Before anything of diffusers.
import importlib
import inspect
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import torch

from nft_plugins.files import (
    PICKLED,
    TABLES,
    check_attention,
    explain_pickles,
    limit_tensors,
    read_header,
)
from nft_plugins.vocabulary import check_end, check_tokenizer

from .headers import check_dtypes, check_shapes
from .schedulers import check_scheduler
from .small_files import list_files, read_object

#: Libraries that a pipeline's parts may be of.
LIBRARIES = ("diffusers", "transformers")
#: Tensors of a part without files. Published ones have up to about 2,000.
MOST_TENSORS = 10_000


def check_parts(index: Mapping[str, Any]) -> None:
    """Raise OSError for a part of another library, or of a class that might run code of the checkpoint's."""
    for name, kind in index.items():
        if name.startswith("_") or not isinstance(kind, list) or kind == [None, None]:
            continue
        library, cls = kind if len(kind) == 2 else (None, None)
        auto = str(cls).startswith("Auto") and not str(cls).startswith("Autoencoder")
        if library not in LIBRARIES or auto or not isinstance(cls, str):
            raise OSError(
                f"model_index.json names {kind} for {name}: expected a class of {' or '.join(LIBRARIES)}, such "
                'as ["diffusers", "SD3Transformer2DModel"], and none that chooses its class by the files.'
            )


def list_parts(index: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """List the parts that a pipeline was saved with, as `(library, class)` by name."""
    kinds = {n: k for n, k in index.items() if isinstance(k, list) and not n.startswith("_")}
    return {name: (kind[0], kind[1]) for name, kind in kinds.items() if kind != [None, None]}


def check_pipeline(folder: Path, index: Mapping[str, Any], weights: bool = True) -> None:
    """Hold a local folder to its model_index.json, by its small files and the headers of the weights.

    weights: whether they must be there; a plan does without. Raises OSError.
    """
    check_files(folder, json.dumps(index, sort_keys=True), weights, stamp_files(folder))


def stamp_files(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """List the times and sizes of a folder's files, which change when these do."""
    # A link to nothing has a time of its own; the check says what is wrong with it.
    found = ((f, f.stat() if f.exists() else f.lstat()) for f in folder.rglob("*"))
    return tuple(sorted((str(f), s.st_mtime_ns, s.st_size) for f, s in found))


# A run asks twice, before its rewards are loaded and with the model, and tokenizers alone take a while to read.
@lru_cache(maxsize=32)
def check_files(folder: Path, listed: str, weights: bool, stamp: tuple[tuple[str, int, int], ...]) -> None:
    """Check a pipeline's folder, once as long as its files stay as they are.

    listed: its model_index.json. stamp: of `stamp_files`. Raises OSError, also when asked again.
    """
    index = json.loads(listed)
    check_parts(index)
    parts = list_parts(index)
    texts = [name for name in parts if name.startswith("text_encoder")]
    # Some pipelines have a processor in a tokenizer's place.
    tokenizers = {n: t for n in texts if (t := n.replace("text_encoder", "tokenizer")) in index}
    parameters = inspect.signature(find_class("diffusers", str(index["_class_name"])).__init__).parameters
    expected = [n for n, p in list(parameters.items())[1:] if p.default is p.empty and n not in index]
    wanted = [*expected, "transformer", "vae", "scheduler", *tokenizers.values()]
    if unnamed := [name for name in dict.fromkeys(wanted) if name not in parts]:
        raise OSError(f"{folder / 'model_index.json'} names no {', no '.join(unnamed)}, which a run needs.")
    if lacking := [name for name in parts if not (folder / name).is_dir()]:
        raise OSError(
            f"{folder} is not whole: its model_index.json names {', '.join(lacking)}, and it has no such "
            "folder. Download all of its files again."
        )
    check_classes(find_class("diffusers", str(index["_class_name"])), parts)
    for name, (library, kind) in parts.items():
        check_part(folder / name, library, kind, weights)
    for name, tokenizer in tokenizers.items():
        check_texts(folder / name, parts[name], folder / tokenizer, parts[tokenizer], weights)


def check_classes(pipeline: Any, parts: Mapping[str, tuple[str, str]]) -> None:
    """Raise OSError for a transformer, or a CLIP's text encoder, of another class than the pipeline works with.

    Of its other parts the annotations are looser than what is published.
    """
    hints: dict[str, Any] = {}
    with suppress(NameError, TypeError):  # An annotation of what is not installed.
        hints = get_type_hints(pipeline.__init__)
    for name, kind in parts.items():
        classes = tuple(c for c in get_args(hints.get(name)) or (hints.get(name),) if isinstance(c, type))
        strict = name == "transformer" or any(c.__name__.startswith("CLIPText") for c in classes)
        if strict and classes and not issubclass(find_class(*kind), classes):
            raise OSError(
                f"model_index.json names a {kind[1]} for {name}, and a {pipeline.__name__} works with "
                f"{' or '.join(c.__name__ for c in classes)}. It may be another model's; download it again."
            )


def check_part(folder: Path, library: str, name: str, weights: bool) -> None:
    """Raise OSError for files that are missing, pickled or of another kind, and for configs that do not fit.

    A config may not name code, nor want a larger part than the files hold: transformers would allocate it,
    and then fill it with random numbers.
    """
    cls = find_class(library, name)
    if name.endswith("Scheduler"):
        check_scheduler(read_object(folder / "scheduler_config.json"), folder)
    if "Tokenizer" in name:
        read_object(folder / "tokenizer_config.json")
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        return
    config = read_object(folder / "config.json")
    if name.startswith("Autoencoder"):
        check_scale(config, folder / "config.json")
    if not weights and not list_files(folder, ".safetensors", *PICKLED):
        return
    files, _ = find_weights(folder, library)
    if packed := config.get("quantization_config"):
        method = packed.get("quant_method") if isinstance(packed, dict) else packed
        raise OSError(
            f"{folder}: the weights are quantised ({method}), which is not read here: take the original ones."
        )
    tensors = {key: kind for file in files for key, kind in read_header(file).items()}
    check_dtypes({key: dtype for key, (dtype, _) in tensors.items()}, folder)
    try:
        model = empty_part(str(folder), library, name, len(tensors))
    except OSError:
        raise
    except Exception as error:  # Numbers out of range raise anything.
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise OSError(f"{folder / 'config.json'} is of no {name}: {said}.") from error
    wanted = sum(p.numel() for p in model.parameters())
    tables = sum(b.numel() for b in model.buffers())
    held = sum(math.prod(shape) for _, shape in tensors.values())
    # Buffers, such as tables of positions, are often computed and not saved, so some may be missing.
    if wanted > held or tables > held + TABLES:
        raise OSError(
            f"{folder}: the config is of a {name} of {wanted + tables:,} numbers, the files hold {held:,}. "
            "They may be cut short or of another model; download them again."
        )
    check_shapes({key: shape for key, (_, shape) in tensors.items()}, model, folder)


def check_scale(config: Mapping[str, Any], file: Path) -> None:
    """Raise OSError where a VAE's latents cannot be divided by its scale and moved by its shift."""
    for name, least in (("scaling_factor", 1e-6), ("shift_factor", 0.0)):
        value = config.get(name)
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        if value is not None and not (math.isfinite(number) and abs(number) >= least):
            raise OSError(f"{file}: {name} should be a number, got {value!r}. Download it again.")


def find_class(library: str, name: str) -> Any:
    """Find a class of diffusers or transformers. Raises OSError where the installed version has none."""
    found = getattr(importlib.import_module(library), name, None)
    if found is None:
        raise OSError(
            f"model_index.json names a {name} of {library}, and {library} {version(library)}, which is "
            "installed, has no such class: it may be of a newer version."
        )
    return found


def find_weights(folder: Path, library: str) -> tuple[list[Path], str | None]:
    """Find the files of a part's weights, and their variant, such as fp16, where the folder has no others.

    Raises OSError where they are missing, pickled or of other names than the library's.
    """
    stem = "model" if library == "transformers" else "diffusion_pytorch_model"
    found = list_files(folder, ".safetensors")
    whole = folder / f"{stem}.safetensors"
    if whole in found:
        return [whole], None
    indices = {
        f.name: f for f in list_files(folder, ".json") if f.name.startswith(f"{stem}.safetensors.index.")
    }
    # The shortest name first, which is that of no variant.
    for name, file in sorted(indices.items(), key=lambda item: len(item[0])):
        variant = name.removeprefix(f"{stem}.safetensors.index.").removesuffix("json").rstrip(".")
        names = read_object(file).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise OSError(f"{file}: weight_map should name a file for each weight. Download it again.")
        shards = sorted({folder / str(shard) for shard in names.values()})
        if pickles := [f for f in shards if f.suffix in PICKLED]:
            raise explain_pickles(pickles, whole)
        if lacking := [f.name for f in shards if f not in found]:
            raise OSError(f"{folder} lacks {', '.join(lacking)}, which {name} names. Download it again.")
        return shards, variant or None
    variants = [f for f in found if f.name.startswith(f"{stem}.") and "-of-" not in f.name]
    if len(variants) == 1:
        return variants, variants[0].name.removeprefix(f"{stem}.").removesuffix(".safetensors")
    if len(variants) > 1:
        raise OSError(
            f"{folder} holds {' and '.join(f.name for f in variants)}, and no {whole.name}: give one of them "
            "that name."
        )
    if pickles := list_files(folder, *PICKLED):
        raise explain_pickles(pickles, whole)
    held = f"it holds {', '.join(f.name for f in found)}" if found else "it holds no safetensors"
    raise OSError(f"{folder}: expected the weights in {whole.name}, and {held}. Download it again.")


def check_texts(
    encoder: Path, kind: tuple[str, str], folder: Path, tokenizer_kind: tuple[str, str], words: bool
) -> None:
    """Raise OSError for a tokenizer that is not its text encoder's.

    words: whether it must know them; for a plan any tokenizer will do.
    """
    if kind[0] != "transformers":
        return
    config = find_class(*kind).config_class.from_pretrained(encoder)
    try:
        tokenizer = find_class(*tokenizer_kind).from_pretrained(folder)
    except Exception as error:  # Files of other forms raise anything.
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}."
        mend = "Download all of its files again."
        models = [*folder.glob("*.model")]
        if models and not (folder / "tokenizer.json").exists() and not find_spec("sentencepiece"):
            said, mend = f"it is in {models[0].name} alone.", "That is read by: pip install sentencepiece"
        raise OSError(f"Cannot read the tokenizer in {folder}: {said} {mend}") from error
    if words:
        check_tokenizer(tokenizer, int(config.get_text_config().vocab_size), str(folder))
    if config.model_type.startswith("clip"):
        positions, length = int(config.max_position_embeddings), tokenizer.model_max_length
        if type(length) is not int or not 2 < length <= positions:
            raise OSError(
                f"{folder / 'tokenizer_config.json'}: model_max_length is {length}, and the text encoder reads "
                f"{positions} tokens: write that."
            )
        if words:
            check_end(tokenizer, config.eos_token_id, length, str(folder))


def load_part(folder: Path, library: str, name: str, dtype: torch.dtype) -> torch.nn.Module:
    """Load a part with its weights. Raises OSError where some are missing; the libraries would only warn."""
    _, variant = find_weights(folder, library)
    module, found = find_class(library, name).from_pretrained(
        folder,
        use_safetensors=True,
        output_loading_info=True,
        variant=variant,
        **{"dtype" if library == "transformers" else "torch_dtype": dtype},
    )
    missing = set(found["missing_keys"])
    if library == "transformers":  # Of tied weights the file holds one.
        missing &= {name for name, _ in module.named_parameters()}
    # Text encoders are often cut out of larger models.
    more = set(found["unexpected_keys"]) if name.endswith("Transformer2DModel") else set()
    for what, names in (("lacks", missing), ("has too many", more)):
        if names:
            raise OSError(
                f"{folder} {what} weights: {len(names)}, such as {min(names)!r}. It may be of another version "
                f"of {name}, or not whole; download it again."
            )
    return cast(torch.nn.Module, module)


def empty_part(
    source: str, library: str, name: str, tensors: int = MOST_TENSORS, **where: str
) -> torch.nn.Module:
    """Make a part by its config alone, on the meta device, which holds no numbers.

    source: its folder, or a hub id with subfolder=. tensors: in its files, or the most that it may have.
    Raises OSError for a config that names code, or that is of far more.
    """
    cls = find_class(library, name)
    with torch.device("meta"), limit_tensors(tensors, f"{source}: the config of its {name}"):
        if library == "diffusers":
            return cast(torch.nn.Module, cls.from_config(cls.load_config(source, **where)))
        config = cls.config_class.from_pretrained(source, **where)
        check_attention(config, str(Path(source) / "config.json"))
        return cast(torch.nn.Module, cls(config))
