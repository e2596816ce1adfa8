"""No reward, and no observer, reaches into the others: not by its batch, not by the process that they share."""

from __future__ import annotations

import io
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nft_core.errors import NftError
from nft_core.host import lending
from nft_core.host.host import load_host
from nft_core.host.lending import lend_batch
from nft_core.host.specs import parse_reward
from nft_core.parallel.workers import Worker
from nft_core.sampling.rollout import start_scoring
from nft_core.scoring.composer import compose
from nft_plugins import Batch, Run, Scores, hookimpl, process


def a_batch(n=3):
    images = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    metadata = [
        {"text": "HI", "include": [{"class": "cat", "count": 1}], "mask": np.ones(2), "feature": torch.ones(2)}
        for _ in range(n)
    ]
    return Batch(images, [f"p{i}" for i in range(n)], metadata, torch.arange(n))


def seen(batch):
    """Compute a number for each image from all that a reward could look at."""
    pictures = torch.tensor([float(np.asarray(p, dtype=np.float64).mean()) for p in batch.pil])
    rows = zip(batch.prompts, batch.metadata, batch.groups.tolist(), strict=True)
    texts = [hash(str(row)) % 1000 for row in rows]
    kept_for_all = batch.shared("test", lambda: batch.images.mean((1, 2, 3)).double())
    array = torch.from_numpy(batch.shared("array", lambda: batch.images.numpy().copy())).sum()
    sums = batch.images.sum((1, 2, 3)) + batch.uint8.sum((1, 2, 3))
    return Scores.of(sums + pictures + torch.tensor(texts) + kept_for_all + array)


SPOILS = {
    "images": lambda b: b.images.mul_(255),
    "images by .data": lambda b: b.images.data.zero_(),
    "images by NumPy": lambda b: np.multiply(b.images.numpy(), 255, out=b.images.numpy()),
    "a part of the images": lambda b: b.images[1, :, 2:4].fill_(7),
    "uint8": lambda b: b.uint8.zero_(),
    "pictures": lambda b: [p.paste("red", (0, 0, 8, 8)) for p in b.pil],
    "the list of pictures": lambda b: b.pil.reverse(),
    "prompts": lambda b: b.prompts.sort(reverse=True),
    "metadata": lambda b: [m.pop("text") for m in b.metadata],
    "metadata inside": lambda b: [m["include"][0].update({"count": 9}) for m in b.metadata],
    "arrays in metadata": lambda b: [m["mask"].fill(0) for m in b.metadata],
    "tensors in metadata": lambda b: [m["feature"].zero_() for m in b.metadata],
    "groups": lambda b: b.groups.zero_(),
    "a shared array": lambda b: b.shared("array", lambda: b.images.numpy().copy()).fill(0),
    "what is shared": lambda b: b.shared("test", lambda: b.images.mean((1, 2, 3)).double()).zero_(),
    "what is shared, by its images": lambda b: (
        b.images.zero_(),
        b.shared("test", lambda: b.images.mean((1, 2, 3)).double()),
    ),
    "in inference mode": lambda b: torch.inference_mode()(lambda: (b.uint8, b.pil, b.images.mul_(2)))(),
}


@pytest.mark.parametrize("policy", ["", "retry=1"])
@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_what_one_reward_does_to_its_batch_no_other_sees(spoil, policy):
    def spoils(batch):
        spoil(batch)
        return torch.zeros(len(batch))

    expected = compose([seen])(a_batch()).values
    both = compose([parse_reward(spoils).with_options({"retry": 1} if policy else {}), seen])
    assert both(batch := a_batch()).parts["seen"].scores.values.equal(expected)
    assert compose([seen])(batch).values.equal(expected)


def test_images_are_copied_for_the_one_who_writes_alone():
    batch = a_batch()
    lent, other = lend_batch(batch), lend_batch(batch)
    assert lent.images.mean() == batch.images.mean()
    memory = torch._C._data_address(other.images), torch._C._data_address(lent.images)
    assert memory[0] == memory[1] == torch._C._data_address(batch.images)
    lent.images.zero_()
    assert torch._C._data_address(other.images) == torch._C._data_address(batch.images)
    assert torch._C._data_address(lent.images) != memory[1]


def test_what_is_shared_is_computed_once():
    calls = []
    for lent in (batch := a_batch(), lend_batch(batch), lend_batch(lend_batch(batch))):
        lent.shared("key", lambda: calls.append(1))
    assert calls == [1]


def test_images_of_numpys_own_memory_can_be_lent():
    array = np.full((1, 3, 4, 4), 0.5, dtype=np.float32)
    batch = Batch(torch.from_numpy(array), ["p"], [{}], torch.arange(1))
    lend_batch(batch).images.zero_()
    assert (array == 0.5).all()


def test_a_lent_batch_can_be_replaced():
    batch = lend_batch(a_batch())
    half = replace(batch, images=batch.images / 2)
    assert half.uint8.float().mean() < 0.6 * batch.uint8.float().mean()


CHANGES = {
    "torch's default dtype": lambda: torch.set_default_dtype(torch.float64),
    "torch's precision of float32": lambda: torch.set_float32_matmul_precision("medium"),
    "torch's random numbers": lambda: torch.manual_seed(1234),
    "NumPy's random numbers": lambda: np.random.seed(1234),
    "torch's threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "torch's default device": lambda: torch.set_default_device("meta"),
    "autocast": lambda: torch.set_autocast_enabled("cpu", True),
    "the current folder": lambda: process.os.chdir("/"),
    "the environment variables": lambda: process.os.environ.update(NFT_TEST="1"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_put_back_on_the_thread_of_rewards(name, fails):
    """Runs score on this thread, with the main one beside it; kit and mutants have the other places."""

    def reward(batch):
        CHANGES[name]()
        if fails:
            raise ValueError("afterwards")
        return torch.zeros(len(batch), dtype=torch.float32, device="cpu")

    def call():
        before = process.noted(process.all_places())
        try:
            compose([reward])(a_batch())
        except NftError:
            assert fails
        return process.put_back(before)

    worker = Worker("test")
    assert worker.submit(call).result() == []
    worker.close()
    assert call() == []


def test_draws_of_the_main_thread_are_not_taken_back():
    """A reward draws beside it; only one that seeds moves the numbers of others."""
    drawn, go_on = threading.Event(), threading.Event()

    def reward(batch):
        drawn.set()
        go_on.wait(20)
        return torch.rand(len(batch))

    worker = Worker("test")
    future = worker.submit(lambda: compose([reward])(a_batch()))
    drawn.wait(20)
    first = torch.rand(4)
    go_on.set()
    future.result()
    worker.close()
    assert not first.equal(torch.rand(4))


def test_of_a_call_that_takes_too_long_the_process_is_put_back_at_once():
    go_on = threading.Event()

    def hangs(batch):
        torch.set_default_dtype(torch.float64)
        go_on.wait(60)
        return [1.0] * len(batch)

    with pytest.raises(NftError, match="took longer"):
        compose([parse_reward(hangs).with_options({"max_seconds": 0.5})])(a_batch())
    assert torch.get_default_dtype() == torch.float32
    go_on.set()


def test_changed_numbers_of_the_process_are_told_once(capsys, monkeypatch):
    monkeypatch.setattr(lending, "told", set())

    def doubles(batch):
        torch.set_default_dtype(torch.float64)
        return [1.0] * len(batch)

    reward = compose([doubles])
    reward(a_batch()), reward(a_batch())
    said = capsys.readouterr().err
    assert said.count("torch's default dtype changed during the call of the reward 'doubles', which holds") == 1


def test_the_making_of_a_reward_leaves_the_process(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, torch\n"
        "torch.set_default_dtype(torch.float64)\n"
        "class Mine:\n"
        "    def __init__(self):\n"
        "        torch.manual_seed(0), os.chdir('/'), os.environ.update(NFT_KEY='kept for my library')\n"
        "    def check_prompt(self, prompt, metadata):\n"
        "        metadata.clear()\n"
        "    def __call__(self, batch):\n"
        "        return [len(m) for m in batch.metadata]\n"
    )
    before = process.noted(process.all_places())
    reward = compose([f"{tmp_path}/mine.py:Mine"])
    batch = a_batch()
    reward.check_prompt("p", batch.metadata[0])
    assert reward(batch).values.tolist() == [4, 4, 4]
    assert process.put_back(before) == ["the environment variables"]


def test_a_reward_may_write_to_its_tensors_at_the_next_call():
    buffer = torch.zeros(3)

    def reuses(batch):
        buffer.add_(1)
        return Scores(buffer, buffer > 0, {"count": buffer})

    reward = compose([reuses])
    first, second = reward(a_batch()), reward(a_batch())
    assert first.details["reuses/count"].tolist() == [1, 1, 1] and second.values.tolist() == [2, 2, 2]


def test_regroup_cannot_spoil_groups_and_scores_of_others():
    class Spoils:
        def __call__(self, batch):
            return Scores.of(torch.ones(len(batch)))

        def regroup(self, scores, groups):
            groups.zero_(), scores.values.zero_()
            return scores

    class Looks(Spoils):
        def regroup(self, scores, groups):
            return Scores.of(groups.float())

    groups = torch.arange(3)
    reward = compose([Spoils(), Looks()])
    again = reward.regroup(reward(a_batch()), groups)
    assert again.parts["Looks"].scores.values.tolist() == groups.tolist() == [0, 1, 2]


def test_rewards_of_which_another_is_made_have_batches_of_their_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "class Both:\n"
        "    def __init__(self, *, make_reward):\n"
        "        self.rewards = [make_reward(f'{__file__}:{name}') for name in ('spoils', 'looks')]\n"
        "    def __call__(self, batch):\n"
        "        return [reward(batch) for reward in self.rewards][1]\n"
        "def spoils(images):\n"
        "    images.zero_()\n"
        "    return images.sum((1, 2, 3))\n"
        "def looks(images):\n"
        "    return images.sum((1, 2, 3))\n"
    )
    assert compose([f"{path}:Both"])(a_batch()).values.min() > 0


def test_observers_cannot_change_what_others_are_told():
    told = []

    class Spoils:
        @hookimpl
        def nft_eval_finished(self, run, record, batch, scores):
            run.settings.clear(), record.clear(), batch.images.zero_(), scores.values.zero_()

    class Looks:
        @hookimpl
        def nft_eval_finished(self, run, record, batch, scores):
            told.append((dict(run.settings), dict(record), float(batch.images.sum()), scores.values.tolist()))

    host, batch = load_host(), a_batch()
    for observer in (Looks(), Spoils(), Looks()):
        host.hooks.register(observer, repr(observer))
    run, record, scores = Run(Path("x"), {"seed": 1}, 1), {"epoch": 0}, Scores.of(torch.ones(3))
    host.hooks.notify("nft_eval_finished", run=run, record=record, batch=batch, scores=scores)
    assert told[0] == told[1] == ({"seed": 1}, {"epoch": 0}, float(batch.images.sum()), [1, 1, 1])
    assert record == {"epoch": 0}


def test_the_older_way_of_setting_a_precision_is_put_back_with_the_newer():
    """Where they differ torch raises, and the run with it."""

    def exact(batch):
        torch.backends.cudnn.allow_tf32 = False
        return [1.0] * len(batch)

    before = torch.backends.cudnn.allow_tf32
    compose([exact])(a_batch())
    assert torch.backends.cudnn.allow_tf32 == before


def test_nothing_is_put_back_that_was_not_changed():
    assert process.put_back(process.noted(process.all_places())) == []


def test_what_the_main_thread_changes_for_a_moment_is_not_put_back_for_good(capsys):
    """A plug-in's model may choose a kernel of attention, or a dtype, for each of its passes."""
    noted, left = threading.Event(), threading.Event()

    def reward(batch):
        noted.set()
        left.wait(20)
        return [1.0] * len(batch)

    composed = compose([reward])
    with start_scoring() as worker:
        with sdpa_kernel(SDPBackend.MATH):
            future = worker.submit(lambda: composed(a_batch()))
            noted.wait(20)
        left.set()
        future.result()
    assert torch.backends.cuda.flash_sdp_enabled() and not capsys.readouterr().err


def test_what_a_reward_does_to_standard_output_the_run_does_not_see(monkeypatch):
    monkeypatch.setattr(sys, "stdout", shown := io.StringIO())

    def silences(batch):
        sys.stdout = io.StringIO()
        return [1.0] * len(batch)

    with start_scoring() as worker:
        worker.submit(lambda: compose([silences])(a_batch())).result()
        assert sys.stdout is shown


def test_a_call_that_ends_after_the_run_does_not_put_its_output_back(monkeypatch):
    called, go_on = threading.Event(), threading.Event()

    def hangs(batch):
        called.set()
        go_on.wait(20)
        return [1.0] * len(batch)

    with start_scoring() as worker:
        future = worker.submit(lambda: compose([hangs])(a_batch()))
        called.wait(20)
    monkeypatch.setattr(sys, "stdout", shown := io.StringIO())
    go_on.set()
    future.result()
    assert sys.stdout is shown


def test_a_ctrl_c_that_a_reward_raises_is_the_rewards():
    def interrupts(batch):
        raise KeyboardInterrupt

    with start_scoring() as worker, pytest.raises(NftError, match="'interrupts' failed: KeyboardInterrupt"):
        worker.submit(lambda: compose([interrupts])(a_batch())).result()
    with pytest.raises(KeyboardInterrupt):  # On the main thread it may be the user's.
        compose([interrupts])(a_batch())
