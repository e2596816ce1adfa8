"""Whether a tokenizer is a text encoder's own.

Where a tokenizer's files are missing, transformers makes one with no words, silently: each prompt is then the
same to the model.
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
    if not size / 2 <= len(tokenizer) <= size:
        raise OSError(f"{said}. {mend}")
    words = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    words = words[:: max(len(words) // SAMPLE, 1)]
    # A part of a word may become another one when it stands alone; most words are found again.
    texts = tokenizer.batch_decode([[word] for word in words])
    read = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    found = sum(word in ids for word, ids in zip(words, read, strict=True))
    if found < len(words) / 10:
        raise OSError(f"{said}, but of {len(words)} of its words it finds {found} in a text. {mend}")
