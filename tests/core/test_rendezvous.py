"""Processes that do not find one another, or do not fit together: told in one sentence, and in time."""

import json
import os
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from nft_core.errors import CheckpointError, PeerError, UsageError
from nft_core.parallel import rendezvous
from nft_core.parallel.processes import process_group
from nft_core.parallel.rendezvous import (
    compare_members,
    connect_in_time,
    describe_process,
    meet_others,
    name_ranks,
)
from nft_core.runs.inputs import check_same_settings
from nft_core.runs.setup import pick_device
from nft_core.settings import make_settings

CPU = torch.device("cpu")


@pytest.fixture
def port():
    """Find a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def environment(monkeypatch, port):
    """Sets RANK and WORLD_SIZE, and others, of one process."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rendezvous, "GRACE", 0.0)

    def announce(rank, size, **others):
        for name, value in {"RANK": rank, "WORLD_SIZE": size, **others}.items():
            monkeypatch.setenv(name, str(value))

    announce(0, 1, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return announce


@pytest.fixture
def clock(monkeypatch):
    """A clock of our own, which goes on while we sleep, whatever else the machine is at."""
    now = [0.0]
    monkeypatch.setattr(rendezvous, "monotonic", lambda: now[0])
    monkeypatch.setattr(rendezvous, "sleep", lambda seconds: now.append(now.pop() + seconds))
    return now


def join():
    with process_group(CPU, 60, 1.0):
        pytest.fail("joined")


def test_the_others_never_come(environment, port, clock):
    environment(0, 4)
    with pytest.raises(
        PeerError, match=rf"^1 of 4 processes came to 127.0.0.1:{port} .* = 1 s; missing: ranks 1 to 3\."
    ):
        join()
    assert not dist.is_initialized()
    assert 1 < clock[0] < 3


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1", "Connection refused"),
        ("nowhere.invalid", "(Name or service not known|Temporary failure|nodename)"),
    ],
)
def test_the_first_cannot_be_reached(address, why, environment, port, clock):
    environment(1, 2, MASTER_ADDR=address)
    with pytest.raises(
        PeerError, match=f"Process 1, on .* at {address}:{port} .* within join_timeout = 1 s: {why}"
    ):
        join()
    assert 1 < clock[0] < 3


def test_the_port_is_in_use(environment):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        environment(0, 2, MASTER_PORT=port)
        with pytest.raises(PeerError, match=f"Port {port} of this machine, {socket.gethostname()}, is in use"):
            join()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"RANK": "1"}, "RANK = 1 and WORLD_SIZE = 1: ranks count from 0"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK = 2 and WORLD_SIZE = 2"),
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE = 2 announces several processes, and RANK, MASTER_ADDR, MASTER_PORT is not",
        ),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE = 'two': expected a whole number"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"},
            "MASTER_PORT = 70000: a port is a number up to 65535",
        ),
    ],
)
def test_an_environment_that_cannot_be(given, said, environment, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        join()


def test_those_who_are_gone_are_not_met(environment, port):
    """A store that torchrun keeps when it starts processes anew holds an earlier meeting."""
    store = dist.TCPStore("127.0.0.1", port, 2, True, timedelta(seconds=900), wait_for_workers=False)
    gone, back = describe_process(CPU, 2), describe_process(CPU, 2)
    store.set(rendezvous.TOKEN, "before")
    store.set("before/0", json.dumps(gone))
    store.set("before/all", json.dumps([gone, gone]))
    environment(1, 2)

    def first():
        time.sleep(0.5)
        store.set(rendezvous.TOKEN, "now")
        store.set("now/all", json.dumps([back, json.loads(store.get("now/1"))]))

    thread = threading.Thread(target=first)
    thread.start()
    shared, warnings = meet_others(CPU, 1, 2, 900)
    thread.join()
    shared.set("here", "1")
    assert store.check(["now/here"])
    assert not warnings and json.loads(store.get("now/1")) not in (gone, back)


def members(**others):
    """Two on node1 and one on node2, alike but for what is given: a value for each."""
    hosts = ("node1", "node1", "node2")
    some = [describe_process(CPU, 3) | {"host": host} for host in hosts]
    return {r: some[r] | {name: values[r] for name, values in others.items()} for r in range(3)}


H100, A100 = "NVIDIA H100, 80 GiB", "NVIDIA A100, 40 GiB"


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (
            {"torch": ("2.8", "2.8", "2.9")},
            "different torch: 2.8 in ranks 0 to 1 (node1); 2.9 in rank 2 (node2). Install",
        ),
        (
            {"nft-hub": ("1", "2", "1")},
            "different nft-hub: 1 in ranks 0, 2 (node1, node2); 2 in rank 1 (node1)",
        ),
        ({"WORLD_SIZE": (3, 3, 4)}, "different WORLD_SIZE: 3 in ranks 0 to 1 (node1); 4 in rank 2 (node2)"),
        ({"gpu": (H100, H100, rendezvous.NO_GPU)}, "have no GPU: NVIDIA H100, 80 GiB in ranks 0 to 1"),
        (
            {"gpu": (H100,) * 3, "uuid": "aab"},
            "The ranks 0 to 1, on node1, have taken the same GPU: LOCAL_RANK",
        ),
    ],
)
def test_processes_that_do_not_fit_together(others, said):
    assert not compare_members(members())
    with pytest.raises(UsageError) as error:
        compare_members(members(**others))
    assert said in str(error.value)


def test_different_gpus_are_told():
    mixed = members(gpu=(H100, H100, A100), uuid="abc")
    (said,) = compare_members(mixed)
    assert (
        f"differ, and the slowest sets the pace: {H100} in ranks 0 to 1 (node1); {A100} in rank 2 (node2)."
        in said
    )
    assert not compare_members(members(gpu=(H100,) * 3))


def test_ranks_in_words():
    assert name_ranks([3]) == "rank 3"
    assert name_ranks({5, 0, 1, 2, 7, 8}) == "ranks 0 to 2, 5, 7 to 8"


def test_processes_that_cannot_connect(environment, monkeypatch, capsys):
    environment(0, 2)
    said = r"All 2 .* could not connect to the others: no such wire\. .*_IFNAME"
    with pytest.raises(PeerError, match=said), connect_in_time(0, 2, 60):
        raise RuntimeError("no such wire\nat frame 1")
    ended = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: ended.set() if code == PeerError.exit_code else None)
    with connect_in_time(0, 2, 0.1):
        assert ended.wait(900)  # What hangs in gloo or NCCL is ended from outside.
    assert "could not connect to the others within join_timeout = 0.1 s" in capsys.readouterr().err


def test_processes_with_different_settings(monkeypatch):
    def gathered(text, device):
        mine = json.loads(text)
        assert not {"device", "rollout_batch", "prompts"} & mine.keys()  # They may differ.
        return [json.dumps(mine | others), text]

    monkeypatch.setattr("nft_core.parallel.processes.gather_texts", gathered)
    others = {}
    check_same_settings(make_settings(), None, CPU)
    others = {"lr": 0.01}
    with pytest.raises(
        UsageError, match=r"different settings: lr \(0.01 in process 0, 0.0003 in process 1\)\."
    ):
        check_same_settings(make_settings(), None, CPU)


def test_a_checkpoint_that_is_not_seen_here(tmp_path):
    with pytest.raises(CheckpointError, match="000002, from which process 0 goes on: .* all nodes share"):
        check_same_settings(make_settings(), tmp_path / "000002", CPU)


def test_fewer_gpus_than_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        UsageError, match="from 0 to 1, and there is none of number 2 for LOCAL_RANK = 2: start no more"
    ):
        pick_device("auto")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UsageError, match=r"there is none of number 5\.$"):
        pick_device("cuda:5")
