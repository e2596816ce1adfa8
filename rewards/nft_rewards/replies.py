"""What a judge's reply says: a number in its text, or how likely its first token was yes and no."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .chat import Failed

#: The most alternatives that OpenAI's protocol gives for a token.
TOP = 20

#: What models that think aloud write around it, where the server leaves it in the text.
THOUGHT = r"(?:\w+:)?(?:think|thinking|thought|reasoning)"
OPENING, CLOSING = (re.compile(rf"[<\[◁]{slash}{THOUGHT}[>\]▷]", re.IGNORECASE) for slash in ("", "/"))

LABEL = re.compile(r"final[\s_*-]*score", re.IGNORECASE)
#: Characters after a label in which its number begins.
NEAR = 200
#: Full-width signs, and characters that cannot be seen.
PLAIN = str.maketrans(
    {"．": ".", "／": "/", "⁄": "/", "∕": "/", "﹕": ":"} | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff")
)
#: What may stand around a number: white space, Markdown, brackets, quotes, tags, LaTeX's commands.
AROUND = r"(?:[\s*_`\"'“”‘’()\[\]{}<>【】$|#]|</?\w+>|\\[a-z]*)*"
#: The same within a line.
BESIDE = r"[ \t*_`\"'”’()\[\]{}$\\]*"
#: Between the ends of a range.
TO = rf"{BESIDE}(?:[-‐-―−~〜～至到]|(?:to|through)\b){BESIDE}"
#: What a label says of its scale, or of what it scores.
SCALE = (
    rf"(?:{AROUND}[(\[][^()\[\]\n]*[)\]]|,? (?:out of|on a scale (?:of|from)) (?:\d+{TO})?\d+"
    r"|,? (?:for|of) (?:the|this) (?:\w+ )?(?:image|picture))?"
)
#: The end of that scale.
END = re.compile(r"(?:/|\bof\b|\bto\b|[-‐-―−~〜～])\s*(\d+(?:\.\d+)?)\D*$")
#: From the label to its number, as in "Final Score (1-5): ", "final score is ", "### Final Score\n",
#: "<final_score>"; without a sign between them where the line has nothing else.
BETWEEN = (
    rf"(?:>|(?P<scale>{SCALE}){AROUND}(?:[:：=→\n|][:=]*|-(?=\s)|of\b"
    r"|(?:is|would be|should be)\b(?: therefore)?:?"
    rf"|(?<=[\s*_])(?=[\d.]+(?:\s*/\s*\d+)?[*_` \t.]*(?:\n|$)))){AROUND}"
)
#: How a number was worked out, as in "(3 + 5) / 2 = 4".
SUM = rf"(?:[-+*/×÷·().\d \t]*\d[-+*/×÷·().\d \t]*[=≈]{AROUND})*"
#: A number that stands alone: neither a part of another, of a word or of a sum, nor the begin of a range.
NUMBER = re.compile(
    rf"(?P<between>{BETWEEN}){SUM}(?P<number>[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?)"
    rf"(?![\da-z%½⅓⅔¼¾]|[.,…]+\d|[ \t]+\d+/|{TO}\d|{BESIDE},?{BESIDE}(?:(?:or|and)\b|[&或和]){BESIDE}\d"
    rf"|{BESIDE}(?:[+×÷·→=≈]|[-=]>){BESIDE}\d|[ \t]*\*[ \t]*\d)"
    rf"(?:{BESIDE}(?:points?\b|stars?\b|分)?{BESIDE}"
    rf"(?:(?:/|of\b|out of\b|on a scale (?:of|from)\b)(?:{BESIDE}(?:an?|the|possible|total|max(?:imum)?|of)\b)*"
    rf"{BESIDE}(?:[01]{TO})?|(?:in\b)?{BESIDE}[01]{TO})(?P<of>\d+(?:\.\d+)?))?",
    re.IGNORECASE,
)
#: A label that has something else than a number; in quotes, as in 'Final Score:', it is but named.
OTHER = re.compile(rf"{SCALE}{AROUND}[:：=](?![\"'”’])|{BETWEEN}\d", re.IGNORECASE)
#: After a number on a line of its own: it numbers the items of a list.
ITEM = re.compile(r"[.)][ \t]+\w")


class Answer(NamedTuple):
    value: float
    figure: float


class Found(NamedTuple):
    """A number as the reply gives it, and what it is out of, if that is said."""

    number: str
    of: str | None = None


def find_final_score(text: str) -> Found | None:
    """The number after the last `Final Score:`, plain, bold or boxed; None for a range and other words."""
    text = text.translate(PLAIN)
    for label in reversed(list(LABEL.finditer(text))):
        tail = text[label.end() : label.end() + NEAR]
        match = NUMBER.match(tail)
        if match and not ("\n" in match["between"] and ITEM.match(tail, match.end("number"))):
            end = END.search(match["scale"] or "")
            return Found(match["number"], match["of"] or (end and end[1]))
        if match or OTHER.match(tail):
            return None
    return None


def make_last_match_finder(pattern: re.Pattern[str]) -> Callable[[str], Found | None]:
    """Finds what the first group of a pattern matches last."""

    def find_last(text: str) -> Found | None:
        matches = list(pattern.finditer(text))
        return Found(matches[-1][1]) if matches and matches[-1][1] is not None else None

    return find_last


def read_last_number(
    choice: Mapping[str, Any], find: Callable[[str], Found | None], low: float, high: float
) -> Answer:
    """The reply's number. find: where it stands in the text after the thinking."""
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
    """The reply's text without its thinking."""
    content = choice["message"]["content"]
    if isinstance(content, list):  # In parts, of which some may be thinking.
        content = "".join(part["text"] for part in content if part["type"] == "text")
    refusal = choice["message"].get("refusal")
    if refusal or choice.get("finish_reason") == "content_filter":
        raise Failed("a refusal", str(refusal or content or ""))
    # Of a reply that was cut while it thought, nothing is left.
    return OPENING.split(CLOSING.split(content)[-1])[0]


def read_yes_or_no(choice: Mapping[str, Any]) -> Answer:
    """P(yes) / (P(yes) + P(no)) among the first token's alternatives, whatever their case and leading space."""
    if not choice.get("logprobs") or not choice["logprobs"].get("content"):
        raise Failed("no log-probabilities in the reply")
    chances = {"yes": 0.0, "no": 0.0}
    for alternative in choice["logprobs"]["content"][0]["top_logprobs"]:
        word = alternative["token"].strip(" \t\n▁Ġ").lower()
        if word in chances:
            # Rounded figures may add up to a little over 1; beyond that they are no probabilities.
            chances[word] += math.exp(min(alternative["logprob"], 1.0))
    mass = sum(chances.values())
    if mass > 1.01:
        raise Failed("log-probabilities that are none", str(chances))
    if not mass > 0:
        raise Failed("neither yes nor no among the likely answers", str(choice["message"].get("content")))
    return Answer(chances["yes"] / mass, mass)
