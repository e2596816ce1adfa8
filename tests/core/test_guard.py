"""Each way in which a reward can fail, under each policy; nothing that fails becomes a number."""

import gc
import math
import subprocess
import sys
import threading
import weakref
from concurrent.futures import CancelledError, wait
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from nft_core.errors import NftError, Unreachable, UsageError
from nft_core.host.specs import FailurePolicy, parse_reward
from nft_core.parallel import devices
from nft_core.parallel.workers import Worker
from nft_core.sampling.rollout import await_scores
from nft_core.scoring import failures as guard
from nft_core.scoring.composer import Composed, Loader, Named, Term
from nft_core.scoring.failures import Failed, Tally, compute_pause, guard_reward
from nft_core.scoring.scores import concatenate_scores
from nft_core.scoring.statistics import summarize_scores
from nft_plugins import Batch, PromptError, Scores


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(guard, "BACKOFF", 0.001)


@pytest.fixture(autouse=True, scope="module")
def let_go():
    yield
    FAILURES["hangs"][0].go.set()


def batch(n=3):
    return Batch(torch.zeros(n, 3, 4, 4), ["p"] * n, [{}] * n, torch.arange(n))


def good(n=3):
    return Scores.of(torch.arange(1.0, n + 1), size=torch.ones(n))


def raises(error):
    def score(b):
        raise error

    return score


def returns(make):
    return lambda b: make(len(b))


def odd(n, **changes):
    """Scores with an attribute that their constructor would not let pass, as a stranger's subclass may have."""
    scores = good(n)
    for name, value in changes.items():
        object.__setattr__(scores, name, value)
    return scores


class Hangs:
    """Hangs until it is let go; `overlap` is how many calls ran at once."""

    def __init__(self):
        self.go, self.running, self.overlap, self.calls = threading.Event(), 0, 0, 0

    def __call__(self, b):
        self.running += 1
        self.calls += 1
        self.overlap = max(self.overlap, self.running)
        self.go.wait(900)
        self.running -= 1
        return good(len(b))


FAILURES = {
    "raises": (raises(ValueError("bad")), "'x' failed: ValueError: bad"),
    "exits": (raises(SystemExit(7)), "'x' failed: SystemExit: 7"),
    "nan": (returns(lambda n: Scores(torch.full((n,), math.nan), torch.ones(n, dtype=bool))), "not finite"),
    "infinite": (
        returns(lambda n: Scores(torch.full((n,), math.inf), torch.ones(n, dtype=bool))),
        "not finite",
    ),
    "overflows": (
        returns(lambda n: Scores(torch.full((n,), 1e300, dtype=torch.double), torch.ones(n, dtype=bool))),
        "not finite",
    ),
    "no scores": (returns(lambda n: [1.0] * n), "must return Scores, got list"),
    "nothing": (returns(lambda n: None), "must return Scores, got NoneType"),
    "length": (returns(lambda n: good(n + 1)), "must score 3 images, got 4"),
    "array": (
        returns(lambda n: Scores(good(n).values.numpy(), good(n).valid)),
        "values as a float32 tensor, got",
    ),
    "complex": (
        returns(lambda n: Scores(good(n).values + 1j, good(n).valid)),
        "float32 tensor, got torch.complex",
    ),
    "valid": (returns(lambda n: Scores(good(n).values, torch.ones(n))), "bool tensor, got torch.float32"),
    "shape": (
        returns(lambda n: Scores(torch.zeros(n, 1), torch.ones(n))),
        "failed: ValueError: values and valid",
    ),
    "detail": (
        returns(lambda n: odd(n, details={"size": good(n).values.numpy()})),
        "detail size as a float32 tensor, got ndarray",
    ),
    "parts": (returns(lambda n: odd(n, parts={"a": 3})), "'x' failed: AttributeError"),
    "memory": (raises(torch.OutOfMemoryError("full")), "'x' ran out of memory: full"),
    "hangs": (Hangs(), "took longer than max_seconds = 0.05 s"),
}


def policy(name, **words):
    return FailurePolicy(max_seconds=0.05 if name == "hangs" else 0.0, **words)


def composed(reward, words=None, other=True):
    terms = [Term("x", 1.0, guard_reward(reward, words or FailurePolicy(), "x"))]
    if other:
        terms.append(Term("y", 2.0, lambda b: Scores.of(torch.ones(len(b)))))
    return Composed(tuple(terms))


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("retry", [0, 2])
def test_stop(name, retry):
    reward, cause = FAILURES[name]
    with pytest.raises(Failed) as caught:
        composed(reward, policy(name, retry=retry))(batch())
    told = str(caught.value)
    # A reward that hangs is still at it when it is asked again.
    assert (cause if name != "hangs" or not retry else "is still running") in told
    assert ("It was tried 3 times." in told) == bool(retry)
    assert told.count("on_error=mask") == 1


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("on_error", ["mask", "skip"])
@pytest.mark.parametrize("retry", [0, 1])
def test_mask_and_skip(name, on_error, retry, capsys):
    reward, cause = FAILURES[name]
    both = composed(reward, policy(name, on_error=on_error, retry=retry))
    scores = both(batch())
    assert scores.parts["x"].scores.valid.tolist() == scores.valid.tolist() == [False] * 3
    assert scores.parts["y"].scores.valid.all()
    both(batch(2))
    skips = 2 if on_error == "skip" else 0
    # A skipped reward is out of the epoch already, and a call that hangs has been waited for in vain.
    tries = 2 * retry if name != "hangs" and on_error == "mask" else retry
    assert both.tallies() == {"x": Tally(tries, 5, skips), "y": Tally()}
    assert both.tallies()["x"] == Tally()
    told = capsys.readouterr().err
    assert told.count("Warning: ") == 1
    assert f"With on_error={on_error}" in told and (name == "hangs" or cause in told)


def test_one_warning_an_epoch(capsys):
    both = composed(FAILURES["raises"][0], FailurePolicy("mask"))
    for _ in range(2):
        both(batch()), both(batch())
        both.tallies()
    assert capsys.readouterr().err.count("'x' failed: ValueError: bad") == 2


def flaky(failures):
    """Fails that many times, and then scores."""
    left = [failures]

    def score(b):
        left[0] -= 1
        if left[0] >= 0:
            raise ConnectionError("lost")
        return good(len(b))

    return score


@pytest.mark.parametrize("on_error", ["stop", "mask", "skip"])
def test_a_retry_succeeds(on_error):
    both = composed(flaky(2), FailurePolicy(on_error, retry=2))
    assert both(batch()).parts["x"].scores.values.tolist() == [1, 2, 3]
    assert both.tallies()["x"] == Tally(retried=2)


class Far:
    """In another process, which is away in the first calls of each kind."""

    def __init__(self, away):
        self.away = {"check_prompt": away, "regroup": away}

    def __call__(self, b):
        return good(len(b))

    def answer(self, kind):
        self.away[kind] -= 1
        if self.away[kind] >= 0:
            raise Unreachable(f"The reward 'x' failed in {kind}: no server answers")

    def check_prompt(self, prompt, metadata):
        self.answer("check_prompt")

    def regroup(self, scores, groups):
        self.answer("regroup")
        return scores


def test_retry_holds_for_what_else_a_reward_in_another_process_is_asked(capsys):
    with pytest.raises(Unreachable, match="in check_prompt: no server answers"):
        composed(Far(2), FailurePolicy(retry=1)).check_prompt("p", {})
    both = composed(Far(2), FailurePolicy(retry=2))
    both.check_prompt("p", {})
    assert both.regroup(both(batch()), torch.zeros(3)).valid.all()
    warned = capsys.readouterr().err.splitlines()
    assert warned[-1].startswith(
        "Warning: The reward 'x' failed in regroup: no server answers. It is tried again"
    )
    assert len(warned) == 5


def test_retry_holds_for_the_loading_of_a_reward_in_another_process(capsys):
    class Loads:
        calls = 0

        def make_reward(self, *given):
            self.calls += 1
            if self.calls < 3:
                raise Unreachable("The reward 'x' failed: while it was loaded, its process ended.")
            return returns(good)

    for retry, fails in ((1, True), (2, False)):
        loader = Loader(Loads(), "cpu", {})
        named = Composed((Term("x", 1.0, Named(parse_reward(f"x,retry={retry}"), None, None)),))
        with pytest.raises(Unreachable) if fails else nullcontext():
            assert loader.load(named)(batch()).valid.all()
        assert loader.given.calls == retry + 1
    assert "its process ended. It is tried again in 0.001 s." in capsys.readouterr().err


@pytest.mark.parametrize("error", [PromptError("no words"), UsageError("no such folder")])
def test_what_no_retry_mends_is_tried_once(error):
    calls = []

    def score(b):
        calls.append(1)
        raise error

    with pytest.raises(NftError, match="no words|no such folder"):
        composed(score, FailurePolicy(retry=3))(batch())
    assert len(calls) == 1


def test_a_mistake_of_the_user_is_never_masked():
    with pytest.raises(UsageError, match="no such folder"):
        composed(raises(UsageError("no such folder")), FailurePolicy("mask"))(batch())


def test_ctrl_c_passes():
    with pytest.raises(KeyboardInterrupt):
        composed(raises(KeyboardInterrupt()), FailurePolicy("mask"))(batch())


def test_invalid_samples_are_no_failure(capsys):
    some = lambda b: Scores(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([True, False, True]))  # noqa: E731
    both = composed(some, FailurePolicy("mask", retry=1))
    assert both(batch()).valid.tolist() == [True, False, True]
    assert both.tallies()["x"] == Tally()
    assert capsys.readouterr().err == ""


def patient(both, monkeypatch):
    """Whoever waits for the reward from here on waits as long as it takes."""
    monkeypatch.setattr(both.terms[0].reward, "policy", FailurePolicy("mask", retry=1, max_seconds=900))


def test_a_retry_takes_up_when_the_late_call_has_ended(monkeypatch):
    """Two calls never run at once, and what the late one returned is nobody's."""
    slow = Hangs()
    both = composed(slow, FailurePolicy("mask", retry=1, max_seconds=0.05))
    timer = threading.Timer(0.1, slow.go.set)
    monkeypatch.setattr(guard, "sleep", lambda seconds: (patient(both, monkeypatch), timer.start()))
    assert both(batch()).valid.all()
    assert (slow.calls, slow.overlap) == (2, 1)
    assert both.tallies()["x"] == Tally(retried=1)


def test_after_a_late_call_the_next_batch_is_scored(monkeypatch):
    slow, waits = Hangs(), []
    monkeypatch.setattr(guard, "wait", lambda *a: waits.append(a) or wait(*a))
    both = composed(slow, FailurePolicy("mask", max_seconds=0.05))
    assert not both(batch()).valid.any()  # takes too long
    assert not both(batch()).valid.any()  # waits in vain
    assert len(waits) == 2
    assert not both(batch()).valid.any()
    assert len(waits) == 2  # does not wait again
    slow.go.set()
    wait([both.terms[0].reward.overdue])
    patient(both, monkeypatch)
    assert both(batch()).valid.all()
    assert slow.overlap == 1


def test_a_call_within_its_time_is_as_without_a_deadline():
    both = composed(returns(good), FailurePolicy(max_seconds=900))
    assert both(batch()).parts["x"].scores.values.tolist() == [1, 2, 3]
    with torch.enable_grad():
        weight = torch.ones(3, requires_grad=True)
        assert not composed(lambda b: Scores.of(weight * 2), FailurePolicy(max_seconds=900))(
            batch()
        ).values.requires_grad


def test_details_that_change_are_a_failure_under_mask():
    answers = iter([good(), Scores.of(torch.ones(3)), good()])
    both = composed(lambda b: next(answers), FailurePolicy("mask"), other=False)
    batches = [both(batch()) for _ in range(3)]
    assert [bool(s.valid.all()) for s in batches] == [True, False, True]
    together = concatenate_scores(batches)
    assert together.details["x/size"].isnan().tolist() == [False] * 3 + [True] * 3 + [False] * 3
    assert together.parts["x"].scores.details["size"][[0, 8]].tolist() == [1, 1]


def test_batches_without_scores_join_the_others():
    """They are those of a clipped member of a sum, before and after batches that it could score."""
    x = Composed((Term("x", 1.0, guard_reward(flaky(1), FailurePolicy("mask"), "x")),))
    y = Composed((Term("y", 0.5, lambda b: Scores.of(torch.ones(len(b)), more=torch.ones(len(b)))),))
    both = x.clip(0, 2) + y
    lost, good = both(batch()), both(batch())
    for batches, mask in (([lost, good], [True, False]), ([good, lost], [False, True])):
        together = concatenate_scores(batches)
        assert together.valid.tolist() == [not m for m in mask for _ in range(3)]
        assert together.values[together.valid].tolist() == [1.5, 2.5, 2.5]
        assert together.details["x/size"].isnan().tolist() == [m for m in mask for _ in range(3)]
        assert together.details["y/more"].tolist() == [1.0] * 6
    assert both.tallies() == {"x": Tally(masked=3), "y": Tally()}


def test_one_reward_in_two_members_costs_both():
    x = Composed((Term("x", 1.0, guard_reward(raises(ValueError("bad")), FailurePolicy("skip"), "x")),))
    both = x + x.clip(0, 1)
    scores = both(batch())
    assert both.tallies() == {"x": Tally(0, 6, 2), "x:2": Tally(0, 6, 2)}
    assert not scores.valid.any()


class Groups:
    """Finds the best image of each group, for which it needs its detail."""

    def __init__(self, fails):
        self.fails = fails

    def __call__(self, b):
        if self.fails:
            raise ValueError("bad")
        return Scores.of(torch.ones(len(b)), raw=torch.arange(float(len(b))))

    def regroup(self, scores, groups):
        best = scores.details["raw"] == scores.details["raw"][scores.valid].max()
        return Scores(best.float(), scores.valid, scores.details)


@pytest.mark.parametrize("fails", [False, True])
def test_regrouping_under_a_policy(fails):
    both = composed(Groups(fails), FailurePolicy("mask"))
    scores = both.regroup(both(batch()), torch.zeros(3))
    assert scores.parts["x"].scores.valid.tolist() == [not fails] * 3
    assert scores.parts["x"].scores.values.tolist() == [0, 0, 0 if fails else 1]
    assert not hasattr(guard_reward(returns(good), FailurePolicy("mask"), "x"), "regroup")


def test_without_a_member_the_total_is_of_the_others():
    both = composed(raises(ValueError("bad")), FailurePolicy("skip"))
    scores = both.without(both(batch()), ["x"])
    assert scores.values.tolist() == [2.0] * 3 and scores.valid.all()
    assert {name: part.weight for name, part in scores.parts.items()} == {"x": 0.0, "y": 2.0}
    with pytest.raises(NftError, match="Nothing is left to learn from: .*: x, y"):
        both.without(both(batch()), ["x", "y"])
    watched = Composed((both.terms[0]._replace(weight=0.0), both.terms[1]))
    assert watched.without(watched(batch()), ["x"]).valid.all()


def test_statistics_count_what_was_lost():
    both = composed(raises(ValueError("bad")), FailurePolicy("mask", retry=1))
    scores = concatenate_scores([both(batch()), both(batch())])
    rewards = summarize_scores(scores, tallies=both.tallies())["rewards"]
    lost = {"valid": 0, "invalid": 6, "masked": 6, "retried": 2}
    assert rewards["x"] == rewards["total"] == {"mean": None, "std": None, **lost}
    assert rewards["y"] == {"mean": 1.0, "std": 0.0, "valid": 6, "invalid": 0, "masked": 0, "retried": 0}


def test_a_tag_that_is_null_is_no_tag():
    scores = concatenate_scores([composed(raises(ValueError("bad")), FailurePolicy("mask"))(batch())] * 2)
    tags = [{"tag": None}, {"tag": "a"}, {}, {"tag": float("nan")}, {"tag": "a"}, {"tag": "b"}]
    assert list(summarize_scores(scores, tags)["tags"]) == ["a", "b"]


def test_pauses_double_up_to_a_bound(monkeypatch):
    monkeypatch.setattr(guard, "BACKOFF", 0.5)
    assert [compute_pause(n) for n in (1, 2, 3, 7, 8, 1000)] == [0.5, 1.0, 2.0, 30.0, 30.0, 30.0]


def test_memory_is_freed_before_the_next_attempt(monkeypatch):
    """The failed attempt's tensors hang on its error, which must be gone by then."""
    held = []

    def score(b):
        if not held:
            tensor = Tracked()
            held.append(weakref.ref(tensor))
            raise torch.OutOfMemoryError("full")
        return good(len(b))

    class Tracked: ...

    freed = []
    monkeypatch.setattr(guard, "free_memory", lambda: (gc.collect(), freed.append(held[0]() is None)))
    assert composed(score, FailurePolicy(retry=1))(batch()).valid.all()
    assert freed == [True]


def test_a_closed_worker_runs_nothing_more():
    worker, begun, go, ran = Worker("w"), threading.Event(), threading.Event(), []
    first = worker.submit(lambda: begun.set() or go.wait(900))
    second = worker.submit(lambda: ran.append(1))
    begun.wait(900)
    worker.close()
    go.set()
    assert first.result(900) is True
    with pytest.raises(CancelledError):
        second.result(900)
    assert not ran


def test_waiting_for_a_score_ends_when_told():
    worker, go, asked = Worker("w"), threading.Event(), []

    def stop():
        asked.append(1)
        if len(asked) == 2:
            raise NftError("Stopped.")

    with pytest.raises(NftError, match="Stopped"):
        await_scores(worker.submit(lambda: go.wait(900)), stop)
    go.set()
    # A call that itself raises what waiting does is not taken for one that goes on.
    with pytest.raises(TimeoutError, match="slow"):
        await_scores(worker.submit(lambda: raises(TimeoutError("slow"))(None)), lambda: None)


def test_a_process_that_ends_while_a_reward_is_at_work_keeps_its_exit_code():
    """torch aborts a process that takes the interpreter from under one of its calls."""
    code = (
        "import sys, threading, time, torch\n"
        "from nft_core.parallel.workers import Worker\n"
        "begun = threading.Event()\n"
        "def busy():\n"
        "    begun.set()\n"
        "    end, x = time.monotonic() + 1.5, torch.ones(300, 300)\n"
        "    while time.monotonic() < end: x @ x\n"
        "Worker('w').submit(busy)\n"
        "begun.wait()\n"
        "sys.exit(3)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert result.returncode == 3, result.stderr


def test_threads_of_a_name_share_a_stream(monkeypatch):
    """The allocator keeps free memory apart for each, so that one a call would hoard what a reward takes."""
    made, waited = [], []

    def stream(device):
        made.append(device)
        return SimpleNamespace(wait_event=waited.append, synchronize=lambda: waited.append("scores"))

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    here = SimpleNamespace(record_event=lambda: "images")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    devices.get_side_stream.cache_clear()
    gpu = torch.device("cuda", 0)
    for name in ("reward", "reward", "reward ocr"):
        assert Worker(name).submit(devices.wrap_in_side_stream(gpu, lambda: 5)).result() == 5
    assert made == [gpu] * 2
    assert waited == ["images", "scores"] * 3
    devices.get_side_stream.cache_clear()
