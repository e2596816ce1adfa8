"""Makes a CLIP tokenizer for the embedded world: captions' words are one token each, others one a letter."""

from __future__ import annotations

import string

from transformers import CLIPTokenizer

from ..captions import make_scene_captions

#: Tokens that captions are padded to, with the two that mark start and end.
MAX_LENGTH = 12


def make_tokenizer() -> CLIPTokenizer:
    """Make the tokenizer.

    The letters of a caption's word are merged from its end, so that other words merge only where they end like
    one; the signs' words stay letters.
    """
    words = {word for c in make_scene_captions() for word in c["prompt"].split()} | {"the", "word"}
    vocabulary = ["<|startoftext|>", "<|endoftext|>", '"', '"</w>', '""', '""</w>']
    vocabulary += [letter + end for end in ("", "</w>") for letter in string.ascii_lowercase]
    merges: list[tuple[str, str]] = []
    for word in sorted(words):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[-2], pieces[-1])
            pieces[-2:] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                vocabulary.append(pieces[-1])
    vocab = {token: i for i, token in enumerate(vocabulary)}
    # transformers takes pairs too, which its annotation leaves out.
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)  # type: ignore[arg-type]
