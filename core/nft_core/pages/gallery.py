"""Galleries of pictures with their scores: of one folder, or of the same prompts over evaluations and runs."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

#: Bytes of pictures that a page holds, as they are written in it.
MOST_BYTES = 4 * 2**20
#: Of each: the best, the worst, the most risen and the most fallen are shown whatever else is left out.
EXTREMES = 8


class Card(NamedTuple):
    """What pictures were made for. kind: its tag, or empty. number: among its prompt's pictures, from 1."""

    prompt: str
    kind: str = ""
    number: int = 1


@dataclass(frozen=True)
class Frame:
    """The pictures of all cards at one time, and what is said of them. None: no picture, or no valid score.

    figures: scores by name; the rewards come first, then the total, then details.
    texts: words of rewards about each picture, such as what was read in it.
    """

    title: str
    pictures: Sequence[bytes | None]
    figures: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Gallery:
    """Pictures in columns: the same cards before and after, or made by different runs.

    steps: the positions of the slider, each with its title and a frame for each column, by its index.
    lower: figures that are better where they are lower. minor: figures that are not shown at first sight.
    """

    cards: Sequence[Card]
    frames: Sequence[Frame]
    columns: Sequence[str]
    steps: Sequence[tuple[str, Sequence[int]]]
    lower: frozenset[str] = frozenset()
    minor: frozenset[str] = frozenset()
    notes: Sequence[str] = ()


def describe_gallery(gallery: Gallery) -> dict[str, Any]:
    """Describe a gallery for the page's scripts."""
    names = dict.fromkeys(chain.from_iterable(frame.figures for frame in gallery.frames))
    return {
        "cards": [card._asdict() for card in gallery.cards],
        "frames": [
            {
                "title": frame.title,
                "pictures": [p and encode_picture(p) for p in frame.pictures],
                "figures": {n: [round_figure(v) for v in values] for n, values in frame.figures.items()},
                "texts": {n: [text[:500] for text in texts] for n, texts in frame.texts.items()},
            }
            for frame in gallery.frames
        ],
        "columns": list(gallery.columns),
        "steps": [{"title": title, "frames": list(frames)} for title, frames in gallery.steps],
        "figures": list(names),
        "lower": sorted(gallery.lower),
        "minor": sorted(gallery.minor),
    }


def encode_picture(data: bytes) -> str:
    """Write a picture as the address of an image that holds it."""
    kind = "webp" if data[:4] == b"RIFF" else "jpeg" if data[:2] == b"\xff\xd8" else "png"
    return f"data:image/{kind};base64,{b64encode(data).decode()}"


def round_figure(value: float | None) -> float | None:
    """Round a score to what a reader could ever see of it, so that pages stay small."""
    return None if value is None else float(f"{value:.5g}")


def fit_gallery(gallery: Gallery, most: int = MOST_BYTES) -> Gallery:
    """Leave out cards, and then positions of the slider, until a gallery is small enough; a note says so.

    The first and the last position stay; so do the most telling cards, and others spread over the prompts.
    """
    if measure_frames(gallery, set(range(len(gallery.frames))), range(len(gallery.cards))) <= most:
        return gallery
    first, last = gallery.steps[0], gallery.steps[-1]
    kept = set(first[1]) | set(last[1])
    others = [step for step in gallery.steps if not kept.issuperset(step[1])]
    # Where there are more positions, a half is theirs.
    cards = choose_cards(gallery, kept, most if not others else most // 2)
    chosen = [step for step in gallery.steps if kept.issuperset(step[1])]
    left = most - measure_frames(gallery, kept, cards)
    for step in spread(others):
        size = measure_frames(gallery, set(step[1]) - kept, cards)
        if size <= left:
            left -= size
            kept |= set(step[1])
            chosen.append(step)
    notes = list(gallery.notes)
    if len(cards) < len(gallery.cards):
        notes.append(
            f"Of {len(gallery.cards)} pictures {len(cards)} are shown, so that the page stays small: the best "
            "and worst, those that changed most, and others of all prompts."
        )
    if len(chosen) < len(gallery.steps):
        notes.append(f"Of {len(gallery.steps)} evaluations {len(chosen)} are shown, so that the page is small.")
    return pick_parts(gallery, cards, [step for step in gallery.steps if step in chosen], notes)


def choose_cards(gallery: Gallery, frames: set[int], most: int) -> list[int]:
    """Choose the cards whose pictures in these frames take no more than so many bytes, in their order."""
    chosen, left = set[int](), most
    for card in dict.fromkeys([*list_extremes(gallery), *spread_cards(gallery.cards)]):
        size = measure_frames(gallery, frames, [card])
        if size <= left:
            left -= size
            chosen.add(card)
    return sorted(chosen)


def list_extremes(gallery: Gallery) -> list[int]:
    """List the cards that are best, worst, most risen and most fallen by the total, or the first figure."""
    frames = gallery.steps[-1][1]
    before, last = (gallery.frames[frames[end]].figures for end in (0, -1))
    name = "total" if "total" in last else next(iter(last), None)
    if name is None:
        return []
    now = {i: v for i, v in enumerate(last[name]) if v is not None}
    change = {i: v - b for i, v in now.items() if (b := before.get(name, [None] * (i + 1))[i]) is not None}
    ordered = [sorted(values, key=values.__getitem__) for values in (change, now)]
    return [i for order in ordered for i in (*order[: -EXTREMES - 1 : -1], *order[:EXTREMES])]


def spread_cards(cards: Sequence[Card]) -> list[int]:
    """Order cards: the first of each prompt, spread over the prompts, then the second of each."""
    by_number: dict[int, list[int]] = {}
    for i, card in enumerate(cards):
        by_number.setdefault(card.number, []).append(i)
    return [i for number in sorted(by_number) for i in spread(by_number[number])]


def spread(items: Sequence[Any]) -> list[Any]:
    """Order items so that any first ones of them lie spread over all: by their index's bits, read backwards."""
    bits = max(len(items) - 1, 1).bit_length()
    return [items[i] for i in sorted(range(len(items)), key=lambda i: int(f"{i:0{bits}b}"[::-1], 2))]


def measure_frames(gallery: Gallery, frames: set[int], cards: Sequence[int]) -> int:
    """Measure the bytes that the pictures of these cards take in these frames, as a page holds them."""
    sizes = (len(p) for f in frames for c in cards if (p := gallery.frames[f].pictures[c]) is not None)
    return sum(size * 4 // 3 + 30 for size in sizes)


def pick_parts(
    gallery: Gallery, cards: Sequence[int], steps: Sequence[tuple[str, Sequence[int]]], notes: Sequence[str]
) -> Gallery:
    """Make a gallery of some cards and some positions of the slider."""
    used = sorted({i for _, frames in steps for i in frames})

    def pick(values: Sequence[Any]) -> list[Any]:
        return [values[i] for i in cards]

    frames = [
        Frame(
            frame.title,
            pick(frame.pictures),
            {name: pick(values) for name, values in frame.figures.items()},
            {name: pick(texts) for name, texts in frame.texts.items()},
        )
        for frame in (gallery.frames[i] for i in used)
    ]
    moved = [(title, [used.index(i) for i in indices]) for title, indices in steps]
    return replace(gallery, cards=pick(gallery.cards), frames=frames, steps=moved, notes=notes)
