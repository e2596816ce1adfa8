"""A run's report: what stands in it, and what a reader's browser makes of it."""

import json
import math
import re
from time import perf_counter

import pytest
import torch
from browser import COMMAND, Browser
from pages import read_data

from nft_core.errors import NftError
from nft_core.pages.curves import MOST, Curve
from nft_core.pages.gallery import Card, Frame, Gallery, describe_gallery, fit_gallery
from nft_core.pages.page import read_assets
from nft_core.runs.comparison.figures import Summary
from nft_core.runs.comparison.page import Comparison, draw_page
from nft_core.runs.comparison.reading import read_run
from nft_core.runs.observers.evaluations import save_scores
from nft_core.runs.observers.history import History
from nft_core.runs.observers.metrics import Metrics, append_record
from nft_core.runs.observers.report import Report
from nft_core.runs.observers.report_page import draw_changes, make_run_gallery
from nft_core.runs.observers.samples import Samples
from nft_core.runs.observers.weights import describe_weight, read_weights
from nft_plugins import Batch, Part, Run, Scores

from .records import epoch_record, evaluation

BAD = "<script>alert(1)</script>"
PROMPTS = [f"a photo of {n} cats" for n in range(6)] + [BAD, 'красный круг "ОТКРЫТО"']
REWARDS = [{"name": "cat", "weight": 1.0}, {"name": "dog", "weight": -0.5}, {"name": "owl", "weight": 0.0}]


def make_run(folder, epochs=(0, 2, 4), size=16, step=0.25):
    """A run of 8 prompts with 2 pictures each: `cat` rises, `dog` falls, `owl` does what it likes."""
    folder.mkdir(exist_ok=True)
    (folder / "run.toml").write_text(f"[record]\ncommand = {json.dumps('nft run ' + BAD)}\n")
    run = Run(folder, {"model": BAD, "epochs": max(epochs), "lr": 0.5, "rewards": REWARDS}, max(epochs))
    observers = Metrics(), Samples(), Report()
    groups = torch.arange(len(PROMPTS)).repeat_interleave(2)
    place = torch.linspace(0, 1, len(groups))
    for number, epoch in enumerate(epochs):
        made = {
            "cat": place + step * number,
            "dog": place * (1 - step * number),
            "owl": (place * 99 + number).sin(),
        }
        valid = torch.arange(len(groups)) != 5
        parts = {r["name"]: Part(r["weight"], Scores(made[r["name"]], valid)) for r in REWARDS}
        scores = Scores(sum(p.weight * p.scores.values for p in parts.values()), valid, {}, parts)
        images = torch.rand(len(groups), 3, size, size, generator=torch.Generator().manual_seed(epoch))
        metadata = [{"tag": "odd" if g % 2 else "even"} for g in groups.tolist()]
        batch = Batch(images, [PROMPTS[g] for g in groups], metadata, groups)
        save_scores(folder, epoch, scores, groups)
        figures = {**{n: p.scores.values for n, p in parts.items()}, "total": scores.values}
        record = evaluation(epoch, 0.5)
        record["rewards"] = {
            n: {"mean": float(v[valid].mean()), "std": 0.1, "low": float(v[valid].mean()) - 0.1, "high": 2.0}
            for n, v in figures.items()
        }
        observers[0].nft_eval_finished(run, record)
        observers[1].nft_eval_finished(run, record, batch, scores)
        observers[2].nft_eval_finished(run)
        if epoch < max(epochs):
            observers[0].nft_epoch_finished(run, epoch_record(epoch + 1))
    observers[2].nft_run_finished(run, None)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made") / "<b>run")


def test_the_page_holds_everything_and_fetches_nothing(made):
    page = (made / "report.html").read_text()
    assert "<script>alert" not in page and "<b>run" not in page
    assert "&lt;script&gt;alert(1)" in page
    policy = read_assets().policy
    assert page.count(policy) == 1 and "default-src 'none'" in policy and "unsafe" not in policy
    outside = page.replace(read_assets().script, "").replace(read_assets().style, "")
    assert not re.search(r"(src|href)=.https?:|url\(|@import", outside)
    held_out, training = read_data(page, "curves")
    assert [chart["title"] for chart in held_out] == ["cat", "dog", "owl", "total"]
    assert [chart["note"] for chart in held_out[1:3]] == [
        "weight -0.5: lower is better",
        "weight 0: watched, not trained on",
    ]
    assert held_out[0]["base"] == held_out[0]["lines"][0]["pieces"][0][0][1]
    assert len(held_out[0]["lines"][0]["intervals"]) == 3
    assert "loss" in {chart["title"] for chart in training}


def test_a_change_is_told_from_chance(made):
    """By hand: `cat` rises by 0.5 on every image, `dog` falls on all but the first, `owl` has no direction."""
    rows = re.findall('<tr class="first">(.*?)</tr>', draw_changes(read_figures(made)))
    cells = {row[0]: row[1:] for row in (re.findall("<td>(.*?)</td>", row) for row in rows)}
    assert cells["cat"][2:] == ["+0.5", "+0.5 to +0.5", "8 / 0", "▲ better, larger than chance"]
    assert cells["dog (lower is better)"][4:] == ["8 / 0", "▼ better, larger than chance"]
    assert cells["owl (watched)"][5] == "may be chance"


def read_figures(folder):
    """The run as its page is drawn of it."""
    found = read_run(folder, folder.name)
    return type(found)(found.name, folder, {"rewards": REWARDS}, found.record, found.evaluations, found.curves)


def test_pictures_are_those_of_each_evaluation(made):
    (gallery,) = read_data((made / "report.html").read_text(), "gallery")
    assert [step["title"] for step in gallery["steps"]] == ["epoch 2", "epoch 4"]
    assert [step["frames"] for step in gallery["steps"]] == [[0, 1], [0, 2]]
    assert [frame["title"] for frame in gallery["frames"]] == ["base model", "epoch 2", "epoch 4"]
    assert [card["prompt"] for card in gallery["cards"][::2]] == PROMPTS
    assert [card["kind"] for card in gallery["cards"][:3]] == ["even", "even", "odd"]
    assert gallery["lower"] == ["dog"] and gallery["figures"] == ["cat", "dog", "owl", "total"]
    frame = gallery["frames"][2]["figures"]
    assert frame["cat"][0] == 0.5 and frame["cat"][5] is None


def test_a_run_that_was_stopped_has_its_first_pictures(tmp_path):
    page = (make_run(tmp_path / "run", (0,)) / "report.html").read_text()
    (gallery,) = read_data(page, "gallery")
    assert gallery["columns"] == [""] and gallery["steps"] == [{"title": "epoch 0", "frames": [0]}]
    assert all(picture.startswith("data:image/png;base64,") for picture in gallery["frames"][0]["pictures"])


def test_a_run_without_evaluations_has_a_report(run):
    Report().nft_run_finished(run, RuntimeError("<b>"))
    page = (run.folder / "report.html").read_text()
    assert "ended early (RuntimeError)" in page and "There are no pictures yet." in page


def test_the_report_takes_a_hundredth_of_the_time(run):
    report = Report()
    Metrics().nft_epoch_finished(run, epoch_record(1))
    began = perf_counter()
    report.nft_epoch_finished(run)
    took = perf_counter() - began
    path = run.folder / "report.html"
    path.unlink()
    report.nft_epoch_finished(run)
    assert not path.exists()
    assert 0 < report.due - perf_counter() <= 100 * took
    report.due = perf_counter()
    report.nft_epoch_finished(run)
    assert path.exists()


def noise_gallery(cards, steps, size):
    """A gallery of pictures that hold so many bytes, each with a figure that grows over cards and steps."""
    frames = [
        Frame(f"epoch {n}", [bytes([n]) * size] * cards, {"cat": [float(i * n) for i in range(cards)]})
        for n in range(steps)
    ]
    names = [Card(f"prompt {i // 2}", "", i % 2 + 1) for i in range(cards)]
    return Gallery(names, frames, ["", ""], [(f"epoch {n}", [0, n]) for n in range(1, steps)])


@pytest.mark.parametrize(("cards", "steps", "size"), [(400, 30, 9000), (3000, 2, 5000), (10, 200, 8000)])
def test_pages_stay_small(cards, steps, size):
    most = 2**20
    small = fit_gallery(noise_gallery(cards, steps, size), most)
    held = sum(len(p) for frame in describe_gallery(small)["frames"] for p in frame["pictures"])
    assert most / 3 < held <= most
    assert small.steps[-1][0] == f"epoch {steps - 1}" and small.steps[-1][1][0] == 0
    assert any(str(cards) in n or str(steps - 1) in n for n in small.notes)
    values = small.frames[-1].figures["cat"]
    assert max(values) == (cards - 1) * (steps - 1) and min(values) == 0  # The best and the worst are there.


def test_a_small_gallery_is_whole():
    gallery = noise_gallery(10, 3, 100)
    assert fit_gallery(gallery) == gallery


def test_weights_are_read_in_every_form():
    assert read_weights(
        {"rewards": ["cat=0.5", {"name": "a.py:dog", "weight": -1}, {"weight": 3}, 7, "a=b=c=d,,"]}
    ) == {
        "cat": 0.5,
        "dog": -1,
    }
    assert read_weights({"rewards": "cat"}) == read_weights({}) == {}
    assert describe_weight("cat", {"cat": 1.0}) == describe_weight("loss", {}) == ""


def test_a_curve_skips_what_is_unknown_and_keeps_few_points():
    curve = Curve()
    for epoch, value in ((0, 1.0), (5, None), (7, math.nan), (8, "3"), (10, 3.0)):
        curve.add(epoch, value)
    assert curve.pieces == [[(0, 1.0), (10, 3.0)]]
    curve = Curve()
    for epoch in range(100_000):
        curve.add(epoch, {77_777: 9.0, 5: -9.0}.get(epoch, 0.5))
    (points,) = curve.pieces
    assert len(points) <= MOST
    assert {(0, 0.5), (5, -9.0), (77_777, 9.0), (99_999, 0.5)} <= set(points)
    assert points == sorted(points)


def test_a_history_reads_on_where_it_stopped(run):
    append_record(run.folder, evaluation(0, 0.25))
    history = History()
    history.read_on(run.folder)
    assert history.place == (run.folder / "metrics.jsonl").stat().st_size
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write("no record\n" + json.dumps(evaluation(1, 0.5)) + "\n" + '{"event": "ep')
    history.read_on(run.folder)
    assert history.held_out["cat"].pieces == [[(0, 0.25), (1, 0.5)]]


def test_a_curve_is_broken_where_another_evaluation_begins():
    history = History()
    for epoch, prompts in ((0, "1"), (1, "1"), (2, "2"), (3, "2")):
        history.add(evaluation(epoch, 0.5) | {"evaluation": {"prompts": prompts}})
    assert history.held_out["cat"].pieces == [[(0, 0.5), (1, 0.5)], [(2, 0.5), (3, 0.5)]]
    assert history.changes == ["The evaluation changed before epoch 2: prompts."]


needs_browser = pytest.mark.skipif(not COMMAND, reason="reads the page in chromium")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


CARDS = "[...document.querySelectorAll('.cards article')].map((card) => Number(card.dataset.card))"


def choose(browser, name, value):
    browser.run(
        f"(() => {{ const one = document.querySelector('[name={name}]'); one.value = {json.dumps(value)};"
        "one.dispatchEvent(new Event('change')); one.dispatchEvent(new Event('input')); })()"
    )


def check_quiet(browser):
    """The browser has said nothing, and asked for nothing but the page."""
    assert browser.errors == []
    assert [a for a in browser.fetched if not a.startswith("data:")][1:] == []


@needs_browser
def test_a_reader_looks_at_the_report(made, browser):
    browser.open(made / "report.html")
    assert browser.run("document.title") == "<b>run"
    assert browser.run(CARDS) == list(range(16))
    assert browser.run("document.querySelectorAll('.charts canvas').length") > 8
    shown = browser.run("[...document.querySelectorAll('.cards .prompt')].map((one) => one.textContent)")
    assert shown == [prompt for prompt in PROMPTS for _ in range(2)]
    # Sorting. Of `dog` lower is better, and card 5 has no valid scores.
    choose(browser, "figure", "cat")
    choose(browser, "order", "best")
    assert browser.run(CARDS) == [*range(15, 5, -1), *range(4, -1, -1), 5]
    choose(browser, "figure", "dog")
    assert browser.run(CARDS) == [*range(5), *range(6, 16), 5]
    choose(browser, "order", "risen")
    assert browser.run(CARDS)[:3] == [15, 14, 13]
    choose(browser, "order", "file")
    choose(browser, "kind", "odd")
    assert browser.run(CARDS) == [2, 3, 6, 7, 10, 11, 14, 15]
    choose(browser, "kind", "")
    choose(browser, "words", "ОТКРЫТО")
    assert browser.run(CARDS) == [14, 15]
    assert browser.run("document.querySelector('.count').textContent") == "2 of 16 pictures"
    choose(browser, "words", "")
    check_quiet(browser)


@needs_browser
def test_the_slider_and_the_viewer_work_with_the_keyboard(made, browser):
    browser.open(made / "report.html")
    picture = "document.querySelectorAll('.cards article')[0].querySelectorAll('img')[1].src"
    change = "document.querySelector('.cards .scores td:last-child').textContent"
    last = browser.run(picture)
    assert browser.run(change) == "▲ +0.5"
    browser.run("document.querySelector('[name=step]').focus()")
    browser.press("ArrowLeft")
    assert browser.run("document.querySelector('output').textContent") == "epoch 2"
    assert browser.run(picture) != last and browser.run(change) == "▲ +0.25"
    browser.press("ArrowRight")
    assert browser.run(picture) == last
    browser.run("document.querySelector('.cards .pictures').focus()")
    browser.press("Enter")
    assert browser.run("document.querySelector('dialog').open")
    assert browser.run("document.querySelectorAll('.strip img').length") == 3
    assert browser.run("document.querySelectorAll('.large img').length") == 2
    for key, prompt in (("ArrowRight", PROMPTS[0]), ("ArrowRight", PROMPTS[1]), ("ArrowLeft", PROMPTS[0])):
        browser.press(key)
        assert browser.run("document.querySelector('.viewer .prompt').textContent") == prompt
    browser.press("Escape")
    assert not browser.run("document.querySelector('dialog').open")
    check_quiet(browser)


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1200, True), (480, False), (320, True)])
def test_the_page_fits_its_window(made, browser, width, dark):
    browser.open(made / "report.html", width=width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    over = (
        "[...document.querySelectorAll('.cards td, .cards th, .cards img, canvas')].filter((one) =>"
        "one.getBoundingClientRect().right > one.closest('article, figure').getBoundingClientRect().right + 1)"
        ".length"
    )
    assert browser.run(over) == 0
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)")
    check_quiet(browser)


@needs_browser
def test_runs_stand_beside_one_another(made, tmp_path, browser):
    other = read_figures(make_run(tmp_path / "other", (0, 4), step=0.5))
    runs = [read_figures(made), other]
    gallery = make_run_gallery(runs)
    assert gallery.steps == [("epoch 0", [0, 0, 3]), ("epoch 2", [0, 1, 3]), ("epoch 4", [0, 2, 4])]
    page = tmp_path / "page.html"
    summaries: dict[str, dict[str, Summary]] = {run.name: {} for run in runs}
    page.write_text(draw_page(Comparison(runs, {"lr": [0.5, BAD]}, summaries, {}, [BAD])))
    browser.open(page)
    titles = (
        "[...document.querySelectorAll('.cards article:first-child figcaption')].map((one) => one.textContent)"
    )
    assert browser.run(titles) == ["<b>run, base model", "<b>run, epoch 4", "other, epoch 4"]
    assert browser.run("document.querySelectorAll('.legend span').length") >= 2
    check_quiet(browser)


@needs_browser
def test_the_browser_would_say_and_stop_what_is_wrong(tmp_path, browser):
    """What the tests above look for is seen: a script that was not ours, an error, an image from elsewhere."""
    page = f'<meta http-equiv="Content-Security-Policy" content="{read_assets().policy}">'
    (tmp_path / "page.html").write_text(
        page + "<script>window.bad = 1</script><img src='http://127.0.0.1:9/x.png'>"
    )
    browser.open(tmp_path / "page.html")
    assert browser.run("window.bad") is None
    assert len(browser.errors) == 2
    (tmp_path / "other.html").write_text(
        "<script>throw Error('no')</script><img src='http://127.0.0.1:9/x.png'>"
    )
    browser.open(tmp_path / "other.html")
    assert browser.errors and "http://127.0.0.1:9/x.png" in browser.fetched


def test_a_page_that_cannot_be_written_is_said(run):
    (run.folder / "metrics.jsonl").mkdir()
    with pytest.raises(NftError, match="Cannot read"):
        Report().nft_eval_finished(run)
