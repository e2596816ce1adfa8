"""The scores of every image of an evaluation, which a run keeps for comparisons."""

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from nft_core.errors import NftError
from nft_core.runs.observers import evaluations
from nft_core.runs.observers.evaluations import list_scores, read_scores, save_scores
from nft_core.runs.observers.metrics import trim_metrics
from nft_core.training.state import Progress
from nft_plugins import Part, Scores

GROUPS = torch.tensor([0, 0, 3, 3])


def make_scores():
    """Two prompts with two images each; one of `cat` is invalid, and NaN as such ones may be."""
    values = torch.tensor([0.5, float("nan"), 0.25, 1.0])
    valid = torch.tensor([True, False, True, True])
    detail = torch.tensor([1.0, 2.0, float("inf"), 4.0])
    part = Scores(values, valid, {"paws": detail})
    return Scores(2 * values, valid, {"cat/paws": detail}, {"cat": Part(2.0, part)})


def test_every_image_reads_back(tmp_path):
    save_scores(tmp_path, 20, make_scores(), GROUPS)
    assert [p.name for p in (tmp_path / "evaluations").iterdir()] == ["000020.safetensors"]
    found = read_scores(tmp_path, 20)
    assert found.prompt.tolist() == [0, 0, 3, 3]
    assert {name: (v.tolist(), k.tolist()) for name, (v, k) in found.figures.items()} == {
        "total": ([1.0, 0.0, 0.5, 2.0], [True, False, True, True]),
        "cat": ([0.5, 0.0, 0.25, 1.0], [True, False, True, True]),
        "cat/paws": ([1.0, 0.0, 0.0, 4.0], [True, False, False, True]),
    }


def test_a_file_has_a_bound(tmp_path, monkeypatch):
    """Details are left out first, then rewards."""
    for most, kept in ((16 + 3 * 20, 3), (16 + 2 * 20, 2), (16 + 20, 1), (15, 0)):
        monkeypatch.setattr(evaluations, "MOST_BYTES", most)
        save_scores(tmp_path, 0, make_scores(), GROUPS)
        assert sorted(read_scores(tmp_path, 0).figures) == sorted(["total", "cat", "cat/paws"][:kept])


def test_what_comes_after_a_checkpoint_is_removed(tmp_path):
    for epoch in (0, 1, 2):
        save_scores(tmp_path, epoch, make_scores(), GROUPS)
    (tmp_path / "evaluations" / "mine.txt").touch()
    trim_metrics(tmp_path, Progress(epoch=1), pytest.fail)
    assert list(list_scores(tmp_path)) == [0]
    assert (tmp_path / "evaluations" / "mine.txt").exists()
    trim_metrics(tmp_path / "gone", Progress(), pytest.fail)


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"prompt": np.zeros((2, 2), np.int32)},
        {"prompt": np.zeros(2)},
        {"prompt": np.zeros(2, np.int32), "values/cat": np.zeros(2, np.float32)},
        {
            "prompt": np.zeros(2, np.int32),
            "values/cat": np.zeros(3, np.float32),
            "valid/cat": np.zeros(3, bool),
        },
    ],
)
def test_something_else_in_its_place(arrays, tmp_path):
    (tmp_path / "evaluations").mkdir()
    save_file(arrays, tmp_path / "evaluations" / "000000.safetensors")
    assert read_scores(tmp_path, 0) is None
    (tmp_path / "evaluations" / "000000.safetensors").write_bytes(b"cut short")
    assert read_scores(tmp_path, 0) is None
    assert read_scores(tmp_path, 1) is None


def test_scores_that_cannot_be_written_end_the_run(tmp_path):
    with pytest.raises(NftError, match=r"Cannot write .*000000.safetensors.*resume the run"):
        save_scores(tmp_path / "gone", 0, make_scores(), GROUPS)
