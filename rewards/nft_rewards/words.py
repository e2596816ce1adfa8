"""Finds the words that a prompt asks to be written, and folds texts so that those that look alike are equal."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from nft_plugins import PromptError

from .fields import decode_text, get_field

#: What closes each opening quote. Straight and Swedish quotes close themselves; German guillemets point
#: inwards.
CLOSING = {
    **{'"': '"', "＂": "＂", "“": "”", "”": "”", "„": "“”", "‟": "”", "❝": "❞", "〝": "〞〟"},
    **{"«": "»", "»": "«»", "‹": "›", "›": "‹›"},
    **{"「": "」", "『": "』", "｢": "｣", "﹁": "﹂", "﹃": "﹄"},
}
QUOTES = {*CLOSING, *"".join(CLOSING.values())}
#: Quotes that are also written for inches, and what follows an inch mark, as in `12" wide` and `12"x8"`.
INCHES, INCH = '"”＂', re.compile(r"[\W_]|$|[x×]\s*\d", re.IGNORECASE)

#: Signs that look the same in a picture, or that few recognisers know, and the sign that stands for them.
ALIKE = str.maketrans(
    dict.fromkeys("‘’‚‛`´′ʼʹ‹›", "'")
    | dict.fromkeys("“”„‟«»″〝〞〟❝❞", '"')
    | dict.fromkeys("‐‑‒–—―−⁃˗﹘﹣", "-")
    | {"〜": "~", "⁄": "/", "∕": "/", "ς": "σ"}
)
#: Characters that cannot be seen, but that Unicode does not count among controls and formats: joiners,
#: variation selectors, fillers.
UNSEEN = {*map(chr, [0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0])} | {
    chr(c)
    for first, last in ((0x180B, 0x180F), (0xFE00, 0xFE0F), (0xE0100, 0xE01EF))
    for c in range(first, last + 1)
}


def find_target_text(prompt: str, metadata: Mapping[str, Any]) -> str:
    """Find the words to be read: metadata `text`, or else all quoted words of the prompt, in order.

    A list of texts is joined, without its nulls. What a prompt quotes twice counts once.
    Raises PromptError where there are no words, and where a quote has no partner or may be an inch mark, as in
    `a 5"x" sign`.
    """
    given = get_field(metadata, "text")
    if given is not None:
        # A list may stand there as text. A text such as "[sic]" stays itself.
        many = decode_text(given)
        if isinstance(many, (list, tuple)):
            many = [t for t in many if t is not None]
        texts = many if isinstance(many, list) and all(isinstance(t, str) for t in many) else [given]
        if not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise PromptError(f"metadata text must be a text or a list of texts, none empty, got {given!r}")
        return " ".join(texts)
    once: dict[str, str] = {}
    for words in find_quoted_texts(prompt):
        # American English puts commas and full stops before the closing quote.
        letters = fold_text(words, normalise=True)
        once.setdefault(letters.rstrip(".,;:") or letters, words)
    text = " ".join(once.values())
    if not text.strip():
        raise PromptError(
            "no words to read: expected metadata text or words in double quotes (single ones may be "
            f"apostrophes), got {prompt!r}"
        )
    return text


def find_quoted_texts(prompt: str) -> Iterator[str]:
    """Find the texts between quotes, outermost ones only. An inch mark, as in `a 12" pipe`, is no quote.

    Raises PromptError for a quote without a partner, for one between a number and a letter, and for one with
    nothing in it.
    """
    # Prompts that were cut out of a JSON file keep its backslashes.
    prompt, i = undo_doubled_quotes(prompt.replace('\\"', '"')), 0
    while i < len(prompt):
        after_number = prompt[i] in INCHES and unicodedata.category(prompt[i - 1 : i] or " ") in ("Nd", "No")
        if prompt[i] in QUOTES and not (after_number and INCH.match(prompt, i + 1)):
            end = find_closing_quote(prompt, i)
            if after_number:
                raise PromptError(
                    f"{prompt[i : end and end + 1]} begins right after a number, so it may be an inch mark; "
                    f"put a space before it or give metadata text: {prompt!r}"
                )
            if end is None:
                raise PromptError(
                    f"a double quote without a partner, {prompt[i]}, leaves the words to read open; give "
                    f"metadata text: {prompt!r}"
                )
            if not (words := prompt[i + 1 : end].strip()):
                raise PromptError(
                    f"no words to read between two quotes; leave them out or give metadata text: {prompt!r}"
                )
            yield words
            i = end
        i += 1


def undo_doubled_quotes(prompt: str) -> str:
    """Remove CSV's quotes from a prompt: a line of CSV stands in quotes, and those inside are written twice."""
    inner = prompt.strip()[1:-1]
    for text in (inner, prompt) if prompt.strip() == f'"{inner}"' else (prompt,):
        if '""' in text and '"' not in text.replace('""', ""):
            return text.replace('""', '"')
    return prompt


def find_closing_quote(prompt: str, start: int) -> int | None:
    """Find where the quote that opens at `start` is closed, past others of its kind; None where it is not."""
    opening, depth = prompt[start], 0
    for i in range(start + 1, len(prompt)):
        mark = prompt[i]
        # A sign that can both open and close opens where a space stands before it and a word behind.
        opens = mark == opening and prompt[i - 1].isspace() and prompt[i + 1 : i + 2].isalnum()
        if mark in CLOSING.get(opening, "") and not opens:
            if depth == 0:
                return i
            depth -= 1
        elif mark == opening:
            depth += 1
    return None


def fold_text(text: str, normalise: bool) -> str:
    """Remove white space from a text and make it lower case, for comparing.

    normalise: also make signs alike that look alike (NFKC forms, apostrophes, quotes, dashes), and leave out
        characters that cannot be seen.
    """
    if normalise:
        # Before NFKC too, which splits an acute accent that stands alone into a space and an accent; and after
        # it, for signs that NFKC makes.
        text = unicodedata.normalize("NFKC", text.translate(ALIKE)).lower().translate(ALIKE)
        text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf") and c not in UNSEEN)
    return "".join(text.split()).lower()


def find_unknown_letters(text: str, known: frozenset[str], normalise: bool) -> list[str]:
    """Find the letters of a text that a recogniser cannot read, each once. known: those that it can, folded."""
    if normalise:
        # The text as a whole, so that a letter and its accents become one.
        text = unicodedata.normalize("NFKC", text)
    return list(dict.fromkeys(c for c in text if not known.issuperset(fold_text(c, normalise))))
