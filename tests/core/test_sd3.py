"""What the SD3 family has of its own; tests/core/test_models.py has what all families share."""

import pytest
import torch

from nft_core.models.sd3 import SD3
from nft_core.prompts import Prompt
from nft_core.sampling.conditions import encode_prompts


def test_its_own_size_is_the_default(sd3_folder):
    assert SD3(str(sd3_folder)).resolution == (16, 16)


def test_a_t5_wants_tokens(sd3_folder):
    with pytest.raises(ValueError, match="has a T5, so max_sequence_length must be at least 1"):
        SD3(str(sd3_folder), max_sequence_length=0)


def test_each_text_that_is_drawn_is_encoded_once(sd3_folder):
    model = SD3(str(sd3_folder), max_sequence_length=8)
    prompts = [Prompt(text, {}) for text in ("a", "b", "a", "c")]
    encoded = encode_prompts(model, prompts, [2, 0, 1])
    assert encoded.row.tolist() == [0, 1, 0, -1]
    ours = encoded.take_rows(torch.tensor([1, 2, 0]), torch.device("cpu"))
    for name, rows in model.encode(["b", "a", "a"]).items():
        torch.testing.assert_close(ours[name], rows)


@pytest.mark.parametrize("size", [0, 7, 200])
def test_a_cut_file_of_the_cache_is_made_anew(sd3_folder, tmp_path, size):
    model, prompts = SD3(str(sd3_folder), max_sequence_length=8), [Prompt("a", {}), Prompt("b", {})]
    first = encode_prompts(model, prompts, [0, 1], tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    cut = tmp_path / "cut"  # The first is still mapped.
    cut.write_bytes(whole[:size] if size < 200 else whole[:-1])
    cut.replace(file)
    again = encode_prompts(model, prompts, [0, 1], tmp_path)
    for name, rows in first.condition.items():
        torch.testing.assert_close(again.condition[name], rows)
    assert file.read_bytes() == whole


def test_what_no_encoder_reads_is_said_once(sd3_folder, caplog):
    """CLIP reads 12 tokens here and T5 24, two of them for each letter and one for the end."""
    model = SD3(str(sd3_folder), max_sequence_length=24)
    model.encode(["a " * 11])
    assert "tokens of a prompt" not in caplog.text
    model.encode(["b", "a " * 30 + "b", "a " * 30 + "c", "c " * 30])
    model.encode(["d " * 30])
    (record,) = (r for r in caplog.records if r.name == "nft_core.models.pipeline")
    said = record.getMessage()
    assert "reads 24 tokens of a prompt and leaves out the rest; 3 of 4 prompts are longer" in said
    assert "of these 1 are the same to it as another" in said
    assert "max_sequence_length sets how many" in said
