"""The embedded world's captions with GenEval's metadata, and which of them are for what.

Three sets share no prompt: `train` and `eval` for reinforcement learning, and `select`, by which a
snapshot of the pretrained model was chosen. The words of `eval` and `select` were not in pretraining.
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

#: English words of three letters that OCR reads from their clean renders.
WORDS = """
act add age aid aim air all and ant any ape arc arm art ash ask ate axe bad bag ban bar bat bay
bed bee bet big bin bit bow box boy bud bug bun bus but buy cab can cap car cat cot cow cry cub
cup cut dad day den dew did dig dip dog dot dry due dug ear eat egg elf elk elm end era eve eye
fan far fat fee few fig fin fit fix fly fog fox fun fur gap gas gem get gum gun guy had ham has
hat hay hen her hid him hip his hit hot how hub hug hut ice ill ink inn ivy jam jar jaw jet job
jog joy jug key kid kin kit lab lad lap law lay leg let lid lip log lot low mad man map mat may
men met mix mom mop mud mug nap net new nod not now nut oak oar oat odd off oil old one orb ore
our out owl own pad pal pan pat paw pay pea pen pet pie pig pin pit pop pot pub put rag ram ran
rat raw ray red rib rid rim rip rob rod rot row rub rug run sad sat saw say sea see set she shy
sip sit six sky sly son spa spy sum sun tab tag tan tap tar tax tea ten the tie tin tip toe ton
too top toy try tub two use van vet war was wax way web wet who why wig win wit yak yes yet you
zip zoo
""".split()

#: Kept out of pretraining, so that OCR on held-out prompts is not recall of pictures.
HELD_OUT_WORDS = 36

#: Words with an ending that the tokenizer has as one token (as in "circle"); the rest are spelled letter by letter.
NOT_SPELLED = set(
    "and ate bed bee bow cow cot den due end eve fee fur hen how low men now one ore our pen red row see she "
    "ten the two yes".split()
)


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def scene_captions() -> Iterator[Caption]:
    """Every caption of shapes, tag by tag."""

    def caption(tag: str, prompt: str, *include: dict[str, Any]) -> Caption:
        return {"tag": tag, "prompt": prompt, "include": list(include)}

    for s in SHAPES:
        one = {"class": s, "count": 1}
        for template in ("a {}", "one {}", "a single {}", "a photo of a {}"):
            yield caption("single_object", template.format(s), one)
        for c, start in itertools.product(COLORS, ("a", "a photo of a")):
            yield caption("colors", f"{start} {c} {s}", one | {"color": c})
        for (n, word), start in itertools.product(NUMBERS.items(), ("", "a photo of ")):
            yield caption("counting", f"{start}{word} {plural(s)}", {"class": s, "count": n})
    for a, b in itertools.permutations(SHAPES, 2):
        first, second = {"class": a, "count": 1}, {"class": b, "count": 1}
        for start in ("a", "a photo of a"):
            yield caption("two_object", f"{start} {a} and a {b}", first, second)
            for r in RELATIONS:
                yield caption("position", f"{start} {a} {r} a {b}", second, first | {"position": [r, 0]})
        for c, d in itertools.permutations(COLORS, 2):
            yield caption(
                "color_attr", f"a {c} {a} and a {d} {b}", first | {"color": c}, second | {"color": d}
            )


def word_caption(word: str) -> Caption:
    return {"tag": "text", "prompt": f'the word "{word.upper()}"', "text": word.upper()}


def held_out_words() -> list[str]:
    words = [w for w in WORDS if w not in {"cot", "cow"}]
    random.Random(1).shuffle(words)
    return words[:HELD_OUT_WORDS]


#: Captions of each set and tag. `eval` has as many of each tag, so that its mean is the mean over tags.
SIZES = {
    "eval": dict.fromkeys(TAGS, 8),
    "select": dict.fromkeys(TAGS, 4),
    "train": {"single_object": 4, "two_object": 12, "counting": 12, "colors": 20, "position": 40, "color_attr": 40},
}


def sets() -> dict[str, list[Caption]]:
    """The three sets, split tag by tag."""
    result: dict[str, list[Caption]] = {name: [] for name in SIZES}
    for tag in TAGS:
        captions = [c for c in scene_captions() if c["tag"] == tag]
        random.Random(f"split {tag}").shuffle(captions)
        for name, sizes in SIZES.items():
            result[name] += captions[: sizes[tag]]
            captions = captions[sizes[tag] :]
    held_out = [w for w in held_out_words() if w not in NOT_SPELLED]
    known = [w for w in WORDS if w not in NOT_SPELLED and w not in held_out]
    result["eval"] += map(word_caption, held_out[:24])
    result["select"] += map(word_caption, held_out[24:])
    result["train"] += map(word_caption, known)
    return result


def write(folder: Path) -> None:
    """`train.jsonl`, `eval.jsonl` and `select.jsonl`."""
    for name, captions in sets().items():
        lines = [json.dumps(c) + "\n" for c in captions]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
