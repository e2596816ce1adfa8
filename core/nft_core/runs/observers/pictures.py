"""`samples/NNNNNN.safetensors`: the pictures of an evaluation, small ones, with their prompts and scores.

The report, `nft compare` and the grids of `samples` are made of them. A file has an array of bytes for each
picture, a PNG or WebP file, and in its header a JSON object that tells of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from ...pages.gallery import Card, Frame, read_kind, spread_cards
from ...pages.thumbnails import encode_image
from ..fingerprint import pick_picture_part

if TYPE_CHECKING:
    from nft_plugins import Batch, Scores

FOLDER, NOTE = "samples", "nft_pictures"
#: Pictures of an evaluation, and bytes of its file.
MOST, MOST_BYTES = 1024, 32 * 2**20


class Pictures(NamedTuple):
    """The pictures of an evaluation. of: the fingerprint of what they depend on beside the weights.

    details: figures of the frame that are no rewards.
    """

    epoch: int
    of: Mapping[str, Any]
    cards: Sequence[Card]
    frame: Frame
    details: frozenset[str]


def choose_kept(cards: Sequence[Card]) -> list[int]:
    """Choose the pictures that are kept: all, or of very many the first ones of prompts."""
    return sorted(islice(spread_cards(cards), MOST))


def collect_pictures(
    record: Mapping[str, Any],
    batch: Batch,
    scores: Scores,
    choose: Callable[[Sequence[Card]], list[int]] = choose_kept,
) -> Pictures:
    """Collect an evaluation's pictures, those that `choose` names by their index."""
    cards, count = [], 0
    groups = batch.groups.tolist()
    for i, (prompt, metadata) in enumerate(zip(batch.prompts, batch.metadata, strict=True)):
        # Images of one prompt stand together, and are numbered from 1.
        count = count + 1 if i and groups[i] == groups[i - 1] else 1
        cards.append(Card(prompt, read_kind(metadata), count))
    chosen = choose(cards)
    figures, details = list_values(scores)
    pixels = batch.uint8[chosen].permute(0, 2, 3, 1).cpu().numpy()
    frame = Frame(
        name_epoch(record["epoch"]),
        [encode_image(Image.fromarray(array)) for array in pixels],
        {name: [values[i] for i in chosen] for name, values in figures.items()},
        {n: [str(texts[i] or "") for i in chosen] for n, texts in scores.notes.items()},
    )
    of = pick_picture_part(record.get("evaluation"))
    return Pictures(record["epoch"], of, [cards[i] for i in chosen], frame, details)


def list_values(scores: Scores) -> tuple[dict[str, list[float | None]], frozenset[str]]:
    """List the scores of each image by figure, None where one is not valid, and which figures are details.

    The total is left out where there is one reward, since it says the same.
    """
    from ...scoring.statistics import list_figures

    rewards, details = list_figures(scores)
    if len(rewards) == 2:
        del rewards["total"]
    found = {
        name: [v if ok else None for v, ok in zip(values.tolist(), valid.tolist(), strict=True)]
        for name, (values, valid) in {**rewards, **details}.items()
    }
    return found, frozenset(details)


def name_epoch(epoch: int) -> str:
    """Name the time of an evaluation."""
    return f"epoch {epoch}" if epoch else "base model"


def save_pictures(folder: Path, pictures: Pictures) -> None:
    """Write an evaluation's pictures to a run's folder, whole or not at all."""
    import numpy as np
    from safetensors.numpy import save_file

    frame = pictures.frame
    note = {
        "of": pictures.of,
        "cards": pictures.cards,
        "figures": frame.figures,
        "details": sorted(pictures.details),
        "notes": frame.notes,
    }
    path = find_pictures(folder, pictures.epoch)
    path.parent.mkdir(exist_ok=True)
    aside = path.with_name(f".{path.name}")
    # Six digits, since `read_pictures` sorts the names as text.
    images = [np.frombuffer(data, np.uint8) for data in frame.pictures if data]
    save_file({f"{i:06d}": image for i, image in enumerate(images)}, aside, {NOTE: json.dumps(note)})
    aside.replace(path)


def find_pictures(folder: Path, epoch: int) -> Path:
    """Name the file of an evaluation's pictures."""
    return folder / FOLDER / f"{epoch:06d}.safetensors"


def read_pictures(folder: Path, epoch: int, of: Mapping[str, Any]) -> Pictures | None:
    """Read the pictures of an evaluation; None where there are none, or none of this fingerprint."""
    from safetensors import SafetensorError, safe_open

    path = find_pictures(folder, epoch)
    try:
        if path.stat().st_size > MOST_BYTES:  # It was not written here, and could fill the memory.
            return None
        with safe_open(path, "np") as file:
            note = json.loads((file.metadata() or {})[NOTE])
            if note["of"] != of:
                return None
            images = [file.get_tensor(name).tobytes() for name in sorted(file.keys())]
        cards = [Card(str(prompt), str(kind), int(number)) for prompt, kind, number, *_ in note["cards"]]
        figures = {name: [None if v is None else float(v) for v in vs] for name, vs in note["figures"].items()}
        notes = {name: [str(text) for text in each] for name, each in note["notes"].items()}
        details = frozenset(map(str, note["details"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError):
        return None
    if any(len(column) != len(cards) for column in (images, *figures.values(), *notes.values())):
        return None
    return Pictures(epoch, of, cards, Frame(name_epoch(epoch), images, figures, notes), details)


def find_first_pictures(folder: Path, now: Pictures) -> Pictures | None:
    """Find the first pictures of the same prompts and noise that were kept at an earlier epoch.

    now: all pictures of an evaluation, or some, of which alone the earlier ones are returned.
    """
    epochs = sorted(int(path.stem) for path in (folder / FOLDER).glob("*.safetensors") if path.stem.isdecimal())
    for epoch in epochs:
        found = read_pictures(folder, epoch, now.of) if epoch < now.epoch else None
        if found and found.cards == now.cards:
            return found
        if found and (picked := pick_cards(found, now.cards)):
            return picked
    return None


def pick_cards(pictures: Pictures, cards: Sequence[Card]) -> Pictures | None:
    """Pick the pictures of some cards; None where one of them has none."""
    place = {card: i for i, card in enumerate(pictures.cards)}
    if not place.keys() >= set(cards):
        return None
    chosen, frame = [place[card] for card in cards], pictures.frame
    picked = Frame(
        frame.title,
        [frame.pictures[i] for i in chosen],
        {name: [values[i] for i in chosen] for name, values in frame.figures.items()},
        {name: [texts[i] for i in chosen] for name, texts in frame.notes.items()},
    )
    return pictures._replace(cards=list(cards), frame=picked)
