import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nft_core.errors import UsageError
from nft_core.prompts import Prompt, draw_prompts_of_epoch, keep_scorable, list_prompts_of_run, read_prompts
from nft_core.runs.inputs import DATA, Inputs, drop_unscorable


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_text_and_jsonl(tmp_path):
    path = write(tmp_path, "p.txt", "a cat\n\n  a dog  \n")
    assert read_prompts(path) == [Prompt("a cat", {}, f"{path}:1"), Prompt("a dog", {}, f"{path}:3")]
    path = write(tmp_path, "p.jsonl", json.dumps({"prompt": "a cat", "tag": "x"}) + "\n")
    assert read_prompts(path) == [Prompt("a cat", {"tag": "x"}, f"{path}:1")]


def test_a_prompt_that_stands_twice_comes_twice_as_often(tmp_path):
    path = write(tmp_path, "p.txt", "a\nb\na\n")
    assert [p.text for p in read_prompts(path)] == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"\n', r"p.jsonl:2: not a line of JSON"),
        ("p.jsonl", "[1]\n", r"p.jsonl, item 1: expected an object"),
        ("p.json", '["a",\n1\n]', r"p.json, item 2: expected an object"),
        ("p.json", '["a",\n', r"p.json: not a list in JSON: .*line 2 column 1"),
        ("p.json", '{\n"prompts": ["a"]\n}', r"p.json:1: expected an object.*another field"),
        ("p.jsonl", '{"prompt": null}', r"p.jsonl:1: expected an object"),
        (
            "p.jsonl",
            '{"prompt": "a", "x": ' + "[" * 900 + "]" * 900 + "}",
            r"p.jsonl:1: it is nested too deeply",
        ),
        # What is neither text nor JSON is no prompt line by line.
        ("p.csv", "prompt,tag\na cat,x\n", r"p.csv is of a kind that is not read.*pandas.*read_csv\(FILE\)"),
        ("p.TSV", "Prompt\tTag\na cat\tx\n", r"p.TSV is of a kind that is not read.*sep="),
        ("p.parquet", "PAR1", r"p.parquet is of a kind that is not read.*read_parquet"),
        ("p.yaml", "- a cat\n", r"p.yaml is of a kind that is not read: expected .txt, one prompt a line"),
        (
            "p.txt",
            '{"prompt": "a"}\n{"prompt": "b"}\n',
            r"p.txt holds JSON: give it a name that ends in .jsonl",
        ),
        ("p", '\ufeff\n[\n"a",\n"b"\n]', r"p holds JSON"),
        ("p.txt", 'a cat\n{"prompt": "b"},\n', r"p.txt:2: expected a prompt, got an object: .*\.jsonl"),
        ("p.txt", "{'prompt': 'a'}\n", r"p.txt:1: expected a prompt, got an object"),
        ("p.txt", "Prompt\tTag\na cat\tx\n", r"p.txt is of a kind that is not read.*sep="),
        (
            "p.txt",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "p.txt is a pointer of Git LFS",
        ),
        ("p.jsonl", "\n<!DOCTYPE html>\n", "p.jsonl is a web page"),
        ("p.txt", "a\0 \0c\0a\0t\0", r"p.txt: it holds null bytes; expected text in UTF-8"),
        ("p.jsonl", '{"text": "a"}\n', r"p.jsonl:1: expected an object"),
        ("p.jsonl", '{"prompt": " "}\n', r"p.jsonl:1: the prompt is empty"),
        ("p.jsonl", "[" * 100_000, r"p.jsonl: not a list in JSON"),
        ("p.jsonl", '{"prompt": ' + "[" * 100_000, r"p.jsonl:1: not a line of JSON"),
    ],
)
def test_bad_files(tmp_path, name, text, message):
    with pytest.raises(UsageError, match=message):
        read_prompts(write(tmp_path, name, text))


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UsageError, match="Cannot read the prompt file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="Cannot read the prompt file .*expected text in UTF-8"):
        read_prompts(tmp_path / "b.txt")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.JSONL", '\ufeff{"prompt": "a cat"}\r\n\r\n{"prompt": "{a} dog"}\r\n'),
        ("p.ndjson", '{"prompt": "a cat"}\n"{a} dog"'),
        ("p.json", '["a cat",\n "{a} dog"]'),
        ("p.json", '[{"prompt": "a cat"}, {"prompt": "{a} dog", "tag": null}]'),
        ("p.jsonl", '["a cat", "{a} dog"]'),
        ("p.TXT", "a cat\n{a} dog"),
        ("p", "a cat\n{a} dog"),
    ],
)
def test_other_names_and_shapes(tmp_path, name, text):
    prompts = read_prompts(write(tmp_path, name, text))
    assert [(p.text, p.metadata) for p in prompts] == [("a cat", {}), ("{a} dog", {})]


def test_null_is_absent_and_text_in_json_is_what_it_says(tmp_path):
    """The datasets library and tables write GenEval's metadata so; a sign may read [1]."""
    clause = {"class": "cat", "count": 1}
    inner = json.dumps({"prompt": "a cat", "include": [{**clause, "color": None}]})
    lines = [
        {"prompt": "a cat", "include": [{**clause, "color": None}], "exclude": None},
        {"prompt": "a cat", "include": json.dumps([clause])},
        {"geneval_metadata": inner},
        {"prompt": "a cat", "metadata": {"include": [clause], "prompt": "another"}},
        {"prompt": "a cat", "metadata": str({"include": [{**clause, "color": None}], "exclude": None})},
    ]
    found = read_prompts(write(tmp_path, "p.jsonl", "\n".join(map(json.dumps, lines))))
    assert [p.text for p in found] == ["a cat"] * 5
    assert [p.metadata["include"] for p in found] == [[clause]] * 5
    assert all("exclude" not in p.metadata for p in found)
    signs = {"prompt": "a", "text": "[1]", "more": "{a}", "words": '["A", "B"]'}
    (found,) = read_prompts(write(tmp_path, "p.jsonl", json.dumps(signs)))
    assert found.metadata == {"text": "[1]", "more": "{a}", "words": ["A", "B"]}


def check(prompts):
    return ["" if "text" in metadata else "no text" for _, metadata in prompts]


def test_scorable():
    good, bad = Prompt("a", {"text": "A"}, "f:1"), Prompt("b", {}, "/data/f:2")
    assert keep_scorable([good, bad], check, "drop") == [good]
    with pytest.raises(UsageError, match="f:2: no text.*unscorable=drop"):
        keep_scorable([good, bad], check, "error")
    with pytest.raises(UsageError, match="Of 1 prompts none can be scored.*f:2: no text"):
        keep_scorable([bad], check, "drop")
    told = []
    drop_unscorable(Inputs([], None, [good, bad], [good], None, None), check, "drop", told.append)
    assert (
        told[0]
        == "2 of 3 prompts are used, those that every reward can score. One that is left out: f:2: no text"
    )


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 3))
def test_an_epoch_has_distinct_prompts_and_a_pass_repeats_none(count, per_epoch, seed):
    per_epoch = min(count, per_epoch)
    epochs = range(1, count // per_epoch + 1)
    one_pass = [draw_prompts_of_epoch(count, per_epoch, seed, e) for e in epochs]
    flat = [i for epoch in one_pass for i in epoch]
    assert all(len(epoch) == per_epoch for epoch in one_pass)
    assert len(set(flat)) == len(flat)
    assert set(flat) <= set(range(count))


@pytest.mark.parametrize(("count", "epochs"), [(10, 2), (10, 3), (7, 2), (3, 9)])
def test_the_prompts_of_a_run_are_those_of_its_epochs(count, epochs):
    drawn = {i for e in range(1, epochs + 1) for i in draw_prompts_of_epoch(count, 3, 0, e)}
    assert drawn <= set(list_prompts_of_run(count, 3, 0, epochs))
    if epochs * 3 < count:
        assert set(list_prompts_of_run(count, 3, 0, epochs)) == drawn


def test_built_in_prompts_share_none():
    train, held_out = (read_prompts(DATA / f"prompts-{kind}.txt") for kind in ("train", "eval"))
    assert len(train) >= 500
    assert not {p.text for p in train} & {p.text for p in held_out}
