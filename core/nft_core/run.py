"""A run from its settings: everything is checked, then loaded, then trained."""

from __future__ import annotations

import json
import os
import shlex
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nft_plugins import Run

from . import environment
from .errors import CheckpointError, NftError, SaveError, Stopped, UsageError, disk_advice, unknown, where
from .fingerprint import evaluation, short_digest, sources_of
from .host import Host
from .launch import first as is_first
from .launch import told
from .observers.metrics import trim
from .places import placeless
from .progress import Progress
from .prompts import Prompt, prompts_of_run, read_prompts, refusal_of, scorable
from .resume import FREE, digest, find, holds_a_run, locked, restore
from .settings import Settings, make_settings, to_toml
from .specs import RewardSpec, parse_observer, parse_reward

if TYPE_CHECKING:
    import torch

    from nft_plugins import FlowModel, Solver

    from .composer import Composed
    from .policy import Policy
    from .train import Training

#: Prompts with words to paint, for a run that is given none.
DATA = Path(__file__).parent / "data"


def resolve(host: Host, preset: str | None, *layers: Mapping[str, Any]) -> Settings:
    """Settings from a preset and then from each layer, later ones first in rank.

    Raises UsageError for a preset, a setting or a reward of `reward_defaults` that is not known.
    """
    base: dict[str, Any] = {}
    if preset:
        if preset not in host.presets:
            raise unknown("preset", preset, host.presets)
        info = host.presets[preset].info
        base = {**info.settings, "reward_defaults": {k: dict(v) for k, v in info.rewards.items()}}
    for layer in layers:
        defaults = layer.get("reward_defaults", {})
        for name in defaults if isinstance(defaults, Mapping) else ():
            if name not in host.rewards:
                raise unknown("reward", name, host.rewards)
    return make_settings(base, *layers)


def run(
    settings: Settings,
    folder: Path,
    host: Host,
    say: Callable[[str], None] = print,
    resume: bool = False,
    allow_changes: bool = False,
    profile: bool = False,
) -> None:
    """Train, in this process or in each that a launcher started, and write everything to `folder`.

    resume: go on from the folder's newest whole checkpoint, where it holds a run.
    allow_changes: even with settings or prompts that change what is learned.
    profile: write a trace of a part of an epoch to `folder/profile`, and say what takes the time.
    Raises UsageError for what can be told from the settings and files alone, before anything heavy is
    loaded or written, and NftError for what fails later.
    """
    folder = folder.resolve()  # A reward may change the current folder.
    environment.check()
    first = is_first()
    tell = say if first else lambda text: None
    specs, solver, prompts, held_out = prepare(settings, host)
    asked = make_observers(settings, host) if first else {}
    with ExitStack() as stack:
        found: Path | None = None
        goes_on = first and resume and holds_a_run(folder)
        if goes_on:
            stack.enter_context(locked(folder))
            found = find(folder, settings, allow_changes, tell)
        elif first:
            claim(folder)

        from .attention import attention_kernel
        from .compiling import should_compile, warm_up
        from .distributed import agree, barrier, process_group, rank, same_everywhere
        from .quiet import quiet
        from .train import train

        quiet("diffusers", "transformers")
        device = pick_device(settings.device)
        for warning in stack.enter_context(process_group(device, settings.peer_timeout, settings.join_timeout)):
            tell(warning)
        stack.enter_context(memory_errors())
        stack.enter_context(attention_kernel(settings.attention))
        stack.enter_context(host.guests())
        # All processes go on from the same checkpoint, or none does.
        number = agree(int(found.name) if found else -1, device)
        path = folder / "checkpoints" / f"{number:06d}" if number >= 0 else None
        check_alike(settings, path, device)
        check_model(settings, host)
        reward = load_rewards(specs, host, device, settings.reward_defaults)
        prompts, held_out = usable(prompts, held_out, reward.check_prompt, settings.unscorable, tell)
        check_sizes(settings, len(prompts), len(held_out))
        if not same_everywhere(digest(prompts, held_out), device):
            raise UsageError("The prompts of this run's processes differ: give the same files on every node.")
        model = load_model(settings, host, device)
        operations = count_on_gpu(settings, host, device, tell) if device.type == "cuda" else None
        compiled = should_compile(settings.compile, device, operations)
        training = assemble(settings, model, reward, solver, prompts, held_out, device, folder, compiled)
        named = [text for spec in specs for text in (spec.name, *spec.options.values())]
        training.at.sources = sources_of(host, [settings.solver, *map(str, named)])
        training.evaluation = evaluation(
            settings,
            held_out,
            specs,
            host,
            training.at.sources,
            precision=str(autocast_dtype(settings, device)),
            decode_precision=str(decode_dtype(settings, device)),
            family=find_family(settings, host)[0],
        )
        training.at.evaluation = short_digest(training.evaluation)
        other = bool(path) and restore(training, path, allow_changes, tell)
        if compiled:
            warm_up(training, tell)
        observe: Callable[..., None] = silent
        if rank() == 0:
            described = Run(folder, settings.model_dump(), settings.epochs, training.at.epoch)
            observe = training.observe = observers(host, described, asked)
            if not goes_on:
                make(folder)
                stack.enter_context(locked(folder))
                claim(folder)  # Loading took its time, in which another process may have come.
            write_settings(folder, settings, training.at.step)
            trim(folder, training.at, tell)
        if other:  # What was allowed holds from here on, whatever comes.
            training.save()
        observe("nft_run_started")
        error: BaseException | None = None
        said: list[str] = []
        try:
            with told() as training.told:  # Around the saving too, which a second signal must not end.
                try:
                    with profiling(training, folder, host, profile and rank() == 0):
                        train(training)
                except BaseException as caught:
                    # A second Ctrl-C means at once.
                    if is_from_inside(caught, training.told()) or not isinstance(
                        caught, KeyboardInterrupt | SaveError
                    ):
                        rescue(training, folder, said.append)
                    if isinstance(caught, Stopped):
                        barrier()  # torchrun kills the first, which saves, 30 seconds after another has ended.
                    raise
        except BaseException as caught:
            error = caught
            if is_from_inside(caught, training.told()):  # With an exit code of 0 the run would pass for whole.
                error = NftError(f"The run was ended from inside: {caught!r} came{where(caught)}.")
                raise error from caught
            raise
        finally:
            observe("nft_run_finished", error=error)
            for text in said:  # Now that nothing draws bars over it.
                tell(text)


def prepare(settings: Settings, host: Host) -> tuple[list[RewardSpec], Solver, list[Prompt], list[Prompt]]:
    """What can be made, and checked, without loading anything heavy."""
    solver = host.make_solver(settings.solver, settings.solver_options)
    specs = reward_specs(settings, host)
    if not any(spec.weight for spec in specs):
        raise UsageError("Every reward has the weight 0, so nothing would be learned: give one another weight.")
    return specs, solver, *both_files(settings)


def count_on_gpu(
    settings: Settings, host: Host, device: torch.device, tell: Callable[[str], None]
) -> float | None:
    """The run's floating-point operations, or None where they cannot be counted; warns of too little memory."""
    from .footprint import footprint
    from .plan import check_memory, count_operations

    try:
        counted = footprint(settings, host, device)
    except NftError:  # What cannot be counted may fit all the same.
        return None
    check_memory(settings, counted, host, device, tell)
    return count_operations(settings, counted)


def profiling(training: Training, folder: Path, host: Host, wanted: bool) -> AbstractContextManager[None]:
    if not wanted:
        return nullcontext()
    from .profile import profiled

    return profiled(training, folder / "profile", host)


@contextmanager
def memory_errors() -> Iterator[None]:
    """A GPU's full memory in one sentence with what helps."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NftError(
            f"{first_line(error)} Lower rollout_batch, microbatch or resolution; the same command with --plan "
            "says what takes the memory, and which settings would fit."
        ) from error


def is_from_inside(error: BaseException, told: int) -> bool:
    """Whether a plug-in has raised what ends a process, and not the user. told: the user's signal, or 0."""
    return isinstance(error, SystemExit) or (isinstance(error, KeyboardInterrupt) and not told)


def rescue(training: Training, folder: Path, tell: Callable[[str], None]) -> None:
    """Keep what was trained before an error or Ctrl-C, in the middle of an epoch as it may be."""
    training.policy.restore()
    at = training.at
    if training.torn:
        tell("The error came in the middle of a step: what was trained since the last checkpoint is lost.")
    elif not (at.step or at.update):
        tell("Nothing was trained yet, so nothing is saved: `nft resume` begins anew.")
    if training.torn or not (at.step or at.update):
        return
    in_step = training.sampler.in_step
    if training.policy.sharded and in_step and not in_step.all_here():
        tell(
            "Another process, which holds a part of the weights, has ended or hangs: what was trained since "
            "the last checkpoint is lost."
        )
        return
    try:
        training.save()
    except Exception as error:  # Whatever it is, the one that ended the run is to be seen.
        tell(str(error))
        return
    tell(f"Saved at epoch {at.epoch}, gradient step {at.step}. To go on: nft resume {shlex.quote(str(folder))}")


def reward_specs(settings: Settings, host: Host) -> list[RewardSpec]:
    """The run's rewards with the preset's options filled in where the user gave none."""
    if not settings.rewards:
        raise UsageError(
            "A run needs a reward: give --reward NAME, as in --reward pickscore. "
            f"Known: {', '.join(sorted(host.rewards))}; FILE.py:FUNCTION is a reward of yours."
        )
    specs = [parse_reward(given, settings.reward_defaults) for given in settings.rewards]
    for spec in specs:
        host.reward(spec.name)
    return specs


def load_rewards(
    specs: list[RewardSpec], host: Host, device: torch.device, defaults: Mapping[str, Mapping[str, Any]]
) -> Composed:
    from .composer import compose

    try:
        return compose(specs, host=host, device=str(device), defaults=defaults)
    except NftError as error:
        if isinstance(error.__cause__, OSError):
            raise NftError(f"{error} --tiny brings small stand-ins, which work offline too.") from error
        raise


def both_files(settings: Settings) -> tuple[list[Prompt], list[Prompt]]:
    """The training and the held-out prompts; none of these where there is no file of them."""
    held_out = read_prompts(Path(settings.eval_prompts)) if settings.eval_prompts else []
    if settings.prompts:
        return read_prompts(Path(settings.prompts)), held_out
    return read_prompts(DATA / "prompts-train.txt"), held_out or read_prompts(DATA / "prompts-eval.txt")


def usable(
    prompts: list[Prompt],
    held_out: list[Prompt],
    check: Callable[[str, Mapping[str, Any]], None],
    policy: Literal["error", "drop"],
    tell: Callable[[str], None],
) -> tuple[list[Prompt], list[Prompt]]:
    """Those that the rewards can score; held-out prompts are split off where there are none."""
    from .lending import kept

    everything = [*prompts, *held_out]
    with kept("the check of prompts"):
        prompts = scorable(prompts, check, policy)
        held_out = scorable(held_out, check, policy) if held_out else []
        lost = len(everything) - len(prompts) - len(held_out)
        if lost:
            example = next(filter(None, (refusal_of(prompt, check) for prompt in everything)))
            tell(
                f"{lost} of {len(everything)} prompts are left out: not every reward can score them, such as "
                f"{example}"
            )
    if held_out:
        shared = {p.text for p in prompts} & {p.text for p in held_out}
        if shared:
            tell(f"Warning: {len(shared)} of {len(held_out)} held-out prompts are trained on too.")
        return prompts, held_out
    texts = list(dict.fromkeys(p.text for p in prompts))
    if len(texts) == 1:
        tell("There is one prompt: it is trained on and evaluated on.")
        return prompts, prompts[:1]
    count = min(64, len(texts) // 10) or 1
    chosen = set(texts[:: len(texts) // count][:count])
    tell(f"No --eval-prompts: {count} of {len(texts)} prompts are held out for evaluation.")
    first = {p.text: p for p in reversed(prompts)}
    return [p for p in prompts if p.text not in chosen], [first[t] for t in texts if t in chosen]


def claim(folder: Path) -> None:
    """Refuse a folder that holds anything: a run never overwrites another."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        command = f"nft resume {shlex.quote(str(folder))}"
        goes_on = f" `{command}` goes on with the run in it." if (folder / "run.toml").exists() else ""
        raise UsageError(
            f"{folder} exists and is not empty. Choose another --out, or remove it first; "
            f"nothing in it was changed.{goes_on}"
        )


def check_sizes(settings: Settings, prompts: int, held_out: int) -> None:
    """Raise UsageError, with the nearest possible sizes, for sizes that the prompts or processes rule out."""
    from .distributed import world_size

    if settings.prompts_per_epoch > prompts:
        raise UsageError(
            f"prompts_per_epoch = {settings.prompts_per_epoch}, but there are {prompts} training prompts "
            f"to choose from: use --set prompts_per_epoch={prompts} or less, or give more prompts."
        )
    images = min(settings.prompts_per_epoch * settings.group_size, held_out * settings.eval_images)
    if images < world_size():
        raise UsageError(
            f"{images} images cannot be shared by {world_size()} processes: give more prompts, a larger "
            "group_size or eval_images, or use fewer processes."
        )


def check_alike(settings: Settings, path: Path | None, device: torch.device) -> None:
    """Raise UsageError where a process was started otherwise than the first.

    path: the checkpoint to go on from; CheckpointError where this process cannot see it.
    """
    from .distributed import gather_texts, rank

    # Where files lie may differ from node to node.
    places = {"model", "model_options", "prompts", "eval_prompts", "reward_defaults"}
    mine = placeless(settings.model_dump(mode="json", exclude=FREE | places))
    first, *others = map(json.loads, gather_texts(json.dumps(mine), device))
    for number, other in enumerate(others, 1):
        differ = [
            f"{n} ({first[n]!r} in process 0, {other[n]!r} in process {number})"
            for n in first
            if other[n] != first[n]
        ]
        if differ:
            raise UsageError(
                f"The run's processes were started with different settings: {'; '.join(differ)}. Give the same "
                "command on every node."
            )
    if path and not path.exists():
        raise CheckpointError(
            f"Process {rank()}, on {socket.gethostname()}, does not see {path.absolute()}, from which process "
            "0 goes on: a run's folder must be on a file system that all nodes share."
        )


def pick_device(name: str) -> torch.device:
    """The device by name; `auto` is this process's GPU where there is one."""
    import torch

    environment.check()
    local = environment.number("LOCAL_RANK", 0)
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
    from .models.sources import read_index

    name = settings.model
    try:
        index = read_index(name)
    except NftError:
        raise
    except (OSError, ValueError) as error:
        raise NftError(
            f"Cannot load the model {name!r}: looked for a diffusers pipeline (model_index.json) in a folder "
            f"of that name and on the Hugging Face hub. {first_line(error)} Check the name, your network "
            "and, for a gated model, `hf auth login`; a local folder with --model PATH works offline, "
            "and so does --tiny, which brings its own small model."
        ) from error
    pipeline = str(index["_class_name"])
    family = host.family(pipeline, settings.family)
    if family is None:
        from .models.checks import unhandled

        known = {p for card in host.models.values() for p in card.info.pipelines}
        raise UsageError(unhandled(name, pipeline, known))
    return family, index


def check_model(settings: Settings, host: Host) -> None:
    """Raise NftError for a model that cannot be trained, or is not whole. No weights are read."""
    from .factories import resolve as factory_of
    from .models.checks import check_pipeline
    from .models.pipeline import PipelineModel

    family, index = find_family(settings, host)
    factory = factory_of(host.models[family].info.factory)
    # Another family may read its folder in a way of its own.
    if Path(settings.model).is_dir() and isinstance(factory, type) and issubclass(factory, PipelineModel):
        try:
            check_pipeline(Path(settings.model), index)
        except Exception as error:
            raise unreadable(settings.model, error) from error


def unreadable(model: str, error: Exception) -> NftError:
    said = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {first_line(error)}"
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


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 400 else text[:400] + " ..."


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


def make(folder: Path, new: bool = False) -> bool:
    """Make a folder; returns whether it is there now, or with `new` whether it is there by this call."""
    try:
        folder.mkdir(parents=True, exist_ok=not new)
    except OSError as error:
        if new and isinstance(error, FileExistsError):
            return False
        advice = f"{disk_advice(error)}, or choose another --out"
        raise NftError(f"Cannot write to {folder}: {error}. {advice}.") from error
    return True


def write_settings(folder: Path, settings: Settings, step: int) -> None:
    """Write `run.toml`. Other settings that stand there held until this gradient step, and are kept by it."""
    file, aside, before = folder / "run.toml", folder / ".run.toml", folder / f"run-until-{step:06d}.toml"
    text = to_toml(settings)

    def write(path: Path, content: str) -> None:
        aside.write_text(content, encoding="utf-8")
        aside.replace(path)

    try:
        former = file.read_text(encoding="utf-8") if file.exists() else text
        if former != text and not before.exists():
            write(before, former)
        write(file, text)
    except OSError as error:
        advice = f"{disk_advice(error)}, then give the command again"
        raise NftError(f"Cannot write to {folder}: {error}. {advice}.") from error


def silent(hook: str, **arguments: Any) -> None:
    """The observers of every process but the first."""


def make_observers(settings: Settings, host: Host) -> dict[str, object]:
    """Those that the settings ask for, by name."""
    specs = [parse_observer(given) for given in settings.observers]
    if len({spec.name for spec in specs}) < len(specs):
        raise UsageError(f"An observer is asked for twice: {', '.join(spec.name for spec in specs)}.")
    return {spec.name: host.make_observer(spec) for spec in specs}


def observers(host: Host, described: Run, asked: Mapping[str, object]) -> Callable[..., None]:
    """Tells the built-in observers, those that were asked for, and those that plug-ins are by themselves."""
    from .observers import builtin

    for observer in builtin():
        host.register(observer, f"nft_core.{type(observer).__name__.lower()}")
    for name, observer in asked.items():
        host.ask(observer, name)
    return lambda hook, **arguments: host.notify(hook, run=described, **arguments)


def make_policy(s: Settings, model: FlowModel, device: torch.device) -> Policy:
    """The weights that are trained, and their copies."""
    import torch

    from .distributed import world_size
    from .policy import Policy

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

    from .checkpoint import prune, save_checkpoint
    from .compiling import compile_blocks
    from .distributed import rank
    from .encodings import Encoded, encode
    from .guard import free_memory
    from .optimizers import LOSS_SCALE, make_optimizer
    from .policy import checkpoint_activations
    from .rollout import Sampler
    from .sharding import InStep
    from .train import Training

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
