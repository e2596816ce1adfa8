"""What the documentation shows of Python: README, the page and the notebook, run as they stand there."""

import inspect
import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest

import nft_core

ROOT = Path(__file__).parents[2]
NOTEBOOK = json.loads((ROOT / "examples/train_from_python.ipynb").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")
#: Of a run that only shows that all works.
SMALL = {
    **{"prompts_per_epoch": 2, "group_size": 2, "steps": 2, "eval_steps": 2, "train_times_count": 1},
    **{"prompts": ["a red circle", "a blue square"], "eval_prompts": ["a red square"]},
}


def cells(kind):
    return ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == kind]


def test_the_notebook(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code = [re.sub(r"EPOCHS = \d+", "EPOCHS = 1", cell) for cell in cells("code")]
    code = [re.sub(r"GROUP = \d+", "GROUP = 2", cell) for cell in code]
    space = {"__name__": "__main__"}
    for number, cell in enumerate(code):
        exec(compile(cell, f"cell {number}", "exec"), space)
    said = capsys.readouterr().out
    assert len(space["run"].epochs) == 2 and "epoch 1: " in said
    assert space["scores"].parts["warmth"].scores.values.tolist() == [1.0, 0.0, -1.0]


def test_the_notebook_is_stripped_and_has_words():
    assert NOTEBOOK["nbformat"] == 4 and len(cells("markdown")) >= len(cells("code"))
    for cell in NOTEBOOK["cells"]:
        assert set(cell) <= {"cell_type", "id", "metadata", "source", "outputs", "execution_count"}
        assert not cell.get("outputs") and cell.get("execution_count") is None


@pytest.mark.parametrize("page", ["README.md", "docs/getting-started.md"])
def test_snippets_work_as_pasted(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
    (code,) = [block for block in blocks if "nft_core.train" in block]
    train = partial(nft_core.train, **SMALL, out="run")
    monkeypatch.setattr(
        nft_core, "train", lambda *given, **more: train(*given, **more | {"epochs": 1}), raising=False
    )
    exec(compile(code, page, "exec"), {"__name__": "__main__"})
    assert "TrainedRun(" in capsys.readouterr().out


def test_the_page_s_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    for name, text in re.findall(r'^```python title="([^"]+)"\n(.*?)^```', PAGE, flags=re.M | re.S):
        (tmp_path / name).write_text(text)
        if name != "my_rewards.py":
            exec(compile(text, name, "exec"), {"__name__": "__main__"})
    lines = (tmp_path / "runs/warm/metrics.jsonl").read_text().splitlines()
    assert sum(json.loads(line)["event"] == "epoch" for line in lines) == 2
    assert "Figures may differ" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "resume"])
def test_the_page_has_every_argument(name):
    section = PAGE.split("## Train\n")[1] if name == "train" else PAGE.split("## Stop and go on\n")[1]
    section = section.split("\n## ")[0]
    arguments = [p for p in inspect.signature(getattr(nft_core, name)).parameters if p != "settings"]
    assert [a for a in arguments if f"\n| `{a}` |" not in section] == []
