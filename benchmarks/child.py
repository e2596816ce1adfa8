"""A reward in a child process beside one in the process: milliseconds a batch, and MB a second of the messages.

python benchmarks/child.py [--images 24] [--side 512] [--rounds 5]    beside base64 in JSON, as servers take it
python benchmarks/child.py --fuzz 100000                              spoiled messages: what they raise
python benchmarks/child.py --kills 20                                 kills the child at random moments
"""

import argparse
import base64
import importlib.util
import json
import os
import random
import resource
import signal
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from nft_core.host.host import load_host
from nft_core.host.specs import FailurePolicy
from nft_core.scoring import failures
from nft_plugins import Batch
from nft_plugins.wire import WireError, decode_message, encode_message, pack_batch, unpack_batch

REWARD = "jpeg_compressibility"


def make_batch(images: int, side: int) -> Batch:
    pixels = torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(0))
    return Batch(pixels, ["a cat"] * images, [{}] * images, torch.zeros(images, dtype=torch.int64))


def measure(call: Callable[[], Any], rounds: int) -> float:
    """Measure the median seconds of a call, after one that warms up."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def send_as_json(batch: Batch) -> None:
    """Write and read a batch as base64 in JSON, which has no loss either."""
    text = json.dumps(
        {"images": base64.b64encode(batch.uint8.numpy().tobytes()).decode(), "prompts": batch.prompts}
    )
    torch.frombuffer(bytearray(base64.b64decode(json.loads(text)["images"])), dtype=torch.uint8)


def send_as_message(batch: Batch) -> None:
    """Write and read a batch as a message."""
    unpack_batch(decode_message(encode_message(*pack_batch(batch))))


def compare(images: int, side: int, rounds: int) -> None:
    """Print the time of each way, and that scores are equal."""
    host, batch = load_host(), make_batch(images, side)
    near, far = (host.make_reward(REWARD, {"run_in": place}) for place in ("process", "child"))
    # The child is sent bytes, so both are given images of whole bytes.
    batch = Batch(batch.uint8.float() / 255, batch.prompts, batch.metadata, batch.groups)
    megabytes = batch.uint8.numel() / 1e6
    times = {
        "in the process": measure(lambda: near(batch), rounds),
        "in a child": measure(lambda: far(batch), rounds),
        "message, there and back": measure(lambda: send_as_message(batch), rounds),
        "base64 in JSON, there and back": measure(lambda: send_as_json(batch), rounds),
    }
    for name, seconds in times.items():
        print(f"{name:<32} {1e3 * seconds:8.1f} ms {megabytes / seconds:8.0f} MB/s")
    print(f"scores equal: {near(batch).values.equal(far(batch).values)}; load {os.getloadavg()[0]:.1f}")


def load_tests() -> ModuleType:
    """Load the tests of messages, which know how to spoil one."""
    spec = importlib.util.spec_from_file_location(
        "test_wire", Path(__file__).parents[1] / "tests/host/test_wire.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fuzz(number: int) -> None:
    """Print how many spoiled messages were refused. Anything but WireError ends it."""
    tests = load_tests()
    whole, refused, longest = encode_message(*pack_batch(tests.make_batch())), 0, 0.0
    for seed in range(number):
        data = tests.spoil(whole, random.Random(seed))
        start = time.perf_counter()
        try:
            unpack_batch(decode_message(data, limit=1 << 20))
        except WireError:
            refused += 1
        longest = max(longest, time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(f"{number} messages, {refused} refused, the longest {1e3 * longest:.1f} ms, peak {peak:.0f} MB")


def kill_children(number: int) -> None:
    """Score with retry while the child is killed at random moments; the scores must be the undisturbed ones."""
    failures.BACKOFF = 0.01
    batch, source = make_batch(8, 256), random.Random(0)
    reward: Any = load_host().make_reward(REWARD, {"run_in": "child"})
    expected = reward(batch).values
    guarded = failures.Guarded(reward, FailurePolicy("stop", retry=5), REWARD)
    killed = equal = rounds = 0
    while killed < number:
        child = reward.child
        pid = child.process.pid if child else 0

        def strike(pid: int = pid, after: float = source.uniform(0, 0.2)) -> None:
            time.sleep(after)
            if pid:
                os.kill(pid, signal.SIGKILL)

        thread = threading.Thread(target=strike)
        thread.start()
        while thread.is_alive():
            rounds += 1
            equal += guarded(batch).values.equal(expected)
        thread.join()
        killed += bool(pid)
    print(f"{killed} kills, {rounds} calls, {equal} with equal scores, {guarded.tally.retried} tried again")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fuzz", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    given = parser.parse_args()
    if given.fuzz:
        fuzz(given.fuzz)
    elif given.kills:
        kill_children(given.kills)
    else:
        compare(given.images, given.side, given.rounds)
