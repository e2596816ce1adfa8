"""Looks up GPUs and published models by name, so that a plan needs neither of them nor a network.

The facts are in known.toml, each with its source.
"""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from ..errors import NftError, UsageError, unknown_name
from ..host.host import Host
from ..models.hub import is_fetched
from ..models.paths import INDEX
from ..runs.setup import find_family
from ..settings import Settings

#: Prompts of a plan are read by a tokenizer that knows these letters: what it makes of them has the length that
#: any prompt is filled up to.
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Card(NamedTuple):
    """A GPU to plan for. memory: in GiB. tflops: its peak speed in 16 bits, or None where nobody said it."""

    title: str
    memory: float
    tflops: float | None = None
    lacks_bf16: bool = False


#: No card has as many GiB, so that a higher number is a name, such as 3080.
MOST_MEMORY = 1000


@cache
def read_known() -> dict[str, Any]:
    """Read the table of GPUs and models."""
    return tomllib.loads(Path(__file__).with_name("known.toml").read_text(encoding="utf-8"))


def find_card(given: str) -> Card:
    """Find a GPU by name, such as h100, or by its memory in GiB. Raises UsageError, which lists the names."""
    cards = read_known()["cards"]
    name = given.lower().replace(" ", "-").removeprefix("nvidia-").removeprefix("rtx-").removeprefix("rtx")
    if name in cards:
        facts = {key: value for key, value in cards[name].items() if key != "source"}
        return Card(**facts)
    try:
        memory = float(given)
    except ValueError:
        memory = 0.0
    if not 1 <= memory <= MOST_MEMORY:
        raise unknown_name("card", given, cards, "Or give its memory in GiB, as in --card 24.")
    return Card(f"a GPU of {memory:g} GiB", memory)


@contextmanager
def use_known_model(s: Settings) -> Iterator[Settings]:
    """Put a folder of configs in the place of a model that is known and not on this machine.

    Nothing is asked of the hub for it: a plan then works offline, and for models with gated weights.
    """
    known = read_known()["models"].get(s.model)
    if known is None or Path(s.model).exists() or is_fetched(s.model, "transformer/config.json"):
        yield s
        return
    with TemporaryDirectory() as folder:
        write_pipeline(Path(folder), known)
        yield s.model_copy(update={"model": folder})


def find_planned_family(s: Settings, host: Host) -> str:
    """Find the model's family. Raises NftError, which names the models that a plan knows without a network."""
    try:
        return find_family(s, host)[0]
    except UsageError:  # It is there, and something else than a pipeline.
        raise
    except NftError as error:
        known = ", ".join(read_known()["models"])
        raise NftError(
            f"{error} A plan needs nothing of that for the models that it knows: {known}."
        ) from error


def write_pipeline(folder: Path, known: Mapping[str, Any]) -> None:
    """Write the configs of a pipeline, without weights and with tokenizers of a few letters."""
    index = {"_class_name": known["pipeline"], **known.get("index", {})}
    parts = {"transformer": known["transformer"], "vae": known["vae"]}
    for i, part in enumerate(known["texts"]):
        parts["text_encoder" + (f"_{i + 1}" if i else "")] = part
    for name, part in parts.items():
        facts = read_known()["parts"][part]
        of_text = "tokenizer" in facts
        index[name] = ["transformers" if of_text else "diffusers", facts["class"]]
        write_json(folder / name / "config.json", {"_class_name": facts["class"], **facts.get("config", {})})
        if of_text:
            tokenizer = make_tokenizer(facts["tokenizer"])
            place = name.replace("text_encoder", "tokenizer")
            tokenizer.save_pretrained(folder / place)
            index[place] = ["transformers", type(tokenizer).__name__]
    scheduler = "FlowMatchEulerDiscreteScheduler"
    index["scheduler"] = ["diffusers", scheduler]
    write_json(folder / "scheduler/scheduler_config.json", {"_class_name": scheduler, **known["scheduler"]})
    write_json(folder / INDEX, index)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def make_tokenizer(kind: str) -> Any:
    """Make a tokenizer of one of the classes that pipelines have, which knows letters alone."""
    import transformers

    if kind == "clip":
        words = ["<|startoftext|>", "<|endoftext|>"] + [c + end for c in LETTERS for end in ("", "</w>")]
        vocabulary = {word: i for i, word in enumerate(words)}
        return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    if kind == "t5":
        pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *((c, -2.0) for c in LETTERS)]
        return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    if kind == "gemma":
        return make_tokenizer_of_words()
    from tokenizers.pre_tokenizers import ByteLevel

    return transformers.Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])},
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template="{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    )


def make_tokenizer_of_words() -> Any:
    """Make a tokenizer for SANA that takes each word of its pipeline's instruction as one token.

    The instruction stands before every prompt, so its length counts: Gemma has about a token for a word too.
    """
    from diffusers import SanaPipeline
    from transformers import GemmaTokenizer

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    text = "\n".join(lines)
    words = re.findall(r"\w+", text)
    # A word comes about letter by letter; those behind a space, which are most, come first.
    merges: Any = dict.fromkeys(
        (w[:i], w[i]) for w in [*("▁" + w for w in words), *words] for i in range(1, len(w))
    )
    known = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS, *text, *(a + b for a, b in merges)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(known))}
    return GemmaTokenizer(vocab=vocabulary, merges=list(merges))
