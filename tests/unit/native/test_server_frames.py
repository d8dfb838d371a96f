"""What a reader must not send: its connection ends with a word why, and nobody else notices."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import pairwise

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pkv.errors import RemoteProtocolError
from p2pkv.wire.frame import HEADER, FrameDecoder
from p2pkv.wire.limits import NO_PROCESSOR
from p2pkv.wire.peer import CODEC, Get, PeerType, Release
from tests.unit.native.serving import NODE, Owner, Reader, layout_of, until

pytestmark = pytest.mark.deep

LAYOUT = layout_of(4096)
SPACE = LAYOUT.namespace
KEY = bytes(range(16))
pack = msgspec.msgpack.encode
fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Scene:
    """An owner, a block, and a connection that reads it before and after every nonsense."""

    def __init__(self) -> None:
        self.owner = Owner()
        self.blocks = self.owner.put(LAYOUT, 2)
        self.witness = self.owner.connect()

    def fresh(self) -> Reader:
        """A connection without a network in between: many a second can be made."""
        here, there = socket.socketpair()
        there.setblocking(False)
        self.owner.server.add(there.detach(), NODE, False, b"")
        return Reader(here)

    def check(self) -> None:
        """The witness is served, it alone holds something, and the nonsense was logged."""
        assert self.witness.get(SPACE, list(self.blocks)).payloads == list(self.blocks.values())
        until(lambda: (self.owner.server.active, self.owner.leases) == (1, 1))


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    made = Scene()
    made.check()
    yield made
    made.check()
    made.witness.sock.close()
    made.owner.close()


def frame(message_type: int, body: bytes, *, version: int = 1, length: int | None = None) -> bytes:
    return HEADER.pack(len(body) if length is None else length, version, message_type, 0, 0) + body


GET, RELEASE = PeerType.GET, PeerType.RELEASE
NONSENSE = {
    "another version": frame(GET, pack([1, [], 1]), version=2),
    "a header that claims 4 GiB": frame(GET, b"", length=0xFFFF_FFFF),
    "just too large": frame(GET, b"", length=(2 << 20) + 1),
    "a large RELEASE": frame(RELEASE, bytes(65)),
    "an unknown type": frame(250, b"\x90"),
    "a type of the control connection": frame(PeerType.PIN, pack([1, [], 1])),
    "an answer": frame(PeerType.GOT, bytes(32)),
    "HTTP": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "an empty GET": frame(GET, b""),
    "an empty RELEASE": frame(RELEASE, b""),
    "not msgpack": frame(GET, b"\xc1" * 64),
    "a map": frame(GET, pack({"namespace": 1})),
    "too few fields": frame(GET, pack([1, []])),
    "something after the message": frame(GET, pack([1, [], 1]) + b"\x00"),
    "another count of fields than there are": frame(GET, b"\x94" + pack([1, [], 1])[1:]),
    "something after a RELEASE": frame(RELEASE, pack([0]) + b"\x00"),
    "a negative namespace": frame(GET, pack([-1, [], 1])),
    "a text for a key": frame(GET, pack([1, ["x" * 16], 1])),
    "a short key": frame(GET, pack([1, [bytes(7)], 1])),
    "a long key": frame(GET, pack([1, [bytes(65)], 1])),
    "one key too many": frame(GET, pack([1, [bytes(8)] * 16_385, 1])),
    "a ttl of more than 32 bits": frame(GET, pack([1, [], 1 << 32])),
    "more keys claimed than there are": frame(GET, b"\x93\x01\xdd\xff\xff\xff\xff\x01"),
    "a key longer than the frame": frame(GET, b"\x93\x01\x91\xc6\xff\xff\xff\xff" + bytes(16)),
    "a key that ends with the frame": frame(GET, b"\x93\x01\x91\xc4\x10" + bytes(3)),
    "nested arrays": frame(GET, b"\x91" * 100_000 + b"\xc0"),
    "a RELEASE of nothing": frame(RELEASE, pack([])),
    "a RELEASE of a text": frame(RELEASE, pack(["x"])),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_ends_its_connection_with_a_word_why(scene: Scene, nonsense: str) -> None:
    server = scene.owner.server
    server.drain()
    before = server.protocol_errors
    with scene.fresh() as reader:
        reader.sock.sendall(NONSENSE[nonsense])
        said = reader.last_words()
    assert server.protocol_errors == before + 1
    [(node, text)] = server.drain()
    assert node == NODE and text and said in ("", text)
    scene.check()


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_after_a_lawful_request_releases_what_it_held(scene: Scene, nonsense: str) -> None:
    with scene.fresh() as reader:
        assert reader.get(SPACE, list(scene.blocks)).payloads == list(scene.blocks.values())
        reader.sock.sendall(NONSENSE[nonsense])
        reader.last_words()
    scene.check()


def test_a_frame_that_ends_in_the_middle_is_no_frame(scene: Scene) -> None:
    get = CODEC.encode(Get(SPACE, list(scene.blocks), 1000))
    before = scene.owner.server.gets
    for cut in range(len(get)):
        with scene.fresh() as reader:
            reader.sock.sendall(get[:cut])
            reader.sock.shutdown(socket.SHUT_WR)
            assert reader.rest() == b""
    assert scene.owner.server.gets == before
    scene.check()


def test_requests_heaped_up_end_the_connection(scene: Scene) -> None:
    with scene.fresh() as reader:
        reader.sock.sendall(CODEC.encode(Get(SPACE, [KEY], 1000)) * 17)
        assert "one request at a time" in reader.last_words()
    scene.check()


def test_requests_are_not_taken_in_while_nobody_reads_the_answers(scene: Scene) -> None:
    with scene.fresh() as reader:
        reader.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        reader.sock.settimeout(0.2)
        get = CODEC.encode(Get(SPACE, [bytes(64)] * 1000, 1000))
        sent = 0
        with pytest.raises((TimeoutError, ConnectionError)):
            while True:
                sent += reader.sock.send(get)
                assert sent < 64 << 20
    scene.check()


def test_what_is_told_to_the_log_is_bounded(scene: Scene) -> None:
    server = scene.owner.server
    server.drain()
    for _ in range(400):
        with scene.fresh() as reader:
            reader.sock.sendall(NONSENSE["an empty GET"])
            reader.last_words()
    assert 0 < len(server.drain()) <= 256
    with scene.fresh() as reader:
        reader.sock.sendall(NONSENSE["an empty GET"])
        reader.last_words()
    assert len(server.drain()) == 1


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in pairwise(at)]


def say(scene: Scene, data: bytes, cuts: list[int]) -> bytes:
    """All that the owner answers to these bytes, arriving in pieces, up to the connection's end."""
    with scene.fresh() as reader:
        try:
            for piece in pieces(data, cuts):
                reader.sock.sendall(piece)
            reader.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # closed already
        return reader.rest()


@fuzz
@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_random_bytes_do_nothing(scene: Scene, data: bytes, cuts: list[int]) -> None:
    say(scene, data, cuts)
    scene.check()


@fuzz
@given(st.data())
def test_mutated_frames_are_refused_or_are_lawful(scene: Scene, data: st.DataObject) -> None:
    keys = [*scene.blocks, KEY]
    frames = data.draw(
        st.lists(
            st.one_of(
                st.builds(Get, st.just(SPACE), st.lists(st.sampled_from(keys), max_size=4), st.integers(0, 10_000)),
                st.builds(Release, st.integers(0, 1 << 63)),
            ),
            min_size=1,
            max_size=5,
        )
    )
    sent = bytearray(b"".join(map(CODEC.encode, frames)))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(sent) - 1), st.integers(0, 255)), max_size=4)):
        sent[at] = byte
    before = scene.owner.server.gets
    answer = say(scene, bytes(sent), data.draw(st.lists(st.integers(0, 1000), max_size=4)))
    scene.check()
    gets = scene.owner.server.gets - before - 1  # one is the witness's
    assert gets <= lawful_gets(bytes(sent))
    if not gets and answer:
        assert answer[5] == PeerType.ERROR


def lawful_gets(data: bytes) -> int:
    """How many GETs come before the first thing that Python's own decoder calls malformed."""
    gets = 0
    try:
        for received in FrameDecoder(2 << 20).feed(data):
            gets += isinstance(CODEC.decode(received), Get)
    except RemoteProtocolError:
        pass
    return gets


SURPLUS = [
    0, 127, 128, 65_535, 1 << 20, 1 << 40, -1, -100, -1_000, -100_000, -(1 << 40), None, True, False, 1.5, "", "x" * 40,
    "y" * 300, "z" * 70_000, b"", b"b" * 300, b"c" * 70_000, [], [1, [2, [3]]], list(range(20)), [0] * 70_000, {},
    {"a": {"b": 1}}, {str(i): i for i in range(20)}, {str(i): i for i in range(70_000)},
    msgspec.msgpack.Ext(5, b"1"), msgspec.msgpack.Ext(5, b"12"), msgspec.msgpack.Ext(5, bytes(16)),
    msgspec.msgpack.Ext(5, bytes(17)), msgspec.msgpack.Ext(5, bytes(300)), msgspec.msgpack.Ext(5, bytes(70_000)),
]  # fmt: skip
"""One of every kind that msgpack has."""


@pytest.mark.parametrize("surplus", SURPLUS, ids=lambda value: f"{type(value).__name__}-{len(pack(value))}")
def test_fields_of_a_later_version_are_ignored(scene: Scene, surplus: object) -> None:
    with scene.fresh() as reader:
        reader.sock.sendall(frame(GET, pack([SPACE, [KEY], 1_000, NO_PROCESSOR, surplus, [surplus]])))
        assert reader.answer().payloads == [None]


@pytest.mark.parametrize("surplus", SURPLUS, ids=lambda value: f"{type(value).__name__}-{len(pack(value))}")
def test_a_field_of_a_later_version_that_is_cut_short_is_malformed(scene: Scene, surplus: object) -> None:
    whole = pack([SPACE, [KEY], 1_000, NO_PROCESSOR, surplus])
    with scene.fresh() as reader:
        reader.sock.sendall(frame(GET, whole[:-1]))
        assert reader.last_words()


@pytest.mark.parametrize("rest", [[], [NO_PROCESSOR], [0], [63]])
def test_a_reader_may_say_where_it_waits(scene: Scene, rest: list[int]) -> None:
    with scene.fresh() as reader:
        reader.sock.sendall(frame(GET, pack([SPACE, [KEY], 1_000, *rest])))
        assert reader.answer().payloads == [None]


@pytest.mark.parametrize("processor", [NO_PROCESSOR + 1, -1, (1 << 64) - 1, "0", None, False])
def test_a_processor_that_cannot_be_is_malformed(scene: Scene, processor: object) -> None:
    with scene.fresh() as reader:
        reader.sock.sendall(frame(GET, pack([SPACE, [KEY], 1_000, processor])))
        assert "malformed GET" in reader.last_words()


def test_arrays_within_arrays_are_not_followed_for_ever(scene: Scene) -> None:
    with scene.fresh() as reader:
        reader.sock.sendall(frame(GET, pack([SPACE, [KEY], 1_000])[:1].replace(b"\x93", b"\x94")
                                  + pack([SPACE, [KEY], 1_000])[1:] + b"\x91" * 100_000 + b"\x00"))  # fmt: skip
        assert reader.last_words()
