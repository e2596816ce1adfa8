"""What a run leaves behind and what a person sees of it, from hooks called as the loop calls them."""

import errno
import json
import math
import re
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from rich.console import Console as Terminal
from safetensors import SafetensorError

from nft_core.errors import NftError, advise_on_disk
from nft_core.output import keep_output_alive
from nft_core.runs.observers import captions
from nft_core.runs.observers.console import Console, compare_evaluations, format_seconds
from nft_core.runs.observers.evaluations import save_scores
from nft_core.runs.observers.live import LiveView
from nft_core.runs.observers.metrics import Metrics, append_record, read_records
from nft_core.runs.observers.report import MOST, Curve, Report
from nft_core.runs.observers.samples import (
    CELL,
    Samples,
    Sheet,
    choose_font,
    choose_samples,
    find_first_sheet,
    fit_to_cell,
    write_caption,
)
from nft_core.runs.observers.samples import read_sheet as read_samples
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
    assert list(read_records(run.folder)) == records
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
    monkeypatch.setattr(captions, "list_system_fonts", list)
    captions._font_for.cache_clear()
    yield
    captions._font_for.cache_clear()


def test_a_caption_that_no_font_can_draw_says_where_the_prompt_is(run, no_fonts):
    prompts = ["a cat", "кот", "a cafe\u0301", "红色的\n圆圈"]
    batch, scores = pictures(prompts, images=1)
    chosen = choose_samples(batch, scores)
    assert [write_caption(s) for s in chosen] == [
        "a cat",
        *(f"prompt {n} of samples/prompts.txt" for n in (2, 3, 4)),
    ]
    assert choose_font("кот 1", 11)[0] == r"\u043a\u043e\u0442 1"
    Samples().nft_eval_finished(run, evaluation(0, 0.1), batch, scores)
    lines = (run.folder / "samples" / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["1. a cat", "2. кот", "3. a cafe\u0301", "4. 红色的 圆圈"]
    found = read_samples(run.folder / "samples" / "epoch-0000.png", {}).samples
    assert [(s.prompt, s.number) for s in found] == list(zip(prompts, range(1, 5), strict=True))


@pytest.mark.parametrize("text", ["a café — 5 €", "красный круг", "a cafe\u0301", "\u200ba cat\u202e"])
def test_captions_are_no_boxes(text):
    text = captions.clean_text(text)
    font = captions.find_font(text, 13)
    if font is None:
        pytest.skip("this system has no font with these letters")
    box = captions.draw_letter(font, captions.MISSING)
    assert all(captions.draw_letter(font, letter) != box for letter in text if letter != " ")
    assert max(font.getlength(line) for line in captions.wrap_text(text * 9, font, CELL, 27)) < CELL + 14


def test_words_without_spaces_are_wrapped():
    font = captions.find_font("a", 13)
    lines = captions.wrap_text("圆" * 60, font, 7 * font.getlength("圆"), 27)
    assert lines == ["圆" * 7, "圆" * 4 + " ..."]


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (176, 20), (1024, 512), (3, 900)])
def test_any_size_fits_its_cell(size):
    image = fit_to_cell(Image.new("RGB", size))
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
    curve = Curve()
    for epoch, value in ((0, 1.0), (5, None), (7, math.nan), (8, "3"), (10, 3.0)):
        curve.add(epoch, value)
    svg = curve.figure("x")
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


def test_console_in_a_terminal_shows_bars_and_figures(run, capsys):
    console = Console()
    console.terminal = Terminal(force_terminal=True, width=100)
    console.nft_run_started(run)
    console.nft_eval_finished(run, evaluation(0, 0.25))
    console.nft_progress(run, "rollout", 3, 8)
    console.nft_epoch_finished(run, epoch_record(1))
    console.nft_eval_finished(run, evaluation(1, 0.75))
    console.bars.refresh()
    console.nft_run_finished(run, None)
    shown = capsys.readouterr().out
    assert "rollout" in shown and "3/8 images" in shown
    assert "1/2" in shown and "1:30 left, 10.0 img/s" in shown
    assert "cat  evaluated 0.75 (+0.5), rollouts 0.5" in shown


def test_a_terminal_shows_as_many_epochs_as_its_width_takes():
    view = LiveView(Terminal(force_terminal=True, width=40), 0, 20)
    for epoch in range(1, 10):
        view.show_epoch(epoch_record(epoch) | {"rewards": {"cat": {"mean": epoch / 8}}}, "", "")
    assert view.write_figures(40) == ["cat  evaluated -, rollouts 0.875 1 1.125"]
    assert view.write_figures(20) == ["cat  evaluated -"]


def test_a_dumb_terminal_gets_lines(run, capsys, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    console = Console()
    console.terminal = Terminal(force_terminal=True, width=100)
    console.nft_run_started(run)
    console.nft_epoch_finished(run, epoch_record(1))
    assert console.bars is None and "epoch 1/2  cat 0.5" in capsys.readouterr().out


def test_nothing_is_said_of_a_run_that_never_began(run, capsys):
    Console().nft_run_finished(run, RuntimeError("no model"))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")])
def test_clock(seconds, text):
    assert format_seconds(seconds) == text


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


NAMES = ["[/]", "[red]x[/red]", ":smile:", "a\\", "кот 猫 \udcff"]


@pytest.mark.parametrize("width", [None, 100])
def test_names_are_shown_as_they_are(width, run, capsys):
    """Brackets are no markup, colons no emoji, whatever a reward, a detail or a folder is called."""
    details = {f"cat/{name}": 0.5 for name in NAMES}
    console = Console()
    if width:
        console.terminal.width, console.terminal._force_terminal = width, True
    folder = Run(run.folder / "[/] :smile:", {}, epochs=2)
    with keep_output_alive():
        console.nft_run_started(folder)
        renamed = {name: {"mean": 0.25, "std": 0.1} for name in (*NAMES, "total")}
        for epoch, value in ((0, 0.25), (1, 0.75)):
            record = evaluation(epoch, value, **details) | {"rewards": renamed}
            console.nft_epoch_finished(folder, epoch_record(1) | {"rewards": renamed})
            console.nft_eval_finished(folder, record)
        console.nft_run_finished(folder, None)
        Report().nft_eval_finished(Run(run.folder, {name: name for name in NAMES}, epochs=2))
    shown = capsys.readouterr().out
    table = shown[shown.index("held-out images") :]
    assert "[/] :smile:" in shown
    assert all(f"cat/{name}" in table for name in NAMES[:-1])
    assert "<td>[/]" in (run.folder / "report.html").read_text()


def test_a_run_is_compared_with_its_like(run, capsys):
    """After a change of prompts with the first of the new ones; of rewards, reward by reward."""
    of = {"prompts": "1", "seed": "0", "rewards": {"cat": "c", "dog": "d"}, "total": "t"}
    other_dog = of | {"rewards": {"cat": "c", "dog": "D", "bird": "b"}, "total": "T"}
    console = Console()
    console.nft_run_started(run)
    console.nft_eval_finished(run, evaluation(0, 0.25) | {"evaluation": of})
    record = evaluation(1, 0.75) | {"evaluation": other_dog, "which": {}}
    record["rewards"]["bird"] = {"mean": 0.125}
    console.nft_eval_finished(run, record)
    assert "eval at epoch 1: cat 0.75  dog 0.75  bird 0.125  (base cat 0.25)" in capsys.readouterr().out
    console.nft_run_finished(run, None)
    rows = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert re.findall(r"[-+\d.]+", rows["cat"]) == ["0.25", "0.75", "+0.5"]
    assert re.findall(r"[-+\d.]+", rows["dog"]) == ["0.25", "0.75"]
    assert re.findall(r"[-+\d.]+", rows["bird"]) == ["-", "0.125"]

    console.nft_eval_finished(run, evaluation(2, 0.5) | {"evaluation": of | {"prompts": "2", "seed": "1"}})
    console.nft_eval_finished(run, evaluation(3, 0.25) | {"evaluation": of | {"prompts": "2", "seed": "1"}})
    shown = capsys.readouterr().out
    assert "Not compared with the evaluation at epoch 0, which was another: prompts, seed." in shown
    assert "(epoch 2 cat 0.5  dog 0.5)" in shown
    assert "base" not in shown
    comparison_of_both = compare_evaluations(console.base, console.latest)
    assert [c.header for c in comparison_of_both.columns] == [
        *("", "epoch 2", "epoch 3", "change", "95 % interval")
    ]


def test_a_change_has_the_interval_of_its_pairs(run):
    """`cat` rises by 0.5 on every image, `dog` by 0.5 on some and falls by as much on others."""
    groups = torch.arange(12).repeat_interleave(2)
    before = torch.linspace(0, 1, 24)
    dog = before + torch.tensor([0.5, 0.5, -0.5, -0.5]).repeat(6)
    for epoch, values in ((0, (before, before)), (1, (before + 0.5, dog))):
        parts = {name: Part(1.0, Scores.of(v)) for name, v in zip(("cat", "dog"), values, strict=True)}
        save_scores(run.folder, epoch, Scores(sum(values), torch.ones(24, dtype=torch.bool), {}, parts), groups)
    table = compare_evaluations(evaluation(0, 0.25), evaluation(1, 0.75), run.folder)
    cells = dict(zip(*(table.columns[i].cells for i in (0, 4)), strict=True))
    assert cells["cat"] == "+0.5 to +0.5"
    low, high = map(float, re.findall(r"[-+][\d.]+", cells["dog"]))
    assert cells["dog"].endswith(", may be chance") and low < -0.2 < 0.2 < high
    # Of a run of an older version nothing is known of single images.
    (run.folder / "evaluations" / "000000.safetensors").unlink()
    table = compare_evaluations(evaluation(0, 0.25), evaluation(1, 0.75), run.folder)
    assert set(table.columns[4].cells) == {""}


def test_curves_show_intervals_of_evaluations(run):
    for epoch, mean in enumerate((0.25, 0.75)):
        record = evaluation(epoch, mean)
        record["rewards"]["cat"] |= {"error": 0.1, "low": mean - 0.2, "high": mean + 0.2}
        append_record(run.folder, record)
    Report().nft_run_finished(run)
    page = (run.folder / "report.html").read_text()
    assert page.count("<title>95 % interval</title>") == 1
    # The axis is as long as the intervals.
    assert ">0.95</text>" in page and ">0.05</text>" in page


def test_means_over_other_images_have_no_change():
    base, latest = evaluation(0, 0.25) | {"which": {"dog": "1"}}, evaluation(1, 0.75) | {"which": {"dog": "2"}}
    table = compare_evaluations(base, latest)
    changes = dict(zip(*(table.columns[i].cells for i in (0, 3)), strict=True))
    assert changes == {"cat": "+0.5", "dog": "", "total": "+0.5"}
    assert table.caption == "dog: other images could be scored than before, so no change is given."


def test_pictures_of_other_prompts_are_not_put_beside_one_another(run):
    first, other = ({"evaluation": {"prompts": p, "rewards": {"cat": p}}} for p in "12")
    folder = run.folder / "samples"
    batch, scores = pictures(["a cat", "a dog"])
    Samples().nft_eval_finished(run, evaluation(0, 0.1) | first, batch, scores)
    resumed = Samples()
    resumed.nft_eval_finished(run, evaluation(1, 0.1) | other, batch, scores)
    assert not (folder / "before-after.png").exists()
    resumed.nft_eval_finished(run, evaluation(2, 0.1) | other, batch, scores)
    assert (folder / "before-after.png").exists()
    # One that has the first prompts again finds the first pictures, and other rewards change no picture.
    assert find_first_sheet(folder, Sheet(3, [], {"prompts": "1"})).epoch == 0
    assert find_first_sheet(folder, Sheet(3, [], {"prompts": "2"})).epoch == 1
    assert find_first_sheet(folder, Sheet(3, [], {"prompts": "3"})) is None


def test_a_report_of_a_long_run_reads_on_where_it_stopped_and_keeps_few_points(run):
    metrics, report = Metrics(), Report()
    metrics.nft_eval_finished(run, evaluation(0, 0.25))
    report.nft_eval_finished(run)
    before = report.place
    assert before == (run.folder / "metrics.jsonl").stat().st_size
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write("no record\n" + json.dumps(evaluation(1, 0.5)) + "\n" + '{"event": "ep')
    report.nft_eval_finished(run)
    assert report.held_out["cat"].pieces == [[(0, 0.25), (1, 0.5)]]
    curve = Curve()
    for epoch in range(100_000):
        curve.add(epoch, {77_777: 9.0, 5: -9.0}.get(epoch, 0.5))
    (points,) = curve.pieces
    assert len(points) <= MOST
    assert {(0, 0.5), (5, -9.0), (77_777, 9.0), (99_999, 0.5)} <= set(points)
    assert points == sorted(points)


def test_a_curve_is_broken_where_another_evaluation_begins(run):
    report = Report()
    for epoch, prompts in ((0, "1"), (1, "1"), (2, "2"), (3, "2")):
        report.add(evaluation(epoch, 0.5) | {"evaluation": {"prompts": prompts}})
    assert report.held_out["cat"].pieces == [[(0, 0.5), (1, 0.5)], [(2, 0.5), (3, 0.5)]]
    assert "The evaluation changed before epoch 2: prompts." in report.page(run)


def test_numbers_that_json_lacks_are_null(run):
    wild = epoch_record(1) | {"loss": math.nan, "drift": math.inf, "phases": {"train": -math.inf}}
    Metrics().nft_epoch_finished(run, wild)
    text = (run.folder / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert (record["loss"], record["drift"], record["phases"]) == (None, None, {"train": None})
    # A version that wrote them left no JSON.
    (run.folder / "metrics.jsonl").write_text('{"event": "epoch", "epoch": 1, "loss": NaN}\n')
    assert list(read_records(run.folder)) == [{"event": "epoch", "epoch": 1, "loss": None}]


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "Free some space"),
        (OSError(errno.EFBIG, "File too large"), "Raise the limit on the size of files"),
        (OSError(errno.EMFILE, "Too many open files"), "Raise the limit on open files"),
        (OSError(errno.EROFS, "Read-only file system"), "Make the file system writable"),
        (OSError(errno.ENOENT, "No such file or directory"), "Put back the folder"),
        (SafetensorError("I/O error: File too large (os error 27)"), "Raise the limit on the size of files"),
        (ValueError("what else"), "Mend that"),
    ],
)
def test_what_helps_is_told_by_the_cause(error, advice):
    assert advise_on_disk(error).startswith(advice)
