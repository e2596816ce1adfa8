"""The code that a run prints at its end, run as it stands in plain diffusers."""

import numpy as np
import pytest
from PIL import Image

from nft_core.host.host import load_host
from nft_core.pages.thumbnails import decode_image, encode_image
from nft_core.runs.fingerprint import pick_picture_part
from nft_core.runs.inputs import make_run_settings
from nft_core.runs.observers.metrics import read_records
from nft_core.runs.observers.pictures import read_pictures
from nft_core.runs.run import run_training

SHORT = {"steps": 2, "group_size": 2, "prompts_per_epoch": 2, "updates_per_epoch": 1, "epochs": 1}
SHORT |= {"eval_images": 1, "eval_steps": 4, "train_times_count": 1, "processes": 1, "device": "cpu"}


def first_picture(folder, epoch):
    line = next(r for r in read_records(folder) if r["event"] == "eval" and r["epoch"] == epoch)
    found = read_pictures(folder, epoch, pick_picture_part(line["evaluation"]))
    return np.asarray(decode_image(found.frame.pictures[0])).astype(int)


@pytest.mark.parametrize(("rank", "solver"), [(0, "dpm2"), (4, "dpm2"), (4, "euler")])
def test_it_makes_the_first_evaluation_picture(rank, solver, tmp_path, monkeypatch):
    """It agrees to one of 255 levels: a LoRA is added to the weights here, and lies beside them there."""
    given = {"rewards": ["jpeg_compressibility"], "lora_rank": rank, "solver": solver, "lr": 0.02}
    settings, told = make_run_settings(load_host(), "tiny", SHORT | {"ema_decay": 0} | given), []
    run_training(settings, tmp_path / "run", load_host(), told.append)
    words, code = told[-1].split("\n\n", 1)
    assert words == "To use it in plain diffusers (this makes the run's first evaluation picture):"
    assert all(len(line) <= 88 for line in code.splitlines() if "/" not in line) and "seed(-" not in code
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    picture = np.asarray(decode_image(encode_image(Image.open("image.png")))).astype(int)
    assert np.abs(picture - first_picture(tmp_path / "run", 1)).max() <= 1
    assert np.abs(picture - first_picture(tmp_path / "run", 0)).max() > 1


def test_a_solver_that_diffusers_has_not_is_named(tmp_path):
    given = {"rewards": ["jpeg_compressibility"], "solver": "heun"}
    settings, told = make_run_settings(load_host(), "tiny", SHORT | {"ema_decay": 0} | given), []
    run_training(settings, tmp_path / "run", load_host(), told.append)
    assert "a picture like the run's first evaluation picture, which the solver heun made" in told[-1]
