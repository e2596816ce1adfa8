"""Evaluations outside a run: protocols, scores in parts, figures, and what is refused beforehand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nft_core.cli.evaluate import show_results
from nft_core.errors import NftError, UsageError
from nft_core.evaluation.api import evaluate
from nft_core.evaluation.entries import Model, list_entries, parse_model
from nft_core.evaluation.figures import (
    Change,
    EntryFigures,
    Figure,
    Measured,
    find_published,
    make_changes,
    make_figures,
    read_tags,
)
from nft_core.evaluation.protocol import check_protocol, find_protocol, read_protocol
from nft_core.evaluation.report import list_rows, list_tag_rows, write_interval, write_markdown
from nft_core.evaluation.request import check_sizes, read_held_out
from nft_core.evaluation.store import Stored, join, read_parts, write_part
from nft_core.host.host import load_host
from nft_core.runs.inputs import make_run_settings
from nft_core.scoring.failures import Tally
from nft_core.scoring.intervals import Difference, Interval
from nft_plugins import Scores

PROMPTS = [{"prompt": f"a red {shape}", "tag": tag} for tag in "ab" for shape in ("circle", "square", "ring")]
SMALL = {"preset": "tiny", "prompts": PROMPTS, "eval_images": 2, "eval_steps": 1, "rollout_batch": 4}
SMALL |= {"processes": 1, "device": "cpu"}

LONG = ("imagereward", "imagereward/strict")


@pytest.fixture(scope="module")
def host():
    return load_host()


def redness(batch):
    """Red minus blue; with a detail."""
    red, _, blue = batch.images.mean((2, 3)).unbind(1)
    return Scores.of(red - blue, red=red)


@pytest.fixture(scope="module")
def finished(host, tmp_path_factory):
    """An evaluation of the embedded base with and without guidance, that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, evaluate([], redness, guidance=[1.0, 2.0], out=folder, host=host, **SMALL)


def files(folder):
    """The bytes of all files of an evaluation, by path, but for the order in which parts were made."""
    parts = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return parts


def figures(values, valid=None, tags=(), groups=(0, 0, 1, 1, 2, 2)):
    values = torch.tensor(values, dtype=torch.float32)
    valid = torch.ones(len(values), dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Measured({"r": (values, valid)}, torch.tensor(groups), tags)


def test_means_are_over_valid_images():
    figure = make_figures(figures([1.0, 3.0, 5.0, 100.0, 0.0, 0.0], [True, True, True, False, False, False]))[
        "r"
    ]
    assert figure.interval.mean == 3.0
    assert (figure.valid, figure.invalid, figure.prompts) == (3, 3, 2)
    assert make_figures(figures([1.0] * 6, [False] * 6))["r"].interval is None


def test_every_tag_counts_alike():
    figure = make_figures(figures([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], tags=["a", "a", "b", "b", "b", "b"]))["r"]
    assert {tag: each.mean for tag, each in figure.by_tag.items()} == {"a": 0.5, "b": 0.5}
    figure = make_figures(figures([1.0, 1.0, 0.0, 0.0, 0.0, 1.0], tags=["a", "a", "b", "b", "", ""]))["r"]
    assert figure.tag_mean.mean == 0.5  # Of (1 + 0) / 2; images without a tag do not count.
    assert figure.interval.mean == 0.5
    lost = make_figures(figures([1.0] * 4 + [0.0] * 2, [True] * 4 + [False] * 2, tags=list("aaaabb")))["r"]
    assert lost.tag_mean is None and lost.by_tag["b"] is None


def test_differences_are_in_pairs_over_images_valid_in_both():
    before = figures([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [True, True, True, True, False, True])
    after = figures([2.0, 9.0, 0.0, 1.0, 9.0, 1.0], [True, False, True, True, True, True])
    difference = make_changes(before, after)["r"].mean
    # Images 0, 2, 3 and 5: +1, -1, 0, 0.
    assert difference.interval.mean == 0.0
    assert (difference.higher, difference.lower, difference.equal) == (1, 1, 1)


def test_geneval_is_known_by_its_details():
    names = ["g", "g/strict", "g/lenient", "g/soft", "other", "other/strict"]
    assert find_published(dict.fromkeys(names)) == {"g": "g/lenient"}


def test_geneval_as_published_is_the_mean_over_tags_of_the_lenient_rule():
    one = torch.ones(4, dtype=torch.bool)
    lenient = torch.tensor([1.0, 1.0, 1.0, 0.0])  # By tag 1 and 0, over images 0.75.
    scores = {"g": (one * 0.3, one), "g/strict": (one * 0.1, one), "g/soft": (one * 0.2, one)}
    measured = Measured(scores | {"g/lenient": (lenient, one)}, torch.arange(4), ["a", "a", "a", "b"])
    rows = list_rows([EntryFigures("model", 4, make_figures(measured))])
    assert [row[2] for row in rows if row[0] == "g as published"] == ["0.5"]


def test_tags_of_prompts():
    assert read_tags([{"tag": "a"}, {"tag": None}, {}, {"tag": 3}]) == ["a", "", "", "3"]
    assert read_tags([{}, {"other": 1}]) == []


def test_numbers_have_the_digits_of_their_error():
    assert write_interval(Interval(0.4861, 0.0553, 0.3731, 0.5982)) == ["0.486", "± 0.055", "0.373 to 0.598"]
    assert write_interval(Interval(21.34, 1.26, 18.9, 23.8)) == ["21.3", "± 1.3", "18.9 to 23.8"]
    assert write_interval(Interval(0.0, 0.0, 0.0, 0.0)) == ["0", "± 0", "0 to 0"]
    assert write_interval(Interval(0.5)) == ["0.5", "", ""]
    assert write_interval(None) == ["none valid", "", ""]


def test_parts_are_read_back_and_joined(host, tmp_path):
    entry = list_entries([Model("hub/id")], [1.0])[0]
    valid = torch.tensor([True, False])
    parts = [
        Stored(
            torch.tensor([n, n]),
            torch.tensor([0, 1]),
            {"r": (torch.tensor([1.0, 0.0]) + n, valid)},
            {"r/d": (torch.tensor([5.0, torch.nan]), valid)} if n else {},
            {"r": Tally(1, n, 0)},
            frozenset({"r"} if n else ()),
        )
        for n in (0, 1)
    ]
    for part in reversed(parts):
        write_part(tmp_path, entry, part, "f")
    whole = join(read_parts(tmp_path, entry, "f"))
    assert whole.prompt.tolist() == [0, 0, 1, 1] and whole.image.tolist() == [0, 1, 0, 1]
    assert whole.rewards["r"][0].tolist() == [1.0, 0.0, 2.0, 1.0]
    assert whole.details["r/d"][1].tolist() == [False, False, True, False]
    assert whole.tallies == {"r": Tally(2, 1, 0)} and whole.skipped == {"r"}
    with pytest.raises(UsageError, match="figures of different protocols are not compared"):
        read_parts(tmp_path, entry, "another")
    first = next(iter(sorted(tmp_path.rglob("part-*"))))
    first.write_bytes(first.read_bytes()[:-4])  # As a full disk leaves it.
    assert len(read_parts(tmp_path, entry, "f")) == 1


def test_figures_of_an_evaluation(finished):
    folder, results = finished
    assert results.complete and [f.name for f in results.figures] == ["tiny, guidance 1", "tiny, guidance 2"]
    base, guided = (f.figures["redness"] for f in results.figures)
    assert base.valid == 12 and base.prompts == 6 and set(base.by_tag) == {"a", "b"}
    change = results["tiny, guidance 2"].changes["redness"].mean
    assert change.interval.mean == pytest.approx(guided.interval.mean - base.interval.mean, abs=1e-6)
    assert change.higher + change.lower + change.equal == 6
    assert not results.figures[0].changes
    written = json.loads((folder / "results.json").read_text())
    base, guided = written["entries"]
    told = guided["figures"]["redness"]["difference"]
    assert told["to"] == "tiny, guidance 1" and "difference" not in base["figures"]["redness"]
    assert (told["prompts_higher"], told["prompts_lower"]) == (change.higher, change.lower)
    assert written == json.loads(json.dumps(results.to_json())) and written["complete"]
    assert (folder / "results.md").read_text() == write_markdown(results)
    assert [row[0] for row in list_rows(results.figures)] == ["redness"] * 2 + ["redness/red"] * 2
    assert len(list_tag_rows(results.figures)) == 4


def test_an_interrupted_evaluation_goes_on(host, finished, tmp_path):
    """The reward fails in every part in turn; in the end all files are those of an evaluation left in peace."""
    folder, whole = finished
    left = [0]

    def redness(batch):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("the network is gone")
        return whole_redness(batch)

    attempts, parts = 0, 0
    while attempts < 10:
        attempts, left[0] = attempts + 1, 2
        said = []
        try:
            results = evaluate(
                [], redness, guidance=[1.0, 2.0], out=tmp_path / "out", host=host, tell=said.append, **SMALL
            )
            break
        except NftError as error:
            assert "the network is gone" in str(error)
            assert "goes on from there" in said[-1]
            now = len(list((tmp_path / "out").rglob("part-*")))
            assert now >= parts
            parts = now
    assert 2 < attempts < 10
    assert results.to_json() == whole.to_json()
    assert files(tmp_path / "out") == files(folder)


whole_redness = redness


def test_a_finished_evaluation_loads_no_model(host, finished, monkeypatch):
    folder, whole = finished
    monkeypatch.setattr("nft_core.evaluation.running.prepare_generation", None)
    again = evaluate([], redness, guidance=[1.0, 2.0], out=folder, host=host, **SMALL)
    assert again.to_json() == whole.to_json()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"eval_images": 3}, "images = 2 then, 3 now"),
        ({"seed": 1}, "seed = 0 then, 1 now"),
        ({"prompts": PROMPTS[:3], "unscorable": "error"}, "prompts_count = 6 then, 3 now"),
        ({"solver": "euler"}, "solver = 'dpm2' then, 'euler' now"),
        ({"guidance": [1.0]}, r"guidance = \[1.0, 2.0\] then, \[1.0\] now"),
        ({"models": [Model("tiny", name="other")]}, "stands where 'tiny, guidance 1' stood"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(next(iter(value))),
)
def test_an_evaluation_does_not_go_on_with_other_settings(host, finished, monkeypatch, changed, said):
    folder, _ = finished
    monkeypatch.setattr("nft_core.evaluation.running.load_rewards", None)  # Nothing heavy comes first.
    before = files(folder)
    given = {"models": [], "guidance": [1.0, 2.0], **SMALL, **changed}
    if given["models"]:
        given["models"] = [replace(given["models"][0], model=host.presets["tiny"].info.settings["model"])]
    with pytest.raises(UsageError, match=said):
        evaluate(rewards=redness, out=folder, host=host, **given)
    assert files(folder) == before


def test_a_folder_of_something_else_is_refused(host, tmp_path):
    (tmp_path / "precious").write_text("")
    with pytest.raises(UsageError, match="holds no evaluation"):
        evaluate([], redness, out=tmp_path, host=host, **SMALL)


def test_models_may_be_added_and_protocols_repeated(host, finished, tmp_path, monkeypatch):
    folder, whole = finished
    monkeypatch.chdir(folder.parent)
    (folder.parent / "evaluations").mkdir()
    (folder.parent / "evaluations" / "earlier").symlink_to(folder)
    for given in (folder, folder / "protocol.toml", "earlier"):
        protocol, prompts = read_protocol(find_protocol(str(given)))
        assert protocol == whole.protocol and [p.text for p in prompts] == [p["prompt"] for p in PROMPTS]
    jpeg = {"rewards": "jpeg_compressibility", "out": tmp_path / "out", "host": host}
    one = evaluate([], **jpeg, **SMALL)
    base = parse_model("tiny", host)
    two = evaluate(
        [base, replace(base, name="again")],
        protocol=tmp_path / "out",
        preset="tiny",
        processes=1,
        device="cpu",
        rollout_batch=4,
        out=tmp_path / "out2",
        host=host,
    )
    assert two.figures[0] == one.figures[0]
    assert two.figures[1].changes["jpeg_compressibility"].mean.equal == 6
    with pytest.raises(UsageError, match="The protocol .* says what eval_images is"):
        evaluate([], protocol=tmp_path / "out", tiny=True, eval_images=3, host=host)
    with pytest.raises(UsageError, match="Unknown protocol 'earler'. Did you mean 'earlier'"):
        find_protocol("earler")


def test_protocols_that_are_none(finished, tmp_path):
    folder, _ = finished
    import tomllib

    values = tomllib.loads((folder / "protocol.toml").read_text())
    check_protocol(values, tmp_path)
    with pytest.raises(UsageError, match="is a protocol of version 2, and nft-hub .* reads version 1"):
        check_protocol(values | {"version": 2}, tmp_path)
    with pytest.raises(UsageError, match="Unknown key of a protocol 'imagse'. Did you mean 'images'"):
        check_protocol(values | {"imagse": 2}, tmp_path)
    with pytest.raises(UsageError, match="key steps = 0"):
        check_protocol(values | {"steps": 0}, tmp_path)
    with pytest.raises(UsageError, match="guidance is empty"):
        check_protocol(values | {"guidance": []}, tmp_path)
    for name in ("protocol.toml", "prompts.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "one more"}\n')
    with pytest.raises(UsageError, match="does not hold the prompts that"):
        read_protocol(tmp_path / "protocol.toml")


def test_a_failure_is_never_a_score(host):
    calls = []

    def shaky(batch):
        calls.append(len(batch))
        if len(calls) == 2:
            raise RuntimeError("no answer")
        return Scores.of(batch.images.mean((1, 2, 3)))

    spec = {"on_error": "mask"}
    from nft_core.host.specs import RewardSpec

    results = evaluate([], RewardSpec(shaky).with_options(spec), host=host, **SMALL)
    figure = results.figures[0].figures["shaky"]
    assert figure.failed == figure.invalid == calls[1] and figure.valid == 12 - calls[1]


def test_models_of_other_sizes_are_not_compared(host, sd3_folder, monkeypatch):
    monkeypatch.setattr("nft_core.evaluation.running.load_rewards", None)
    with pytest.raises(UsageError, match=r"differ in size \(.* x .* of tiny, .*give one for all, such as"):
        evaluate(["tiny", str(sd3_folder)], redness, host=host, max_sequence_length=8, **SMALL)
    check_sizes({"a": (64, 64), "b": (64, 64)})


def test_models_are_written_with_what_is_on_top(host, tmp_path):
    assert parse_model("hub/id", host) == Model("hub/id")
    assert parse_model("hub/id,lora=runs/a,name=my best", host) == Model("hub/id", "runs/a", "my best")
    tiny = parse_model("tiny", host)
    assert tiny.name == "tiny" and tiny.model.endswith("pipeline")
    for wrong in ("", "hub/id,lora=", "hub/id,lora=a,lora=b", "hub/id,lroa=a", ",name=x"):
        with pytest.raises(UsageError, match="A model is written"):
            parse_model(wrong, host)
    run = tmp_path / "mine" / "checkpoints" / "000120"
    run.mkdir(parents=True)
    entries = list_entries([Model(str(run)), Model(str(tmp_path / "mine")), Model("a/b", "c/d")], [1.0, 3.5])
    assert [e.name for e in entries][::2] == [
        "mine at 120, guidance 1",
        "mine, guidance 1",
        "a/b + c/d, guidance 1",
    ]
    with pytest.raises(UsageError, match="'a/b' is given twice"):
        list_entries([Model("a/b"), Model("a/b")], [1.0])


def test_held_out_prompts(host):
    settings = make_run_settings(host, None, {"prompts": "train.txt"})
    with pytest.raises(UsageError, match="There are no held-out prompts"):
        read_held_out(settings)
    assert len(read_held_out(make_run_settings(host, None, {}))) == 96


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"negative_prompt": "ugly"}, "A negative prompt counts under guidance alone"),
        ({"guidance": [2.0, 2.0]}, "names a value twice"),
        ({"prompts": []}, "the list of prompts is empty"),
        ({"lr": 1.0}, "The setting lr is not read by an evaluation"),
        ({"eval_imagse": 1}, "Unknown setting 'eval_imagse'. Did you mean 'eval_images'"),
        ({"resolution": 33}, "the nearest possible size is 32 x 32"),
        ({"solver": "eulr"}, "Did you mean 'euler'"),
        ({"preset": None}, "There is no model to evaluate"),
        ({"preset": "tinny"}, "Unknown preset 'tinny'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(next(iter(value))),
)
def test_bad_input_is_a_sentence(host, monkeypatch, given, said):
    monkeypatch.setattr("nft_core.evaluation.running.load_rewards", None)
    with pytest.raises(UsageError, match=said):
        evaluate([], redness, host=host, **{**SMALL, **given})


def test_tables_of_two_models_fit_into_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    interval = Interval(-0.4861, 0.0553, -0.5731, -0.3982)
    figures = {name: Figure(interval, 12, 4, 6, 4, {"a": interval, "b": interval}) for name in LONG}
    change = {name: Change(Difference(interval, 120, 115, 265)) for name in LONG}
    entries = [EntryFigures("stable-diffusion-3.5-medium, guidance 1", 16, figures)]
    entries.append(EntryFigures("runs/a-run-with-a-long-name, guidance 4.5", 16, figures, change))
    show_results(SimpleNamespace(figures=entries, folder="out"), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for whole in ("-0.573 to -0.398", "12/16, 4 failed", "120 / 115 / 265", "higher / lower /", "± 0.055"):
        assert any(whole in line for line in lines), whole
    # Of each of the two figures, the first has no difference to itself.
    assert sum("120 / 115 / 265" in line for line in lines) == 2
    assert any(line.startswith("Differences from stable-diffusion-3.5-medium, guidance 1,") for line in lines)
    assert not any("Intervals need" in line for line in lines)
    entries = [EntryFigures("tiny", 16, {name: Figure(Interval(0.5), 12, 4, 3) for name in LONG})]
    show_results(SimpleNamespace(figures=entries, folder="out"), as_json=False)
    assert "Intervals need images of at least 5 prompts" in capsys.readouterr().out
