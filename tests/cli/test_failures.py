"""Each way in which a reward can fail, under each policy: an installed plug-in in `nft run`."""

import json
import os
import sys

import forks
import pytest

PLUGIN = """
import os, signal, time
import torch
from nft_plugins import RewardInfo, Scores, hookimpl

HOW = "raises exits hangs nan infinite type length details memory invalid kills".split()

@hookimpl
def nft_register_rewards(register):
    for how in HOW:
        register(RewardInfo(how, "fails so", f"plug_failing:{how}"))

class Failing:
    '''5 for every image, but for batches with the prompt: of these `bad` fail after the first `good`.'''

    def __init__(self, how, prompt, good, bad, rank):
        self.how, self.prompt, self.good, self.bad, self.rank, self.seen = how, prompt, good, bad, rank, 0

    def __call__(self, batch):
        n, values, every = len(batch), torch.full((len(batch),), 5.0), torch.ones(len(batch), dtype=torch.bool)
        scores = Scores.of(values, size=values)
        if self.prompt not in batch.prompts or os.environ.get("RANK", self.rank) != self.rank:
            return scores
        self.seen += 1
        if not self.good < self.seen <= self.good + self.bad:
            return scores
        match self.how:
            case "raises": raise ValueError("no such thing")
            case "exits": raise SystemExit(0)
            case "hangs": time.sleep(3 if self.bad < 9 else 9999)
            case "nan": return Scores(values * torch.nan, every, {"size": values})
            case "infinite": return Scores(values * torch.inf, every, {"size": values})
            case "type": return values.tolist()
            case "length": return Scores.of(torch.ones(n + 1), size=torch.ones(n + 1))
            case "details": return Scores.of(values)
            case "memory": raise torch.OutOfMemoryError("CUDA out of memory.")
            case "invalid": return Scores(values, torch.arange(n) > 0, {"size": values})
            case "kills": os.kill(os.getpid(), signal.SIGKILL)
        return scores

def factory(how):
    def make(prompt: str = "a red circle", good: int = 0, bad: int = 1, rank: str = "0"):
        return Failing(how, prompt, good, bad, rank)
    return make

globals().update({how: factory(how) for how in HOW})
"""

#: What the message names, by the way to fail.
CAUSES = {
    "raises": "failed: ValueError: no such thing (plug_failing.py, line ",
    "exits": "failed: SystemExit: 0",
    "hangs": "failed: it took longer than max_seconds = 2 s.",
    "nan": "gave a value that is not finite and marked it as valid",
    "infinite": "gave a value that is not finite and marked it as valid",
    "type": "must return Scores, got list",
    "length": "must score 4 images, got 5 values",
    "memory": "ran out of memory: CUDA out of memory.",
    "details": "must give the same details for every batch, got none, and before size",
}
POLICIES = ("mask", "skip", "retry")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the plug-in as an installed distribution, and prompts: 4 to train on, 2 held out."""
    root = tmp_path_factory.mktemp("failing")
    forks.install(root / "site", "failing", PLUGIN)
    colours = ("red", "green", "blue", "yellow")
    (root / "train.txt").write_text("".join(f"a {colour} circle\n" for colour in colours))
    (root / "eval.txt").write_text("a red square\na blue square\n")
    return root


def command(place, out, *rewards, **settings):
    """A run of 4 prompts with 4 images each, an epoch of 4 batches, one of each prompt."""
    settings = {
        **{"processes": 1, "prompts_per_epoch": 4, "group_size": 4, "rollout_batch": 4, "updates_per_epoch": 1},
        **{"steps": 2, "eval_steps": 2, "eval_images": 1, "train_times_count": 1, "epochs": 1},
        **settings,
    }
    words = ["run", "--tiny", "--prompts", place / "train.txt", "--eval-prompts", place / "eval.txt"]
    words += [word for reward in rewards for word in ("--reward", reward)]
    words += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return [str(word) for word in (*words, "--out", out)]


def python(place, *arguments):
    return forks.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(place / "site"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


def start(place, out, *rewards, **settings):
    return python(place, "-m", "nft_core", *command(place, out, *rewards, **settings))


def records(folder, event="epoch"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.fixture(scope="module")
def run(place):
    """All ways to fail under all policies that go on, in one run: they do not disturb one another."""
    rewards = ["jpeg_compressibility"]
    for words in ("on_error=mask", "on_error=skip", "retry=1,rank=0"):  # An option more: a reward of its own.
        for how in (*CAUSES, "invalid"):
            # Details that change in one batch alone are seen by who looks for it: not under stop.
            if (how, words[:5]) not in (("details", "retry"), ("invalid", "retry")):
                bad = "" if words.startswith("retry") else ",bad=8"
                rewards.append(f"{how}=0.1,{words}{bad}" + (",max_seconds=2" if how == "hangs" else ""))
    out = place / "together"
    result = start(place, out, *rewards)
    assert result.returncode == 0, result.stderr
    return result, out


def title(how, policy):
    return how + {"mask": "", "skip": ":2", "retry": ":3"}[policy]


@pytest.mark.parametrize("how", CAUSES)
@pytest.mark.parametrize("policy", ["mask", "skip"])
def test_a_failure_that_a_run_survives(run, how, policy):
    result, out = run
    (record,) = records(out)
    figures = record["rewards"][title(how, policy)]
    # The third of four batches fails; a skipped reward, out of the epoch then, is not asked for the fourth.
    lost = 4 if policy == "mask" else 8
    counts = [figures[name] for name in ("valid", "invalid", "masked", "retried")]
    assert counts == [16 - lost, lost, lost, 0]
    # Nothing took the place of what failed: the others scored 5, all of them.
    assert (figures["mean"], figures["std"]) == (5.0, 0.0)
    assert record["details"][f"{title(how, policy)}/size"] == 5.0
    assert (title(how, policy) in record["skipped"]) == (policy == "skip")
    assert f"The reward '{how}' {CAUSES[how]}" in result.stderr


@pytest.mark.parametrize("how", [how for how in CAUSES if how != "details"])
def test_a_retry_that_succeeds(run, how):
    (record,) = records(run[1])
    figures = record["rewards"][title(how, "retry")]
    assert figures == {"mean": 5.0, "std": 0.0, "valid": 16, "invalid": 0, "masked": 0, "retried": 1}


@pytest.mark.parametrize("policy", ["mask", "skip"])
def test_invalid_samples_are_no_failure(run, policy):
    (record,) = records(run[1])
    figures = record["rewards"][title("invalid", policy)]
    assert figures == {"mean": 5.0, "std": 0.0, "valid": 15, "invalid": 1, "masked": 0, "retried": 0}
    assert title("invalid", policy) not in record["skipped"]


def test_what_the_total_makes_of_it(run):
    result, out = run
    (record,) = records(out)
    total, jpeg = record["rewards"]["total"], record["rewards"]["jpeg_compressibility"]
    # The images of the batch that was masked, of which one is invalid too; skipped rewards take none away.
    assert (total["valid"], total["invalid"]) == (12, 4)
    assert (total["masked"], total["retried"]) == ((4 + 8) * len(CAUSES), len(CAUSES) - 1)
    # 9 masked, 2 with one invalid sample and 8 that were tried again count; 9 that were skipped do not.
    assert total["mean"] == pytest.approx(jpeg["mean"] + 0.5 * (9 + 2 + 8), abs=1e-3)
    assert jpeg["valid"] == 16
    assert record["loss"] is not None
    for evaluation in records(out, "eval"):
        assert evaluation["rewards"]["total"]["invalid"] == 0
    # One warning for each reward that went on, and one for each that was left out, which says for how long.
    assert result.stderr.count("Warning: The reward") == 2 * len(CAUSES)
    assert result.stderr.count("is left out of epoch 1 (on_error=skip)") == len(CAUSES)


#: Rewards and settings of runs that end at their first evaluation, or in their second epoch.
ENDING = {
    **{
        how: ((f"{how},bad=99,prompt=a red square", "jpeg_compressibility"), {"eval_images": 4})
        for how in CAUSES
    },
    "retry": (("raises,bad=99,retry=2,prompt=a red square", "jpeg_compressibility"), {}),
    "trained": (("raises,good=1", "jpeg_compressibility"), {"epochs": 2, "checkpoint_every": 0}),
    "skip": (("raises,on_error=skip,prompt=a red square", "jpeg_compressibility=0"), {}),
}
del ENDING["hangs"]
ENDING["details"][1]["rollout_batch"] = 1
#: One after the other in one process, as most of a short run's time goes into its start.
SEVERAL = """
import json, sys
from click.testing import CliRunner
from nft_core.cli import main

results = {name: CliRunner().invoke(main, command) for name, command in json.loads(sys.argv[1]).items()}
print(json.dumps({name: (r.exit_code, r.stderr) for name, r in results.items()}))
"""


@pytest.fixture(scope="module")
def ended(place):
    commands = {name: command(place, place / name, *rewards, **s) for name, (rewards, s) in ENDING.items()}
    result = python(place, "-c", SEVERAL, json.dumps(commands))
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("how", [how for how in CAUSES if how not in ("hangs", "details")])
def test_stop(ended, how):
    code, told = ended[how]
    assert code == 1
    error = f"Error: The reward '{how}' {CAUSES[how]}"
    assert told.startswith(error) and "give the reward on_error=mask" in told and told.count("\n") == 1


def test_stop_says_how_often_a_reward_was_tried(ended):
    code, told = ended["retry"]
    assert code == 1
    assert told.startswith(f"Error: The reward 'raises' {CAUSES['raises']}") and "tried 3 times." in told


def test_stop_where_details_differ(ended):
    code, told = ended["details"]
    assert code == 1
    assert "Error: A reward does not keep the contract: every batch must give the same details, got" in told


def test_a_run_whose_only_reward_is_skipped_ends(ended):
    code, told = ended["skip"]
    assert code == 1
    assert "Error: Nothing is left to learn from" in told


def test_stop_keeps_what_was_trained(ended, place):
    code, told = ended["trained"]
    assert code == 1
    assert f"Error: The reward 'raises' {CAUSES['raises']}" in told
    assert len(list((place / "trained" / "checkpoints").glob("[0-9]*"))) == 1
    assert not list((place / "raises").glob("checkpoints/*"))


def test_stop_while_the_call_still_hangs(place, tmp_path):
    """It holds neither the run nor the end of the process."""
    words = "bad=99,max_seconds=2,prompt=a red square"
    result = start(place, tmp_path / "run", f"hangs,{words}", "jpeg_compressibility")
    assert result.returncode == 1
    assert f"Error: The reward 'hangs' {CAUSES['hangs']}" in result.stderr


def test_a_killed_process_leaves_its_last_checkpoint(place, tmp_path):
    """No policy helps a process that a reward takes down with it."""
    out = tmp_path / "run"
    rewards = ("kills,good=1,on_error=mask", "jpeg_compressibility")
    result = start(place, out, *rewards, epochs=2, checkpoint_every=1)
    assert result.returncode == -9
    assert [r["epoch"] for r in records(out)] == [1]
    (checkpoint,) = (out / "checkpoints").glob("[0-9]*")
    assert (checkpoint / "policy.safetensors").stat().st_size


def test_processes_agree_on_what_one_of_them_has_lost(place, tmp_path):
    """The second one has scores of neither reward for any of its 8 images, and so not even their details."""
    failing = [f"raises=0.1,rank=1,bad=99,on_error={policy}" for policy in ("mask", "skip")]
    result = start(
        place, tmp_path / "run", *failing, "jpeg_compressibility", processes=2, rollout_batch=8, device="cpu"
    )
    assert result.returncode == 0, result.stderr
    (record,) = records(tmp_path / "run")
    assert record["skipped"] == ["raises:2"]
    for name in ("raises", "raises:2"):
        figures = record["rewards"][name]
        assert (figures["mean"], figures["valid"], figures["masked"]) == (5.0, 8, 8)
        assert record["details"][f"{name}/size"] == 5.0
    assert record["rewards"]["total"]["valid"] == 8
    assert record["details"]["jpeg_compressibility/kilobytes"] > 0
