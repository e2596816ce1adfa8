"""`nft run --plan` prints what a run will need, and which settings fit, as tables."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from ..host.host import Host
from ..host.local import is_reference
from ..host.specs import RewardSpec
from ..planning.footprint import Footprint, count_footprint
from ..planning.known import Card
from ..planning.plan import (
    CARDS,
    CONTEXT,
    GIB,
    SLACK,
    USABLE,
    Phases,
    count_copies,
    count_needed,
    count_planned_processes,
    count_works,
    plan_phases,
    propose_settings,
    sum_phases,
    write_changes,
)
from ..prompts import Prompt, list_prompts_of_run
from ..quiet import silence_libraries
from ..runs.inputs import Inputs
from ..runs.setup import pick_device
from ..settings import Settings
from .tables import new_table, print_table

#: Bytes of weights below which a model is planned for the CPU where there is no GPU.
SMALL = GIB


def show_plan(
    s: Settings, planned: Settings, host: Host, inputs: Inputs, card: Card | None, rate: float | None
) -> None:
    """Print what a run takes, whether that fits, and which settings would.

    planned: the same settings, with a model whose configs are on this machine.
    card: the GPU to plan for; None plans for this machine's GPU, or with the device cpu for its own memory.
    rate: speed in TFLOP/s, for the shortest time that an epoch can take; None takes the card's.
    """
    silence_libraries("diffusers", "transformers")
    # The plan of a GPU is made without a GPU too, such as on a laptop; but a small model is trained on its CPU.
    there = s.device == "cpu" or torch.cuda.is_available() or (is_small(s.model) and not card and not rate)
    device = pick_device(s.device) if there else torch.device("cuda")
    rewards, unknown = count_reward_bytes(inputs.rewards, host, device.type)
    f = count_footprint(planned, host, device, both=True)
    table = plan_phases(s, f, rewards)
    click.echo(write_headline(s, f, device))
    if planned is not s:
        click.echo("The model is not on this machine: its sizes are the published ones, which nft-hub knows.")
    if card and card.lacks_bf16 and f.precision == "bf16":
        click.echo(f"{card.title} has no fast bf16: --set precision=fp16 suits it.")
    show_phases(table)
    for line in write_remarks(s, f, table, unknown, inputs.prompts, inputs.held_out):
        click.echo(line)
    # The peaks of cards are those of 16 bits.
    show_works(s, f, rate or (card.tflops if card and f.precision != "fp32" else None))
    rooms = [(f"a GPU of {size:g} GiB", round(size * GIB * USABLE)) for size in CARDS]
    if here := find_memory(device, card):
        click.echo(write_verdict(table, *here, on_gpu=bool(card) or device.type != "cpu"))
        rooms = [here] if card or device.type == "cpu" else [here, *rooms]
    else:
        click.echo("There is no GPU here to compare with: give one, as in --card h100 or --card 24 (GiB).")
    show_proposals(s, f, rewards, rooms)


def is_small(model: str) -> bool:
    """Tell whether a model is a folder of so few weights that people train it on a CPU."""
    return Path(model).is_dir() and sum(f.stat().st_size for f in Path(model).rglob("*.safetensors")) < SMALL


def write_headline(s: Settings, f: Footprint, device: torch.device) -> str:
    """Write what is trained, in which precision, and where."""
    trained = sum(f.trained)
    what = f"a LoRA of rank {s.lora_rank}" if f.lora else "the whole transformer"
    where = "a CPU" if device.type == "cpu" else "a GPU"
    several = f", in each of {count_planned_processes(s)} processes" if count_planned_processes(s) > 1 else ""
    return (
        f"{s.model}: {what} is trained ({trained:,} numbers), in {f.precision}, on {where}{several}. "
        "Nothing was loaded."
    )


def show_phases(table: Phases) -> None:
    """Print the memory that each phase needs, with a row for each thing that is in it."""
    unit, name = (GIB, "GiB") if max(sum_phases(table).values()) >= 4 * GIB else (2**20, "MiB")
    shown = new_table()
    shown.add_column(f"{name} in", no_wrap=True)
    for phase in table:
        shown.add_column(phase, justify="right")
    rows = dict.fromkeys(row for column in table.values() for row in column)
    # What is made in a phase stands below what stays through all of them.
    for row in sorted(rows, key=lambda row: row in ("activations", "latents and images")):
        values = [column.get(row, 0) for column in table.values()]
        if any(values):
            shown.add_row(row, *(f"{value / unit:,.2f}" if value else "" for value in values))
    shown.add_section()
    shown.add_row("at most", *(f"{value / unit:,.2f}" for value in sum_phases(table).values()))
    print_table(shown)


def write_remarks(
    s: Settings,
    f: Footprint,
    table: Phases,
    unknown: Sequence[str],
    prompts: list[Prompt],
    held_out: list[Prompt],
) -> Iterator[str]:
    """Write what the table of phases does not show."""
    # Activations grow with the microbatch in a straight line, so that one image more gives the amount for each.
    step = f.steps[s.gradient_checkpointing]
    each = step.held(s.microbatch + 1) - step.held(s.microbatch)
    yield f"Activations that wait for the backward pass: {format_bytes(each)} for each image of the microbatch."
    drawn = list_prompts_of_run(len(prompts), min(s.prompts_per_epoch, len(prompts)), s.seed, s.epochs)
    texts = len({prompts[i].text for i in drawn}) + len({p.text for p in held_out})
    away = sum(count_copies(s, f).values()) if s.offload else 0
    yield (
        f"In the host's memory: {format_bytes(texts * f.row)} for conditions of {texts} prompts at most"
        + (f", {format_bytes(away)} for old, reference and EMA weights" if away else "")
        + f"; {format_bytes(sum(f.texts.values()))} for text encoders until the prompts are encoded."
    )
    if any(row.startswith("reward ") for row in table["reward"]):
        yield "Rewards are as their cards say, weights alone: what they take while they score is not counted."
    if unknown:
        yield f"Of these rewards nothing is known: {', '.join(unknown)}."
    if s.compile is not False:
        yield "What torch.compile saves and takes is not counted."


def format_bytes(size: int) -> str:
    """Write a size in GiB, or in MiB if it is small."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def show_works(s: Settings, f: Footprint, rate: float | None) -> None:
    """Print the operations of an epoch and the bytes of weights that it reads, by kind of work."""
    found = count_works(s, f)
    large = sum(work.total for work in found) > 1e14
    unit, names = (1e12, "TPT") if large else (1e9, "GTG")
    shown = new_table()
    shown.add_column("an epoch", no_wrap=True)
    titles = [
        "images",
        "passes each",
        f"{names[0]}FLOP a pass",
        f"{names[1]}FLOP",
        f"{names[2]}B of weights read",
    ]
    for title in titles + ([f"seconds at {rate:g} TFLOP/s"] if rate else []):
        shown.add_column(title, justify="right")

    def format_totals(total: float, read: float) -> list[str]:
        least = [f"{total / rate / 1e12:.4g}"] if rate else []
        return [f"{total / unit / 1000:.4g}", f"{read / unit:.3g}", *least]

    for work in found:
        each = [str(work.images), str(work.passes), f"{work.flops / unit:.4g}"]
        shown.add_row(work.name, *each, *format_totals(work.total, work.read))
    shown.add_section()
    shown.add_row("in all", "", "", "", *format_totals(sum(w.total for w in found), sum(w.read for w in found)))
    print_table(shown)


def find_memory(device: torch.device, card: Card | None) -> tuple[str, int] | None:
    """Find the memory to compare the plan with, as a name and bytes; None where there is no GPU."""
    if card:
        return card.title, round(card.memory * GIB * USABLE)
    if device.type == "cpu":
        return "this machine", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not torch.cuda.is_available():
        return None
    here = torch.cuda.get_device_properties(device)
    return here.name, here.total_memory


def write_verdict(table: Phases, name: str, room: int, on_gpu: bool = True) -> str:
    """Write whether a run fits into the memory `room`, and what is assumed for that."""
    needed, (phase, _) = count_needed(table), max(sum_phases(table).items(), key=lambda item: item[1])
    assumed = (
        f"with {SLACK:.0%} for allocator and kernels and {CONTEXT / GIB:g} GiB for "
        f"{'CUDA' if on_gpu else 'PyTorch itself'}, which are assumed"
    )
    said = (
        f"Needed: {needed / GIB:.1f} GiB, in the phase {phase}, {assumed}. For {name}, {room / GIB:.1f} GiB: "
    )
    return said + (
        "it fits." if needed <= room else f"it does not fit, {(needed - room) / GIB:.1f} GiB are missing."
    )


def show_proposals(s: Settings, f: Footprint, rewards: dict[str, int], rooms: list[tuple[str, int]]) -> None:
    """Print the first settings that fit into each memory, and what they cost more than those asked for."""
    shown = new_table()
    shown.add_column("what fits", no_wrap=True)
    shown.add_column("settings", overflow="fold")
    for title in ("GiB needed", "operations", "weights read"):
        shown.add_column(title, justify="right")

    def compare_work(work: str, fitting: Settings) -> str:
        """Compare a figure of an epoch with that of the settings that were asked for."""
        asked, found = (sum(getattr(w, work) for w in count_works(x, f)) for x in (s, fitting))
        return f"x {found / asked:.2f}"

    for name, room in rooms:
        fitting, lacking = propose_settings(s, f, rewards, room)
        if fitting is None:
            shown.add_row(name, f"none: the smallest settings lack {lacking / GIB:.1f} GiB", "", "", "")
            continue
        needed = f"{count_needed(plan_phases(fitting, f, rewards)) / GIB:.1f}"
        shown.add_row(
            name,
            write_changes(s, fitting) or "as asked",
            needed,
            compare_work("total", fitting),
            compare_work("read", fitting),
        )
    print_table(shown)


def count_reward_bytes(
    specs: Sequence[RewardSpec], host: Host, device: str
) -> tuple[dict[str, int], list[str]]:
    """Count the bytes of each reward's weights, and name the rewards of which nothing is known.

    The sizes of local files count, else what the card says. The card says nothing of a part of one's own, which
    an option gives as `MODULE:NAME`. A model that two cards call shared counts once.
    """
    known: dict[str, int] = {}
    unknown: list[str] = []
    counted: set[str] = set()
    for spec in specs:
        name = spec.title
        files = [f for value in spec.options.values() for f in find_local_files(value)]
        said = str(getattr(host.find_reward(spec.name).info, "memory", ""))
        if files:
            known[name] = sum(f.stat().st_size for f in files)
        elif said and not any(isinstance(v, str) and is_reference(v) for v in spec.options.values()):
            precision = str(spec.options.get("precision", "auto"))
            # As rewards choose it: 16 bits on a GPU, 32 on a CPU.
            low = device != "cpu" if precision == "auto" else precision != "fp32"
            known[name] = 0
            for shared, figure in read_card_memory(said, name, low):
                known[name] += 0 if shared in counted else figure
                counted.add(shared)
        else:
            unknown.append(name)
    return known, unknown


def find_local_files(option: Any) -> list[Path]:
    """Find the files of weights that an option of a reward names; none where it is no path."""
    path = Path(option) if isinstance(option, str) else None
    if path is None or not path.exists():
        return []
    return [path] if path.is_file() else sorted(path.glob("*.safetensors"))


def read_card_memory(said: str, name: str, low: bool) -> Iterator[tuple[str, int]]:
    """Read `(whose model, bytes)` of each model in a card's text, such as `1.7 GB in fp32, 0.9 GB in bf16`."""
    models = re.findall(
        r"([\d.]+) GB in fp32(?:, ([\d.]+) GB in bf16)?(?:[; ]*\(?(?:\w+, )?shared with (\w+))?", said
    )
    for i, (whole, half, shared) in enumerate(models):
        yield shared or (name if not i else f"{name} {i}"), round(float(half if low and half else whole) * 1e9)
