"""A reward server as replicas of Ray Serve, on a real Ray of this machine. It needs the extra `ray`."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from nft_core.errors import NftError
from nft_core.host.specs import FailurePolicy
from nft_core.remote.address import parse_address
from nft_core.remote.http import Servers
from nft_core.remote.served import ServedReward
from nft_core.scoring.composed import call_reward
from nft_core.scoring.failures import guard_reward
from nft_plugins import Batch
from nft_rewards.jpeg import JPEGCompressibility

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason='needs pip install "nft-hub[ray]"'),
    pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc"),
]
TOKEN = "a-token-of-the-tests"


def list_processes():
    """The number, the parent and the command of each process."""
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            yield int(folder.name), int(parent), (folder / "cmdline").read_text()


def find_descendants(process):
    found, size = {process}, 0
    while size < len(found):
        size = len(found)
        found |= {number for number, parent, _ in list_processes() if parent in found}
    return found


def find_replicas(process):
    mine = find_descendants(process)
    return {n for n, _, command in list_processes() if n in mine and command.startswith("ray::ServeReplica")}


def list_listeners(processes):
    """The ports on which processes listen, and their addresses as /proc writes them."""
    sockets = set()
    for process in processes:
        with suppress(OSError):
            sockets |= {str(f.readlink()) for f in Path(f"/proc/{process}/fd").iterdir()}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                host, _, port = words[1].partition(":")
                yield int(port, 16), host


def check_ports(processes):
    """What Ray's own ports are sent, Ray would run: they are on 127.0.0.1, or refuse who has no secret."""
    import grpc

    # 127.0.0.1, the same in IPv6, and ::1.
    near = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    listeners = list(list_listeners(processes))
    assert any(host in near for _, host in listeners)
    for port in (port for port, host in listeners if host not in near):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/ray.serve.ASGIService/HandleRequest")(b"", timeout=60)
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def make_batch(seed):
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(seed)) / 255
    return Batch(images, ["a"] * 4, [{}] * 4, torch.arange(4))


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVE_TOKEN", TOKEN)
    (tmp_path / "two.toml").write_text("replicas = 2\ncpus = 0.5\n")
    words = ["--reward", "jpeg_compressibility", "--port", "0", "--token-env", "SERVE_TOKEN", "--engine", "ray"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nft_core", "serve", *words, "--deployment", tmp_path / "two.toml"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        first = next(line for line in process.stdout if line.startswith("Serving"))
        assert first.startswith("Serving jpeg_compressibility at http://127.0.0.1:"), first
        yield process, first.split()[-1]
    finally:
        process.kill()
        process.wait()


def test_two_replicas_share_the_work_and_one_that_is_killed_is_replaced(server):
    process, address = server
    before = find_replicas(process.pid)
    assert len(before) == 2
    check_ports(find_descendants(process.pid))
    with pytest.raises(NftError, match="refuses the token"):
        ServedReward(parse_address(f"{address}/jpeg_compressibility"), "", 60.0)

    far = ServedReward(parse_address(f"{address}/jpeg_compressibility"), "SERVE_TOKEN", 60.0)
    guarded = guard_reward(far, FailurePolicy("stop", 20), "jpeg")
    here, wrong, calls = JPEGCompressibility(), [], []
    stop = threading.Event()

    def ask(number):
        while not stop.is_set():
            batch = make_batch(number)
            scores = call_reward("jpeg", guarded, batch)
            if not scores.values.equal(call_reward("jpeg", here, batch).values) or not scores.valid.all():
                wrong.append(number)
            calls.append(number)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    while len(calls) < 20:
        time.sleep(0.05)
    os.kill(min(before), signal.SIGKILL)
    while len(find_replicas(process.pid) - before) < 1 and all(t.is_alive() for t in threads):
        time.sleep(0.2)
    after = len(calls)
    while len(calls) < after + 20 and all(t.is_alive() for t in threads):
        time.sleep(0.05)
    assert all(t.is_alive() for t in threads)  # None has given up.
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong and not guarded.tally.masked

    replicas = {
        line.partition('replica="')[2].partition('"')[0]
        for _ in range(30)
        for line in Servers([address], "SERVE_TOKEN").ask("/metrics", bytes.decode).splitlines()
        if line.startswith("nft_images_total")
    }
    assert len(replicas) >= 1 and "" not in replicas
    own = find_descendants(process.pid)
    process.terminate()
    assert process.wait(300) == 0
    left = {number for number, _, command in list_processes() if number in own and "ray" in command}
    assert not left
