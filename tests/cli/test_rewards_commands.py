"""`nft rewards info` and `check`, and the check that a plug-in's own tests can use."""

import json
import re
from io import BytesIO

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from nft_core.cli import main
from nft_core.host import load_host
from nft_core.reward_commands import options, type_text
from nft_plugins import Batch, PromptError, RewardInfo, Scores
from nft_plugins.testing import builtin_batches, check_reward


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
        value = getattr(card, field)
        assert found[field] == (list(value) if isinstance(value, tuple) else value)
        for part in value if isinstance(value, tuple) else [value]:
            assert part in result.stdout
    assert found["distribution"] == "nft-hub"
    assert found["plugin"].endswith("(nft_rewards)")


def test_info_tells_options_from_the_signature():
    found = json.loads(nft("info", "ocr", "--json").stdout)
    rows = {row["name"]: row for row in found["options"]}
    assert rows["variant"] == {"name": "variant", "type": "nft | strict", "required": False, "default": "nft"}
    assert (rows["normalise"]["type"], rows["normalise"]["default"]) == ("bool", True)
    assert "upscale: enlarge images" in found["doc"]
    lines = [line.split() for line in nft("info", "ocr").stdout.splitlines()]
    assert ["normalise", "bool", "true"] in lines
    assert "device" not in {
        row["name"] for row in json.loads(nft("info", "pickscore", "--json").stdout)["options"]
    }

    def factory(detector, *more, size: int | None = None, device="cpu", **others):
        pass

    assert [(o["name"], o["type"], o["required"]) for o in options(factory)] == [
        ("detector", "any", True),
        ("size", "int | none", False),
    ]
    assert type_text(list[str]) == "list[str]"


def test_info_of_a_reward_that_is_not_ready(monkeypatch):
    monkeypatch.setattr("nft_core.host.installed", lambda module: module != "rapidfuzz")
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
    # Every other image asks for a class that the embedded world's detector does not know.
    scored = "8 images" if arguments[0] == "geneval" else "11 images"
    assert f"{scored} of 3 sizes (1 x 1, 64 x 64, 80 x 48) are scored" in result.stdout
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


class Picky:
    def check_prompt(self, prompt, metadata):
        if "wide" in prompt:
            raise PromptError("no wide ones")

    def __call__(self, batch):
        for prompt, metadata in zip(batch.prompts, batch.metadata, strict=True):
            self.check_prompt(prompt, metadata)
        return brightness(batch)


def grouped():
    images = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return [Batch(images, list("abab"), [{}] * 4, torch.tensor([0, 1, 0, 1]))]


def test_correct_rewards_pass():
    assert len(check_reward(brightness).scored) == 4
    assert check_reward(Relative()).holds
    assert len(check_reward(Relative(), grouped()).scored) == 1
    checked = check_reward(Picky())
    assert "9 images of 2 sizes" in checked.holds[0]
    assert "refuses the prompts of 2 others" in checked.holds[0]


class Counting:
    calls = 0

    def __call__(self, batch):
        self.calls += 1
        return Scores.of(batch.images.mean((1, 2, 3)) + self.calls)


class RefusesAll:
    def check_prompt(self, prompt, metadata):
        raise PromptError("never")


class Breaks(RefusesAll):
    def check_prompt(self, prompt, metadata):
        metadata["absent"]


def normalised(batch):
    values = batch.images.mean((1, 2, 3))
    return Scores.of(values - values.mean())


class Relative:
    """A score relative to the group, and so in need of `regroup`."""

    def __call__(self, batch):
        values = batch.images.mean((1, 2, 3))
        return self.regroup(Scores.of(values, value=values), batch.groups)

    def regroup(self, scores, groups):
        values = scores.details["value"]
        means = [float(values[groups == g].mean()) for g in groups]
        return Scores.of(values - torch.tensor(means), value=values)


class Raises(Relative):
    def __call__(self, batch):
        return brightness(batch)

    def regroup(self, scores, groups):
        raise LookupError("no such group")


def relative(batch):
    return Relative()(batch)


def restless(batch):
    return Scores.of(batch.images.mean((1, 2, 3)), luck=torch.rand(len(batch)))


def by_place(batch):
    return Scores.of(torch.arange(len(batch)))


def writes(batch):
    batch.images.mul_(0.5)
    return brightness(batch)


def writes_metadata(batch):
    for metadata in batch.metadata:
        metadata["seen"] = True
    return brightness(batch)


def needs_some(batch):
    return Scores.of(torch.stack([image.mean() for image in batch.images]))


def made_up(batch):
    return Scores(torch.full((len(batch),), torch.nan), torch.ones(len(batch), dtype=torch.bool))


def double(batch):
    scores = brightness(batch)
    return Scores(scores.values.double(), scores.valid)


def integer_valid(batch):
    scores = brightness(batch)
    return Scores(scores.values, scores.valid.int())


def no_pixel(batch):
    return Scores.of(batch.images.mean((1, 2, 3)) / (1 / (batch.images.shape[2] - 1)))


def sometimes_invalid(batch):
    values = batch.images.mean((1, 2, 3))
    return Scores(values, torch.full((len(batch),), len(batch) > 1))


@pytest.mark.parametrize(
    ("reward", "rule"),
    [
        (lambda batch: batch.images.mean((1, 2, 3)), "must return nft_plugins.Scores, got Tensor"),
        (lambda batch: Scores.of(torch.zeros(1)), "5 images must give 5 values, got 1"),
        (double, "values must be float32, got torch.float64"),
        (integer_valid, "valid must be bool, got torch.int32"),
        (made_up, "finite where valid is true"),
        (
            lambda batch: Scores.of(1 / (batch.images.shape[2] - 1) + brightness(batch).values),
            "it raised ZeroDiv",
        ),
        (writes, "must not change its batch"),
        (writes_metadata, "must not change its batch"),
        (Counting(), "the same a second time"),
        (by_place, "its place in the batch"),
        (normalised, "the images of other prompts"),
        (sometimes_invalid, "the images of other prompts in its batch: valid was"),
        (relative, "must define regroup(scores, groups)"),
        (Raises(), "it raised LookupError"),
        (restless, "a second time (within 0.001): detail luck"),
        (needs_some, "must score 0 images of 64 x 64"),
        (RefusesAll(), "it refused all, the first with: never"),
        (Breaks(), "must raise PromptError or nothing, it raised KeyError"),
    ],
)
def test_a_breach_is_told_as_what_a_correct_plugin_does(reward, rule):
    with pytest.raises(AssertionError, match=re.escape(rule)):
        check_reward(reward)


def test_a_breach_as_the_command_tells_it(monkeypatch):
    monkeypatch.setattr("nft_rewards.jpeg.JPEGCompressibility.__call__", lambda self, batch: by_place(batch))
    result = nft("check", "jpeg_compressibility")
    assert result.exit_code == 1
    assert "does not keep the contract: an image's score must not depend on its place" in result.stderr
    assert "ok:" not in result.stdout


def test_images_made_by_code():
    batches = builtin_batches()
    assert [tuple(b.images.shape[2:]) for b in batches] == [(64, 64), (48, 80), (1, 1), (64, 64)]
    for batch in batches:
        assert batch.images.dtype == torch.float32
        assert ((batch.images >= 0) & (batch.images <= 1)).all()
    again = builtin_batches()
    assert all(torch.equal(a.images, b.images) for a, b in zip(batches, again, strict=True))


def test_what_the_host_gives_a_factory_is_no_option():
    assert [o["name"] for o in json.loads(nft("info", "rank", "--json").stdout)["options"]] == ["of"]
