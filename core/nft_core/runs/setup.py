"""What a run computes on and with: the device, the base model, dtypes and sizes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nft_plugins import FlowModel, Objective
from nft_plugins.rules import LENT_SETTINGS

from .. import environment
from ..errors import NftError, UsageError, shorten_error
from ..host.host import Host
from ..host.specs import parse_objective
from ..settings import Settings

if TYPE_CHECKING:
    import torch

    from ..models.sources import ModelSource

#: Names of torch's dtypes by ours.
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def pick_device(name: str) -> torch.device:
    """Find the device by name; `auto` is this process's GPU where there is one. Raises UsageError."""
    check_device_name(name)
    environment.check_numbers()
    import torch

    local = environment.read_number("LOCAL_RANK", 0)
    if name == "auto":
        name = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device(name)
    index = name.partition(":")[2]
    count = torch.cuda.device_count()
    if not count:
        raise UsageError(f"--device {name}: this torch ({torch.__version__}) sees no GPU; use cpu.")
    # A number would put all processes of this machine on one GPU.
    if index and "LOCAL_RANK" in os.environ and name != f"cuda:{local}":
        raise UsageError(f"--device {name}: each of several processes takes a GPU of its own; use cuda.")
    wanted = int(index or local)
    if wanted >= count:
        several = (
            f" for LOCAL_RANK = {local}: start no more processes on this machine, or, where each sees its own "
            "GPU alone (srun --gpus-per-task), set LOCAL_RANK=0 for all"
        )
        raise UsageError(
            f"--device {name}: the GPUs here are counted from 0 to {count - 1}, and there is none of number "
            f"{wanted}{several if 'LOCAL_RANK' in os.environ else ''}."
        )
    device = torch.device("cuda", wanted)
    # Libraries that allocate without naming a device then use this one, and not the first.
    torch.cuda.set_device(device)
    return device


def check_device_name(name: str) -> None:
    """Raise UsageError for a name that no device has. Torch is not imported, so nobody knows which are here."""
    kind, _, index = name.partition(":")
    if name not in ("auto", "cpu", "cuda") and not (kind == "cuda" and index.isdigit()):
        raise UsageError(f"Unknown device {name!r}: expected cpu, cuda, cuda:N or auto.")


def make_objective(settings: Settings, host: Host) -> Objective:
    """Make the objective that the settings name. Raises UsageError where they leave out what it needs.

    Its options that have the name of one of LENT_SETTINGS take that setting's value where none is given.
    """
    spec = parse_objective(settings.objective)
    objective = host.make_objective(spec, {name: getattr(settings, name) for name in LENT_SETTINGS})
    if objective.needs_reference and not settings.kl_weight:
        raise UsageError(
            f"The objective {spec.name!r} compares with the reference, which kl_weight = 0 leaves out: give a "
            "kl_weight above 0, such as --set kl_weight=1e-4."
        )
    if objective.least_times > (times := settings.count_train_times()):
        raise UsageError(
            f"The objective {spec.name!r} needs at least {objective.least_times} training times for an image, "
            f"got train_times_count = {times}: use --set "
            f"train_times_count={objective.least_times}."
        )
    return objective


def find_model(settings: Settings) -> ModelSource:
    """Find what the settings' model is made of: a pipeline, whole weights and LoRAs. Raises UsageError."""
    from ..models.sources import find_source

    return find_source(settings.model, settings.lora)


def find_family(settings: Settings, host: Host) -> tuple[str, Mapping[str, Any]]:
    """Find the family of the base model, by the pipeline class in its `model_index.json`, and that index."""
    from ..models.paths import find_index

    name = find_model(settings).base
    index = find_index(name)
    pipeline = str(index["_class_name"])
    family = host.choose_family(pipeline, settings.family)
    if family is None:
        from ..models.paths import explain_unknown_pipeline

        known = {p for card in host.models.values() for p in card.info.pipelines}
        raise UsageError(explain_unknown_pipeline(name, pipeline, known))
    return family, index


def check_model(settings: Settings, host: Host) -> None:
    """Raise NftError for a model that cannot be used, is not whole, or has a LoRA of another model on top.

    No weights are read.
    """
    from ..host.factories import import_factory
    from ..models.checks import check_pipeline, empty_part, list_parts
    from ..models.pipeline import PipelineModel
    from ..models.weights import check_source_fits, check_targets

    source = find_model(settings)
    family, index = find_family(settings, host)
    factory = import_factory(host.models[family].info.factory)
    # Another family may read its folder in a way of its own.
    if not (isinstance(factory, type) and issubclass(factory, PipelineModel)):
        return
    base, local = source.base, Path(source.base).is_dir()
    try:
        if local:
            check_pipeline(Path(base), index)
        if source.transformer or source.loras:
            folder = str(Path(base) / "transformer") if local else base
            where: dict[str, Any] = {} if local else {"subfolder": "transformer"}
            transformer = empty_part(folder, *list_parts(index)["transformer"], **where)
            check_source_fits(source, transformer)
            if source.loras and settings.lora_rank and not settings.lora_merge:
                check_targets(source.loras[-1], settings.lora_targets, transformer)
    except NftError:
        raise
    except Exception as error:
        raise say_unloadable(base, error) from error


def check_guidance(settings: Settings, host: Host, guidance: float) -> None:
    """Raise UsageError for a guidance that is no possible number, or that the model does not know.

    Nothing is loaded: the model's family says whether it can be guided, or the model's own index says that
    guidance is distilled into it.
    """
    if not isfinite(guidance) or guidance < 0:
        raise UsageError(f"guidance = {guidance}: expected a number from 0 up; 1 is without guidance.")
    if guidance == 1:
        return
    from ..host.factories import import_factory

    family, index = find_family(settings, host)
    factory = import_factory(host.models[family].info.factory)
    if getattr(factory, "can_guide", True) and not index.get("is_distilled"):
        return
    raise UsageError(
        f"guidance = {guidance:g}: the model {settings.model!r} has learned without a negative prompt, so that "
        "classifier-free guidance means nothing to it; use guidance 1. Guidance that is distilled into a model "
        "is an option of its family: --set model_options={guidance=3.5}."
    )


def say_unloadable(model: str, error: Exception) -> NftError:
    said = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {shorten_error(error)}"
    return NftError(f"Cannot load the model {model!r}: {said}")


def load_base(settings: Settings, host: Host, device: torch.device) -> FlowModel:
    """Load the pipeline that the model is based on, without what stands on its transformer."""
    import torch

    from ..models.pipeline import PipelineModel
    from ..models.single_files import use_parts_of_file

    source = find_model(settings)
    name = source.base
    family, _ = find_family(settings, host)
    # A LoRA's frozen base can stand in half precision; weights that are trained stay in float32.
    half = autocast_dtype(settings, device) if settings.lora_rank else None
    dtype = half or torch.float32
    options = {"max_sequence_length": settings.max_sequence_length}
    try:
        model = host.make_model(family, name, settings.model_options, device=device, dtype=dtype, **options)
        if source.file and isinstance(model, PipelineModel):
            use_parts_of_file(source.file, model)
    except NftError:
        raise
    except Exception as error:  # A file cut short, too little memory, a plug-in's own mistake.
        raise say_unloadable(name, error) from error
    return model


def load_model(settings: Settings, host: Host, device: torch.device) -> FlowModel:
    """Load the model as it generates images, with the weights and LoRAs that `model` and `lora` name.

    The LoRA on top is an adapter, as in the run that trained it; those below are merged into the weights.
    """
    from ..models.weights import put_in_place
    from ..training.lora import add_trained_lora

    source = find_model(settings)
    model = load_base(settings, host, device)
    put_in_place(source, model.transformer, source.loras[:-1])
    if source.loras:
        add_trained_lora(model.transformer, source.loras[-1])
        # Nothing is trained here; `add_lora` has made the LoRA trainable.
        model.transformer.requires_grad_(False)
    return model


def autocast_dtype(settings: Settings, device: torch.device) -> torch.dtype | None:
    """Choose the dtype of matrix products; None: float32, without autocast."""
    import torch

    if settings.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    return getattr(torch, DTYPES[settings.precision]) if settings.precision != "fp32" else None


def decode_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """Choose the dtype that the VAE decodes in."""
    import torch

    if settings.decode_precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return cast("torch.dtype", getattr(torch, DTYPES[settings.decode_precision]))


def image_shape(settings: Settings, model: FlowModel) -> tuple[int, int, tuple[int, ...]]:
    """Say how high and wide images are, and of which shape their latents. Raises UsageError for other sizes."""
    height, width = (settings.resolution, settings.resolution) if settings.resolution else model.resolution
    try:
        return height, width, tuple(model.latent_shape(height, width))
    except ValueError as error:
        raise UsageError(f"Setting resolution: {error}.") from error
