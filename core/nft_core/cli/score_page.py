"""The page of `nft score --html`: the images with their scores, to sort and to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING

from ..errors import NftError
from ..pages.gallery import (
    Card,
    Frame,
    Gallery,
    describe_gallery,
    fit_gallery,
    pick_parts,
    rank_cards,
    read_kind,
)
from ..pages.page import draw_notes, draw_page, draw_section, draw_table, embed_data
from .summary import list_summary_rows, summarise

if TYPE_CHECKING:
    from ..scoring.composer import Composed
    from ..scoring.images import Scored

Columns = Mapping[str, Sequence[float | None]]
#: Images that are read again for the page: more would not fit in it.
MOST = 1500


def draw_score_page(results: Sequence[Scored], reward: Composed, columns: Columns) -> str:
    """Draw the page of scored images, in their order. columns: values by reward, and the weighted sum."""
    summary = list_summary_rows(summarise(results, columns), list(columns)) if len(results) > 1 else []
    failures = dict.fromkeys(error for result in results for error in result.errors.values())
    gallery = make_gallery(results, reward, columns)
    if len(gallery.cards) > MOST:
        chosen = sorted(rank_cards(gallery)[:MOST])
        left_out = [f"Of {len(results)} images {MOST} were read for this page."]
        gallery = pick_parts(gallery, chosen, gallery.steps, left_out)
        results = [results[i] for i in chosen]
    gallery = fit_gallery(add_pictures(gallery, results))
    title = f"{len(columns)} scores" if len(columns) > 1 else f"{next(iter(columns))}"
    return draw_page(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            draw_notes(failures),
            draw_section("means", "Means", draw_table(["", *columns], summary) if summary else ""),
            draw_section(
                "pictures",
                "Pictures",
                draw_notes(gallery.left_out),
                embed_data("gallery", describe_gallery(gallery)),
            ),
        ],
    )


def make_gallery(results: Sequence[Scored], reward: Composed, columns: Columns) -> Gallery:
    """Make a gallery of scored images, whose pictures are not there yet."""
    from .score import format_path

    cards, seen = [], dict[str, int]()
    for result in results:
        item = result.item
        prompt = item.prompt or ""
        seen[prompt] = seen.get(prompt, 0) + 1
        number = seen[prompt] if prompt else 1
        cards.append(Card(prompt, read_kind(item.metadata), number, format_path(item.path)))
    details = dict.fromkeys((n, d) for r in results for n, each in r.details.items() for d in each)
    figures: dict[str, Sequence[float | None]] = dict(columns)
    for name, detail in details:
        figures[f"{name}/{detail}"] = [
            r.details[name].get(detail) if r.valid.get(name) else None for r in results
        ]
    frame = Frame("", [None] * len(cards), figures, list_notes(results))
    return Gallery(
        cards,
        [frame],
        [""],
        [("", [0])],
        frozenset(term.name for term in reward.terms if term.weight < 0),
        frozenset(f"{name}/{detail}" for name, detail in details),
    )


def list_notes(results: Sequence[Scored]) -> dict[str, list[str]]:
    """List what rewards say beside their scores, and why they failed, by name a text for each image."""
    told = [result.notes for result in results]
    names = dict.fromkeys((n, note) for each in told for n, notes in each.items() for note in notes)
    found = {f"{n}/{note}": [each.get(n, {}).get(note, "") for each in told] for n, note in names}
    failed = dict.fromkeys(name for result in results for name in result.errors)
    return found | {f"{name} failed": [result.errors.get(name, "") for result in results] for name in failed}


def add_pictures(gallery: Gallery, results: Sequence[Scored]) -> Gallery:
    """Read the images again, and add what can be read of them as small pictures."""
    from PIL import Image

    from ..pages.thumbnails import encode_image
    from ..scoring.image_files import decode_image

    pictures: list[bytes | None] = []
    for result in results:
        try:
            pixels = decode_image(result.item.source, result.item.path)
        except NftError:  # It was said when it was scored.
            pictures.append(None)
        else:
            array = pixels.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy()
            pictures.append(encode_image(Image.fromarray(array)))
    return replace(gallery, frames=[replace(gallery.frames[0], pictures=pictures)])
