"""Reads a judge's reply: a number in its text, or how likely its first token was yes and no."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .chat import Failed

#: Alternatives for a token that are asked for, the most that OpenAI's protocol gives.
TOP = 20

#: The tags that models write around their thinking, where the server leaves it in the text.
THOUGHT = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
OPENING, CLOSING = (re.compile(rf"[<\[◁]{slash}{THOUGHT}[>\]▷]", re.IGNORECASE) for slash in ("", "/"))

LABEL = re.compile(r"final[\s_*-]*score", re.IGNORECASE)
#: The number must begin within this many characters after the label.
NEAR = 200
#: Makes full-width signs plain, and leaves out characters that cannot be seen.
PLAIN = str.maketrans(
    {"．": ".", "／": "/", "⁄": "/", "∕": "/", "﹕": ":"} | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff")
)
#: What may stand around a number: white space, Markdown, brackets, quotes, tags, LaTeX's commands.
AROUND = r"(?:[\s*_`\"'“”‘’()\[\]{}<>【】$|#]|</?\w+>|\\[a-z]*)*"
#: The same, but within one line.
BESIDE = r"[ \t*_`\"'”’()\[\]{}$\\]*"
#: What stands between the ends of a range, as in "3 to 4".
TO = rf"{BESIDE}(?:[-‐-―−~〜～至到]|(?:to|through)\b){BESIDE}"
#: What a label may say of its scale or of what it scores, as in "Final Score (1-5)".
SCALE = (
    rf"(?:{AROUND}[(\[][^()\[\]\n]*[)\]]|,? (?:out of|on a scale (?:of|from)) (?:\d+{TO})?\d+"
    r"|,? (?:for|of) (?:the|this) (?:\w+ )?(?:image|picture))?"
)
#: The upper end of that scale.
END = re.compile(r"(?:/|\bof\b|\bto\b|[-‐-―−~〜～])\s*(\d+(?:\.\d+)?)\D*$")
#: What stands between the label and its number, as in "Final Score (1-5): ", "final score is ",
#: "### Final Score\n" and "<final_score>". There need be no sign where the line has nothing else.
BETWEEN = (
    rf"(?:>|(?P<scale>{SCALE}){AROUND}(?:[:：=→\n|][:=]*|-(?=\s)|of\b"
    r"|(?:is|would be|should be)\b(?: therefore)?:?"
    rf"|(?<=[\s*_])(?=[\d.]+(?:\s*/\s*\d+)?[*_` \t.]*(?:\n|$)))){AROUND}"
)
#: How a number was worked out, as "(3 + 5) / 2 =" in "(3 + 5) / 2 = 4".
SUM = rf"(?:[-+*/×÷·().\d \t]*\d[-+*/×÷·().\d \t]*[=≈]{AROUND})*"
#: A number that stands alone: it is not part of another number, a word or a sum, and begins no range. Behind
#: it may stand what it is out of, as in "4 / 5".
NUMBER = re.compile(
    rf"(?P<between>{BETWEEN}){SUM}(?P<number>[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?)"
    rf"(?![\da-z%½⅓⅔¼¾]|[.,…]+\d|[ \t]+\d+/|{TO}\d|{BESIDE},?{BESIDE}(?:(?:or|and)\b|[&或和]){BESIDE}\d"
    rf"|{BESIDE}(?:[+×÷·→=≈]|[-=]>){BESIDE}\d|[ \t]*\*[ \t]*\d)"
    rf"(?:{BESIDE}(?:points?\b|stars?\b|分)?{BESIDE}"
    rf"(?:(?:/|of\b|out of\b|on a scale (?:of|from)\b)(?:{BESIDE}(?:an?|the|possible|total|max(?:imum)?|of)\b)*"
    rf"{BESIDE}(?:[01]{TO})?|(?:in\b)?{BESIDE}[01]{TO})(?P<of>\d+(?:\.\d+)?))?",
    re.IGNORECASE,
)
#: A label that something else than a number follows. In quotes, as in 'Final Score:', it is only mentioned.
OTHER = re.compile(rf"{SCALE}{AROUND}[:：=](?![\"'”’])|{BETWEEN}\d", re.IGNORECASE)
#: What follows a number that only numbers the items of a list, as in "1. The image".
ITEM = re.compile(r"[.)][ \t]+\w")


class Answer(NamedTuple):
    """Holds what a reply is worth. value: the score in [0, 1]. figure: the detail, as the reply gives it."""

    value: float
    figure: float


class Found(NamedTuple):
    """Holds a number as the reply writes it, and what it is out of, if the reply says so."""

    number: str
    of: str | None = None


def find_final_score(text: str) -> Found | None:
    """Find the number after the last `Final Score:`, plain, bold or boxed.

    None where there is no such label, or where a range or other words follow it.
    """
    text = text.translate(PLAIN)
    # From the end: a reply may name the label before it gives its score.
    for label in reversed(list(LABEL.finditer(text))):
        tail = text[label.end() : label.end() + NEAR]
        match = NUMBER.match(tail)
        if match and not ("\n" in match["between"] and ITEM.match(tail, match.end("number"))):
            end = END.search(match["scale"] or "")
            return Found(match["number"], match["of"] or (end and end[1]))
        # The last score of the reply is no number. An earlier one would be of something else.
        if match or OTHER.match(tail):
            return None
    return None


def make_last_match_finder(pattern: re.Pattern[str]) -> Callable[[str], Found | None]:
    """Make a function that finds what the first group of a pattern matches last in a text."""

    def find_last(text: str) -> Found | None:
        matches = list(pattern.finditer(text))
        return Found(matches[-1][1]) if matches and matches[-1][1] is not None else None

    return find_last


def read_last_number(
    choice: Mapping[str, Any], find: Callable[[str], Found | None], low: float, high: float
) -> Answer:
    """Read a number from a reply, as an Answer with the value number / high.

    choice: the reply's first choice, in OpenAI's form. find: finds the number in the text after the thinking.
    low, high: where the number must lie. Raises Failed where there is no such number.
    """
    cut = ", cut at max_tokens" if choice.get("finish_reason") == "length" else ""
    text = strip_thinking(choice)
    if (found := find(text)) is None:
        raise Failed(f"no number in the reply{cut}", text[-100:])
    try:
        x = float(found.number)
    except ValueError:
        raise Failed("no number in the reply", found.number) from None
    if not low <= x <= high:
        raise Failed(f"a number that is not from {low:g} to {high:g}", found.number)
    if found.of is not None and float(found.of) != high:
        raise Failed(f"a number that is not out of {high:g}", f"{found.number} of {found.of}")
    return Answer(x / high, x)


def strip_thinking(choice: Mapping[str, Any]) -> str:
    """Return the reply's text without its thinking. Raises Failed for a refusal."""
    content = choice["message"]["content"]
    if isinstance(content, list):  # It comes in parts, some of which may be thinking.
        content = "".join(part["text"] for part in content if part["type"] == "text")
    refusal = choice["message"].get("refusal")
    if refusal or choice.get("finish_reason") == "content_filter":
        raise Failed("a refusal", str(refusal or content or ""))
    # A reply that was cut while it thought opens its thinking and never closes it, so nothing is left of it.
    return OPENING.split(CLOSING.split(content)[-1])[0]


def read_yes_or_no(choice: Mapping[str, Any]) -> Answer:
    """Read P(yes) / (P(yes) + P(no)) from the alternatives of a reply's first token.

    Case and spaces of the alternatives play no part. Raises Failed where there is neither yes nor no.
    """
    if not choice.get("logprobs") or not choice["logprobs"].get("content"):
        raise Failed("no log-probabilities in the reply")
    chances = {"yes": 0.0, "no": 0.0}
    for alternative in choice["logprobs"]["content"][0]["top_logprobs"]:
        # Some tokenizers write a space as one of these two signs.
        word = alternative["token"].strip(" \t\n▁Ġ").lower()
        if word in chances:
            # Rounded figures may add up to a little over 1; more than that are no probabilities.
            chances[word] += math.exp(min(alternative["logprob"], 1.0))
    mass = sum(chances.values())
    if mass > 1.01:
        raise Failed("log-probabilities that are none", str(chances))
    if not mass > 0:
        raise Failed("neither yes nor no among the likely answers", str(choice["message"].get("content")))
    return Answer(chances["yes"] / mass, mass)
