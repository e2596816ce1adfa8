"""`nft rewards info` and `check`, and the check that a plug-in's own tests can use."""

import json
from io import BytesIO

import pytest
from click.testing import CliRunner
from PIL import Image

from nft_core.cli.app import main
from nft_core.cli.rewards import list_options, write_type
from nft_core.host.host import load_host
from nft_plugins import RewardInfo, Scores
from nft_plugins.rules import list_environments, name_environment


def nft(*arguments):
    return CliRunner().invoke(main, ["rewards", *map(str, arguments)])


def brightness(batch):
    return Scores.of(batch.images.mean((1, 2, 3)))


def test_the_list_stays():
    table = nft()
    assert table.exit_code == 0
    listed = json.loads(nft("--json").stdout)
    assert {"ocr", "pickscore", "jpeg_compressibility"} <= {row["name"] for row in listed}
    assert all({"ready", "install", "needs", "plugin"} <= set(row) for row in listed)
    assert all(row["name"] in table.stdout for row in listed)


@pytest.mark.parametrize(
    "name", sorted(n for n, c in load_host().rewards.items() if c.distribution == "nft-hub")
)
def test_info_shows_the_whole_card(name):
    card = load_host().rewards[name].info
    result = nft("info", name)
    assert result.exit_code == 0, result.stderr
    found = json.loads(nft("info", name, "--json").stdout)
    for field in RewardInfo.__dataclass_fields__:
        if field == "environment":
            continue
        value = getattr(card, field)
        assert found[field] == (list(value) if isinstance(value, tuple) else value)
        for part in value if isinstance(value, tuple) else [value]:
            assert (("yes" if part else "no") if isinstance(part, bool) else part) in result.stdout
    names = [name_environment(card, each) for each in list_environments(card)]
    assert [each["name"] for each in found["environment"]] == names
    assert all(f"{name} (for " in result.stdout for name in names)
    assert found["distribution"] == "nft-hub"
    assert found["plugin"].endswith("(nft_rewards)")


def test_info_tells_options_from_the_signature():
    found = json.loads(nft("info", "ocr", "--json").stdout)
    rows = {row["name"]: row for row in found["options"]}
    assert rows["variant"] == {"name": "variant", "type": "nft | strict", "required": False, "default": "nft"}
    assert (rows["normalise"]["type"], rows["normalise"]["default"]) == ("bool", True)
    assert "upscale: factor by which images are enlarged" in found["doc"]
    lines = [line.split() for line in nft("info", "ocr").stdout.splitlines()]
    assert ["normalise", "bool", "true"] in lines
    assert "device" not in {
        row["name"] for row in json.loads(nft("info", "pickscore", "--json").stdout)["options"]
    }

    def factory(detector, *more, size: int | None = None, device="cpu", **others):
        pass

    assert [(o["name"], o["type"], o["required"]) for o in list_options(factory)] == [
        ("detector", "any", True),
        ("size", "int | none", False),
    ]
    assert write_type(list[str]) == "list[str]"


def test_info_of_a_reward_that_is_not_ready(monkeypatch):
    monkeypatch.setattr("nft_core.host.cards.is_installed", lambda module: module != "rapidfuzz")
    found = json.loads(nft("info", "ocr", "--json").stdout)
    assert (found["ready"], found["install"]) == (False, 'pip install "nft-hub[ocr]"')
    assert 'no: pip install "nft-hub[ocr]"' in nft("info", "ocr").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "pikscore"], 2, "Did you mean 'pickscore'"),
        (["check", "pikscore"], 2, "Did you mean 'pickscore'"),
        (["check", "ocr", "upscle=2"], 2, "Did you mean 'upscale'"),
        (["check", "ocr", "upscale"], 2, "'upscale' is no option"),
        (["check", "geneval", "checkpoint=no/such-model"], 1, "Looked for a Mask2Former"),
        (["check", "ocr", "--expect", "none.jsonl"], 2, "Cannot read the prompt file none.jsonl"),
        (["--json", "info", "ocr"], 2, "--json goes last"),
        (["ocr"], 2, "No such command 'ocr'"),
        (["check", "rank", "of=jpeg_compressibility", "make_reward=x"], 2, "make_reward"),
    ],
)
def test_bad_input(arguments, code, message):
    result = nft(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["jpeg_compressibility"],
        ["jpeg_incompressibility", "variant=ddpo"],
        ["ocr", "upscale=2"],
        ["geneval", "--tiny"],
        ["pickscore", "--tiny"],
        ["clipscore", "--tiny"],
    ],
)
def test_the_built_in_rewards_keep_the_contract(arguments):
    result = nft("check", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("ok: ") == 5
    # Some images ask for a class that the embedded world's detector does not know.
    scored = "10 images" if arguments[0] == "geneval" else "13 images"
    assert f"{scored} of 5 sizes (1 x 1, 33 x 31, 64 x 64, 80 x 48, 257 x 9) are scored" in result.stdout
    assert "not checked: known values. None are shipped" in result.stdout
    if arguments[0] == "ocr":
        found = {
            line.rsplit("  ")[0].strip(): line.split()[-1] for line in result.stdout.splitlines() if '"' in line
        }
        assert [name for name, value in found.items() if value == "1"] == [
            'words, "STOP"',
            'wide words, "OPEN 24"',
        ]


def test_known_values(tmp_path):
    for name, level in (("a", 51), ("b", 102)):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{name}.png")
    file = tmp_path / "known.jsonl"

    def check(*values):
        lines = [{"image": f"{n}.png", "prompt": n, "value": v} for n, v in zip("ab", values, strict=True)]
        file.write_text("\n".join(map(json.dumps, lines)))
        return nft("check", "jpeg_compressibility", "variant=ddpo", "--expect", file)

    buffer = BytesIO()
    Image.new("RGB", (8, 8), (51,) * 3).save(buffer, "JPEG", quality=95)
    right = -len(buffer.getvalue()) / 1000
    result = check(right, right)
    assert result.exit_code == 0, result.output
    assert "ok: 2 known values agree" in result.stdout
    result = check(right, right + 0.01)
    assert result.exit_code == 1
    assert f"1 of 2 known values differ: {tmp_path / 'b.png'}: expected {right + 0.01:.6g}" in result.stderr
    assert "expected invalid" in check(None, right).stderr
    file.write_text('{"image": "a.png", "prompt": "a"}')
    assert 'expected "value"' in nft("check", "jpeg_compressibility", "--expect", file).stderr
