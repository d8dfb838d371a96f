"""Framing: a byte stream cut into frames, however it arrives, and nothing else taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.errors import LocalProtocolError, RemoteProtocolError
from p2pkv.wire.frame import (
    BODY_BYTES_MAX,
    FRAME_VERSION,
    HEADER,
    HEADER_BYTES,
    Frame,
    FrameDecoder,
    encode,
    parse_header,
)

frames = st.lists(
    st.tuples(st.integers(0, 255), st.integers(0, 0xFFFF_FFFF), st.integers(0, 0xFFFF), st.binary(max_size=300)),
    max_size=8,
)


def packed(message_type: int, request_id: int, flags: int, body: bytes) -> bytes:
    return HEADER.pack(len(body), FRAME_VERSION, message_type, flags, request_id) + body


@given(frames, st.data())
def test_frames_come_out_as_they_went_in_however_the_stream_is_cut(
    sent: list[tuple[int, int, int, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(packed(*frame) for frame in sent)
    decoder = FrameDecoder()
    received: list[Frame] = []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        received += list(decoder.feed(stream[:size]))
        stream = stream[size:]
    assert received == [Frame(*frame) for frame in sent]
    assert decoder.pending_bytes == 0


def test_a_frame_is_yielded_as_soon_as_its_last_byte_is_there() -> None:
    whole = packed(7, 1, 0, b"body")
    decoder = FrameDecoder()
    assert list(decoder.feed(whole[:-1])) == []
    assert decoder.pending_bytes == len(whole) - 1
    assert list(decoder.feed(whole[-1:])) == [Frame(7, 1, 0, b"body")]


def test_the_header_is_laid_out_as_documented() -> None:
    header = encode(8, b"\x90", request_id=0x01020304, flags=0x0506)[:HEADER_BYTES]
    assert header == bytes([1, 0, 0, 0, FRAME_VERSION, 8, 6, 5, 4, 3, 2, 1])


@given(st.integers(0, 255).filter(lambda v: v != FRAME_VERSION))
def test_another_version_is_refused_before_its_length_is_believed(version: int) -> None:
    with pytest.raises(RemoteProtocolError, match="version"):
        parse_header(HEADER.pack(0xFFFF_FFFF, version, 1, 0, 1))


@given(st.integers(BODY_BYTES_MAX + 1, 0xFFFF_FFFF))
def test_a_body_over_the_limit_is_refused_from_its_header_alone(length: int) -> None:
    decoder = FrameDecoder()
    with pytest.raises(RemoteProtocolError, match="too large"):
        list(decoder.feed(HEADER.pack(length, FRAME_VERSION, 1, 0, 1)))


def test_a_decoder_may_be_told_a_lower_limit() -> None:
    decoder = FrameDecoder(100)
    assert list(decoder.feed(packed(1, 1, 0, bytes(100)))) == [Frame(1, 1, 0, bytes(100))]
    with pytest.raises(RemoteProtocolError):
        list(decoder.feed(packed(1, 1, 0, bytes(101))))


def test_frames_before_a_wrong_one_are_still_delivered() -> None:
    decoder = FrameDecoder()
    stream = decoder.feed(packed(1, 1, 0, b"a") + packed(2, 2, 0, b"b") + b"\xff" * 12)
    assert next(stream).body == b"a"
    assert next(stream).body == b"b"
    with pytest.raises(RemoteProtocolError):
        next(stream)


@given(st.binary(min_size=HEADER_BYTES, max_size=200))
def test_random_bytes_are_frames_or_a_remote_protocol_error(data: bytes) -> None:
    decoder = FrameDecoder(1000)
    try:
        for frame in decoder.feed(data):
            assert len(frame.body) <= 1000
    except RemoteProtocolError:
        return
    assert decoder.pending_bytes <= len(data)


def test_what_does_not_fit_a_frame_is_a_bug_here_not_there() -> None:
    with pytest.raises(LocalProtocolError):
        encode(1, bytes(BODY_BYTES_MAX + 1))
