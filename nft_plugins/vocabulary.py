"""Whether a tokenizer is a text encoder's own.

Where a tokenizer's files are missing, transformers makes one with no words, silently: each prompt is then the
same to the model. Core and rewards both ask this.
"""

from __future__ import annotations

from typing import Any

#: Words of a vocabulary that are looked for.
SAMPLE = 200


def check_tokenizer(tokenizer: Any, size: int, source: str) -> None:
    """Raise OSError for a tokenizer that was made for another text encoder, or that lost a part.

    size: of the encoder's vocabulary, which is often rounded up. source: where the tokenizer came from.
    """
    said = f"the tokenizer of {source!r} has {len(tokenizer)} tokens and the model {size}"
    mend = "Its files may be missing, cut short or of another model; download all of its files again."
    vocabulary = tokenizer.get_vocab()
    # Some have marks of their own, such as Gemma 3's for images, that the encoder has no place for.
    marks = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    marks -= {getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    if len(tokenizer) < size / 2 or any(i >= size and i not in marks for i in vocabulary.values()):
        raise OSError(f"{said}. {mend}")
    special = set(tokenizer.all_special_ids)
    words = sorted(i for i in vocabulary.values() if i not in special)
    # Of single letters many are found whatever is missing.
    long = {i for word, i in vocabulary.items() if sum(map(str.isalpha, word.removesuffix("</w>"))) > 2}
    words = [i for i in words if i in long] or words
    words = words[:: max(len(words) // SAMPLE, 1)]
    # A part of a word may become another one when it stands alone; most words are found again.
    texts = tokenizer.batch_decode([[word] for word in words])
    read = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    found = sum(word in ids for word, ids in zip(words, read))
    if found < len(words) / 5:
        raise OSError(f"{said}, but of {len(words)} of its words it finds {found} in a text. {mend}")


def check_end(tokenizer: Any, end: Any, length: int, source: str) -> None:
    """Raise OSError where a padded text does not hold, behind its words, the token that the text encoder reads.

    end: of the model's config, where 2 stands for the token of the largest number. Without it in its place
    the first token is read, which is the same for all texts.
    """
    if type(end) is not int:
        raise OSError(
            f"the text encoder of {source!r} has eos_token_id = {end!r} in its config: expected the number of "
            "the token at a text's end."
        )
    words = tokenizer("a").input_ids
    try:
        row = tokenizer("a", padding="max_length", truncation=True, max_length=length).input_ids
    except ValueError as error:
        raise OSError(
            f"the tokenizer of {source!r} cannot fill up a text to {length} tokens: {error}"
        ) from error
    read = row.index(max(row) if end == 2 else end) if end == 2 or end in row else 0
    if row[: read + 1] != words:
        raise OSError(
            f"the tokenizer of {source!r} makes {row} of the text 'a', and the model reads a text at token "
            f"{end}, which should stand behind its words: tokenizer and model do not belong together."
        )
