"""Messages: what goes in comes out, and whatever else comes in is a WireError."""

import json
import random
import struct
import tracemalloc

import numpy as np
import pytest
import torch

from nft_plugins import Batch, Part, Scores, wire
from nft_plugins.data import find_finite
from nft_plugins.wire import (
    MAGIC,
    PREFIX,
    VERSION,
    Message,
    WireError,
    decode_message,
    encode_message,
    pack_batch,
    pack_scores,
    read_message,
    unpack_batch,
    unpack_scores,
)

METADATA = [{}, {"include": [{"class": "dog", "count": 2}], "text": 'Ü\ud800"'}, {"a": None}]


def make_batch(size=3, side=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, side, side + 2, generator=generator)
    return Batch(images, ["a", "ünï", ""][:size], METADATA[:size], torch.tensor([0, 0, 5])[:size])


def make_scores():
    inner = Scores(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, True, False]), {"x/y": torch.ones(3)})
    values = torch.tensor([0.1, float("nan"), -3e38])
    valid = torch.tensor([True, False, True])
    details = {"distance": torch.tensor([1, 2, 3]), "half": torch.ones(3, dtype=torch.bfloat16)}
    return Scores(
        values, valid, details, {"a": Part(0.5, inner), "b/c": Part(-1, inner)}, {"read": ["a", "", "ü"]}
    )


def sent(pack, *given, **options):
    return decode_message(encode_message(*pack(*given, **options)))


def assert_same(a, b):
    assert a.values.equal(b.values) or a.values.isnan().equal(b.values.isnan())
    assert a.values.nan_to_num().equal(b.values.nan_to_num()) and a.valid.equal(b.valid)
    assert a.notes == b.notes
    assert list(a.details) == list(b.details) and list(a.parts) == list(b.parts)
    assert all(
        x.equal(y) and x.dtype == y.dtype for x, y in zip(a.details.values(), b.details.values(), strict=True)
    )
    for name, part in a.parts.items():
        assert part.weight == b.parts[name].weight
        assert_same(part.scores, b.parts[name].scores)


def test_a_batch_arrives_with_the_same_bytes():
    batch = make_batch()
    got = unpack_batch(sent(pack_batch, batch))
    assert got.uint8.equal(batch.uint8) and got.images.equal(batch.uint8.float() / 255)
    assert got.prompts == batch.prompts and got.metadata == batch.metadata and got.groups.equal(batch.groups)
    assert [a.tobytes() for a in got.pil] == [a.tobytes() for a in batch.pil]
    # Of images that are whole bytes already, as those of files are, no bit is lost.
    assert unpack_batch(sent(pack_batch, got)).images.equal(got.images)


def test_a_batch_arrives_with_the_same_floats_where_they_are_needed():
    batch = make_batch()
    batch.images[0, 0, 0, 0], batch.images[1, 0, 0, 0] = float("nan"), 1.5
    got = unpack_batch(sent(pack_batch, batch, floats=True))
    assert got.images.view(torch.int32).equal(batch.images.view(torch.int32)) and got.uint8.equal(batch.uint8)


@pytest.mark.parametrize("odd", [float("nan"), float("inf")])
def test_an_image_that_is_not_finite_arrives_as_such(odd):
    batch = make_batch()
    batch.images[1, 2, 3, 4] = odd
    got = unpack_batch(sent(pack_batch, batch))
    assert got.images.isfinite().flatten(1).all(1).tolist() == [True, False, True]


def test_images_that_are_finite_are_found_however_large():
    images = torch.zeros(5, 3, 4, 4)
    images[0, 0] = 3e38  # The sum of these is infinite.
    images[1, 0, 0, 0], images[1, 0, 0, 1] = float("inf"), float("-inf")
    images[2, 2, 3, 3] = float("nan")
    images[3, 0, 0, 0] = float("-inf")
    for chosen in ([0, 1, 2, 3, 4], [0, 4], [4], []):
        assert find_finite(images[chosen]).tolist() == [i in (0, 4) for i in chosen]


def test_an_empty_batch_arrives():
    batch = Batch(torch.zeros(0, 3, 4, 4), [], [], torch.zeros(0, dtype=torch.int64))
    assert len(unpack_batch(sent(pack_batch, batch))) == 0


def test_scores_arrive_with_details_and_parts():
    assert_same(unpack_scores(sent(pack_scores, make_scores())), make_scores())


def test_without_torch_a_batch_and_scores_are_numpy_s(monkeypatch):
    batch = make_batch()
    batch.images[1, 0, 0, 0] = float("nan")
    data = encode_message(*pack_batch(batch))
    with monkeypatch.context() as patch:
        patch.setattr(wire, "has_torch", lambda: False)
        got = unpack_batch(decode_message(data))
        assert isinstance(got.images, np.ndarray) and got.images.dtype == np.float32
        assert (got.uint8 == batch.uint8.numpy()).all() and np.isnan(got.images[1]).all()
        assert [a.tobytes() for a in got.pil] == [a.tobytes() for a in batch.pil]
        assert got.shared("key", lambda: [1]) is got.shared("key", lambda: [2])
        scores = Scores(got.images.mean((1, 2, 3)), np.array([True, False, True]), {"n": np.arange(3)})
        reply = encode_message(*pack_scores(scores))
    there = unpack_scores(decode_message(reply))
    assert there.values[0] == torch.tensor(scores.values)[0] and there.details["n"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("metadata", [{"a": float("nan")}, {"a": torch.ones(2)}, {"a": {1, 2}}])
def test_metadata_that_is_no_json_is_an_error(metadata):
    batch = make_batch(1)
    head, tensors = pack_batch(Batch(batch.images, ["a"], [metadata], batch.groups))
    with pytest.raises(WireError, match="texts and metadata must be JSON"):
        encode_message(head, tensors)


def stream(data, most=7):
    """Bytes as a socket gives them: a few at a time."""
    left = memoryview(data)

    def read(size):
        nonlocal left
        part, left = left[: min(size, most)], left[min(size, most) :]
        return bytes(part)

    return read


def test_messages_are_read_from_a_stream():
    one, two = encode_message({"n": 1}), encode_message(*pack_scores(make_scores()))
    read = stream(one + two)
    assert [read_message(read), read_message(read), read_message(read)] == [one, two, None]
    with pytest.raises(WireError, match=f"a message of {len(two)} bytes ended after {len(two) - 1}"):
        read_message(stream(two[:-1]))


def prefix(text, body, magic=MAGIC, version=VERSION):
    return PREFIX.pack(magic, version, text, body)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"Loading weights: 100%\n", "expected a message of nft-hub, got b'Loading weights"),
        (prefix(2, 0, version=9) + b"{}", "expected a message of version 1, got one of version 9"),
        (prefix(2**32 - 1, 0), "a message may have"),
        (prefix(2, 2**63), "a message may have"),
        (prefix(2, 5) + b"{}", "was announced, and"),
        (prefix(2, 0) + b"[]", "must be an object, got list"),
        (prefix(2, 0) + b"{]", "cannot be read"),
        (prefix(9, 0) + b'{"a":NaN}', "cannot be read: NaN is no number of JSON"),
        (prefix(10**5, 0) + b"[" * 10**5, "cannot be read"),
        (prefix(2, 8) + b"{}" + b"\xff" * 8, "tensors of a message cannot be read"),
    ],
)
def test_what_is_no_message_is_an_error(data, says):
    with pytest.raises(WireError, match=says):
        decode_message(data)


def test_a_peer_that_promises_much_and_sends_little_costs_little():
    tracemalloc.start()
    with pytest.raises(WireError, match="ended after"):
        read_message(stream(prefix(2, 3 << 30) + b"{}", most=1 << 16))
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def changed(head=None, **tensors):
    """The message of a batch with parts of it replaced; None takes one away."""
    message = sent(pack_batch, make_batch())
    merged = {n: t for n, t in {**message.tensors, **tensors}.items() if t is not None}
    return Message({**message.head, **(head or {})}, merged)


@pytest.mark.parametrize(
    "message",
    [
        changed({"prompts": ["a", "b"]}),
        changed({"prompts": "abc"}),
        changed({"prompts": [1, 2, 3]}),
        changed({"metadata": [1, 2, 3]}),
        changed({"metadata": None}),
        changed(images=None),
        changed(images=torch.zeros(3, 4, 8, 8, dtype=torch.uint8)),
        changed(images=torch.zeros(3, 3, 8, 8, dtype=torch.float64)),
        changed(groups=None),
        changed(groups=torch.zeros(2, dtype=torch.int64)),
        changed(groups=torch.zeros(3)),
        changed(whole=torch.ones(3)),
    ],
)
def test_what_is_no_batch_is_an_error(message):
    with pytest.raises(WireError):
        unpack_batch(message)


def nested(depth):
    head = {"details": [], "parts": []}
    for i in range(depth):
        head = {"details": [], "parts": [{"name": str(i), "weight": 1, **head}]}
    return head


@pytest.mark.parametrize(
    ("head", "tensors"),
    [
        ({}, {}),
        ({"scores": []}, {}),
        ({"scores": {"details": [], "parts": []}}, {}),
        ({"scores": {"details": ["a", "a"], "parts": []}}, {}),
        ({"scores": {"details": ["a"], "parts": []}}, {}),
        ({"scores": {"details": [], "parts": [{}]}}, {}),
        ({"scores": nested(500)}, {}),
        ({"scores": {"details": [], "parts": [{"name": "a", "weight": 10**400}]}}, {"values": torch.ones(3)}),
        ({"scores": {"details": [], "parts": [], "notes": {"a": "abc"}}}, {"valid": torch.ones(3) > 0}),
        ({"scores": {"details": [], "parts": [], "notes": {"a": ["b"]}}}, {"valid": torch.ones(3) > 0}),
        ({"scores": {"details": [], "parts": []}}, {"valid": torch.ones(3)}),
        ({"scores": {"details": [], "parts": []}}, {"valid": torch.ones(2, dtype=torch.bool)}),
        ({"scores": {"details": [], "parts": []}}, {"values": torch.ones(3, dtype=torch.complex64)}),
        ({"scores": {"details": [], "parts": []}}, {"values": torch.ones(3, 1)}),
    ],
)
def test_what_are_no_scores_is_an_error(head, tensors):
    given = {"values": torch.ones(3), "valid": torch.ones(3, dtype=torch.bool)} if tensors else {}
    with pytest.raises(WireError):
        unpack_scores(Message(head, {**given, **tensors}))


def spoil(data, source):
    """A message with something wrong in it, as a broken or hostile peer may send it."""
    text, body = struct.unpack_from("<IQ", data, 8)
    data = bytearray(data)
    way = source.randrange(6)
    if way == 0:
        for _ in range(source.randint(1, 8)):
            data[source.randrange(len(data))] = source.randrange(256)
    elif way == 1:
        del data[source.randrange(len(data)) :]
    elif way == 2:
        data += source.randbytes(source.randint(1, 40))
    elif way == 3:
        start = PREFIX.size + text
        data[start : start + 8] = struct.pack("<Q", source.choice([0, 1, 2**20, 2**63, source.getrandbits(64)]))
    elif way == 4:
        place = PREFIX.size + source.randrange(max(1, text))
        data[place : place + 1] = source.choice([b"[", b"{", b"1e999", b"null", b'"', b"\\ud800", b"-0"])
        struct.pack_into("<I", data, 8, len(data) - PREFIX.size - body)
    else:  # The lengths stand, and the header of the tensors lies.
        start = PREFIX.size + text
        header = json.dumps(
            {
                "images": {
                    "dtype": source.choice(["U8", "F32", "X", "I64"]),
                    "shape": [source.choice([0, 1, 2**31, 2**62, -1]) for _ in range(source.randint(0, 5))],
                    "data_offsets": [0, source.choice([0, 4, 2**40])],
                }
            }
        ).encode()
        data[start:] = struct.pack("<Q", len(header)) + header + source.randbytes(8)
        struct.pack_into("<Q", data, 12, len(data) - start)
    return bytes(data)


@pytest.mark.parametrize(("pack", "unpack", "given"), [
    (pack_batch, unpack_batch, make_batch()), (pack_scores, unpack_scores, make_scores()),
])  # fmt: skip
def test_a_thousand_spoiled_messages_raise_nothing_else(pack, unpack, given):
    whole, refused = encode_message(*pack(given)), 0
    for seed in range(1000):
        data = spoil(whole, random.Random(seed))
        try:
            unpack(decode_message(data, limit=1 << 20))
        except WireError:
            refused += 1
    assert refused > 600  # A changed pixel is another picture, and no error.
