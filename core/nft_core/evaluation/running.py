"""An evaluation from a request to its results, in parts that an interrupted one goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nft_plugins import Batch

from ..errors import NftError, Stopped, UsageError, shorten_error
from ..host.host import Host
from ..host.lending import keep_state
from ..parallel.devices import free_memory
from ..parallel.processes import gather_texts, is_same_everywhere, process_group, rank, world_size
from ..parallel.signals import note_signals
from ..prompts import Prompt, keep_scorable
from ..runs.folder import lock_folder
from ..runs.inputs import load_rewards
from ..runs.setup import image_shape
from ..sampling.draws import Draws
from ..sampling.rollout import Rollout, Sampler, roll_out
from ..scoring.composer import Composed
from ..scoring.images import has_weights
from ..scoring.statistics import list_figures
from ..seeds import reseed
from ..training.attention import attention_kernel
from .entries import Entry
from .figures import EntryFigures, Measured, make_changes, make_figures, read_tags
from .folders import choose_folder
from .generation import Generation, prepare_generation
from .protocol import Protocol
from .report import Evaluation, write_markdown
from .request import Request, check_sizes, use_model
from .store import RESULTS_JSON, RESULTS_MD, Stored, join, read_parts, say_unwritable, write_part, write_text

#: Batches of each process in the largest part: enough for scoring and generating to overlap.
MOST_BATCHES = 8


@dataclass(frozen=True)
class Progress:
    """Tells how far an evaluation is. means: of the entry's rewards so far; None where nothing is valid."""

    entry: str
    done: int
    total: int
    means: dict[str, float | None]


@dataclass(frozen=True)
class Work:
    """Holds what all entries are evaluated with.

    show: told of progress. stop: raises Stopped where this process was told to end.
    """

    request: Request
    protocol: Protocol
    prompts: Sequence[Prompt]
    reward: Composed
    folder: Path
    save_images: bool
    show: Callable[[Progress], None]
    stop: Callable[[], None]


def run_evaluation(
    request: Request,
    host: Host,
    out: Path | None,
    *,
    save_images: bool = False,
    tell: Callable[[str], None] = print,
    show: Callable[[Progress], None] = lambda progress: None,
) -> Evaluation:
    """Evaluate every entry that is not evaluated yet, in this process or in each that a launcher started.

    out: the folder of the results, new or that of an evaluation to go on with; None finds or makes one under
    ./evaluations. Raises UsageError where other settings, prompts, models or versions were evaluated there.
    """
    s, device = request.settings, request.device
    with ExitStack() as stack:
        enter_surroundings(stack, request, host, tell)
        for note in request.notes:
            tell(note)
        reward = load_rewards(cast(Any, request.rewards), host, device, s.reward_defaults)
        with keep_state("the check of prompts"):
            prompts = keep_scorable(list(request.prompts), reward.find_refusals, s.unscorable)
        if len(prompts) < len(request.prompts):
            tell(
                f"{len(prompts)} of {len(request.prompts)} prompts are used, those that every reward can score."
            )
        protocol = request.complete_protocol(prompts, host)
        # With different models or prompts they would wait for one another for ever.
        told = [protocol.fingerprint(), [entry.identity for entry in request.entries]]
        if not is_same_everywhere(json.dumps(told), device):
            raise UsageError(
                "The processes of this evaluation were started differently: give the same command to all."
            )
        folder = Path()
        if rank() == 0:
            folder = choose_folder(out, protocol, prompts, request.entries, tell)
            stack.enter_context(lock_folder(folder))
        # The first process's, which alone has looked: a second might find another unfinished one.
        folder = Path(gather_texts(str(folder), device)[0])
        stop = stack.enter_context(note_signals())

        def raise_if_stopped() -> None:
            if number := stop():
                raise Stopped(number)

        work = Work(request, protocol, prompts, reward, folder, save_images, show, raise_if_stopped)
        with say_how_to_go_on(folder, tell):
            return evaluate_entries(work, host)


def enter_surroundings(stack: ExitStack, request: Request, host: Host, tell: Callable[[str], None]) -> None:
    """Enter what holds for a whole evaluation: the group of processes, kernels, and how errors are told."""
    s = request.settings
    for warning in stack.enter_context(process_group(request.device, s.peer_timeout, s.join_timeout)):
        tell(warning)
    stack.enter_context(explain_memory_errors())
    stack.enter_context(attention_kernel(s.attention))
    stack.enter_context(host.hooks.unregister_afterwards())


@contextmanager
def explain_memory_errors() -> Iterator[None]:
    """Say in one sentence that the GPU's memory is full, and what helps."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise NftError(f"{shorten_error(error)} Lower rollout_batch or decode_batch with --set.") from error


@contextmanager
def say_how_to_go_on(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Say, when something ends an evaluation early, that nothing of it is lost."""
    try:
        yield
    except BaseException:
        if rank() == 0:
            tell(f"What is scored so far is kept in {folder}: the same command goes on from there.")
        raise


def evaluate_entries(work: Work, host: Host) -> Evaluation:
    """Evaluate the entries, each model loaded once; writes the results after each."""
    results = Evaluation(work.protocol, work.request.entries, (), False, work.folder)
    first: Measured | None = None
    sizes: dict[str, tuple[int, int]] = {}
    for _, group in groupby(work.request.entries, key=lambda e: (e.model, e.lora)):
        entries = list(group)
        generation: Generation | None = None
        for entry in entries:
            parts = read_parts(work.folder, entry, work.protocol.fingerprint())
            todo = list_left(work, parts)
            if todo and generation is None:
                generation = open_model(work, host, entry, any(e.guidance != 1 for e in entries))
                sizes[entry.name] = image_shape(generation.settings, generation.model)[:2]
                check_sizes(sizes)
            if todo and generation is not None:
                parts += score_entry(work, entry, generation, parts, todo)
            measured, each = measure_entry(entry, join(parts), work.prompts, first)
            first = first or measured
            results = replace(results, figures=(*results.figures, each))
            results = replace(results, complete=len(results.figures) == len(results.entries))
            if rank() == 0:
                write_results(work.folder, results)
        # Before the next model is loaded: two may not fit in the memory.
        del generation
        free_memory()
    return results


def list_left(work: Work, parts: Sequence[Stored]) -> list[int]:
    """List the prompts that have no scores yet. Raises UsageError where processes see different files."""
    done = {int(n) for part in parts for n in part.prompt.unique()}
    if not is_same_everywhere(str(sorted(done)), work.request.device):
        raise UsageError(
            f"The processes of this evaluation see different files in {work.folder}: it must be on a file "
            "system that all nodes share."
        )
    todo = [n for n in range(len(work.prompts)) if n not in done]
    images = len(todo) * work.protocol.images
    if todo and images < world_size():
        raise UsageError(
            f"{images} images that are left cannot be shared by {world_size()} processes: use fewer processes."
        )
    return todo


def open_model(work: Work, host: Host, entry: Entry, guided: bool) -> Generation:
    """Load an entry's model, and encode the prompts."""
    return prepare_generation(
        use_model(work.request.settings, entry),
        host,
        work.request.device,
        work.prompts,
        guided=guided,
        negative_prompt=work.protocol.negative_prompt,
    )


def score_entry(
    work: Work, entry: Entry, generation: Generation, before: Sequence[Stored], todo: Sequence[int]
) -> list[Stored]:
    """Generate and score the images of the prompts in `todo`, part by part; returns the new parts."""
    p, s = work.protocol, work.request.settings
    sampler = generation.make_sampler(entry.guidance)
    parts: list[Stored] = []
    while todo:
        # The first part is small, so that figures are soon there; in larger ones rewards and model overlap.
        batches = min(2 ** (len(before) + len(parts)), MOST_BATCHES)
        size = -(-batches * s.rollout_batch * world_size() // p.images)
        # A rest of fewer images than processes could not be shared, and is taken along.
        size = len(todo) if (len(todo) - size) * p.images < world_size() else size
        draws = Draws(work.prompts, todo[:size], p.images, p.seed, "eval", 0)
        part = score_part(work, entry, sampler, generation, draws, sum(map(len, [*before, *parts])))
        if rank() == 0:
            write_part(work.folder, entry, part, p.fingerprint())
        parts.append(part)
        todo = todo[size:]
        work.show(summarise_progress(work, entry, join([*before, *parts])))
    return parts


def score_part(
    work: Work, entry: Entry, sampler: Sampler, generation: Generation, draws: Draws, done: int
) -> Stored:
    """Generate and score the images of a part, in all processes."""
    total = len(work.prompts) * work.protocol.images
    folder = work.folder / "images" / entry.folder

    def look(rows: Tensor, batch: Batch) -> None:
        if work.save_images:
            save_images(folder, draws, rows, batch)

    def progress(phase: str, images: int, count: int) -> None:
        if phase == "reward":  # An image counts as done once it is scored.
            work.show(Progress(entry.name, done + images * len(draws) // count, total, {}))

    # For plug-ins that draw from global generators against their contract: the same numbers after a stop.
    reseed(draws.seed, "eval", draws.indices[0], rank())
    rollout = roll_out(
        *(sampler, draws, generation.condition, work.reward, progress, lambda name: nullcontext()),
        stop=work.stop,
        look=look,
    )
    return store_rollout(rollout, has_weights(work.reward))


def store_rollout(rollout: Rollout, keep_total: bool) -> Stored:
    """Take what is kept of a rollout. keep_total: whether the weighted sum says more than the rewards alone."""
    rewards, details = list_figures(rollout.scores)
    if not keep_total:
        del rewards["total"]
    image = torch.arange(len(rollout.groups), device="cpu") % rollout.draws.images
    skipped = frozenset(rollout.skipped)
    return Stored(rollout.groups, image, rewards, details, rollout.tallies, skipped, rollout.scores.notes)


def save_images(folder: Path, draws: Draws, rows: Tensor, batch: Batch) -> None:
    """Save a batch of images, each under the numbers of its prompt and of itself. Raises NftError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for n, image in zip(rows.tolist(), batch.pil, strict=True):
            position, number = divmod(n, draws.images)
            image.save(folder / f"{draws.indices[position]:05d}-{number:02d}.png")
    except OSError as error:
        raise say_unwritable(folder, error) from error


def summarise_progress(work: Work, entry: Entry, stored: Stored) -> Progress:
    """Make the running means of an entry's rewards."""
    means = {n: float(v[ok].double().mean()) if ok.any() else None for n, (v, ok) in stored.rewards.items()}
    return Progress(entry.name, len(stored), len(work.prompts) * work.protocol.images, means)


def measure_entry(
    entry: Entry, stored: Stored, prompts: Sequence[Prompt], first: Measured | None
) -> tuple[Measured, EntryFigures]:
    """Make the figures of an entry from its stored scores, with differences to those of the first entry."""
    # Parts that were made again may stand in another order.
    order = (stored.prompt * (int(stored.image.max()) + 1) + stored.image).argsort()
    groups = stored.prompt[order]
    figures = {n: (v[order], ok[order]) for n, (v, ok) in {**stored.rewards, **stored.details}.items()}
    if stored.skipped and "total" in figures:  # Without one of its rewards a total is another.
        figures["total"] = (figures["total"][0], torch.zeros_like(figures["total"][1]))
    tags = read_tags([prompts[n].metadata for n in groups.tolist()])
    failed = {name: tally.masked for name, tally in stored.tallies.items()}
    measured = Measured(figures, groups, tags, failed)
    changes = make_changes(first, measured) if first else {}
    skipped = tuple(sorted(stored.skipped))
    return measured, EntryFigures(entry.name, len(groups), make_figures(measured), changes, skipped)


def write_results(folder: Path, results: Evaluation) -> None:
    """Write the results as JSON and as Markdown."""
    write_text(folder / RESULTS_MD, write_markdown(results))
    write_text(folder / RESULTS_JSON, json.dumps(results.to_json(), indent=2, allow_nan=False) + "\n")
