"""What a run leaves behind and what a person sees of it, from hooks called as the loop calls them."""

import errno
import io
import json
import math
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console as Terminal
from safetensors import SafetensorError

from nft_core.errors import NftError, advise_on_disk, say_uncreatable
from nft_core.output import keep_output_alive, wrap_words
from nft_core.runs.observers import live
from nft_core.runs.observers.console import Console, compare_evaluations, format_seconds
from nft_core.runs.observers.evaluations import save_scores
from nft_core.runs.observers.live import LiveView
from nft_core.runs.observers.metrics import Metrics, read_records
from nft_core.runs.observers.report import Report
from nft_plugins import Part, Run, Scores

from .records import epoch_record, evaluation


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


def test_an_evaluation_shows_its_means_as_they_come(run, capsys):
    console = Console()
    console.terminal = Terminal(force_terminal=True, width=100)
    console.nft_run_started(run)
    console.nft_eval_progress(run, 1, {"cat": 0.125, "dog": None})
    assert console.bars.write_figures(100) == [
        "cat  evaluated 0.125 over 1 image so far",
        "dog  evaluated - over 1 image so far",
    ]
    console.nft_eval_finished(run, evaluation(0, 0.25))
    assert console.bars.write_figures(100) == ["cat  evaluated 0.25", "dog  evaluated 0.25"]
    console.nft_eval_progress(run, 2, {"cat": 0.5})
    assert console.bars.write_figures(100)[0] == "cat  evaluated 0.25, now 0.5 over 2 images so far"
    console.nft_run_finished(run, None)


def test_an_evaluation_without_a_terminal_tells_its_means_now_and_then(run, capsys, monkeypatch):
    monkeypatch.setattr("nft_core.runs.observers.console.QUIET", 0.0)
    console = Console()
    console.nft_run_started(run)
    capsys.readouterr()
    console.nft_progress(run, "eval", 2, 8)
    console.nft_eval_progress(run, 2, {"cat": 0.125, "dog": None})
    console.nft_progress(run, "eval", 4, 8)
    console.nft_eval_finished(run, evaluation(0, 0.25))
    console.nft_progress(run, "eval", 2, 8)
    first, second, _, of_next = capsys.readouterr().out.splitlines()
    assert first == of_next == "eval: 2/8 images"
    assert second == "eval: 4/8 images  (so far cat 0.125  dog -, over 2 images)"


def test_a_terminal_shows_as_many_epochs_as_its_width_takes(monkeypatch):
    view = LiveView(Terminal(force_terminal=True, width=40), 0, 20)
    for epoch in range(1, 10):
        view.show_epoch(epoch_record(epoch) | {"rewards": {"cat": {"mean": epoch / 8}}}, "", "")
    assert view.write_figures(40) == ["cat  evaluated -, rollouts 0.875 1 1.125"]
    assert view.write_figures(20) == ["cat  evaluated -"]
    formatted = []
    monkeypatch.setattr(live, "format_figure", lambda mean: formatted.append(mean) or "1")
    view.rollouts["cat"] = [1.0] * 2000
    assert view.write_figures(40) == ["cat  evaluated -, rollouts 1 1 1 1 1 1 1"] and len(formatted) < 100


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
    """After a change of prompts that is the first of the new ones; after one of rewards it goes by reward."""
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
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if "│" in line}
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
    assert cells["dog"].endswith(" ?") and low < -0.2 < 0.2 < high
    assert table.caption == "?: 0 is in the interval, so the change may be chance."
    # Of a run of an older version nothing is known of single images.
    (run.folder / "evaluations" / "000000.safetensors").unlink()
    table = compare_evaluations(evaluation(0, 0.25), evaluation(1, 0.75), run.folder)
    assert set(table.columns[4].cells) == {""}


def test_numbers_stay_whole_in_a_terminal_of_80_columns(run):
    groups, name = torch.arange(24), "jpeg_incompressibility/compression"
    for epoch, scale in ((0, 1.0), (1, -1.0)):
        part = Part(1.0, Scores.of(scale * torch.linspace(-1, 1, 24) * 1.234e-3))
        save_scores(run.folder, epoch, Scores(part.scores.values, part.scores.valid, {}, {name: part}), groups)
    records = [evaluation(e, 0.25) for e in (0, 1)]
    for record in records:
        record["rewards"] = {name: record["rewards"]["cat"], "total": record["rewards"]["total"]}
    terminal = Terminal(width=80, file=io.StringIO())
    terminal.print(compare_evaluations(*records, run.folder))
    lines = terminal.file.getvalue().splitlines()
    assert max(map(len, lines)) == 80
    (row,) = (line for line in lines if " to " in line)
    assert re.search(r"[-+][-.e\d]+ to [-+][-.e\d]+ \?", row)
    names = [line.partition("│")[0].strip() for line in lines if "│" in line]
    assert names == ["jpeg_incompressibility/", "compression"], "\n".join(lines)


def test_commands_and_quoted_texts_are_not_broken():
    text = 'Now run `pip install x`. It says "two words" in /a/path/that/is/wider/than/all.'
    broken = ["Now run", "`pip install x`. It", 'says "two words" in', "/a/path/that/is/wider/than/all."]
    assert wrap_words(text, 20).split("\n") == broken
    assert wrap_words("  0.1 s  loading", 80) == "  0.1 s  loading"
    # A long one has to be, at its own spaces.
    assert wrap_words('a "sign with many words"', 12).split("\n") == ['a "sign with', 'many words"']


def test_lines_are_broken_at_words_and_paths_are_not(run, capsys):
    console = Console()
    console.terminal.width, console.terminal._force_terminal = 40, True
    long = Run(run.folder / "a folder whose name is long" / "x", run.settings, epochs=2)
    long.folder.mkdir(parents=True)
    console.nft_run_started(long)
    console.nft_eval_finished(long, evaluation(0, 0.25) | {"warnings": {"x": "Two words " * 8}})
    console.nft_run_finished(long, None)
    lines = capsys.readouterr().out.splitlines()
    assert f"Writing to {long.folder}" in lines and f"Figures:  {long.folder / 'metrics.jsonl'}" in lines
    warning = lines[next(i for i, line in enumerate(lines) if "Warning" in line) :][:3]
    assert warning[0].endswith("Two words") and warning[1] == "Two words Two words Two words Two words"


def test_means_over_other_images_have_no_change():
    base, latest = evaluation(0, 0.25) | {"which": {"dog": "1"}}, evaluation(1, 0.75) | {"which": {"dog": "2"}}
    table = compare_evaluations(base, latest)
    changes = dict(zip(*(table.columns[i].cells for i in (0, 3)), strict=True))
    assert changes == {"cat": "+0.5", "dog": "", "total": "+0.5"}
    assert table.caption == "dog: other images could be scored than before, so no change is given."


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


def test_a_folder_that_cannot_be_made_is_not_said_to_be_deleted():
    gone = str(say_uncreatable(Path("a/b"), OSError(errno.ENOENT, "No such file or directory")))
    assert gone == "The folder a/b cannot be made: No such file or directory. Choose another --out."
    full = str(say_uncreatable(Path("a/b"), OSError(errno.ENOSPC, "No space left on device")))
    assert full.endswith("cannot be made: the disk is full. Free some space, or choose another --out.")


def test_a_full_disk_costs_the_report_and_not_the_run(run, capsys, monkeypatch):
    """It is told once in plain words, and the page is not named before there is one."""
    report, write = Report(), Path.write_text
    console = Console(report)

    def refuse(path, *given, **options):
        if path.name == ".report.html":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *given, **options)

    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", refuse)
        for _ in range(2):
            report.write(run, "running")
    told = capsys.readouterr().err
    assert told.count("Warning") == 1
    assert "report.html was not written: the disk is full. Free some space." in told
    console.latest = {"event": "eval"}
    console.nft_run_finished(run, ValueError())
    assert "Report:" not in capsys.readouterr().out
    report.write(run, "running")
    console.nft_run_finished(run, ValueError())
    assert f"Report:   {run.folder / 'report.html'}" in capsys.readouterr().out
    # The page of an earlier epoch stays, and is not this run's report.
    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", refuse)
        report.write(run, "finished")
    console.nft_run_finished(run, None)
    assert (run.folder / "report.html").exists()
    assert "Report:" not in capsys.readouterr().out


def test_a_run_that_goes_on_compares_with_where_it_began(run, capsys):
    """The table of the second process is that of a single one."""
    Metrics().nft_eval_finished(run, evaluation(0, 0.25))
    again = Run(run.folder, run.settings, epochs=2, epoch=1)
    console = Console()
    console.nft_run_started(again)
    console.nft_eval_finished(again, evaluation(2, 0.75))
    console.nft_run_finished(again, None)
    assert "0.25" in capsys.readouterr().out
