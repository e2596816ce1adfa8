"""`nft sample`: files that `nft score` reads, pictures of a run's evaluation, and what a person gets wrong."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import nft_core
from nft_core.cli.app import main

SMALL = ["--tiny", "--device", "cpu", "--processes", "1"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "a red circle", "tag": "colors"}\n{"prompt": "two blue squares"}\n'
    )
    return tmp_path


def nft(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)])


def sample(*arguments):
    return nft("sample", *SMALL, *arguments)


def read_pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_images_with_prompts_that_are_scored(folder):
    result = sample("--prompts", "p.jsonl", "--steps", 1, "--images", 2, "--seed", 5, "--grid", "--out", "out")
    assert result.exit_code == 0, result.output
    assert "4 images in out" in result.stdout
    names = [f"{p:05d}-{n}" for p in (0, 1) for n in (0, 1)]
    files = [f"{name}{suffix}" for name in names for suffix in (".png", ".json")]
    assert sorted(p.name for p in (folder / "out").iterdir()) == sorted([*files, "grid.png", "sample.json"])
    assert json.loads((folder / "out/00000-1.json").read_text()) == {"prompt": "a red circle", "tag": "colors"}
    record = json.loads((folder / "out/sample.json").read_text())
    assert (record["seed"], record["steps"], record["images"], record["guidance"]) == (5, 1, 2, 1.0)
    size = read_pixels(folder / "out/00000-0.png").shape[:2]
    assert (record["height"], record["width"]) == size
    grid = read_pixels(folder / "out/grid.png")
    assert grid.shape[1] > 4 * 170 and grid.std() > 5
    scored = nft("score", "out", "--reward", "jpeg_compressibility", "--json")
    assert scored.exit_code == 0, scored.output
    rows = json.loads(scored.stdout)
    rows = rows["images"] if isinstance(rows, dict) else rows
    assert [(row["path"], row["prompt"]) for row in rows] == [
        (f"out/{name}.png", ("a red circle", "two blue squares")[int(name[4])]) for name in names
    ]
    # Python returns the same pictures, those of a prompt side by side.
    images = nft_core.sample(preset="tiny", prompts="p.jsonl", steps=1, images=2, seed=5, device="cpu")
    assert len(images) == 4
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(np.asarray(image), read_pixels(folder / f"out/{name}.png"))


def test_a_new_folder_is_named_by_the_time(folder):
    result = sample("--prompt", "a red circle", "--steps", 1, "--images", 1)
    assert result.exit_code == 0, result.output
    (out,) = (folder / "samples").iterdir()
    assert f"1 image in samples/{out.name}" in result.stdout and (out / "00000-0.png").is_file()


@pytest.mark.parametrize("more", [(), ("lora_rank=4",)], ids=["whole", "lora"])
def test_held_out_pictures_are_those_of_the_runs_evaluation(folder, monkeypatch, more):
    """Prompts that the reward refuses are left out as in the run, with its solver, steps, seed and batches."""
    from nft_core.training.gallery import Gallery

    seen = []
    add = Gallery.add

    def keep(self, rows, batch):
        seen.append((rows.tolist(), batch.pil, batch.prompts))
        add(self, rows, batch)

    monkeypatch.setattr(Gallery, "add", keep)
    held = [{"prompt": "a cat"}]
    held += [
        {"prompt": f"a {c} circle", "tag": "colors", "include": [{"class": "circle", "count": 1, "color": c}]}
        for c in ("red", "green", "blue")
    ]
    (folder / "held.jsonl").write_text("".join(json.dumps(line) + "\n" for line in held))
    sets = ["prompts_per_epoch=2", "group_size=4", "steps=2", "eval_steps=3", "eval_images=2", "processes=1"]
    sets += ["rollout_batch=5", "train_times_count=1", "eval_solver=euler", "updates_per_epoch=1", *more]
    sets += ["lr=0.01", "warmup=0", "ema_decay=0.5"]
    run = [
        "run",
        "--tiny",
        "--reward",
        "geneval",
        "--reward",
        "jpeg_compressibility",
        "--epochs",
        1,
        "--seed",
        3,
    ]
    run += ["--device", "cpu", "--out", "run", "--eval-prompts", "held.jsonl"]
    result = nft(*run, *(word for one in sets for word in ("--set", one)))
    assert result.exit_code == 0, result.output
    images = {}
    for rows, pictures, prompts in seen:  # The later evaluation is that of the trained model.
        images |= {n: (picture, text) for n, picture, text in zip(rows, pictures, prompts, strict=True)}
    first = dict(zip(seen[0][0], seen[0][1], strict=True))
    assert not all(np.array_equal(np.asarray(first[n]), np.asarray(images[n][0])) for n in first)
    result = nft(*("sample", "--model", "run", "--held-out", "--device", "cpu", "--out", "out"))
    assert result.exit_code == 0, result.output
    assert result.stderr == "What is not given is as the run of run evaluates.\n"
    assert len(images) == len(list((folder / "out").glob("*.png"))) == 6
    for n, (picture, text) in images.items():
        name = f"{n // 2:05d}-{n % 2}"
        assert json.loads((folder / f"out/{name}.json").read_text())["prompt"] == text
        assert np.array_equal(read_pixels(folder / f"out/{name}.png"), np.asarray(picture)), name


ONE = ["--prompt", "a red circle"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tiny"], "There are no prompts: give --prompt TEXT"),
        (["--tiny", *ONE, "--held-out"], "--prompt and --held-out both say what the prompts are"),
        (["--tiny", *ONE, "--prompts", "p.jsonl"], "--prompt and --prompts both say"),
        (["--tiny", "--prompt", " "], "prompt 1: the prompt is empty"),
        (["--tiny", "--prompts", "none.txt"], "Cannot read the prompt file none.txt"),
        (ONE, "There is no model to generate images with"),
        (["--preset", "tiy", *ONE], "Unknown preset 'tiy'. Did you mean 'tiny'"),
        (["--model", "no/model/here", *ONE], "Cannot load the model 'no/model/here'"),
        (["--model", "./none", *ONE], "there is no such file or folder"),
        (["--tiny", *ONE, "--solver", "eulr"], "Unknown solver 'eulr'"),
        (["--tiny", *ONE, "--steps", "-1"], "Setting eval_steps = -1"),
        (["--tiny", *ONE, "--images", "0"], "Setting eval_images = 0"),
        (["--tiny", *ONE, "--resolution", "33"], "Setting resolution"),
        (["--tiny", *ONE, "--guidance", "-1"], "expected a number from 0 up"),
        (["--tiny", *ONE, "--negative-prompt", "x"], "A negative prompt counts under guidance alone"),
        (["--model", "flux", *ONE, "--guidance", "3"], "means nothing to it; use guidance 1"),
        (["--tiny", *ONE, "--set", "lr=1"], "The setting lr is not read here"),
        (["--tiny", *ONE, "--grid", "--images", "301"], "A grid takes 300 pictures at most"),
        (["--tiny", *ONE, "--out", "full"], "full exists and is not empty"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value[-2:]),
)
def test_bad_input_is_told_before_anything_heavy(folder, monkeypatch, arguments, said):
    (folder / "full").mkdir()
    (folder / "full/mine.txt").write_text("x")
    (folder / "flux").mkdir()
    (folder / "flux/model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    if "flux" in arguments:  # It is whole but for its weights.
        monkeypatch.setattr("nft_core.evaluation.sample.check_model", lambda settings, host: None)
    monkeypatch.setattr("nft_core.evaluation.sample.prepare_generation", None)
    result = nft("sample", *arguments, "--device", "cpu")
    assert result.exit_code in (1, 2) and said in result.output, result.output
    assert not (folder / "samples").exists()
    assert [p.name for p in (folder / "full").iterdir()] == ["mine.txt"]
