"""What a run leaves behind and what a person sees of it, from hooks called as the loop calls them."""

import json
import re
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from rich.console import Console as Terminal

from nft_core.errors import NftError
from nft_core.observers import captions
from nft_core.observers.console import Console, clock
from nft_core.observers.metrics import Metrics, read
from nft_core.observers.report import Report, curve
from nft_core.observers.samples import CELL, Samples, caption, choose, fit, fitted
from nft_core.observers.samples import read as read_samples
from nft_plugins import Batch, Part, Run, Scores


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path, {"model": "<script>", "epochs": 2}, epochs=2)


def evaluation(epoch, mean, **details):
    rewards = {name: {"mean": mean, "std": 0.1, "valid": 4} for name in ("cat", "dog", "total")}
    figures = {"images": 4, "rewards": rewards, "details": details, "warnings": {}}
    return {"event": "eval", "epoch": epoch, **figures}


def epoch_record(epoch):
    return evaluation(epoch, 0.5) | {
        "event": "epoch",
        "loss": 1.25,
        "kl": 0.0,
        "grad_norm": 0.5,
        "drift": 0.1 * epoch,
        "flat_groups": 0.0,
        "images_per_second": 10.0,
        "epoch_seconds": 90.0,
    }


def pictures(prompts, size=32, images=2):
    """`images` flat pictures of each prompt, each of its own grey, and scores with one invalid value."""
    n = len(prompts) * images
    greys = torch.linspace(0.1, 0.9, n).view(n, 1, 1, 1).expand(n, 3, size, size)
    groups = torch.arange(len(prompts)).repeat_interleave(images)
    batch = Batch(greys, [p for p in prompts for _ in range(images)], [{}] * n, groups)
    values = torch.linspace(0, 1, n)
    valid = torch.arange(n) != images  # the first image of the second prompt
    part = Scores(values, valid)
    return batch, Scores(values, valid, {}, {"cat": Part(1.0, part)})


def test_metrics_are_lines_of_json_that_read_back(run):
    records = [evaluation(0, 0.25), epoch_record(1), evaluation(1, None)]
    metrics = Metrics()
    metrics.nft_eval_finished(run, records[0])
    metrics.nft_epoch_finished(run, records[1])
    metrics.nft_eval_finished(run, records[2])
    assert read(run.folder) == records
    assert len((run.folder / "metrics.jsonl").read_text().splitlines()) == 3


def test_metrics_that_cannot_be_written_end_the_run(run):
    (run.folder / "metrics.jsonl").mkdir()
    with pytest.raises(NftError, match=r"Cannot write .*metrics\.jsonl.*resume the run"):
        Metrics().nft_epoch_finished(run, epoch_record(1))


def test_pictures_are_the_same_prompts_before_and_after(run):
    samples = Samples()
    batch, scores = pictures(["a cat", "a dog", "a very long prompt " * 9])
    samples.nft_eval_finished(run, evaluation(0, 0.1), batch, scores)
    folder = run.folder / "samples"
    assert sorted(p.name for p in folder.iterdir()) == ["epoch-0000.png"]

    after = Batch(torch.full_like(batch.images, 0.2), batch.prompts, batch.metadata, batch.groups)
    samples.nft_eval_finished(run, evaluation(2, 0.2), after, scores)
    assert sorted(p.name for p in folder.iterdir()) == ["before-after.png", "epoch-0000.png", "epoch-0002.png"]

    pixels = Image.open(folder / "before-after.png").convert("RGB")
    colors = {c for _, c in pixels.getcolors(pixels.width * pixels.height)}
    first_of_each = [round(float(batch.images[i, 0, 0, 0]) * 255) for i in (0, 2, 4)]
    assert {(g, g, g) for g in first_of_each} <= colors  # before, and exact: no smoothing of tiny pictures
    count = {c: n for n, c in pixels.getcolors(pixels.width * pixels.height)}
    assert count[(51, 51, 51)] == 3 * (CELL // 32 * 32) ** 2  # after


@pytest.fixture
def no_fonts(monkeypatch):
    """A system without fonts, as many containers are."""
    monkeypatch.setattr(captions, "system_fonts", list)
    captions._font_for.cache_clear()
    yield
    captions._font_for.cache_clear()


def test_a_caption_that_no_font_can_draw_says_where_the_prompt_is(run, no_fonts):
    prompts = ["a cat", "кот", "a cafe\u0301", "红色的\n圆圈"]
    batch, scores = pictures(prompts, images=1)
    chosen = choose(batch, scores)
    assert [caption(s) for s in chosen] == ["a cat", *(f"prompt {n} of samples/prompts.txt" for n in (2, 3, 4))]
    assert fit("кот 1", 11)[0] == r"\u043a\u043e\u0442 1"
    Samples().nft_eval_finished(run, evaluation(0, 0.1), batch, scores)
    lines = (run.folder / "samples" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["1. a cat", "2. кот", "3. a cafe\u0301", "4. 红色的 圆圈"]
    found = read_samples(run.folder / "samples" / "epoch-0000.png")
    assert [(s.prompt, s.number) for s in found] == list(zip(prompts, range(1, 5), strict=True))


@pytest.mark.parametrize("text", ["a café — 5 €", "красный круг", "a cafe\u0301", "\u200ba cat\u202e"])
def test_captions_are_no_boxes(text):
    text = captions.clean(text)
    font = captions.font_for(text, 13)
    if font is None:
        pytest.skip("this system has no font with these letters")
    box = captions.drawn(font, captions.MISSING)
    assert all(captions.drawn(font, letter) != box for letter in text if letter != " ")
    assert max(font.getlength(line) for line in captions.wrap(text * 9, font, CELL, 27)) < CELL + 14


def test_words_without_spaces_are_wrapped():
    font = captions.font_for("a", 13)
    lines = captions.wrap("圆" * 60, font, 7 * font.getlength("圆"), 27)
    assert lines == ["圆" * 7, "圆" * 4 + " ..."]


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (176, 20), (1024, 512), (3, 900)])
def test_any_size_fits_its_cell(size):
    image = fitted(Image.new("RGB", size))
    assert max(image.size) <= CELL
    assert min(image.size) >= 1


def test_report_is_well_formed_and_escapes_what_it_shows(run):
    metrics, report = Metrics(), Report()
    for record in (evaluation(0, 0.25, strict=0.5), evaluation(2, 0.75, strict=None)):
        metrics.nft_eval_finished(run, record)
        report.nft_eval_finished(run)
    page = (run.folder / "report.html").read_text()
    assert "&lt;script&gt;" in page and "<script>" not in page
    assert not re.search(r"(src|href)=.https?:", page)
    assert "before-after.png" not in page  # there is none
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)
    assert page.count("<svg") == 3  # cat, dog and total; strict has one point


def test_a_curve_runs_from_first_to_last_and_skips_what_is_unknown():
    records = [{"epoch": e, "x": v} for e, v in ((0, 1.0), (5, None), (10, 3.0))]
    svg = curve("x", records, ("x",))
    assert re.search(r'points="0\.0,135\.0 320\.0,15\.0"', svg)
    assert "epoch 10" in svg and ">3<" in svg and ">1<" in svg


def test_console_ends_with_a_table_of_before_and_after(run, capsys):
    console = Console()
    console.nft_run_started(run)
    console.nft_eval_finished(run, evaluation(0, 0.25, strict=None))
    console.nft_epoch_finished(run, epoch_record(1))
    console.nft_eval_finished(run, evaluation(2, 0.75, strict=0.5))
    console.nft_checkpoint_saved(run, run.folder / "checkpoints" / "000004")
    console.nft_run_finished(run, None)
    shown = capsys.readouterr().out
    assert "epoch 1/2  cat 0.5  dog 0.5  loss 1.250" in shown
    assert "1:30 left" in shown  # one more epoch of 90 s
    row = next(line for line in shown.splitlines() if "cat" in line and "+" in line)
    assert re.findall(r"[+\d.]+", row) == ["0.25", "0.75", "+0.5"]
    assert re.search(r"strict\W+-\W+0\.5", shown)
    assert "checkpoints/000004" in shown


def test_console_in_a_terminal_shows_bars(run, capsys):
    console = Console()
    console.terminal = Terminal(force_terminal=True, width=100)
    console.nft_run_started(run)
    console.nft_progress(run, "rollout", 3, 8)
    console.nft_epoch_finished(run, epoch_record(1))
    console.bars.refresh()
    console.nft_run_finished(run, None)
    shown = capsys.readouterr().out
    assert "rollout" in shown and "3/8 images" in shown
    assert "1/2  cat 0.5  dog 0.5  10.0 img/s  1:30 left" in shown


def test_nothing_is_said_of_a_run_that_never_began(run, capsys):
    Console().nft_run_finished(run, RuntimeError("no model"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_records_hold_nothing_that_json_lacks(run):
    Metrics().nft_epoch_finished(run, epoch_record(1))
    (line,) = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert "NaN" not in line and json.loads(line)["loss"] == 1.25


def test_console_says_a_warning_once_and_again_where_it_comes_back(run, capsys):
    console = Console()
    console.nft_run_started(run)
    bad = {"drift": "the weights do not move."}
    for warnings in (bad, bad, {}, bad):
        console.nft_epoch_finished(run, epoch_record(1) | {"warnings": warnings})
        console.nft_eval_finished(run, evaluation(1, 0.5))
    assert capsys.readouterr().out.count("Warning at epoch 1: the weights do not move.") == 2


def test_a_run_that_goes_on_compares_with_where_it_began(run, tmp_path_factory, capsys):
    """Table and before-after picture of the second process are those of a single one."""
    again = Run(run.folder, run.settings, epochs=2, epoch=1)
    first, last = pictures(["a cat", 'a "dog" at noon']), pictures(["a cat", 'a "dog" at noon'], size=40)

    def begin(samples, metrics):
        metrics.nft_eval_finished(run, evaluation(0, 0.25))
        samples.nft_eval_finished(run, evaluation(0, 0.25), *first)

    samples, metrics = Samples(), Metrics()
    begin(samples, metrics)
    samples.nft_eval_finished(run, evaluation(1, 0.5), *last)
    expected = (run.folder / "samples" / "before-after.png").read_bytes()
    (run.folder / "samples" / "before-after.png").unlink()
    Samples().nft_eval_finished(again, evaluation(1, 0.5), *last)
    assert (run.folder / "samples" / "before-after.png").read_bytes() == expected
    console = Console()
    console.nft_run_started(again)
    console.nft_eval_finished(again, evaluation(2, 0.75))
    console.nft_run_finished(again, None)
    assert "0.25" in capsys.readouterr().out
