"""Messages between agents and from engines: what is encoded is what is decoded, and nonsense is a typed error."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv.errors import RemoteProtocolError
from p2pkv.types import Layout
from p2pkv.wire import engine, peer
from p2pkv.wire.codec import Codec
from p2pkv.wire.fields import Extent
from p2pkv.wire.frame import BODY_BYTES_MAX, HEADER_BYTES, Frame, FrameDecoder
from p2pkv.wire.limits import KEYS_MAX

pytestmark = pytest.mark.deep

CODECS = {"peer": peer.CODEC, "engine": engine.CODEC}

names = st.text(max_size=40)
u8, u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
hashes = st.lists(st.binary(min_size=8, max_size=64), max_size=5)
slots = st.lists(u32, max_size=5)
extents = st.lists(st.builds(Extent, st.integers(0, 1 << 63), st.integers(0, 1 << 63)), max_size=4)
layouts = st.builds(
    Layout,
    model=names,
    revision=names,
    kv_dtype=names,
    block_tokens=st.integers(1, 1 << 20),
    block_bytes=st.integers(1, 1 << 27),
    tenant=names,
    hash_seed=names,
)
addresses = st.builds(peer.Address, names, u16)
cards = st.builds(
    peer.Card,
    u64,
    u32,
    addresses,
    names,
    names,
    st.lists(layouts, max_size=2),
    st.lists(names, max_size=3),
    u64,
    st.lists(names, max_size=2),
    names,
    u32,
)
endpoints = st.builds(peer.NixlEndpoint, names, st.binary(max_size=50), u64, u64)
tiers = st.lists(st.binary(max_size=64), max_size=5)

MESSAGES: dict[str, list[st.SearchStrategy[Any]]] = {
    "peer": [
        st.builds(peer.Hello, u16, u16, names, names, cards),
        st.builds(peer.Welcome, u16, cards, names, st.binary(max_size=256)),
        st.builds(peer.Bye),
        st.builds(peer.Pin, u64, hashes, u32, st.booleans()),
        st.builds(
            peer.Pinned,
            u64,
            u32,
            st.binary(max_size=9),
            extents,
            st.lists(u64, max_size=3),
            st.binary(max_size=48),
            names,
        ),
        st.builds(peer.Release, u64),
        st.builds(peer.Released, st.booleans()),
        st.builds(peer.Get, u64, hashes, u32),
        st.builds(peer.NixlConnect, endpoints, u32),
        st.builds(peer.Suspect, u64, st.lists(st.binary(min_size=8, max_size=64), min_size=1, max_size=4)),
        st.builds(peer.Suspected, st.binary(max_size=peer.SUSPECTS_MAX)),
        st.builds(peer.Hot, u64, u32, st.binary(max_size=64)),
        st.builds(peer.HotKeys, hashes),
        st.builds(peer.Replicate, u64, st.lists(st.binary(min_size=8, max_size=64), min_size=1, max_size=4)),
        st.builds(peer.Replicated, u32, u32),
        st.builds(peer.NixlEndpointReply, st.none() | endpoints),
        st.builds(peer.PeerError, names, names, st.lists(names, max_size=3)),
    ],
    "engine": [
        st.builds(engine.Attach, u32, u32, names, u32),
        st.builds(engine.Ready, u32, u64, u32, u64, u32),
        st.builds(engine.Open, layouts),
        st.builds(engine.Opened, u64),
        st.builds(engine.MapRegion, u32, u64, u64, u32),
        st.builds(engine.UnmapRegion, u32),
        st.builds(engine.Store, u64, hashes, u32, slots, u32),
        st.builds(engine.Load, u64, hashes, u32, slots, u32),
        st.builds(engine.Done, st.binary(max_size=9), st.binary(max_size=9), u64, u64),
        st.builds(engine.Get, u64, hashes, u32),
        st.builds(engine.Got, u64, u32, slots, st.binary(max_size=9), st.binary(max_size=9), extents, st.booleans()),
        st.builds(engine.ReleaseLease, u64),
        st.builds(engine.Ahead, u32, u64, u64),
        st.builds(engine.MatchKeys, u64, hashes, st.booleans()),
        st.builds(
            engine.Matched,
            st.binary(max_size=9),
            u32,
            u32,
            st.lists(st.builds(engine.NodeMatch, u64, u32, u32, u32, u32, u32), max_size=3),
        ),
        st.builds(engine.Prefetch, u64, hashes, u32),
        st.builds(engine.Replicate, u64, hashes, st.lists(u64, min_size=1, max_size=3)),
        st.builds(engine.Replicated, slots, slots, st.lists(names, max_size=3)),
        st.builds(engine.Warm, u64, u32, st.booleans()),
        st.builds(engine.Warming, st.booleans(), st.booleans(), u32, u64, u64, u64, u64, u64, u64, u64, names),
        st.builds(engine.Ok),
        st.builds(engine.EngineError, names, names, st.lists(names, max_size=3)),
    ],
}


def through_the_wire(codec: Codec, message: msgspec.Struct, request_id: int) -> tuple[msgspec.Struct, int]:
    [frame] = FrameDecoder().feed(codec.encode(message, request_id))
    return codec.decode(frame), frame.request_id


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=120)
@given(data=st.data(), request_id=u32)
def test_what_is_encoded_is_what_is_decoded(name: str, data: st.DataObject, request_id: int) -> None:
    message = data.draw(st.one_of(MESSAGES[name]))
    assert through_the_wire(CODECS[name], message, request_id) == (message, request_id)


@pytest.mark.parametrize("name", CODECS)
def test_every_message_of_the_set_is_tried_above(name: str) -> None:
    assert len(MESSAGES[name]) == len(CODECS[name]._types)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=120)
@given(message_type=u8, body=st.binary(max_size=200))
def test_random_bodies_are_messages_or_a_remote_protocol_error(name: str, message_type: int, body: bytes) -> None:
    try:
        CODECS[name].decode(Frame(message_type, 1, 0, body))
    except RemoteProtocolError:
        pass


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=80),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=150)
@given(data=st.data(), fields=st.lists(json_like, max_size=9))
def test_lawful_msgpack_of_the_wrong_shape_is_a_message_or_a_remote_protocol_error(
    name: str, data: st.DataObject, fields: list[object]
) -> None:
    codec = CODECS[name]
    message_type = data.draw(st.sampled_from(sorted(codec._structs)))
    try:
        codec.decode(Frame(message_type, 1, 0, msgspec.msgpack.encode(fields)))
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=80)
@given(data=st.data())
def test_a_message_with_its_end_cut_off_is_a_remote_protocol_error(name: str, data: st.DataObject) -> None:
    message = data.draw(st.one_of(MESSAGES[name]))
    [frame] = FrameDecoder().feed(CODECS[name].encode(message))
    if frame.body:
        cut = data.draw(st.integers(0, len(frame.body) - 1))
        with pytest.raises(RemoteProtocolError):
            CODECS[name].decode(frame._replace(body=frame.body[:cut]))


@pytest.mark.parametrize(
    ("message_type", "fields"),
    [
        (peer.PeerType.GET, [1, [bytes(7)], 1]),
        (peer.PeerType.GET, [1, [bytes(65)], 1]),
        (peer.PeerType.GET, [1, [bytes(8)] * (KEYS_MAX + 1), 1]),
        (peer.PeerType.GET, [1, [], 1 << 32]),
        (peer.PeerType.GET, [-1, [], 1]),
        (peer.PeerType.GET, [True, [], 1]),
        (peer.PeerType.GET, [1, ["12345678"], 1]),
        (peer.PeerType.GET, [1.0, [], 1]),
        (peer.PeerType.WELCOME, [1, None, []]),
    ],
)
def test_values_out_of_bounds_are_refused(message_type: int, fields: list[object]) -> None:
    with pytest.raises(RemoteProtocolError, match="malformed"):
        peer.CODEC.decode(Frame(message_type, 1, 0, msgspec.msgpack.encode(fields)))


@pytest.mark.parametrize("depth", [1_000, 1_000_000])
def test_nesting_without_end_is_a_remote_protocol_error(depth: int) -> None:
    for codec in CODECS.values():
        for message_type in codec._structs:
            with pytest.raises(RemoteProtocolError):
                codec.decode(Frame(message_type, 1, 0, b"\x91" * depth + b"\x90"))


def test_the_largest_lawful_messages_fit_a_frame() -> None:
    keys = [bytes(64)] * KEYS_MAX
    largest = [
        peer.CODEC.encode(peer.Get((1 << 64) - 1, keys, 1)),
        engine.CODEC.encode(engine.Store(1, keys, 1, [0xFFFF_FFFF] * KEYS_MAX, 1)),
        peer.CODEC.encode(
            peer.Pinned(
                1,
                1,
                bytes(KEYS_MAX),
                [Extent(1 << 60, 1 << 27)] * KEYS_MAX,
                [1 << 60] * KEYS_MAX,
                bytes(16 * KEYS_MAX),
                "x" * 256,
            )
        ),
        engine.CODEC.encode(
            engine.Got(
                1,
                1,
                [0xFFFF_FFFF] * KEYS_MAX,
                bytes(KEYS_MAX),
                bytes(KEYS_MAX),
                [Extent(1 << 60, 1 << 27)] * KEYS_MAX,
                True,
            )
        ),
    ]
    assert all(len(frame) - HEADER_BYTES <= BODY_BYTES_MAX for frame in largest)


def test_a_got_record_is_laid_out_as_documented() -> None:
    record = peer.GOT_RECORD.pack(2, 0x01020304, 5, bytes(range(16)))
    assert record == b"\x02\0\0\0" + b"\4\3\2\1" + b"\5\0\0\0\0\0\0\0" + bytes(range(16))
