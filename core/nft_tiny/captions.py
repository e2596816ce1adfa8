"""Makes the embedded world's captions with GenEval's metadata, and splits them into three sets.

The sets share no prompt: `train` and `eval` are for reinforcement learning, and with `select` a snapshot of the
pretrained model was chosen. The words of `eval` and `select` were not in pretraining.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .scenes import COLORS, NUMBERS, RELATIONS, SHAPES

Caption = dict[str, Any]

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

#: English words of three letters that OCR can read when they are drawn as a sign.
WORDS = tuple((Path(__file__).parent / "data" / "words.txt").read_text(encoding="utf-8").split())

#: This many words are kept out of pretraining, so that a model cannot have learned the pictures of their signs.
HELD_OUT_WORDS = 36


def make_plural(shape: str) -> str:
    """Make the plural of a shape's name."""
    return shape + ("es" if shape == "cross" else "s")


def make_scene_captions() -> Iterator[Caption]:
    """Make every caption of shapes, each with its tag and the objects that it asks for."""

    def make_caption(tag: str, prompt: str, *include: dict[str, Any]) -> Caption:
        return {"tag": tag, "prompt": prompt, "include": list(include)}

    for s in SHAPES:
        one = {"class": s, "count": 1}
        for template in ("a {}", "one {}", "a single {}", "a photo of a {}"):
            yield make_caption("single_object", template.format(s), one)
        for c, start in itertools.product(COLORS, ("a", "a photo of a")):
            yield make_caption("colors", f"{start} {c} {s}", one | {"color": c})
        for (n, word), start in itertools.product(NUMBERS.items(), ("", "a photo of ")):
            yield make_caption("counting", f"{start}{word} {make_plural(s)}", {"class": s, "count": n})
    for a, b in itertools.permutations(SHAPES, 2):
        first, second = {"class": a, "count": 1}, {"class": b, "count": 1}
        for start in ("a", "a photo of a"):
            yield make_caption("two_object", f"{start} {a} and a {b}", first, second)
            for r in RELATIONS:
                # A position refers to an earlier clause, so the second object's clause comes first.
                yield make_caption("position", f"{start} {a} {r} a {b}", second, first | {"position": [r, 0]})
        for c, d in itertools.permutations(COLORS, 2):
            prompt = f"a {c} {a} and a {d} {b}"
            yield make_caption("color_attr", prompt, first | {"color": c}, second | {"color": d})


def make_more_captions() -> Iterator[Caption]:
    """Make more captions of two objects, in other words, for `train`: few of them are left for it."""
    for a, b in itertools.permutations(SHAPES, 2):
        for start in ("one", "a photo of one"):
            prompt, include = f"{start} {a} and one {b}", [{"class": a, "count": 1}, {"class": b, "count": 1}]
            yield {"tag": "two_object", "prompt": prompt, "include": include}


def make_word_caption(word: str) -> Caption:
    """Make the caption of a sign with a word."""
    return {"tag": "text", "prompt": f'the word "{word.upper()}"', "text": word.upper()}


def find_merged_endings() -> set[str]:
    """Find the two letters in which a word must not end, since the tokenizer would merge them.

    A caption's word, such as "yellow", is one token, merged from its end; so "cow" would be `c` and `ow`.
    """
    words = {word for c in make_scene_captions() for word in c["prompt"].split()} | {"the", "word"}
    return {word[-2:] for word in words if len(word) > 1}


def split_words() -> tuple[list[str], list[str]]:
    """Split the words into those of pretraining and those that are held out, always in the same way."""
    merged = find_merged_endings()
    words = [w for w in WORDS if w[1:] not in merged]
    random.Random(1).shuffle(words)
    return words[HELD_OUT_WORDS:], words[:HELD_OUT_WORDS]


#: Number of captions of each set and tag. `eval` has the same number of each tag, so that the mean over its
#: captions is the mean over tags.
SIZES = {
    "eval": dict.fromkeys(TAGS, 8),
    "select": dict.fromkeys(TAGS, 4),
    "train": {
        "single_object": 4,
        "two_object": 12,
        "counting": 12,
        "colors": 36,
        "position": 84,
        "color_attr": 200,
    },
}


#: How often each caption of these tags stands in `train`: there are few of them, or they are hard.
REPEATED = {"single_object": 3, "two_object": 4, "counting": 10}


def make_sets() -> dict[str, list[Caption]]:
    """Make the three sets. Each tag is split by itself, always in the same way."""
    result: dict[str, list[Caption]] = {name: [] for name in SIZES}
    for tag in TAGS:
        captions = [c for c in make_scene_captions() if c["tag"] == tag]
        random.Random(f"split {tag}").shuffle(captions)
        for name, sizes in SIZES.items():
            result[name] += captions[: sizes[tag]] * (REPEATED.get(tag, 1) if name == "train" else 1)
            captions = captions[sizes[tag] :]
    result["train"] += list(make_more_captions()) * REPEATED["two_object"]
    known, held_out = split_words()
    result["eval"] += map(make_word_caption, held_out[:24])
    result["select"] += map(make_word_caption, held_out[24:])
    result["train"] += map(make_word_caption, known)
    return result


def write_sets(folder: Path) -> None:
    """Write the sets to `train.jsonl`, `eval.jsonl` and `select.jsonl` in a folder."""
    for name, captions in make_sets().items():
        lines = [json.dumps(c) + "\n" for c in captions]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
