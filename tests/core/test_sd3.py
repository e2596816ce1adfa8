"""What the SD3 family has of its own; tests/core/test_models.py has what all families share."""

import pytest
import torch

from nft_core.encodings import encode
from nft_core.models.sd3 import SD3
from nft_core.prompts import Prompt


def test_its_own_size_is_the_default(sd3_folder):
    assert SD3(str(sd3_folder)).resolution == (16, 16)


def test_a_t5_wants_tokens(sd3_folder):
    with pytest.raises(ValueError, match="has a T5, so max_sequence_length must be at least 1"):
        SD3(str(sd3_folder), max_sequence_length=0)


def test_each_text_that_is_drawn_is_encoded_once(sd3_folder):
    model = SD3(str(sd3_folder), max_sequence_length=8)
    prompts = [Prompt(text, {}) for text in ("a", "b", "a", "c")]
    encoded = encode(model, prompts, [2, 0, 1])
    assert encoded.row.tolist() == [0, 1, 0, -1]
    ours = encoded.of(torch.tensor([1, 2, 0]), torch.device("cpu"))
    for name, rows in model.encode(["b", "a", "a"]).items():
        torch.testing.assert_close(ours[name], rows)
