"""Rewards on a server: what a round trip costs beside other ways, and what clients get when many come at once.

    python benchmarks/serve.py

The reward adds up the pixels, which costs next to nothing, so that the rest is what is measured. The server is
a process of its own on this machine.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from subprocess import PIPE, Popen
from time import perf_counter, sleep
from typing import Any

import measures
import torch

from nft_core.errors import NftError
from nft_core.remote import http
from nft_core.remote.address import parse_address
from nft_core.remote.served import ServedReward, read_scores
from nft_core.scoring.composed import Composed, Term, call_reward
from nft_core.serving.app import digest_token, make_app
from nft_core.serving.limits import Limits
from nft_core.serving.running import bind_socket, make_server, write_address
from nft_core.serving.workers import Engine, make_offer
from nft_plugins import Batch, PromptError, RewardInfo, Scores
from nft_plugins.wire import WireError, encode_message, pack_scores

#: The variables with the token, for client and server, and with a wrong one.
TOKEN, WRONG = "NFT_BENCHMARK_TOKEN", "NFT_BENCHMARK_WRONG"


def add_pixels(batch: Batch) -> Scores:
    return Scores.of(batch.uint8.sum((1, 2, 3), dtype=torch.int64).float())


def make_images(count: int, side: int) -> Batch:
    images = torch.randint(0, 256, (count, 3, side, side), generator=torch.Generator().manual_seed(0)) / 255
    return Batch(images, ["a red circle"] * count, [{}] * count, torch.arange(count))


def serve() -> None:
    """Serve the reward, and beside it the same by base64 in JSON, until this process is ended."""
    offer = make_offer("mean", RewardInfo("mean", "", ""), "", [Composed((Term("mean", 1.0, add_pixels),))])
    limits = Limits(images=64, patience=2.0)
    app = make_app(Engine([offer], [torch.device("cpu")], limits, "0"), digest_token(os.environ[TOKEN]))

    async def with_json(scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") != "/json":
            await app(scope, receive, send)
            return
        from starlette.requests import Request
        from starlette.responses import JSONResponse

        given = json.loads(await Request(scope, receive).body())
        pixels = bytearray(base64.b64decode(given["images"]))
        images = torch.frombuffer(pixels, dtype=torch.uint8).view(given["shape"])
        count = len(images)
        scores = add_pixels(
            Batch(images.float() / 255, given["prompts"], given["metadata"], torch.arange(count))
        )
        await JSONResponse({"values": scores.values.tolist()})(scope, receive, send)

    bound = bind_socket("127.0.0.1", 0)
    print(write_address(bound), flush=True)
    make_server(with_json, bound, limits).run([bound])


def start_server() -> tuple[Popen[str], str]:
    """Start the server's process; returns it and its address."""
    process = Popen([sys.executable, __file__, "--serve"], stdout=PIPE, text=True)
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    while True:
        try:
            connect(address)
            return process, address
        except NftError:
            sleep(0.1)


def connect(address: str) -> ServedReward:
    return ServedReward(parse_address(f"{address}/mean"), TOKEN, 600.0)


def ask_by_json(servers: http.Servers, batch: Batch) -> None:
    """Send images as base64 in JSON, as many servers take them."""
    pixels = base64.b64encode(batch.uint8.numpy().tobytes()).decode()
    body = {
        "images": pixels,
        "shape": list(batch.images.shape),
        "prompts": batch.prompts,
        "metadata": batch.metadata,
    }
    servers.ask("/json", json.loads, json.dumps(body).encode())


def measure(call: Callable[[], object], repeats: int) -> float:
    """Measure the median of some calls, in seconds, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = perf_counter()
        call()
        times.append(perf_counter() - start)
    return median(times[1:])


def compare_ways(address: str, count: int, side: int, repeats: int) -> str:
    """Compare a round trip of images with other ways to have them scored."""
    batch, far = make_images(count, side), connect(address)
    size = batch.uint8.numel() / 1e6
    ways = {
        "in the process": lambda: call_reward("mean", add_pixels, batch),
        "nft serve": lambda: call_reward("mean", far, batch),
        "base64 in JSON": lambda: ask_by_json(far.servers, batch),
    }
    rows = []
    for name, call in ways.items():
        seconds = measure(call, repeats)
        rows.append([name, f"{seconds * 1000:.1f}", f"{size / seconds:.0f}"])
    return measures.table([f"{count} images of {side} px", "ms", "MB/s"], rows)


def load(address: str, clients: int, requests: int, slow: int) -> str:
    """Let many clients ask at once, some of them bad, and say what each kind got."""
    batch, times, got = make_images(4, 256), [], Counter[str]()
    lock, ended = threading.Lock(), threading.Event()

    def ask() -> None:
        far = connect(address)
        for _ in range(requests):
            start = perf_counter()
            try:
                scores = call_reward("mean", far, batch)
                what = "good: scores" if bool(scores.valid.all()) else "good: no scores"
            except NftError as error:
                what = f"good: {error}"
            with lock:
                times.append(perf_counter() - start)
                got[what] += 1

    def send_slowly() -> None:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            try:
                while not ended.wait(1.0):
                    connection.sendall(b"G")
                got["a byte a second: still there"] += 1
            except OSError:
                got["a byte a second: cut off"] += 1

    def send_wrongly(kind: str, given: Batch, variable: str) -> None:
        far = connect(address)
        far.servers.token_env = variable
        try:
            call_reward("mean", far, given)
            what = "scores"
        except NftError as error:
            what = "refuses the token" if "refuses the token" in str(error) else "refused, by its size"
        got[f"{kind}: {what}"] += 1

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    threads += [threading.Thread(target=send_slowly) for _ in range(slow)]
    start = perf_counter()
    for thread in threads:
        thread.start()
    send_wrongly("wrong token", batch, WRONG)
    send_wrongly("too many images", make_images(65, 8), TOKEN)
    for thread in threads[:clients]:
        thread.join()
    seconds = perf_counter() - start
    for deadline in (60.0, None):  # On a busy machine it takes a while until slow clients are cut off.
        for thread in threads[clients:]:
            thread.join(deadline)
        ended.set()
    order = sorted(times)
    tail = [f"{order[min(int(len(order) * share), len(order) - 1)] * 1000:.0f}" for share in (0.5, 0.95, 0.99)]
    rows = [
        [f"{clients} clients", f"{len(times) / seconds:.0f}", f"{len(times) * len(batch) / seconds:.0f}", *tail]
    ]
    head = ["4 images of 256 px", "requests/s", "images/s", "median ms", "95 % ms", "99 % ms"]
    kinds = [[kind, str(number)] for kind, number in sorted(got.items())]
    return measures.table(head, rows) + "\n\n" + measures.table(["client: what it got", "number"], kinds)


def spoil(data: bytes, chance: random.Random) -> bytes:
    """Change some bytes of a message, mostly near its beginning, or cut it."""
    spoiled = bytearray(data)
    for _ in range(chance.randrange(1, 6)):
        spoiled[chance.randrange(min(len(data), chance.choice([24, 400, len(data)])))] = chance.randrange(256)
    if chance.random() < 0.3:
        del spoiled[chance.randrange(len(spoiled)) :]
    return bytes(spoiled)


def fuzz(address: str, process: int, count: int) -> str:
    """Send spoiled messages to the server, and read spoiled answers; count what came of them."""
    chance, got, far, batch = random.Random(0), Counter[str](), connect(address), make_images(2, 8)
    asked = far.encode(*far.pack(batch))
    answer = encode_message(*pack_scores(add_pixels(batch)))
    for _ in range(count):
        try:
            far.servers.ask(chance.choice(["/score", "/check", "/regroup"]), read_scores, spoil(asked, chance))
            got["server: scores"] += 1
        except (NftError, PromptError) as error:
            got["server: gone" if "Connect" in str(error) else "server: refused"] += 1
        try:
            read_scores(spoil(answer, chance))
            got["client: scores"] += 1
        except WireError:
            got["client: refused"] += 1
    status = Path(f"/proc/{process}/status")
    peak = [line for line in status.read_text().splitlines() if "VmHWM" in line] if status.is_file() else []
    rows = [[kind, str(number)] for kind, number in sorted(got.items())]
    rows += [["server: most memory, MB", str(int(line.split()[1]) // 1000)] for line in peak]
    return measures.table(["spoiled messages", "number"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--slow", type=int, default=5)
    parser.add_argument("--fuzz", type=int, default=1000, help="spoiled messages at each end")
    given = parser.parse_args(arguments)
    os.environ |= {TOKEN: "a-token-of-the-benchmark", WRONG: "another-token-of-it"}
    if given.serve:
        serve()
        return
    process, address = start_server()
    try:
        print(compare_ways(address, given.images, given.side, given.repeats))
        print()
        print(load(address, given.clients, given.requests, given.slow))
        print()
        print(fuzz(address, process.pid, given.fuzz))
    finally:
        process.kill()


if __name__ == "__main__":
    main()
