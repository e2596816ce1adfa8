"""Rewards in a child process: the same scores, and an error in a sentence whatever becomes of the child.

The children have this process's own Python. Several tests share one child, since to start one imports torch.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from nft_core.errors import NftError, UsageError
from nft_core.host.host import load_host
from nft_core.host.specs import FailurePolicy
from nft_core.remote import process
from nft_core.remote.reward import ChildReward, Start
from nft_core.runs.fingerprint import collect_remote_sources
from nft_core.scoring.composed import Composed, Term
from nft_core.scoring.failures import Guarded, guard_reward
from nft_plugins import Batch, PromptError, Scores, child
from nft_plugins.wire import Message, pack_batch, unpack_scores

HERE = str(Path(__file__).parent)
MODULE = "odd_rewards"


def make_batch(size=3, prompt="a"):
    images = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return Batch(images, [prompt] * size, [{}] * size, torch.tensor([0, 0, 1])[:size])


def start_child(name="Odd", **options):
    factory = f"{MODULE}:{name}"
    start = Start("odd", "odd", Path(sys.executable), factory, options, isolated=False, packages=("click",))
    return ChildReward(start)


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.append(HERE)
    yield
    sys.path.remove(HERE)


@pytest.fixture(scope="module")
def odd():
    return start_child(scale="2")


def test_scores_are_those_of_the_reward_itself(odd):
    from odd_rewards import Odd

    batch = make_batch()
    batch.images[1, 0, 0, 0] = float("nan")
    eighths = Batch(batch.uint8.float() / 255, batch.prompts, batch.metadata, batch.groups)
    eighths.images[1] = float("nan")
    here, there = Odd(scale=2)(eighths), odd(batch)
    assert there.values.nan_to_num().equal(here.values.nan_to_num()) and there.valid.tolist() == [1, 0, 1]
    assert there.details["row"].nan_to_num().equal(here.details["row"].nan_to_num())


def test_what_it_computes_with_is_noted(odd, monkeypatch):
    guarded = guard_reward(odd, FailurePolicy("mask"), "odd")
    reward = Composed((Term("odd", 1.0, guarded),)).clip(0, 1)
    assert collect_remote_sources(reward) == {}  # This process's own Python.
    monkeypatch.setattr(odd, "start", replace(odd.start, isolated=True))
    found = collect_remote_sources(reward)
    assert found["odd: torch"] == torch.__version__ and found["odd: click"] == version("click")


def test_what_a_reward_prints_is_marked_and_does_not_get_between_the_messages(odd, capfd):
    assert len(odd(make_batch(prompt="print"))) == 3
    end = time.monotonic() + 10
    said = ""
    while "[odd] even from C" not in said and time.monotonic() < end:
        said += capfd.readouterr().err
        time.sleep(0.01)
    assert "[odd] printed\n" in said and "[odd] even from C\n" in said


def test_errors_of_the_reward_are_errors_here(odd):
    with pytest.raises(
        NftError, match=r"'odd' failed: ZeroDivisionError: division by zero \(odd_rewards.py, line"
    ):
        odd(make_batch(prompt="raise"))
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        odd(make_batch(prompt="memory"))
    with pytest.raises(NftError, match="must return Scores, got int"):
        odd(make_batch(prompt="int"))
    with pytest.raises(PromptError, match="never"):
        odd.check_prompt("never", {})
    odd.check_prompt("a", {"b": [1]})
    assert len(odd(make_batch())) == 3


def test_groups_are_compared_there(odd):
    groups = torch.tensor([0, 0, 1])
    scores = odd(make_batch())
    assert odd.regroup(scores, groups).values.equal(scores.values - scores.values.mean())


def test_scores_are_taken_before_the_reward_is_put_away(monkeypatch):
    """Stands in for a GPU: what the reward keeps is emptied between calls, scores too."""

    class Keeps:
        weight = torch.tensor([2.0])

        def __call__(self, batch):
            self.last = self.weight * batch.images.mean((1, 2, 3))
            return Scores.of(self.last)

        def regroup(self, scores, groups):
            return Scores.of(self.weight * scores.values)

    keeper, reward = child.Keeper(), Keeps()
    keeper.reward = reward

    def put_away(keeper):
        for tensor in (reward.weight, reward.last):
            tensor.untyped_storage().resize_(0)

    def bring_back(keeper):
        reward.weight.untyped_storage().resize_(4)
        reward.weight.fill_(2)

    monkeypatch.setattr(child, "put_away", put_away)
    monkeypatch.setattr(child, "bring_back", bring_back)
    batch = make_batch()
    expected = 2 * (batch.uint8 / 255).mean((1, 2, 3))
    scored = Message(*child.score(keeper, Message(*pack_batch(batch))))
    assert unpack_scores(scored).values.equal(expected)
    grouped = child.regroup(keeper, Message(scored.head, scored.tensors | {"groups": batch.groups}))
    assert unpack_scores(Message(*grouped)).values.equal(2 * expected)


def test_a_fork_has_a_child_of_its_own_and_leaves_its_parent_s_alone(odd):
    expected, process = odd(make_batch()).values, odd.child.process
    if not (fork := os.fork()):
        try:
            os._exit(0 if odd(make_batch()).values.equal(expected) and odd.child.process is not process else 1)
        finally:
            os._exit(2)
    assert os.waitpid(fork, 0)[1] == 0
    assert odd(make_batch()).values.equal(expected) and odd.child.process is process


def test_a_child_for_which_no_file_can_be_opened_is_told(odd, monkeypatch):
    def refuse():
        raise OSError("Too many open files")

    monkeypatch.setattr("nft_core.remote.process.socket.socketpair", refuse)
    with pytest.raises(NftError, match="'odd' failed: its process could not be started: Too many open files"):
        ChildReward(odd.start)


def test_another_number_of_scores_is_an_error(odd):
    guarded = Guarded(odd, FailurePolicy("mask"), "odd")
    assert not guarded(make_batch(prompt="few")).valid.any()


def test_a_child_that_dies_is_told_and_started_again_by_retry(odd, capfd, monkeypatch):
    monkeypatch.setattr("nft_core.scoring.failures.BACKOFF", 0.0)
    expected = odd(make_batch())
    first = odd.child.process.pid
    os.kill(first, signal.SIGKILL)
    with pytest.raises(
        NftError, match="'odd' failed: its process was ended by SIGKILL, as the system does where"
    ):
        odd(make_batch())
    assert odd(make_batch()).values.equal(expected.values) and odd.child.process.pid != first
    os.kill(odd.child.process.pid, signal.SIGKILL)
    guarded = guard_reward(odd, FailurePolicy("stop", retry=1), "odd")
    assert guarded(make_batch()).values.equal(expected.values) and guarded.tally.retried == 1


def test_a_child_that_hangs_is_ended_and_the_next_attempt_has_another(odd, monkeypatch):
    monkeypatch.setattr("nft_core.scoring.failures.BACKOFF", 0.0)
    guarded = Guarded(odd, FailurePolicy("mask", max_seconds=0.3), "odd")
    first = odd.child.process.pid
    assert not guarded(make_batch(prompt="hang")).valid.any()
    assert not guarded(make_batch()).valid.any()  # It has waited for that call in vain, and ends it.
    guarded.overdue.exception(30)
    assert odd(make_batch()).valid.all() and odd.child.process.pid != first


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("Odd", {"scales": "2"}, UsageError, "unexpected keyword argument 'scales'; its options are"),
        ("Odd", {"scale": "-1"}, UsageError, "scale must be positive"),
        ("nothing", {}, NftError, "it cannot be loaded: AttributeError"),
        ("exits", {}, NftError, "while it was loaded, its process ended with code 7. It said last: no weights"),
        ("number", {}, NftError, "gave int, which is no reward"),
    ],
)
@pytest.mark.slow
def test_a_reward_that_cannot_be_made_is_told(name, options, error, says):
    with pytest.raises(error, match=says):
        start_child(name, **options)


@pytest.mark.slow
def test_a_child_that_hangs_while_loading_is_told(monkeypatch):
    monkeypatch.setattr(process, "SILENCE", 3.0)
    with pytest.raises(NftError, match="neither answered nor said anything for 3 s"):
        start_child("hangs")


def test_a_python_that_says_nothing_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(process, "SILENCE", 0.3)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 100\n")
    python.chmod(0o755)
    with pytest.raises(NftError, match="could not be started: .* neither answered nor said anything for 0.3 s"):
        ChildReward(Start("odd", "odd", python, f"{MODULE}:Odd"))


def test_a_python_that_is_not_there_is_told():
    with pytest.raises(NftError, match="/no/python cannot be started"):
        ChildReward(Start("odd", "odd", Path("/no/python"), f"{MODULE}:Odd"))


PARENT = """
import signal, sys, time
# A shell lets what it runs in the background ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.append({here!r})
from pathlib import Path
from nft_core.remote.reward import ChildReward, Start
child = ChildReward(Start("odd", "odd", Path(sys.executable), "odd_rewards:Odd", isolated=False))
print(child.child.process.pid, flush=True)
time.sleep(100)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_child_ends_with_its_parent(number):
    command = [sys.executable, "-c", PARENT.format(here=HERE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.send_signal(number)
        parent.wait(30)
    end = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists()


def test_where_a_reward_runs_is_chosen_in_its_spec():
    host = load_host()
    with pytest.raises(UsageError, match="run_in must be one of auto, process, child, got 'here'"):
        host.check_reward("jpeg_compressibility", {"run_in": "here"})
    with pytest.raises(UsageError, match="offload must be true or false, got 'cpu'"):
        host.check_reward("jpeg_compressibility", {"offload": "cpu"})
    with pytest.raises(UsageError, match="offload=true needs a child process"):
        host.check_reward("jpeg_compressibility", {"offload": "true", "run_in": "process"})
    with pytest.raises(UsageError, match="cannot run in a child process"):
        host.make_reward(lambda images: [0.0] * len(images), {"run_in": "child"})
    with pytest.raises(UsageError, match="no option 'variants'"):
        host.check_reward("jpeg_compressibility", {"run_in": "child", "variants": "nft"})
