"""A server of rewards and its client, over real HTTP on this machine: scores, limits, failures, bad input."""

import asyncio
import json
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace

import forks
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from servers import serving as serving_with
from starlette.responses import JSONResponse

from nft_core import score as public
from nft_core.cli.app import main
from nft_core.errors import NftError, UsageError
from nft_core.host.specs import FailurePolicy, parse_reward
from nft_core.remote import http
from nft_core.remote.address import make_served_card, parse_address
from nft_core.remote.served import ServedReward
from nft_core.runs.resume import describe_changes
from nft_core.scoring import failures
from nft_core.scoring.composed import Composed, Term, call_reward
from nft_core.scoring.failures import Failed, guard_reward
from nft_core.scoring.pictures import NoPrompts
from nft_core.serving import running, workers
from nft_core.serving.app import HostGuard
from nft_core.serving.deployment import Deployment, read_deployment
from nft_core.serving.limits import Limits
from nft_core.serving.metrics import Metrics
from nft_core.serving.openapi import PATHS, SHOWN
from nft_core.serving.queue import Queue, join_messages, make_job
from nft_core.serving.running import bind_socket, choose_token
from nft_core.serving.workers import Engine, make_offer
from nft_core.settings import make_settings
from nft_plugins import Batch, PromptError, RewardInfo, Scores, wire
from nft_plugins.wire import Message, encode_message, pack_batch, pack_scores

TOKEN = "a-token-of-the-tests"
SMALL = Limits(wait=0.2, queue=6, images=20, side=64, body=1 << 20, seconds=60, patience=20)
seen = []
gate = threading.Event()


class Many:
    """Has all that a reward may have."""

    def __call__(self, batch):
        seen.append((len(batch), batch.groups.tolist()))
        values = batch.uint8.float().mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in batch.prompts])
        values[batch.images.isnan().flatten(1).any(1)] = float("nan")
        made = Scores.of(values, red=batch.images[:, 0].mean((1, 2)))
        return Scores(made.values, made.valid, made.details, {}, {"read": [f"‹{p}›" for p in batch.prompts]})

    def check_prompt(self, prompt, metadata):
        if metadata.get("text") != prompt:
            raise PromptError(f"{prompt!r} is not in the metadata")

    def regroup(self, scores, groups):
        return Scores(scores.values - groups, scores.valid, scores.details)


def bright(batch):
    return Scores.of(batch.images.mean((1, 2, 3)))


def slow(batch):
    gate.wait(60)
    return bright(batch)


def fails(batch):
    if any(prompt == "refused" for prompt in batch.prompts):
        raise PromptError("never")
    if any(prompt == "bad" for prompt in batch.prompts):
        raise RuntimeError("broken")
    return bright(batch)


REWARDS = {"many": Many(), "bright": bright, "slow": slow, "fails": fails}
REWARDS["sum"] = Composed((Term("many", 2.0, REWARDS["many"]), Term("bright", -1.0, bright)))


def make_engine(limits=SMALL, names=REWARDS, made="1", devices=1):
    offers = [
        make_offer(
            name, RewardInfo(name, "", ""), made, [Composed((Term(name, 1.0, REWARDS[name]),))] * devices
        )
        for name in names
    ]
    return Engine(offers, [torch.device("cpu")] * devices, limits, "0")


def serving(engine, token=TOKEN, port=0):
    return serving_with(engine, token, port)


@pytest.fixture(scope="module")
def engine():
    return make_engine(devices=2)


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine) as address:
        yield address
        gate.set()


@pytest.fixture(autouse=True)
def token(monkeypatch):
    monkeypatch.setenv("SERVE_TOKEN", TOKEN)
    monkeypatch.setattr(failures, "BACKOFF", 0.05)
    monkeypatch.setattr(failures, "LONGEST", 0.5)
    monkeypatch.setattr(http, "FULL", 0.05)


def connect(address, name="many", token_env="SERVE_TOKEN", timeout=60.0):
    return ServedReward(parse_address(f"{address}/{name}"), token_env, timeout)


def batch(size=3, side=8, seed=1, prompts=None):
    images = torch.randint(0, 256, (size, 3, side, side), generator=torch.Generator().manual_seed(seed)) / 255
    prompts = prompts or [f"prompt {i}" for i in range(size)]
    return Batch(images, prompts, [{"text": p} for p in prompts], torch.arange(size) // 2)


def same(one, other):
    assert one.values.equal(other.values) and one.valid.equal(other.valid)
    assert one.details.keys() == other.details.keys() and one.parts.keys() == other.parts.keys()
    for name, figure in one.details.items():
        assert figure.isnan().equal(other.details[name].isnan())
        assert figure.nan_to_num().equal(other.details[name].nan_to_num())
    for name in one.parts:
        assert one.parts[name].weight == other.parts[name].weight
        same(one.parts[name].scores, other.parts[name].scores)


def request(address, path, data=b"", method="POST", **headers):
    """The status, headers and body of an answer, by a client that is not ours."""
    host, port = address.removeprefix("http://").split(":")
    given = {"Authorization": f"Bearer {TOKEN}", "Content-Type": http.MESSAGE, "Content-Length": len(data)}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in given.items() if value is not None]
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + data)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode().lower(), body


def await_requests(address, count):
    while f"under_way {count}.0".encode() not in request(address, "/metrics", method="GET")[2]:
        time.sleep(0.02)


def body(engine, name="bright", of=None, **changes):
    head, tensors = pack_batch(of or batch())
    return encode_message(
        {"reward": name, "digest": engine.offers[name].card["digest"], **head, **changes}, tensors
    )


@pytest.mark.parametrize("name", ["many", "bright", "sum"])
def test_scores_are_those_of_the_same_reward_here_bit_for_bit(address, name):
    images = batch(5)
    images.images[3, 0, 0, 0] = float("nan")
    far = call_reward(name, connect(address, name), images)
    same(far, call_reward(name, REWARDS[name], images))
    if name == "many":
        assert far.valid.tolist() == [True, True, True, False, True] and far.notes["read"][1] == "‹prompt 1›"


def test_prompts_are_checked_and_groups_compared_as_here(address, engine, monkeypatch):
    far, bare = connect(address), connect(address, "bright")
    # A checkpoint notes what it was made of there.
    assert far.list_versions() == {"many on its server": far.card["digest"]} != bare.list_versions()
    far.check_prompt("a", {"text": "a"})
    with pytest.raises(PromptError, match="'a' is not in the metadata"):
        far.check_prompt("a", {"text": "b"})
    pairs = [("a", {"text": "a"}), ("b", {}), ("c", {"text": "c"})]
    whole = Composed((Term("far", 1.0, guard_reward(far, FailurePolicy("mask"), "far")), Term("y", 1.0, bare)))
    asked, ask = [], workers.find_refusals
    monkeypatch.setattr(
        workers, "find_refusals", lambda reward, name, p: asked.append(name) or ask(reward, name, p)
    )
    refusals = whole.find_refusals(pairs)
    assert asked == ["many"]  # One request for all.
    assert refusals[::2] == ["", ""] and refusals[1] == "far: many: 'b' is not in the metadata"
    scores, groups = call_reward("many", REWARDS["many"], batch(4)), torch.tensor([0, 0, 7, 7])
    same(far.regroup(scores, groups), REWARDS["many"].regroup(scores, groups))
    assert not hasattr(bare, "check_prompt") and not hasattr(bare, "regroup")


def test_prompts_are_checked_by_the_thread_that_scores(address, monkeypatch):
    """A reward, such as one with a tokenizer, is not written for two calls at once."""
    threads = []
    monkeypatch.setattr(
        REWARDS["many"], "check_prompt", lambda *given: threads.append(threading.current_thread().name)
    )
    connect(address).check_prompt("a", {"text": "a"})
    assert threads == ["scoring on cpu"]


def test_a_server_without_a_token_answers_to_names_of_this_machine_alone():
    """A web page that has its own name lead to 127.0.0.1 is refused, whatever it asks for."""

    def ask(host):
        told = []

        async def send(message):
            told.append(message)

        scope = {"type": "http", "headers": [(b"host", host.encode())]}
        asyncio.run(HostGuard(JSONResponse("let through"))(scope, None, send))
        return told[0]["status"], told[1]["body"].decode()

    for host in ("127.0.0.1:8000", "localhost", "[::1]:8000"):
        assert ask(host) == (200, '"let through"')
    status, text = ask("cats.example:8000")
    assert status == 403 and "answers to 127.0.0.1, localhost, [::1] alone" in text


def test_images_without_prompts_are_scored_by_rewards_that_read_none(address):
    images = batch(2)
    images = Batch(
        images.images, NoPrompts(2, lambda i: UsageError(f"image {i}")), images.metadata, images.groups
    )
    assert call_reward("bright", connect(address, "bright"), images).valid.all()
    with pytest.raises(UsageError, match="image 0"):
        call_reward("many", connect(address), images)


def test_what_a_reward_raises_is_an_error_here_and_no_score(address):
    far = connect(address, "fails")
    with pytest.raises(NftError, match=r"failed: .*RuntimeError: broken"):
        call_reward("fails", far, batch(1, prompts=["bad"]))
    with pytest.raises(NftError) as caught:
        call_reward("fails", far, batch(1, prompts=["refused"]))
    assert isinstance(caught.value.__cause__, PromptError)  # No attempt more is made.
    masked = guard_reward(far, FailurePolicy("mask", 1), "fails")(batch(2, prompts=["a", "bad"]))
    assert not masked.valid.any()


def test_requests_of_several_clients_are_scored_together(engine):
    queue = Queue(batch=6, wait=30)
    made = [make_job("many", Message(*pack_batch(batch(n, seed=n))), 60) for n in (3, 2, 4)]
    other = make_job("many", Message(*pack_batch(batch(1, side=10))), 60)
    for job in (made[0], other, *made[1:]):
        queue.put(job)
    assert queue.take() == made[:2] and queue.take() == [other] and queue.take() == [made[2]]
    joined = join_messages([job.message for job in made[:2]])
    assert joined.tensors["groups"].tolist() == [0, 0, 1, 2, 2]
    # One that is bad costs its own client alone.
    jobs = [make_job("fails", Message(*pack_batch(batch(1, prompts=[p]))), 60) for p in ("good", "bad", "fine")]
    engine, noted = make_engine(Limits(wait=0)), []
    engine.note = lambda name, images: noted.append(images)
    for job in jobs:
        engine.queue.put(job)
    engine.start()
    engine.close()
    assert noted == [1, 1]
    assert [job.future.exception() is None for job in jobs] == [True, False, True]
    assert jobs[2].future.result().values.equal(bright(batch(1)).values)


def test_many_clients_at_once_each_get_their_own(address):
    far, wrong = connect(address), []

    def ask(number):
        images = batch(1 + number % 3, seed=number)
        for _ in range(5):
            scores = call_reward("many", far, images)
            if not scores.values.equal(call_reward("many", REWARDS["many"], images).values):
                wrong.append(number)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(8)]  # More than the queue holds.
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_only_who_has_the_token_is_answered(address, monkeypatch):
    monkeypatch.setenv("OTHER", "another-token-of-the-tests")
    for token_env in ("", "OTHER"):
        with pytest.raises(UsageError, match="refuses the token: give token_env=NAME"):
            connect(address, token_env=token_env)
    with pytest.raises(ValueError, match=r"token_env=\.\.\.: there is no such") as caught:
        connect(address, token_env="sEcret")
    assert "sEcret" not in str(caught.value)
    for path in ("/rewards", "/metrics", "/score", "/nothing"):
        assert request(address, path, method="GET", Authorization="Bearer x")[0] == 401
    assert request(address, "/health", method="GET", Authorization=None)[::2] == (200, b'{"status":"ok"}')


def test_metrics_and_the_description_are_there(address, engine):
    call_reward("bright", connect(address, "bright"), batch(3))
    text = request(address, "/metrics", method="GET")[2].decode()
    count = next(line for line in text.splitlines() if line.startswith('nft_images_total{reward="bright"}'))
    assert float(count.split()[1]) >= 3
    described = json.loads(request(address, "/openapi.json", method="GET", Authorization=None)[2])
    assert set(described["paths"]) == {*PATHS, *SHOWN}
    for path, methods in described["paths"].items():
        for method in methods:
            assert request(address, path, method=method.upper())[0] not in (404, 405)


def test_limits(address, engine):
    assert request(address, "/score", body(engine))[0] == 200
    for of, text in ((batch(21), b"may have 20 images of 64 pixels"), (batch(1, side=65), b"65 x 65")):
        status, _, told = request(address, "/score", body(engine, of=of))
        assert status == 413 and text in told
    assert request(address, "/score", b"", Content_Length=2 << 20)[0] == 413
    assert request(address, "/score", b"0\r\n\r\n", Content_Length=None, Transfer_Encoding="chunked")[0] == 411
    assert request(address, "/score", body(engine), Content_Type="text/plain")[0] == 415
    assert request(address, "/score", body(engine, reward="nothing"))[0] == 404
    assert request(address, "/score", body(engine, reward=["many"]))[0] == 404
    assert request(address, "/score", body(engine, seconds=-1))[0] == 400
    assert request(address, "/regroup", body(engine))[0] == 400
    digest = engine.offers["many"].card["digest"]
    for prompts, metadata in (("a", [{}]), ([1], [{}]), (["a"], [3]), (["a"], []), (None, None)):
        head = {"reward": "many", "digest": digest, "prompts": prompts, "metadata": metadata}
        assert request(address, "/check", encode_message(head))[0] == 400
    status, _, told = request(address, "/score", body(engine, digest="0"))
    assert status == 409 and b"another one than when the client began" in told
    with pytest.raises(NftError, match="may have 20 images"):
        call_reward("bright", connect(address, "bright"), batch(21))


def test_a_full_queue_says_so_and_the_client_comes_again(address, engine):
    gate.clear()
    far, results = connect(address, "slow"), []
    threads = [
        threading.Thread(target=lambda: results.append(call_reward("slow", far, batch(9, side=16))))
        for _ in range(SMALL.queue + 3)
    ]
    for thread in threads:
        thread.start()
    await_requests(address, SMALL.queue)
    status, headers, _ = request(address, "/score", body(engine))
    assert status == 429 and "retry-after: 1" in headers
    gate.set()
    for thread in threads:
        thread.join()
    assert len(results) == SMALL.queue + 3 and all(scores.valid.all() for scores in results)


def test_slow_clients_are_cut_off():
    engine = make_engine(Limits(patience=0.3))
    with serving(engine) as address:
        cut_off_slow_clients(address, body(engine))


def cut_off_slow_clients(address, data):
    host, port = address.removeprefix("http://").split(":")
    head = (
        f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: {http.MESSAGE}\r\n"
    )
    for sent in (b"", b"GET /hea", f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[:9]):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            start = time.monotonic()
            connection.sendall(sent)
            with pytest.raises(OSError), closing(connection):
                while True:  # A byte now and then.
                    time.sleep(0.1)
                    connection.sendall(b"x" if sent else b"")
                    connection.settimeout(0.01 if sent else 60)
                    try:
                        if not connection.recv(1):
                            raise ConnectionResetError
                    except TimeoutError:
                        assert time.monotonic() - start < 60


def test_a_request_that_takes_too_long_is_given_up_on_both_sides(address, engine):
    gate.clear()
    before = len(engine.queue.jobs)
    far = connect(address, "slow", timeout=0.5)
    for _ in range(3):
        with pytest.raises(NftError, match=r"gave no answer within timeout = 0\.5 s"):
            call_reward("slow", far, batch(9, side=16))
    status, _, told = request(address, "/score", body(engine, "slow", seconds=0.2))
    assert status == 504 and b"took longer than 0.2 s" in told
    gate.set()
    assert call_reward("slow", connect(address, "slow"), batch()).valid.all()
    assert len(engine.queue.jobs) == before


def test_fuzzed_requests_are_refused_and_harm_nobody(address, engine):
    chance = random.Random(0)
    whole = [body(engine, "many"), body(engine, "sum"), encode_message({"reward": "many", "prompt": 1})]
    statuses = {}
    for number in range(150):
        data = bytearray(chance.choice(whole))
        for _ in range(chance.randrange(1, 6)):
            place = chance.randrange(min(len(data), chance.choice([24, 400, len(data)])))
            data[place] = chance.randrange(256)
        if number % 3 == 0:
            del data[chance.randrange(len(data)) :]
        elif number % 7 == 0:
            data[8:12] = struct.pack("<I", chance.randrange(1 << 32))
        status = request(address, chance.choice(["/score", "/regroup", "/check"]), bytes(data))[0]
        statuses[status] = statuses.get(status, 0) + 1
    assert statuses.keys() <= {200, 400, 404, 409, 413, 422, 500} and statuses[400] > 50
    assert request(address, "/score", body(engine, "many"))[0] == 200


@contextmanager
def answering(answers):
    """A server that answers each request with the next of some bytes, and then closes the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def work():
            for data in answers:
                with listener.accept()[0] as connection:
                    connection.settimeout(60)
                    got = connection.recv(1 << 20)
                    head, _, rest = got.partition(b"\r\n\r\n")
                    length = next(
                        (int(x[15:]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-l")), 0
                    )
                    while len(rest) < length:
                        rest += connection.recv(1 << 20)
                    connection.sendall(data)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(60)


def reply(data, status="200 OK", length=None):
    head = (
        f"HTTP/1.1 {status}\r\nContent-Length: {len(data) if length is None else length}\r\nConnection: close"
    )
    return f"{head}\r\n\r\n".encode() + data


def offers(**changes):
    card = {"name": "many", "digest": "0"}
    return json.dumps({"wire": wire.VERSION, "contract": "1.0", "rewards": [card]} | changes).encode()


def test_fuzzed_answers_are_errors_and_no_scores():
    chance = random.Random(1)
    right = encode_message(*pack_scores(call_reward("many", REWARDS["many"], batch())))
    answers = [
        reply(right),
        reply(right[:-9]),
        reply(right, length=len(right) + 9),
        b"",
        b"HTTP/1.1 2",
        reply(b"{}"),
    ]
    answers += [reply(b"<html>", "302 Found"), reply(b"[" * 9999, "500 No"), reply(b"\xff", "404 \xff")]
    answers += [reply(b"", "200 OK", "x"), reply(encode_message({"scores": {}, "notes": 3}))]
    for _ in range(100):
        data = bytearray(right)
        for _ in range(4):
            data[chance.randrange(chance.choice([24, 200, len(data)]))] = chance.randrange(256)
        answers.append(reply(bytes(data)))
    good = failed = 0
    with answering([reply(offers()), *answers]) as address:
        far = connect(address)
        for _ in answers:
            far.servers.avoided.clear()
            try:
                call_reward("many", far, batch())
                good += 1
            except NftError as error:
                assert "failed" in str(error) or "must" in str(error) or "gave" in str(error)
                failed += 1
    assert good >= 1 and failed > 40


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (reply(offers(contract="2.0")), r"has contract 2\.0 and messages of version 1, expected"),
        (reply(offers(wire=9)), "messages of version 9"),
        (
            reply(offers(rewards=[{"name": "other", "digest": "0"}])),
            "'many'.* Known: other. That is what http.* offers",
        ),
        (reply(b"<html>It works!"), "what answers there is no server of nft-hub"),
        (reply(b"<html>nothing", "404 Not Found"), r"no server answers .*: HTTP 404 <html>nothing"),
        (reply(offers(), length=999), "no server answers"),
    ],
)
def test_what_answers_must_be_a_server_of_this_version_with_the_reward(given, text):
    with answering([given]) as address, pytest.raises(NftError, match=text):
        connect(address)


def test_a_proxy_that_takes_no_large_bodies():
    with answering([reply(offers()), reply(b"<html>Too large", "413 Content Too Large")]) as address:
        far = connect(address)
        with pytest.raises(NftError, match=r"a proxy before .* takes no requests of this size \(HTTP 413\)"):
            call_reward("many", far, batch())


def test_a_body_that_ends_too_early_harms_nobody(address, engine):
    data = body(engine)
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
    head += f"Content-Type: {http.MESSAGE}\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + data[: len(data) // 2])
    await_requests(address, 0)
    status, _, told = request(address, "/score", data[: len(data) // 2])
    assert status == 400 and told
    assert request(address, "/score", data)[0] == 200


def test_no_server():
    with closing(bind_socket("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(NftError, match=r"Start the server, as in `nft serve --reward many`"):
            connect(address)
    with pytest.raises(NftError, match="cannot be used: no server answers .*InvalidURL"):
        connect("http://gpü_x:1")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("http://me:secret@gpu2:8000/hpsv2", "must hold no user, password, token"),
        ("http://secret@gpu2:8000/hpsv2=0.3,token_env=T", "must hold no user, password, token"),
        ("http://gpu2:8000/hpsv2?token=secret", "must hold no user, password, token"),
        ("http://gpu2:8000/hpsv2#secret", "must hold no user, password, token"),
        ({"name": "http://gpu2:8000/hpsv2?secret"}, "must hold no user, password, token"),
        ("http://gpu2:8000", "is written http://HOST:PORT/REWARD"),
        ("http://gpu2:many/hpsv2", "is written http://HOST:PORT/REWARD"),
        ("http://gpu2:8000+/hpsv2", "is written http://HOST:PORT/REWARD"),
        ("https:///hpsv2", "is written http://HOST:PORT/REWARD"),
    ],
)
def test_addresses_that_are_refused(given, text):
    with pytest.raises(UsageError, match=text) as caught:
        make_served_card(parse_reward(given).name)
    assert "secret" not in str(caught.value)


def test_addresses():
    spec = parse_reward("http://gpu2:8000+[::1]:81/a/hpsv2=0.3,token_env=T,retry=2")
    assert (spec.title, spec.weight, spec.options, spec.guard.retry) == ("hpsv2", 0.3, {"token_env": "T"}, 2)
    assert parse_address(spec.name) == (("http://gpu2:8000/a", "http://[::1]:81/a"), "hpsv2")
    assert parse_reward("ocr:x").title == "x"


def test_a_run_may_go_on_with_another_server():
    before = make_settings({"rewards": ["http://a:1/ocr=0.5,token_env=T", "http://a:1/many"]})
    for rewards, changed in (
        (["http://b+c:2/ocr=0.5,token_env=T,retry=3", "https://d/many"], 0),
        (["http://a:1/ocr=0.5,token_env=T", "http://a:1/other"], 1),
    ):
        now = make_settings({"rewards": rewards})
        assert len(describe_changes(before.model_dump(mode="json"), now)[0]) == changed


def test_servers_share_the_work_and_one_may_die(address, capsys):
    second = make_engine()
    with serving(second) as other:
        both = f"{address}+{other.removeprefix('http://')}"
        far, images = connect(both, "bright"), batch()
        here = call_reward("bright", bright, images)
        for _ in range(4):
            same(call_reward("bright", far, images), here)
        asked = request(other, "/metrics", method="GET")[2].decode()
        assert 'nft_images_total{reward="bright"} 6.0' in asked  # Each has scored half.
    for _ in range(4):
        same(call_reward("bright", far, images), here)
    assert connect(both, "bright").card["name"] == "bright"
    assert "does without a server" in capsys.readouterr().err
    with serving(make_engine(made="2"), port=int(other.rpartition(":")[2])):
        far.servers.avoided.clear()
        with pytest.raises(UsageError, match="is not the same on all servers"):
            connect(both, "bright")


def test_a_server_that_ends_answers_what_it_has_begun():
    gate.clear()
    results = []
    with serving(make_engine()) as address:
        far = connect(address, "slow")
        thread = threading.Thread(target=lambda: results.append(call_reward("slow", far, batch())))
        thread.start()
        await_requests(address, 1)
        second = threading.Thread(target=lambda: results.append(call_reward("slow", far, batch(size=2))))
        second.start()
        await_requests(address, 2)  # The second one is queued.

        def look_and_go():
            with pytest.raises(ConnectionRefusedError):
                request(address, "/health", method="GET")
            bind_socket("127.0.0.1", int(address.rpartition(":")[2])).close()  # Another may have its port.
            looked.append(True)
            gate.set()

        looked = []
        threading.Timer(0.5, look_and_go).start()
    thread.join()
    second.join()
    assert looked and len(results) == 2 and all(scores.valid.all() for scores in results)
    with pytest.raises(Failed, match=r"no server answers .* It was tried 2 times"):
        guard_reward(far, FailurePolicy("stop", 1), "slow")(batch())


def test_a_reward_that_hangs_does_not_keep_the_server_from_ending():
    gate.clear()
    engine = make_engine(Limits(wait=0, patience=0.1))
    engine.queue.put(make_job("slow", Message(*pack_batch(batch(1))), 60))
    engine.start()
    engine.close()
    assert engine.threads[0].is_alive()
    gate.set()
    engine.threads[0].join()


def test_long_prompts_are_asked_about_in_requests_that_are_short_enough(address, monkeypatch):
    far, lengths = connect(address), []

    def answer(path, read, body, patience):
        lengths.append(len(body))
        return [""] * len(wire.decode_message(body).head["prompts"])

    monkeypatch.setattr(far, "ask", answer)
    assert far.find_refusals([("猫" * 500, {})] * 3500) == [""] * 3500  # A letter takes 6 bytes as JSON.
    assert sum(lengths) > wire.LARGEST_TEXT > max(lengths)


def test_what_comes_after_the_end_is_sent_elsewhere():
    with serving(engine := make_engine()) as address:
        far = connect(address, "bright")
        engine.close()
        status, headers, _ = request(address, "/score", body(engine))
        assert status == 503 and "retry-after: 1" in headers
        with pytest.raises(NftError, match="no server answers .* HTTP 503 the server ends"):
            far(batch())
        with serving(make_engine()) as other:
            both = connect(f"{address}+{other.removeprefix('http://')}", "bright")
            assert all(both(batch()).valid.all() for _ in range(2))


def test_ports_and_tokens(address, monkeypatch):
    with pytest.raises(NftError, match="Cannot listen on 127.0.0.1, port .* choose one with --port"):
        bind_socket("127.0.0.1", int(address.rpartition(":")[2]))
    with pytest.raises(
        NftError, match="Cannot listen on 203.0.113.1, .* --host takes an address of this machine"
    ):
        bind_socket("203.0.113.1", 0)
    token, is_new = choose_token("", False, "0.0.0.0")
    assert is_new and len(token) > 40
    assert choose_token("SERVE_TOKEN", False, "0.0.0.0") == (TOKEN, False)
    assert choose_token("", True, "127.0.0.1") == choose_token("", True, "::1") == ("", False)
    for host in ("0.0.0.0", "192.168.0.1", "example.org", "::"):
        with pytest.raises(UsageError, match="--no-token is for this machine alone"):
            choose_token("", True, host)
    monkeypatch.setenv("SHORT", "secret")
    with pytest.raises(UsageError, match="must have 16 letters") as caught:
        choose_token("SHORT", False, "127.0.0.1")
    assert "secret" not in str(caught.value)


def test_deployments(tmp_path):
    assert read_deployment(None) == Deployment(1, 1.0, 0.0, {}, "")
    file = tmp_path / "d.toml"
    file.write_text("replicas = 3\ngpus = 0.5\ncluster = 'auto'")
    assert read_deployment(file) == Deployment(3, 1.0, 0.5, {}, "auto")
    file.write_text("cpus = 2\n[autoscaling]\nmin_replicas = 2\nmax_replicas = 4")
    assert read_deployment(file).least == 2
    for text, told in (
        ("replica = 2", "d.toml: Unknown key 'replica'"),
        ("replicas = 0", "d.toml: replicas must be a whole number from 1, got 0"),
        ("replicas = 1.5", "replicas must be a whole number from 1, got 1.5"),
        ("gpus = -1", "gpus must be a number from 0, got -1"),
        ("gpus = 'one'", "gpus must be a number from 0, got 'one'"),
        ("cluster = 3", "cluster a text"),
        ("autoscaling = 3", "autoscaling must be a table"),
        ("replicas = 2\n[autoscaling]\nmin_replicas = 1", "not both"),
        ("replicas = ", "is not valid TOML"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=told):
            read_deployment(file)
    with pytest.raises(UsageError, match=r"There is no file .*none\.toml"):
        read_deployment(tmp_path / "none.toml")


def test_figures_of_one_of_several_replicas_have_its_name():
    metrics = Metrics(lambda: 2, "a1")
    metrics.note_batch("ocr", 3)
    text = metrics.write().decode()
    assert 'nft_images_total{replica="a1",reward="ocr"} 3.0' in text
    assert 'nft_requests_under_way{replica="a1"} 2.0' in text


def test_commands(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    versions = {"version": torch.__version__, "cuda": None, "hip": None}
    monkeypatch.setattr("nft_core.cli.doctor.probe_torch", lambda: {"torch": versions})
    Image.effect_noise((16, 16), 90).convert("RGB").save("a.png")
    far = f"{address}/bright=2,token_env=SERVE_TOKEN"
    scored = public.score_images(["a.png"], None, far)[0]
    assert list(scored.values) == ["bright"] and 0 < scored.values["bright"] < 1
    done = CliRunner().invoke(main, ["score", "a.png", "--reward", far, "--json"])
    assert json.loads(done.stdout)[0]["total"] == 2 * scored.values["bright"], done.output
    done = CliRunner().invoke(main, ["doctor", "--json", "--reward", far, "--reward", f"{address}/many"])
    told = json.loads(done.stdout)
    assert [bool(row["problem"]) for row in told["servers"]] == [False, True] and done.exit_code == 1
    assert any("refuses the token" in problem["cause"] for problem in told["problems"])
    for words, text in (
        (["--reward", "ocr=0.5"], "offered without weight"),
        (["--reward", "jpeg_compressibility,retry=2"], "offered without weight"),
        (["--reward", "ocr", "--reward", "ocr,upscale=2"], "given twice"),
        (["--reward", "nothing_like_it"], "Unknown reward"),
        (["--reward", "ocr", "--deployment", "d.toml"], "--deployment is for --engine ray"),
    ):
        done = CliRunner().invoke(main, ["serve", "--port", "0", *words])
        assert done.exit_code == 2 and text in done.output


def test_the_command_serves_as_soon_as_it_says_so_and_shows_no_secret(tmp_path, monkeypatch):
    cards = []

    def make_server(app, bound, limits):
        cards.extend(app.app.routes[0].endpoint.__self__.engine.describe()["rewards"])
        server = SimpleNamespace(run=lambda sockets: socket.create_connection(bound.getsockname()).close())
        return server

    monkeypatch.setattr(running, "make_server", make_server)
    file = tmp_path / "mine.py"
    file.write_text("def make(*, api_key: str, n: int): return lambda batch: None\n")
    words = ["--reward", f"{file}:make,api_key=abc,n=2", "--no-token", "--port", "0", "--device", "cpu"]
    done = CliRunner().invoke(main, ["serve", *words])
    assert done.exit_code == 0, done.output
    assert "abc" not in done.output and cards[0]["made"].endswith("api_key=***,n=2")


def start_server(port, **more):
    command = [sys.executable, "-m", "nft_core", "serve", "--reward", "jpeg_compressibility", "--device", "cpu"]
    process = forks.Popen(
        [*command, "--port", str(port), "--token-env", "SERVE_TOKEN"], stdout=subprocess.PIPE, text=True, **more
    )
    first = process.stdout.readline()  # It is printed once the reward is loaded.
    assert first.startswith("Serving jpeg_compressibility at"), first
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_server_once_what_it_has_begun_is_answered(number):
    with bind_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    process = start_server(port, stderr=subprocess.PIPE)
    far = await_server(port)
    head, tensors = pack_batch(batch(1))
    body = encode_message({"reward": "jpeg_compressibility", "digest": far.card["digest"], **head}, tensors)
    lines = ["POST /score HTTP/1.1", "Host: 127.0.0.1", f"Content-Type: {http.MESSAGE}"]
    lines += [f"Authorization: Bearer {TOKEN}", f"Content-Length: {len(body)}", "", ""]
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall("\r\n".join(lines).encode() + body[:50])
        await_requests(f"http://127.0.0.1:{port}", 1)
        process.send_signal(number)
        time.sleep(0.2)  # Were it to end at once, the rest would come too late.
        connection.sendall(body[50:])
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors and "Aborted" not in errors


def test_a_killed_server_that_comes_back_changes_no_score():
    from nft_rewards.jpeg import JPEGCompressibility

    with bind_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    now = {"process": start_server(port)}

    def come_back():
        now["process"].kill()
        now["process"].wait()
        now["process"] = start_server(port)

    try:
        far = await_server(port)
        guarded = guard_reward(far, FailurePolicy("stop", 100), "jpeg")
        images, found = batch(4, side=32), []
        here = call_reward("jpeg", JPEGCompressibility(), images)
        thread = threading.Thread(target=come_back)
        thread.start()
        while thread.is_alive():
            found.append(guarded(images))
        found.append(guarded(images))
        assert guarded.tally.retried and not guarded.tally.masked
        for scores in found:
            same(scores, here)
        now["process"].terminate()
        assert now["process"].wait(60) == 0
    finally:
        now["process"].kill()


def await_server(port):
    """A client of a server that may not listen yet: it says so before."""
    while True:
        try:
            return connect(f"http://127.0.0.1:{port}", "jpeg_compressibility")
        except NftError:
            time.sleep(0.05)


@pytest.mark.slow
def test_a_run_with_a_served_reward_learns_the_same(tmp_path):
    with bind_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    process = start_server(port)
    small = {
        "prompts_per_epoch": 2,
        "group_size": 4,
        "steps": 2,
        "eval_steps": 2,
        "eval_images": 1,
        "epochs": 2,
    }
    words = [
        w
        for key, value in (small | {"processes": 1, "device": "cpu"}).items()
        for w in ("--set", f"{key}={value}")
    ]
    figures = []
    try:
        await_server(port)
        far = f"http://127.0.0.1:{port}/jpeg_compressibility,token_env=SERVE_TOKEN,retry=9"
        for name, reward in (("near", "jpeg_compressibility"), ("far", far)):
            out = tmp_path / name
            done = CliRunner().invoke(main, ["run", "--tiny", "--reward", reward, "--out", str(out), *words])
            assert done.exit_code == 0, done.output
            lines = map(json.loads, Path(out, "metrics.jsonl").read_text().splitlines())
            figures.append(
                [{k: line.get(k) for k in ("loss", "grad_norm", "rewards", "epoch")} for line in lines]
            )
        assert figures[0] == figures[1] and figures[0]
        assert TOKEN not in "".join(p.read_text(errors="ignore") for p in tmp_path.rglob("*.toml"))
    finally:
        process.kill()
