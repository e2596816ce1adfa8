"""The judge against a real HTTP server that plays OpenAI's protocol, on this machine."""

import asyncio
import base64
import html
import json
import logging
import math
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from urllib.parse import quote, quote_plus

import numpy as np
import pytest
import torch
from PIL import Image

from nft_plugins import Batch
from nft_rewards import chat
from nft_rewards.vlm_judge import UNIFIED, VLMJudge


class Server(ThreadingHTTPServer):
    """respond: `(number of the request for this text, text) -> (status, headers, body)`."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond = lambda n, text: good("Final Score: 3")
        self.lock, self.busy, self.most = threading.Lock(), 0, 0
        self.bodies, self.headers, self.connections = [], [], set()
        self.counts = {}
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # A client that hangs up at its deadline is what some tests need.


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"][1]["text"]
        with server.lock:
            server.busy += 1
            server.most = max(server.most, server.busy)
            server.bodies.append(body)
            server.headers.append(self.headers)
            server.connections.add(self.client_address)
            n = server.counts[text] = server.counts.get(text, 0) + 1
        try:
            status, headers, data = (
                server.respond(n, text) if self.path == "/v1/chat/completions" else (404, {}, b"")
            )
            with server.lock:
                server.busy -= 1
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            self.close_connection = True

    def log_message(self, *arguments):
        pass


def good(content, **choice):
    message = {"role": "assistant", "content": content}
    return 200, {}, json.dumps({"choices": [{"message": message, "finish_reason": "stop"} | choice]}).encode()


def chances(**tokens):
    """A reply whose first token has these alternatives; `_yes` stands for ` yes`."""
    top = [{"token": t.replace("_", " "), "logprob": math.log(p)} for t, p in tokens.items()]
    return good("Yes", logprobs={"content": [{"token": "Yes", "logprob": -0.1, "top_logprobs": top}]})


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(chat, "BACKOFF", 0.001)


def batch_of(*prompts, size=(8, 8)):
    images = torch.rand(len(prompts), 3, *size, generator=torch.Generator().manual_seed(0))
    return Batch(images, prompts, [{}] * len(prompts), torch.arange(len(prompts)))


def by_prompt(replies):
    """Replies by the prompt in brackets, as UnifiedReward's question has it at its end."""
    return lambda n, text: replies[text.rpartition("[")[2][:-1]]


def close(values, expected):
    torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_unified(server):
    server.respond = by_prompt(
        {
            "a cat": good("The cat is there.\nFinal Score: 4"),
            "a dog": good("Final Score:2.5 "),
            "1": good("Final Score: 1"),
            "5": good("cat: 1\nFinal Score: 5."),
        }
    )
    scores = VLMJudge(url=server.url)(batch_of("a cat", "a dog", "1", "5"))
    close(scores.values, [0.8, 0.5, 0.2, 1.0])
    assert scores.valid.all()
    assert scores.details["score"].tolist() == [4.0, 2.5, 1.0, 5.0]
    body = server.bodies[0]
    assert (body["model"], body["temperature"]) == ("CodeGoat24/UnifiedReward-7b-v1.5", 0)
    assert "logprobs" not in body
    texts = {b["messages"][0]["content"][1]["text"] for b in server.bodies}
    assert UNIFIED.replace("{prompt}", "a cat") in texts
    assert all("Authorization" not in h for h in server.headers)


def test_what_cannot_be_read_is_invalid_and_told_once(server, caplog):
    bad = {
        "garbage": good("I like it"),
        "too much": good("Final Score: 45"),
        "a bit too much": good("Final Score: 5.5"),
        "negative": good("Final Score: -3"),
        "refusal": good(None, message={"content": None, "refusal": "I cannot"}),
        "nothing": good(None),
        "not json": (200, {}, b"<html>"),
        "no choices": (200, {}, b'{"choices": []}'),
        "a list": (200, {}, b"[]"),
        "deep": (200, {}, b"[" * 100_000),
        "huge": (200, {}, b" " * (chat.LARGEST_REPLY + 1)),
        "bad request": (400, {}, b'{"message": "prompt too long"}'),
        "elsewhere": (307, {"Location": "http://example.invalid/"}, b""),
    }
    server.respond = by_prompt(bad | {"good": good("Final Score: 4")})
    with caplog.at_level(logging.WARNING):
        scores = VLMJudge(url=server.url, retries=0, image_size=0)(batch_of(*bad, "good", "garbage"))
    assert scores.valid.tolist() == [False] * len(bad) + [True, False]
    assert scores.values[len(bad)] == pytest.approx(0.8)
    (record,) = caplog.records
    message = record.getMessage()
    assert "14 of 15 images could not be scored" in message
    assert "2 no number in the reply ('I like it')" in message
    assert "3 a number that is not from 1 to 5" in message
    for cause in ("a refusal", "not JSON", "another form", "more than 1048576 bytes", "HTTP 400", "HTTP 307"):
        assert cause in message, cause
    assert len(server.bodies) == len(bad) + 2  # none was asked twice


def test_yes_no(server):
    server.respond = lambda n, text: {
        "cat": chances(Yes=0.5, _yes=0.1, No=0.2),
        "dog": chances(no=0.6, No=0.1, _NO=0.2, _Yes=0.1),
        "sure": chances(Yes=0.9, x=0.1),
        "raw": chances(**{"▁yes": 0.25, "Ġno": 0.25}),
        "other": chances(a=0.5, The=0.5),
        "none": good("Yes"),
        "empty": good("Yes", logprobs={"content": []}),
        "nan": good("Yes", logprobs={"content": [{"top_logprobs": [{"token": "yes", "logprob": math.nan}]}]}),
        "big": good("Yes", logprobs={"content": [{"top_logprobs": [{"token": "yes", "logprob": 1e9}]}]}),
        "odd": good("Yes", logprobs={"content": [{"top_logprobs": None}]}),
    }[text.split('"')[1]]
    prompts = ("cat", "dog", "sure", "raw", "other", "none", "empty", "nan", "big", "odd")
    scores = VLMJudge(preset="yes_no", model="m", url=server.url, image_size=0)(batch_of(*prompts))
    assert scores.valid.tolist() == [True] * 4 + [False] * 6
    close(scores.values[:4], [0.75, 0.1, 1.0, 0.5])  # 0.6 / 0.8, 0.1 / 1.0
    close(scores.details["mass"][:4], [0.8, 1.0, 0.9, 0.5])
    body = server.bodies[0]
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"], body["model"]) == (True, 20, 1, "m")


def test_a_question_of_ones_own(server, tmp_path):
    file = tmp_path / "question.txt"
    file.write_text("Rate {braces} for {prompt}, from 0 to 100.\n")
    server.respond = lambda n, text: good("rating 70 of 100") if "a {prompt} x" in text else good("rating 101")
    judge = VLMJudge(url=server.url, model="m", template=str(file), pattern=r"rating (\d+)", low=0, high=100)
    scores = judge(batch_of("a {prompt} x", "other"))
    close(scores.values[:1], [0.7])
    assert scores.valid.tolist() == [True, False]
    assert "Rate {braces} for other, from 0 to 100." in {
        b["messages"][0]["content"][1]["text"] for b in server.bodies
    }


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        ((512, 384), 512, (384, 512)),
        ((64, 48), 0, (48, 64)),
        ((64, 48), 512, (384, 512)),
        ((1024, 8), 512, (4, 512)),
    ],
)
def test_the_picture_that_arrives(server, size, longest, expected):
    batch = batch_of("a", size=size)
    VLMJudge(url=server.url, image_size=longest)(batch)
    image = sent(server)
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", expected)
    pixels = batch.uint8[0].permute(1, 2, 0).numpy()
    if (size[1], size[0]) != expected:
        pixels = np.asarray(Image.fromarray(pixels).resize(expected, Image.Resampling.BICUBIC))
    assert np.array_equal(np.asarray(image), pixels)


def sent(server):
    head, data = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"].split(",")
    image = Image.open(BytesIO(base64.b64decode(data)))
    assert head == f"data:image/{image.format.lower()};base64"
    return image


def test_jpeg(server):
    VLMJudge(url=server.url, image_format="jpeg")(batch_of("a"))
    assert (sent(server).format, sent(server).size) == ("JPEG", (512, 512))


def test_order_and_concurrency_as_the_server_sees_them(server):
    delay = np.random.default_rng(0).permutation(24) / 400
    four = threading.Barrier(4)  # Each is answered when three others are there.

    def respond(n, text):
        i = int(text.rpartition("[")[2][:-1])
        four.wait(900)
        time.sleep(delay[i])
        return good(f"Final Score: {1 + i / 8}")

    server.respond = respond
    scores = VLMJudge(url=server.url, concurrency=4, image_size=0)(batch_of(*map(str, range(24))))
    close(scores.details["score"], [1 + i / 8 for i in range(24)])
    assert server.most == 4
    assert len(server.connections) <= 4  # connections are used again


def test_tries_again(server):
    answers = {
        "500": [(500, {}, b"oops"), (500, {}, b"oops"), good("Final Score: 4")],
        "503": [(503, {}, b"")] * 4,
        "lost": [(200, {"Content-Length": "50"}, b"cut"), good("Final Score: 5")],
        "404": [(404, {}, b"")] * 4,
    }
    server.respond = lambda n, text: answers[text.rpartition("[")[2][:-1]][n - 1]
    # A reply that is shorter than it says is lost when the connection closes.
    handler_end = Handler.end_headers

    def end_headers(self):
        self.send_header("Connection", "close")  # And it is told, or another request might take it meanwhile.
        handler_end(self)

    Handler.end_headers = end_headers
    try:
        scores = VLMJudge(url=server.url, retries=2)(batch_of("500", "503", "lost", "404"))
    finally:
        Handler.end_headers = handler_end
    assert scores.valid.tolist() == [True, False, True, False]
    close(scores.values[[0, 2]], [0.8, 1.0])
    assert {t.rpartition("[")[2][:-1]: n for t, n in server.counts.items()} == {
        "500": 3,
        "503": 3,
        "lost": 2,
        "404": 1,
    }


def test_retry_after_is_waited_for(server, monkeypatch):
    slept = []

    async def sleep(seconds, sleep=asyncio.sleep):
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(chat.asyncio, "sleep", sleep)
    server.respond = lambda n, text: (429, {"Retry-After": "7"}, b"") if n == 1 else good("Final Score: 4")
    scores = VLMJudge(url=server.url)(batch_of("a"))
    assert scores.valid.all()
    assert [s for s in slept if s >= 7] and max(slept) < 7.1
    # Beyond the deadline there is no sense in waiting.
    slept.clear(), server.counts.clear()
    server.respond = lambda n, text: (429, {"Retry-After": "7000"}, b"")
    assert not VLMJudge(url=server.url)(batch_of("a")).valid.any()
    assert len(server.counts) == 1 and not [s for s in slept if s > 1]


def test_retry_after_in_both_forms():
    assert chat.parse_retry_after("3") == 3
    assert chat.parse_retry_after("Fri, 31 Dec 1999 23:59:59 GMT") == 0
    assert chat.parse_retry_after("Fri, 31 Dec 2199 23:59:59 GMT") > 1e6
    assert [chat.parse_retry_after(x) for x in ("", "soon", "-3", "nan")] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("limits", "cause"),
    [({"deadline": 3}, "deadline of 3 s"), ({"timeout": 3}, "timeout of 3 s")],
)
def test_slow_replies(server, caplog, limits, cause):
    done = threading.Event()

    def respond(n, text):
        if "slow" in text:
            done.wait(900)
        return good("Final Score: 4")

    server.respond = respond
    scores = VLMJudge(url=server.url, image_size=0, **limits)(batch_of("slow", "fast", "slow too"))
    done.set()
    assert scores.valid.tolist() == [False, True, False]
    assert f"2 no answer within the {cause}" in caplog.text


def test_no_server(server):
    server.shutdown(), server.server_close()
    with pytest.raises(ConnectionError) as caught:
        VLMJudge(url=server.url, retries=1)(batch_of("a", "b"))
    for part in (server.url, "ConnectError", "vllm serve", "url=http://HOST:PORT/v1"):
        assert part in str(caught.value)


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_refuses_everything(server, status, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    server.respond = lambda n, text: (status, {}, b"no: s3cret is wrong")
    with pytest.raises(ConnectionError, match=f"HTTP {status} 'no: \\*\\*\\* is wrong'.*check url.*model"):
        VLMJudge(url=server.url, api_key_env="JUDGE_KEY")(batch_of("a", "b"))


def test_the_key_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret\n")
    VLMJudge(url=server.url, api_key_env="JUDGE_KEY")(batch_of("a"))
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match="JUDGE_KEY.*no such environment variable"):
        VLMJudge(url=server.url, api_key_env="JUDGE_KEY")


KEY = "sk-proj-Q7+x/9Zk_w2<&>Lm4TtB"


@pytest.mark.parametrize(
    "sent",
    [
        KEY,
        KEY.upper(),
        base64.b64encode(KEY.encode()).decode(),
        base64.b64encode(f"Bearer {KEY}".encode()).decode().removeprefix("QmVhcmVyI"),
        base64.urlsafe_b64encode(f":{KEY}".encode()).decode(),
        quote(KEY, safe=""),
        quote_plus(KEY),
        KEY.encode().hex(),
        html.escape(KEY),
        json.dumps(KEY).replace("/", r"\/"),
        KEY[:14] + "****",
        f"{KEY[:5]}\\n{KEY[5:14]}\n    {KEY[14:]}",
        "\0".join(KEY),
        quote(KEY, safe="")[:20],
    ],
)
def test_the_key_is_known_in_every_shape(monkeypatch, sent):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = VLMJudge(api_key_env="JUDGE_KEY").server
    # Base64 keeps a letter or two at its ends, which belong to what stands there too.
    assert re.fullmatch(r"got .{,2}\*\*\*.{,3}, no", server.redact(f"got {sent}, no"))
    monkeypatch.setenv("JUDGE_KEY", f"Bearer {KEY}")
    assert re.fullmatch(r"got .{,2}\*\*\*.{,3}, no", server.redact(f"got {sent}, no"))


def test_a_key_that_is_sent_back_is_not_logged(server, monkeypatch, caplog):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    headers = f"{'Connection: keep-alive ' * 4} Authorization: Bearer {KEY}"
    server.respond = by_prompt(
        {
            "status": (400, {}, headers.encode()),
            "html": (200, {}, f"<pre>{html.escape(headers)}</pre>".encode()),
            "tail": good(f"{headers} {'.' * 90}"),
            "odd": (200, {}, json.dumps({headers: [headers]}).encode()),
            "good": good("Final Score: 4"),
        }
    )
    with caplog.at_level(logging.WARNING):
        VLMJudge(url=server.url, api_key_env="JUDGE_KEY", retries=0)(
            batch_of("status", "html", "tail", "odd", "good")
        )
    assert "***" in caplog.text
    assert not [KEY[i : i + 4] for i in range(8, len(KEY) - 3) if KEY[i : i + 4] in caplog.text]


def test_a_key_that_is_none_changes_no_answer(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "4")
    server.respond = by_prompt({"a": good("Final Score: 4")})
    assert VLMJudge(url=server.url, api_key_env="JUDGE_KEY")(batch_of("a")).details["score"].tolist() == [4.0]


def test_a_key_in_the_place_of_its_name_is_not_shown():
    for options in ({"api_key_env": KEY}, {"url": f"user:{KEY}@host/v1"}, {"url": f"http://host/v1?key={KEY}"}):
        with pytest.raises(ValueError, match="api_key_env") as caught:
            VLMJudge(**options)
        assert "Q7+x" not in str(caught.value)


def test_the_last_match_of_a_pattern_counts(server):
    server.respond = lambda n, text: good("<think>rate 1</think> rate 30, no: rate 70")
    judge = VLMJudge(url=server.url, model="m", template="{prompt}", pattern=r"rate (\d+)", low=0, high=100)
    close(judge(batch_of("a")).values, [0.7])


def test_inside_a_running_loop(server):
    async def cell():
        return VLMJudge(url=server.url)(batch_of("a"))

    close(asyncio.run(cell()).values, [0.6])


def test_pixels_that_are_not_finite_are_not_sent(server, caplog):
    batch = batch_of("a", "b")
    batch.images[0, 0, 0, 0] = torch.nan
    scores = VLMJudge(url=server.url)(batch)
    assert scores.valid.tolist() == [False, True]
    assert len(server.bodies) == 1
    assert "1 pixels that are not finite" in caplog.text


def test_no_images(server):
    scores = VLMJudge(url=server.url)(batch_of())
    assert len(scores) == 0
    assert list(scores.details) == ["score"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url must be like"),
        ({"url": "http://me:key@host/v1"}, "api_key_env"),
        ({"url": "http://host/v1?key=abc"}, "api_key_env"),
        ({"preset": "yes_no"}, "model=NAME is needed"),
        ({"preset": "yes_no", "model": "m", "high": 10}, "for replies with a number"),
        ({"template": "no such file", "model": "m"}, "template must be a text with {prompt}"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": "x"}, "needs a group"),
        ({"low": 5, "high": 5}, "low must be less than high"),
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"timeout": 0}, "timeout and deadline above 0"),
        ({"image_size": -1}, "image_size"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        VLMJudge(**options)
