"""The loop's parts, put together: encoded prompts, trained weights, samplers, optimizer, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nft_plugins import Condition, FlowModel, Objective, Reward, Solver

from ..errors import UsageError
from ..host.host import load_host
from ..models.weights import put_in_place
from ..parallel.devices import free_memory
from ..parallel.processes import rank, world_size
from ..parallel.sharding import InStep
from ..prompts import Prompt, list_prompts_of_run
from ..sampling.conditions import Encoded, encode_negative, encode_prompts
from ..sampling.rollout import Sampler
from ..settings import Settings, for_evaluation
from ..training.compiling import compile_blocks
from ..training.memory import checkpoint_activations
from ..training.optimizers import LOSS_SCALE, make_optimizer
from ..training.policy import Policy
from ..training.state import SUMS, Progress, Training
from .checkpoint import prune_checkpoints, save_checkpoint
from .inputs import tell_no_observer
from .places import name_places
from .resume import digest_prompts
from .setup import autocast_dtype, decode_dtype, find_model, image_shape, make_objective


def assemble_training(
    s: Settings,
    model: FlowModel,
    reward: Reward,
    solver: Solver,
    prompts: list[Prompt],
    held_out: list[Prompt],
    device: torch.device,
    folder: Path,
    compiled: bool = False,
    eval_solver: Solver | None = None,
    objective: Objective | None = None,
) -> Training:
    """Put the loop's parts together, for a run that begins.

    compiled: whether the transformer's blocks are to be compiled.
    eval_solver: for evaluations; None: the same.
    objective: None: the one that the settings name.
    """
    objective = objective or make_objective(s, load_host())
    # First of all: the text encoders are given up before the copies of the weights take their memory.
    condition, eval_condition, negative = encode_all(s, model, prompts, held_out, device)
    torch.manual_seed(s.seed)  # A LoRA's weights are drawn from torch's own generator.
    policy = make_policy(s, model, device)
    if s.gradient_checkpointing:
        checkpoint_activations(model.transformer)
    if compiled:
        compile_blocks(model.transformer)
    if hasattr(model, "decode_in"):
        model.decode_in(decode_dtype(s, device))
    in_step = InStep(policy.velocity, s.peer_timeout, s.join_timeout) if policy.fsdp else None
    training = Training(
        settings=s,
        policy=policy,
        reward=reward,
        objective=objective,
        sampler=make_sampler(s, policy, solver, in_step),
        eval_sampler=replace(
            make_sampler(for_evaluation(s), policy, eval_solver or solver, in_step),
            guidance=s.eval_guidance,
            negative=negative,
        ),
        prompts=prompts,
        eval_prompts=held_out,
        condition=condition,
        eval_condition=eval_condition,
        optimizer=make_optimizer(s, policy.parameters),
        # The first process sets the real ones once its folder stands.
        observe=tell_no_observer,
        save=lambda: save_training(training, folder),
        at=Progress(
            kl_weight=s.kl_weight,
            loss_scale=LOSS_SCALE if s.precision == "fp16" else 1.0,
            prompts=digest_prompts(prompts, held_out),
            sums=[0.0] * (SUMS + len(objective.figures)),
        ),
    )
    return training


def encode_all(
    s: Settings, model: FlowModel, prompts: list[Prompt], held_out: list[Prompt], device: torch.device
) -> tuple[Encoded, Encoded, Condition | None]:
    """Encode the prompts that the run will draw, all held-out ones, and where evaluations are guided the empty
    negative prompt. Gives up the text encoders."""
    drawn = list_prompts_of_run(len(prompts), s.prompts_per_epoch, s.seed, s.epochs)
    cache = Path(s.cache).expanduser() if s.cache else None
    both = [*prompts, *held_out]
    # In one go, so that the text encoders are loaded once.
    negative = encode_negative(model, "", device) if s.eval_guidance != 1 else None
    encoded = encode_prompts(model, both, [*drawn, *range(len(prompts), len(both))], cache, device)
    if hasattr(model, "release"):
        model.release()
        free_memory()  # What the encoders took is for any stream from here on.
    rows, eval_rows = torch.split(encoded.row, [len(prompts), len(held_out)])
    return Encoded(encoded.condition, rows), Encoded(encoded.condition, eval_rows), negative


def make_policy(s: Settings, model: FlowModel, device: torch.device) -> Policy:
    """Make the weights that are trained, and their copies, from those that the settings begin with.

    model: the base, as `load_base` loads it; it is changed.
    """
    source = find_model(s)
    # A LoRA that is trained further stays one; what is below it becomes part of the weights.
    goes_on = bool(source.loras) and s.lora_rank > 0 and not s.lora_merge
    merged = source.loras[:-1] if goes_on else source.loras
    on_base = s.reference == "base" and s.kl_weight > 0
    base = put_in_place(source, model.transformer, merged, keep=on_base)
    dtype = autocast_dtype(s, device)
    # Where only a LoRA is trained, the transformer can compute in bfloat16 as diffusers' pipelines do: under
    # autocast its norms and all that lies between the products are float32, which costs more than the products.
    # In float16 that would overflow, and weights that are trained are float32 themselves.
    native = s.lora_rank > 0 and dtype == torch.bfloat16 and not getattr(model, "needs_autocast", True)
    # One process has nobody to share with, and the meta device nothing to share.
    fsdp = s.parallel == "fsdp" and world_size() > 1 and device.type != "meta"
    if fsdp and base and s.lora_rank:
        raise UsageError(
            "With parallel=fsdp and a LoRA the frozen weights are shared, and the base's own cannot visit: use "
            "reference=start, or lora_rank=0."
        )
    return Policy(
        model,
        start=source.loras[-1] if goes_on else None,
        base=base if on_base else None,
        lora_rank=s.lora_rank,
        lora_alpha=s.lora_alpha,
        lora_targets=s.lora_targets,
        keep_ema=s.ema_decay > 0,
        autocast=None if native else dtype,
        keep_reference=s.kl_weight > 0,
        offload=s.offload,
        # In 16 bits the sum would round away what a LoRA learns at first.
        merge=s.merge_lora == "always" or (s.merge_lora == "auto" and not dtype),
        fsdp=fsdp,
    )


def make_sampler(s: Settings, policy: Policy, solver: Solver, in_step: InStep | None) -> Sampler:
    """Make what generates images with the policy, without guidance."""
    model: Any = policy.model
    height, width, shape = image_shape(s, model)
    times = model.times(s.steps, height, width)
    velocity, device = policy.velocity, policy.device
    return Sampler(model, velocity, solver, times, shape, s.rollout_batch, s.decode_batch, device, in_step)


def save_training(training: Training, folder: Path) -> None:
    """Write a checkpoint of where the run stands to its folder, and delete those that need not be kept."""
    s, policy = training.settings, training.policy
    at = training.at.model_copy(update={"seconds": training.seconds()})
    path = folder / "checkpoints" / f"{at.step:06d}"
    # Of sharded weights every process has a part, which the first one gathers.
    if rank() == 0 or policy.sharded:
        settings = name_places(s.model_dump(mode="json"), folder)
        save_checkpoint(path, policy, training.optimizer, at, settings)
    if rank() == 0:
        prune_checkpoints(folder, at, s.keep_last, s.keep_best)
        training.observe("nft_checkpoint_saved", folder=path)
