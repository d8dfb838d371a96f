"""PIN on a data connection: where blocks lie in the owner's arena, how long they stay there, and what is refused."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pkv import _native
from p2pkv.errors import RemoteProtocolError
from p2pkv.store.base import LeaseLimits
from p2pkv.types import Status
from p2pkv.wire.frame import HEADER, HEADER_BYTES, Frame, FrameDecoder
from p2pkv.wire.peer import CODEC, Get, PeerError, PeerType, Pin, Release
from tests.unit.native.serving import BLOCK, NODE, Owner, Reader, layout_of, until

pytestmark = pytest.mark.deep

LAYOUT = layout_of()
SPACE = LAYOUT.namespace
ENDPOINT = "a1:7:3"
RECORD = struct.Struct("<B3sIQ16sQ")
"""p2pkv/native/requests.hpp: status, zeros, length, generation, xxh3_128, offset in the arena."""
pack = msgspec.msgpack.encode


class Place(NamedTuple):
    """One entry of PINNED."""

    status: int
    zeros: bytes
    length: int
    generation: int
    checksum: bytes
    offset: int


MISS = Place(Status.MISS, bytes(3), 0, 0, bytes(16), 0)


class Answer(NamedTuple):
    """PINNED as it comes on a data connection, or the owner's ERROR."""

    ttl_ms: int
    endpoint: str
    places: list[Place]
    error: str = ""


def answer(reader: Reader) -> Answer:
    length, version, kind, _, request_id = HEADER.unpack(reader.exactly(HEADER_BYTES))
    body = reader.exactly(length)
    if kind == PeerType.ERROR:
        error = CODEC.decode(Frame(kind, 0, 0, body))
        assert isinstance(error, PeerError)
        return Answer(0, "", [], error.code)
    assert (version, kind, request_id) == (1, PeerType.PINNED, 0)
    ttl_ms, name_bytes = struct.unpack_from("<II", body)
    places = [Place(*row) for row in RECORD.iter_unpack(body[8 + name_bytes :])]
    return Answer(ttl_ms, body[8 : 8 + name_bytes].decode(), places)


def pin(
    reader: Reader, keys: Sequence[bytes], ttl_ms: int = 10_000, *, space: int = SPACE, serve: bool = False
) -> Answer:
    reader.sock.sendall(CODEC.encode(Pin(space, list(keys), ttl_ms, serve)))
    return answer(reader)


@pytest.fixture
def owner() -> Iterator[Owner]:
    with Owner() as made:
        made.server.set_endpoint(ENDPOINT)
        yield made
        until(made.idle)
        assert made.server.leases_held == 0
        made.store.check_integrity()


def lying(owner: Owner, place: Place) -> bytes:
    return bytes(owner.arena.view(place.offset, place.length))


# ---- the answer


@pytest.mark.parametrize("same_host", [False, True])
@pytest.mark.parametrize("block_bytes", [4096, BLOCK, (5 << 20) + 13])
def test_a_record_says_where_its_block_lies_and_what_it_is(owner: Owner, same_host: bool, block_bytes: int) -> None:
    layout = layout_of(block_bytes)
    blocks = owner.put(layout, 3)
    with owner.connect(same_host=same_host) as reader:
        got = pin(reader, list(blocks), space=layout.namespace)
        assert [lying(owner, place) for place in got.places] == list(blocks.values())
    assert got.ttl_ms in (9_999, 10_000) and got.endpoint == ENDPOINT
    assert [place.checksum for place in got.places] == [_native.xxh3_128(content) for content in blocks.values()]
    assert len({place.generation for place in got.places} - {0}) == 3
    assert all(place[:3] == (Status.OK, bytes(3), block_bytes) for place in got.places)
    assert (owner.server.pins, owner.server.gets, owner.server.bytes_served) == (1, 0, 0)


def test_generations_and_checksums_are_those_of_a_get(owner: Owner) -> None:
    blocks = owner.put(LAYOUT, 4)
    with owner.connect() as reader:
        places = pin(reader, list(blocks)).places
        records = reader.get(SPACE, list(blocks)).records
    assert [(p.status, p.length, p.generation, p.checksum) for p in places] == records


def test_what_is_not_there_is_a_miss_of_zeros_and_does_not_shift_its_neighbours(owner: Owner) -> None:
    blocks = owner.put(LAYOUT, 2)
    first, last = blocks
    with owner.connect() as reader:
        places = pin(reader, [os.urandom(16), first, os.urandom(64), last, os.urandom(8), first]).places
        assert places[0] == places[2] == places[4] == MISS
        assert [lying(owner, places[i]) for i in (1, 3, 5)] == [blocks[first], blocks[last], blocks[first]]
        assert places[1] == places[5]
        assert pin(reader, [first], space=SPACE ^ 1).places == [MISS] and owner.leases == 0
        assert pin(reader, [os.urandom(16)] * 300).places == [MISS] * 300 and owner.leases == 0
        assert pin(reader, []).places == []
        assert len(pin(reader, [os.urandom(64) for _ in range(16_384)]).places) == 16_384
    assert (owner.server.leases_given, owner.server.pins) == (1, 5)


def test_gets_and_pins_take_turns_on_one_connection(owner: Owner) -> None:
    blocks = owner.put(LAYOUT, 2)
    keys = list(blocks)
    with owner.connect() as reader:
        for _ in range(3):
            assert [lying(owner, place) for place in pin(reader, keys).places] == list(blocks.values())
            assert owner.leases == 1
            assert reader.get(SPACE, keys).payloads == list(blocks.values())
            assert owner.leases == 1
        ahead = [Pin(SPACE, keys, 1000), Get(SPACE, keys, 1000), Release(0), Pin(SPACE, keys[1:], 1000)]
        reader.sock.sendall(b"".join(map(CODEC.encode, ahead)))
        assert len(answer(reader).places) == 2
        assert reader.answer().payloads == list(blocks.values())
        assert [lying(owner, place) for place in answer(reader).places] == [blocks[keys[1]]]
    assert (owner.server.pins, owner.server.gets) == (5, 4)


def test_the_next_pin_names_the_endpoint_that_there_is_by_then(owner: Owner) -> None:
    keys = list(owner.put(LAYOUT))
    with owner.connect() as reader:
        for name in (ENDPOINT, "a1:7:4", "x" * 256, "ä:1:1"):
            owner.server.set_endpoint(name)
            got = pin(reader, keys)
            assert got.endpoint == name and lying(owner, got.places[0])
        owner.server.set_endpoint("")
        assert pin(reader, keys).error == "busy" and owner.leases == 0
        owner.server.set_endpoint(ENDPOINT)
        assert pin(reader, keys).endpoint == ENDPOINT and owner.leases == 1


# ---- refusals


def test_without_an_endpoint_a_pin_is_refused_and_a_get_is_not() -> None:
    with Owner() as owner, owner.connect() as reader:
        [(key, content)] = owner.put(LAYOUT).items()
        assert pin(reader, [key]).error == "busy"
        assert owner.leases == owner.server.leases_given == 0
        assert reader.get(SPACE, [key]).payloads == [content]
        assert pin(reader, [key]).error == "busy"
        assert owner.leases == 0, "it was the next request"
        assert (owner.server.pins, owner.server.protocol_errors) == (2, 0)


def test_who_wants_to_be_served_has_to_ask_elsewhere(owner: Owner) -> None:
    [(key, content)] = owner.put(LAYOUT).items()
    with owner.connect() as reader:
        assert pin(reader, [key], serve=True).error == "unsupported"
        assert owner.leases == owner.server.leases_given == 0
        owner.server.set_endpoint("")
        assert pin(reader, [key], serve=True).error == "unsupported"
        owner.server.set_endpoint(ENDPOINT)
        assert [lying(owner, place) for place in pin(reader, [key]).places] == [content]


@pytest.mark.parametrize(
    "limits",
    [LeaseLimits(leases_per_holder_max=1), LeaseLimits(bytes_per_holder_max=2 * BLOCK)],
    ids=["leases", "bytes"],
)
def test_a_reader_that_holds_as_much_as_it_may_is_told_busy(limits: LeaseLimits) -> None:
    with Owner(leases=limits) as owner:
        owner.server.set_endpoint(ENDPOINT)
        blocks = owner.put(LAYOUT, 3)
        keys = list(blocks)
        with owner.connect() as one, owner.connect() as two, owner.connect(node=NODE + 1) as other:
            assert len(pin(one, keys[:2]).places) == 2
            assert pin(two, keys[2:]).error == "busy"
            assert (owner.server.refused, owner.leases) == (1, 1)
            assert pin(two, [os.urandom(16)]).places == [MISS], "that takes no room"
            assert len(pin(other, keys[2:]).places) == 1
            one.release()
            until(lambda: owner.leases == 1)
            assert [lying(owner, place) for place in pin(two, keys[2:]).places] == [blocks[keys[2]]]
        until(owner.idle)


# ---- leases


def test_blocks_are_held_from_pin_until_release(owner: Owner) -> None:
    keys = list(owner.put(LAYOUT, 2))
    with owner.connect() as reader:
        pin(reader, keys)
        assert owner.leases == owner.server.leases_held == 1
        reader.release()
        until(lambda: owner.leases == 0)
        pin(reader, keys)
        assert owner.leases == owner.server.leases_held == 1


def test_a_pinned_block_stays_where_it_is_while_others_come(owner: Owner) -> None:
    blocks = owner.put(LAYOUT, 8)
    with owner.connect() as reader:
        places = pin(reader, list(blocks)).places
        for _ in range(3):
            owner.put(LAYOUT, (32 << 20) // BLOCK - 16)  # all the room there is beside them
        assert [lying(owner, place) for place in places] == list(blocks.values())
        reader.release()
        until(lambda: owner.leases == 0)
        for _ in range(3):
            owner.put(LAYOUT, (32 << 20) // BLOCK - 16)
        assert pin(reader, list(blocks)).places == [MISS] * 8, "nothing holds them any more"


def test_the_next_request_releases_what_the_last_one_held(owner: Owner) -> None:
    keys = list(owner.put(LAYOUT, 2))
    with owner.connect() as reader:
        for _ in range(5):
            pin(reader, keys)
            assert owner.leases == 1
        pin(reader, [os.urandom(16)])
        assert owner.leases == 0
        pin(reader, keys)
        reader.get(SPACE, [os.urandom(16)])
        assert owner.leases == 0
        pin(reader, keys)
        assert pin(reader, keys, serve=True).error == "unsupported"
        assert owner.leases == 0
    assert owner.server.leases_given == 7


def test_the_end_of_the_connection_releases(owner: Owner) -> None:
    with owner.connect() as reader:
        pin(reader, list(owner.put(LAYOUT)))
        assert owner.leases == 1
    until(owner.idle, 2.0)


def test_a_lease_that_runs_out_is_given_back_and_the_connection_stays(owner: Owner) -> None:
    keys = list(owner.put(LAYOUT))
    with owner.connect() as reader:
        started = time.monotonic()
        assert pin(reader, keys, ttl_ms=100).ttl_ms in (99, 100)
        until(lambda: owner.leases == 0, 2.0)
        assert time.monotonic() - started >= 0.1
        assert len(pin(reader, keys).places) == 1
    assert owner.server.cut_off == 0


def test_the_owner_bounds_how_long_blocks_are_held_and_says_so() -> None:
    with Owner(lease_ttl_s=0.2, leases=LeaseLimits(ttl_min_s=0.125)) as owner, owner.connect() as reader:
        owner.server.set_endpoint(ENDPOINT)
        keys = list(owner.put(LAYOUT))
        assert pin(reader, keys, ttl_ms=0).ttl_ms in (124, 125)
        assert pin(reader, keys, ttl_ms=0xFFFF_FFFF).ttl_ms in (199, 200)
        until(lambda: owner.leases == 0, 2.0)


def test_a_reader_that_does_not_read_its_answers_is_cut_off() -> None:
    with Owner(lease_ttl_s=0.3) as owner, owner.connect(narrow=True) as stuck, owner.connect() as other:
        owner.server.set_endpoint(ENDPOINT)
        [(key, content)] = owner.put(LAYOUT).items()
        stuck.sock.sendall(CODEC.encode(Pin(SPACE, [key] * 16_384, 300)))
        until(lambda: owner.server.cut_off == 1, 3.0)
        assert [lying(owner, place) for place in pin(other, [key]).places] == [content]


def test_stop_gives_every_lease_back() -> None:
    with Owner() as owner:
        owner.server.set_endpoint(ENDPOINT)
        keys = list(owner.put(LAYOUT))
        with owner.connect() as one, owner.connect() as two:
            pin(one, keys), pin(two, keys)
            assert owner.leases == 2
            owner.server.stop()
            assert owner.idle() and owner.server.leases_held == 0
            owner.server.set_endpoint("later")


# ---- what is malformed


KEY = bytes(range(16))


def frame(body: bytes, *, length: int | None = None) -> bytes:
    return HEADER.pack(len(body) if length is None else length, 1, PeerType.PIN, 0, 0) + body


LAWFUL = pack([SPACE, [KEY], 1_000, False])
NONSENSE = {
    "nothing": b"",
    "not msgpack": b"\xc1" * 64,
    "a map": pack({"namespace": 1}),
    "without serve": pack([SPACE, [KEY], 1_000]),
    "a number for serve": pack([SPACE, [KEY], 1_000, 1]),
    "nil for serve": pack([SPACE, [KEY], 1_000, None]),
    "a text for the namespace": pack(["m", [KEY], 1_000, False]),
    "a negative namespace": pack([-1, [KEY], 1_000, False]),
    "a key for the keys": pack([SPACE, KEY, 1_000, False]),
    "a text for a key": pack([SPACE, ["x" * 16], 1_000, False]),
    "a short key": pack([SPACE, [bytes(7)], 1_000, False]),
    "a long key": pack([SPACE, [bytes(65)], 1_000, False]),
    "one key too many": pack([SPACE, [bytes(8)] * 16_385, 1_000, False]),
    "a fraction for the ttl": pack([SPACE, [KEY], 1.5, False]),
    "a negative ttl": pack([SPACE, [KEY], -1, False]),
    "a ttl of more than 32 bits": pack([SPACE, [KEY], 1 << 32, False]),
    "something behind it": LAWFUL + b"\x00",
    "another count of fields than there are": b"\x95" + LAWFUL[1:],
    "more keys claimed than there are": b"\x94\x01\xdd\xff\xff\xff\xff\x01\xc2",
    "a later version's field that is cut short": pack([SPACE, [KEY], 1_000, False, "later"])[:-1],
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_a_malformed_pin_ends_its_connection_and_releases_what_it_held(owner: Owner, nonsense: str) -> None:
    keys = list(owner.put(LAYOUT))
    with owner.connect() as reader:
        assert len(pin(reader, keys).places) == 1
        reader.sock.sendall(frame(NONSENSE[nonsense]))
        assert reader.last_words() in ("", "malformed PIN")
        until(owner.idle)
    assert (owner.server.protocol_errors, owner.server.pins) == (1, 1)
    assert owner.server.drain() == [(NODE, "malformed PIN")]


@pytest.mark.parametrize("cut", range(len(LAWFUL)))
def test_a_pin_that_is_cut_short_is_malformed(owner: Owner, cut: int) -> None:
    with owner.connect() as reader:
        reader.sock.sendall(frame(LAWFUL[:cut]))
        assert reader.last_words() in ("", "malformed PIN")
    assert (owner.server.protocol_errors, owner.server.pins) == (1, 0)


def test_a_pin_that_is_too_large_ends_its_connection(owner: Owner) -> None:
    with owner.connect() as reader:
        reader.sock.sendall(frame(b"", length=(2 << 20) + 1))
        assert "too large" in reader.last_words()
    assert owner.server.protocol_errors == 1


def test_a_pin_byte_by_byte_is_a_pin(owner: Owner) -> None:
    [(key, content)] = owner.put(LAYOUT).items()
    with owner.connect() as reader:
        reader.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in CODEC.encode(Pin(SPACE, [key], 1000)):
            reader.sock.send(bytes([byte]))
        assert [lying(owner, place) for place in answer(reader).places] == [content]


@pytest.mark.parametrize("surplus", [[None], [7, "x" * 300, {"a": [1]}], [[0] * 70_000], [1.5, bytes(70_000)]])
def test_fields_of_a_later_version_are_ignored(owner: Owner, surplus: list[object]) -> None:
    [(key, content)] = owner.put(LAYOUT).items()
    with owner.connect() as reader:
        reader.sock.sendall(frame(pack([SPACE, [key], 1_000, False, *surplus])))
        assert [lying(owner, place) for place in answer(reader).places] == [content]


# ---- anything


class Scene:
    """An owner, two blocks, and a connection that is answered before and after all nonsense."""

    def __init__(self) -> None:
        self.owner = Owner()
        self.owner.server.set_endpoint(ENDPOINT)
        self.blocks = self.owner.put(LAYOUT, 2)
        self.witness = self.owner.connect()

    def check(self) -> None:
        got = pin(self.witness, list(self.blocks))
        assert [lying(self.owner, place) for place in got.places] == list(self.blocks.values())
        until(lambda: (self.owner.server.active, self.owner.leases) == (1, 1))

    def say(self, data: bytes) -> None:
        """On a connection of its own, without a network in between, up to its end."""
        here, there = socket.socketpair()
        there.setblocking(False)
        self.owner.server.add(there.detach(), NODE, False, b"")
        with Reader(here) as reader:
            try:
                reader.sock.sendall(data)
                reader.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # closed already
            reader.rest()


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    made = Scene()
    yield made
    made.witness.sock.close()
    made.owner.close()


def lawful_pins(data: bytes) -> int:
    """How many PINs come before the first thing that Python's own decoder calls malformed."""
    pins = 0
    try:
        for received in FrameDecoder(2 << 20).feed(data):
            pins += isinstance(CODEC.decode(received), Pin)
    except RemoteProtocolError:
        pass
    return pins


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_mutated_pins_are_refused_or_are_lawful(scene: Scene, data: st.DataObject) -> None:
    keys = st.lists(st.sampled_from([*scene.blocks, KEY]), max_size=4)
    asked = st.builds(Pin, st.just(SPACE), keys, st.integers(0, 10_000), st.booleans())
    words = st.one_of(asked, asked, st.builds(Get, st.just(SPACE), keys, st.just(1_000)), st.just(Release(0)))
    sent = bytearray(b"".join(map(CODEC.encode, data.draw(st.lists(words, min_size=1, max_size=5)))))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(sent) - 1), st.integers(0, 255)), max_size=4)):
        sent[at] = byte
    before = scene.owner.server.pins
    scene.say(bytes(sent))
    scene.check()
    assert scene.owner.server.pins - before - 1 <= lawful_pins(bytes(sent)), "one is the witness's"
