"""What a run loads and builds: the device, the model, its policy, and the loop's parts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import environment
from ..errors import NftError, UsageError
from ..host.host import Host
from ..prompts import Prompt, prompts_of_run
from ..settings import Settings
from ..training.state import Progress
from .resume import digest

if TYPE_CHECKING:
    import torch

    from nft_plugins import FlowModel

    from ..training.policy import Policy
    from ..training.state import Training
from ..errors import shorten_error
from .inputs import silent


def pick_device(name: str) -> torch.device:
    """The device by name; `auto` is this process's GPU where there is one."""
    import torch

    environment.check_numbers()
    local = environment.read_number("LOCAL_RANK", 0)
    if name == "auto":
        name = f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if name == "cpu":
        return torch.device(name)
    if kind != "cuda" or not (name == kind or index.isdigit()):
        raise UsageError(f"Unknown device {name!r}: expected cpu, cuda, cuda:N or auto.")
    count = torch.cuda.device_count()
    if not count:
        raise UsageError(f"--device {name}: this torch ({torch.__version__}) sees no GPU; use cpu.")
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
    torch.cuda.set_device(device)
    return device


def find_family(settings: Settings, host: Host) -> tuple[str, Mapping[str, Any]]:
    """The name of the family whose pipeline class the base model's `model_index.json` names, and that index."""
    from ..models.sources import read_index

    name = settings.model
    try:
        index = read_index(name)
    except NftError:
        raise
    except (OSError, ValueError) as error:
        raise NftError(
            f"Cannot load the model {name!r}: looked for a diffusers pipeline (model_index.json) in a folder "
            f"of that name and on the Hugging Face hub. {shorten_error(error)} Check the name, your network "
            "and, for a gated model, `hf auth login`; a local folder with --model PATH works offline, "
            "and so does --tiny, which brings its own small model."
        ) from error
    pipeline = str(index["_class_name"])
    family = host.choose_family(pipeline, settings.family)
    if family is None:
        from ..models.checks import unhandled

        known = {p for card in host.models.values() for p in card.info.pipelines}
        raise UsageError(unhandled(name, pipeline, known))
    return family, index


def check_model(settings: Settings, host: Host) -> None:
    """Raise NftError for a model that cannot be trained, or is not whole. No weights are read."""
    from ..host.factories import import_factory as factory_of
    from ..models.checks import check_pipeline
    from ..models.pipeline import PipelineModel

    family, index = find_family(settings, host)
    factory = factory_of(host.models[family].info.factory)
    # Another family may read its folder in a way of its own.
    if Path(settings.model).is_dir() and isinstance(factory, type) and issubclass(factory, PipelineModel):
        try:
            check_pipeline(Path(settings.model), index)
        except Exception as error:
            raise unreadable(settings.model, error) from error


def unreadable(model: str, error: Exception) -> NftError:
    said = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {shorten_error(error)}"
    return NftError(f"Cannot load the model {model!r}: {said}")


def load_model(settings: Settings, host: Host, device: torch.device) -> FlowModel:
    """The base model, by the family whose pipeline class its `model_index.json` names."""
    import torch

    name = settings.model
    family, _ = find_family(settings, host)
    # A LoRA's frozen base can stand in half precision; weights that are trained stay in float32.
    half = autocast_dtype(settings, device) if settings.lora_rank else None
    dtype = half or torch.float32
    options = {"max_sequence_length": settings.max_sequence_length}
    try:
        return host.make_model(family, name, settings.model_options, device=device, dtype=dtype, **options)
    except NftError:
        raise
    except Exception as error:  # A file cut short, too little memory, a plug-in's own mistake.
        raise unreadable(name, error) from error


def autocast_dtype(settings: Settings, device: torch.device) -> torch.dtype | None:
    import torch

    if settings.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else None
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[settings.precision]


def decode_dtype(settings: Settings, device: torch.device) -> torch.dtype:
    """The dtype that the VAE decodes in."""
    import torch

    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if settings.decode_precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return names[settings.decode_precision]


def make_policy(s: Settings, model: FlowModel, device: torch.device) -> Policy:
    """The weights that are trained, and their copies."""
    import torch

    from ..parallel.processes import world_size
    from ..training.policy import Policy

    dtype = autocast_dtype(s, device)
    # Where only a LoRA is trained, the transformer can compute in bfloat16 as diffusers' pipelines do: under
    # autocast its norms and all that lies between the products are float32, which costs more than the products.
    # In float16 that would overflow, and weights that are trained are float32 themselves.
    native = s.lora_rank > 0 and dtype == torch.bfloat16 and not getattr(model, "needs_autocast", True)
    return Policy(
        model,
        lora_rank=s.lora_rank,
        lora_alpha=s.lora_alpha,
        lora_targets=s.lora_targets,
        ema_decay=s.ema_decay,
        autocast=None if native else dtype,
        keep_reference=s.kl_weight > 0,
        offload=s.offload,
        # In 16 bits the sum would round away what a LoRA learns at first.
        merge=s.merge_lora == "always" or (s.merge_lora == "auto" and not dtype),
        # One process has nobody to share with, and the meta device nothing to share.
        fsdp=s.parallel == "fsdp" and world_size() > 1 and device.type != "meta",
    )


def assemble(
    s: Settings,
    model: FlowModel,
    reward: Any,
    solver: Any,
    prompts: list[Prompt],
    held_out: list[Prompt],
    device: torch.device,
    folder: Path,
    compiled: bool = False,
) -> Training:
    """The loop's parts, put together.

    compiled: whether the transformer's blocks are to be compiled.
    """
    import torch

    from ..parallel.devices import free_memory
    from ..parallel.processes import rank
    from ..parallel.sharding import InStep
    from ..sampling.conditions import Encoded, encode
    from ..sampling.rollout import Sampler
    from ..training.compiling import compile_blocks
    from ..training.memory import checkpoint_activations
    from ..training.optimizers import LOSS_SCALE, make_optimizer
    from ..training.state import Training
    from .checkpoint import prune, save_checkpoint

    cache = Path(s.cache).expanduser() if s.cache else None
    drawn = prompts_of_run(len(prompts), s.prompts_per_epoch, s.seed, s.epochs)
    # In one go, for which the text encoders are loaded once.
    everyones = [*prompts, *held_out]
    encoded = encode(model, everyones, [*drawn, *range(len(prompts), len(everyones))], cache, device)
    condition, eval_condition = (
        Encoded(encoded.condition, r) for r in encoded.row.split([len(prompts), len(held_out)])
    )
    if hasattr(model, "release"):
        model.release()
        free_memory()  # What they took is for any stream from here on.
    torch.manual_seed(s.seed)
    policy = make_policy(s, model, device)
    if s.gradient_checkpointing:
        checkpoint_activations(model.transformer)
    if compiled:
        compile_blocks(model.transformer)
    if hasattr(model, "decode_in"):
        model.decode_in(decode_dtype(s, device))
    height, width = (s.resolution, s.resolution) if s.resolution else model.resolution
    try:
        shape = model.latent_shape(height, width)
    except ValueError as error:
        raise UsageError(f"Setting resolution: {error}.") from error

    in_step = InStep(policy.velocity, s.peer_timeout, s.join_timeout) if policy.fsdp else None

    def sampler(steps: int) -> Sampler:
        times = model.times(steps, height, width)
        return Sampler(
            model, policy.velocity, solver, times, shape, s.rollout_batch, s.decode_batch, device, in_step
        )

    def save() -> None:
        at = training.at.model_copy(update={"seconds": training.seconds()})
        path = folder / "checkpoints" / f"{at.step:06d}"
        if rank() == 0 or policy.sharded:
            save_checkpoint(path, policy, optimizer, at, s.model_dump(mode="json"))
        if rank() == 0:
            prune(folder, at, s.keep_last, s.keep_best)
            training.observe("nft_checkpoint_saved", folder=path)

    optimizer = make_optimizer(s, policy.parameters)
    training = Training(
        settings=s,
        policy=policy,
        reward=reward,
        sampler=sampler(s.steps),
        eval_sampler=sampler(s.eval_steps or s.steps),
        prompts=prompts,
        eval_prompts=held_out,
        condition=condition,
        eval_condition=eval_condition,
        optimizer=optimizer,
        observe=silent,
        save=save,
        at=Progress(
            kl_weight=s.kl_weight,
            loss_scale=LOSS_SCALE if s.precision == "fp16" else 1.0,
            prompts=digest(prompts, held_out),
        ),
    )
    return training
