"""Going on with a run: from which checkpoint, with which settings, and with whose prompts."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UsageError
from ..host.specs import FailurePolicy, RewardSpec, parse_reward
from ..models.run_folders import STATE, find_checkpoint
from ..models.small_files import read_object
from ..settings import Settings, make_settings
from .fingerprint import compare_sources
from .folder import read_settings
from .places import find_places, shorten_paths

if TYPE_CHECKING:
    from ..prompts import Prompt
    from ..training.state import Progress, Training

#: Settings that a run may go on with at another value: they change how far, how fast and how closely watched it
#: goes, not what is learned. Sizes of batches and the number of processes change results by rounding alone.
FREE = {
    *("epochs", "device", "processes", "parallel", "rollout_batch", "decode_batch", "microbatch", "observers"),
    *("join_timeout", "peer_timeout", "merge_lora", "cache", "gradient_checkpointing", "offload", "compile"),
    *("attention", "eval_resolution"),
    *("eval_every", "eval_images", "eval_steps", "eval_solver", "eval_solver_options", "eval_guidance"),
    *("checkpoint_every", "keep_last", "keep_best"),
    *("prompts", "eval_prompts"),  # What is in these files is compared.
    *("max_nonfinite", "max_skips", "strict", "watch_x0", "watch_gap", "watch_flat_groups", "watch_reward"),
    *("watch_spreads", "preset"),  # What the preset set is compared setting by setting.
}


def choose_checkpoint(
    folder: Path, settings: Settings, allow_changes: bool, tell: Callable[[str], None]
) -> Path | None:
    """Choose the newest whole checkpoint, or None where the run begins anew, and say which.

    Raises UsageError, with each of them, for settings that would change what is learned.
    """
    from .checkpoint import find_newest_checkpoint, list_checkpoints

    path = find_newest_checkpoint(folder, tell)
    if path is None and list_checkpoints(folder):
        raise CheckpointError(
            f"None of the checkpoints of {folder} is whole. Put back a copy of one, or remove "
            f"{folder / 'checkpoints'} to begin anew."
        )
    if path is None:
        check_changes(read_settings(folder), settings, allow_changes, tell)
        tell(f"{folder} has no checkpoint yet: the run begins anew.")
        return None
    progress, before = read_checkpoint(path)
    check_changes(before, settings, allow_changes, tell, has_finished(progress.epoch, before))
    update = f", {progress.update} steps into epoch {progress.epoch + 1}" if progress.update else ""
    tell(f"Going on from {path}: epoch {progress.epoch} of {settings.epochs}{update}.")
    if progress.epoch >= settings.epochs:
        longer = f"nft resume {shlex.quote(str(folder))} --epochs {2 * settings.epochs or 1}"
        tell(f"The run is finished. To train further, such as twice as long: {longer}")
    return path


def read_checkpoint(path: Path) -> tuple[Progress, dict[str, Any]]:
    """Read a checkpoint's progress, and its settings with whole paths. Raises CheckpointError."""
    from .checkpoint import read_state

    progress, settings = read_state(path)
    return progress, find_places(settings, path.parent.parent)


def has_finished(epoch: int, settings: Mapping[str, Any]) -> bool:
    """Say whether a run came to the end of all the epochs that its settings named."""
    return epoch >= make_settings(settings).epochs


def refuse_changes(folder: Path, settings: Settings, allow_changes: bool) -> None:
    """Raise UsageError for settings that would change what is learned, as far as small files tell.

    `choose_checkpoint` compares all, and reads the whole checkpoint for that.
    """
    try:
        path = find_checkpoint(folder)
        state = read_object(path / STATE) if path else {}
    except (UsageError, OSError):  # `choose_checkpoint` says what is wrong with it.
        return
    before, progress = state.get("settings"), state.get("progress")
    if isinstance(before, dict) and isinstance(progress, dict) and type(progress.get("epoch")) is int:
        before = find_places(before, folder)
        check_changes(
            before, settings, allow_changes, lambda text: None, has_finished(progress["epoch"], before)
        )


def check_changes(
    before: Mapping[str, Any],
    settings: Settings,
    allow_changes: bool,
    tell: Callable[[str], None],
    finished: bool = False,
) -> None:
    """Tell which settings have changed; raise UsageError for those that change what is learned.

    finished: whether the run came to its end, so that more epochs are a new stretch of it.
    """
    grave, free = describe_changes(before, settings, finished)
    if grave and not allow_changes:
        raise UsageError(
            "These settings change what is learned, and the checkpoint was made with others: "
            f"{'; '.join(grave)}. Leave them as they were, or go on all the same with --allow-changes."
        )
    if grave or free:
        tell(f"Settings that have changed: {'; '.join([*grave, *free])}.")


def describe_changes(
    before: Mapping[str, Any], settings: Settings, finished: bool = False
) -> tuple[list[str], list[str]]:
    """Describe settings that differ from a checkpoint's: those that change what is learned, and the others."""
    now = settings.model_dump(mode="json")
    before = {**make_settings().model_dump(mode="json"), **before}
    said = {n: f"{n} ({before[n]!r} before, {now[n]!r} now)" for n in sorted(now) if now[n] != before[n]}
    free = FREE
    if settings.lr_schedule == "cosine" and "epochs" in said:
        said["epochs"] += ", over which lr_schedule = cosine, which --tiny has, falls to 0"
        if finished:
            said["epochs"] += ": the learning rate rises again to where it would be in a run of this length"
        else:
            free = FREE - {"epochs"}
    if said:
        # A file may lie elsewhere now, and what is done where a reward fails may change.
        was, is_now = (
            shorten_paths(v) | {"rewards": drop_failure_policies(shorten_paths(v)["rewards"])}
            for v in (before, now)
        )
        free = free | {n for n in said if n != "epochs" and was[n] == is_now[n]}
    return [said[n] for n in said if n not in free], [said[n] for n in said if n in free]


def drop_failure_policies(rewards: Sequence[Any]) -> list[RewardSpec]:
    """Parse rewards without what is done where they fail: that may change."""
    return [replace(parse_reward(given), guard=FailurePolicy()) for given in rewards]


def digest_prompts(prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> str:
    """Make a digest of the prompts that a run trains on and evaluates on, and of their metadata, in order."""
    rows = [[p.text, p.metadata] for p in prompts], [[p.text, p.metadata] for p in held_out]
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=str).encode()).hexdigest()


def explain_other_origin(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say that a run began from weights that are others now."""
    names = ", ".join(name for name in {**before, **now} if before.get(name) != now.get(name))
    return (
        f"What the run began from has changed since its checkpoint was made: {names}. Put back what its "
        "settings model and lora named then, or go on all the same with --allow-changes."
    )


def restore_training(
    training: Training, path: Path, allow_changes: bool, tell: Callable[[str], None] = lambda text: None
) -> bool:
    """Put a run where its checkpoint stands; returns whether it learns from other things from there.

    tell: told which plug-ins and files of the user's are others than when the checkpoint was made.
    Raises UsageError for other prompts, and CheckpointError for a checkpoint of another model.
    """
    from ..training.totals import DEVIATION
    from .checkpoint import load_checkpoint

    progress, before = read_checkpoint(path)
    if progress.prompts != training.at.prompts and not allow_changes:
        raise UsageError(
            "The prompts have changed since the checkpoint was made: give the same files, or go on all the "
            "same with --allow-changes."
        )
    if progress.origin != training.at.origin and not allow_changes:
        raise UsageError(explain_other_origin(progress.origin, training.at.origin))
    # After all checks, so that a refusal leaves the run as it was assembled.
    load_checkpoint(path, training.policy, training.optimizer)
    grave, _ = describe_changes(before, training.settings, has_finished(progress.epoch, before))
    now = training.at
    other = bool(grave) or progress.prompts != now.prompts
    if differ := compare_sources(progress.sources, now.sources):
        tell(f"Not as when the checkpoint was made: {'; '.join(differ)}. Figures may differ for that.")
    if other or progress.evaluation != now.evaluation:
        progress.evaluations.clear()  # Rewards of another kind, or of other images, are not compared with.
        # Totals of equal evaluations are compared, so what they are divided by stays.
        same = progress.evaluation == now.evaluation
        progress.baseline = {n: v for n, v in progress.baseline.items() if same and n.startswith(DEVIATION)}
    if len(progress.sums) != len(now.sums):  # Another objective has other figures: the epoch's begin anew.
        progress.sums = now.sums
    # The next checkpoint tells of the files of now, which have just been compared or allowed.
    progress.prompts, progress.evaluation, progress.sources = now.prompts, now.evaluation, now.sources
    progress.origin = now.origin
    training.at = progress
    return other
