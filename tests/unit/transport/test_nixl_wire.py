"""Messages between an agent and its NIXL child: the lawful comes out as it went in, the rest does not get in."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.errors import InvalidArgument, RemoteProtocolError
from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_wire import Run
from p2pkv.wire.frame import FrameDecoder

U64 = st.integers(0, (1 << 64) - 1)
EXAMPLES: list[msgspec.Struct] = [
    wire.Ready("a:1:1", b"md", (1 << 64) - 1, 1 << 40, "nixl_cu12", "1.5.1"),
    wire.Fatal(wire.FatalCode.NO_NIXL, "no"),
    wire.AddPeer("a:1:1", b"md", 4096, 1 << 30, 1),
    wire.PeerAdded("a:1:1", "", True, 7),
    wire.RemovePeer("a:1:1"),
    wire.Read("a:1:1", wire.pack_runs([Run(1, 2, 3)]), 0, 5),
    wire.ReadProgress(9),
    wire.ReadDone(wire.ReadStatus.TIMEOUT, 4, wire.pack_extents([(1, 2)]), False, "late"),
    wire.QuarantineClear(),
    wire.Cancel(),
    wire.Serve(12),
    wire.Stats(),
    wire.StatsReply(1, 2, 3, 4, 5, 6, 7, 8),
    wire.Shutdown(),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda m: type(m).__name__)
def test_every_message_comes_out_as_it_went_in_whole_or_in_bits(message: msgspec.Struct) -> None:
    data = wire.CODEC.encode(message, 77)
    (frame,) = wire.cut(FrameDecoder(), data)
    assert (wire.CODEC.decode(frame), frame.request_id) == (message, 77)
    decoder = FrameDecoder()
    frames = [frame for byte in data + data for frame in wire.cut(decoder, bytes([byte]))]
    assert [wire.CODEC.decode(frame) for frame in frames] == [message, message]


def test_every_type_has_an_example() -> None:
    assert {type(message) for message in EXAMPLES} == {type(wire.CODEC.decode(f)) for f in _frames()}
    assert len(EXAMPLES) == len(wire.NixlType)


def _frames() -> list[wire.Frame]:
    return [frame for message in EXAMPLES for frame in wire.cut(FrameDecoder(), wire.CODEC.encode(message))]


@pytest.mark.parametrize(
    "message",
    [
        wire.Read("", wire.pack_runs([Run(1, 2, 3)]), 0, 5),
        wire.Read("a" * 300, wire.pack_runs([Run(1, 2, 3)]), 0, 5),
        wire.Read("a", b"", 0, 5),
        wire.Read("a", b"x" * (wire.RUN_BYTES * wire.RUNS_MAX + 1), 0, 5),
        wire.Read("a", wire.pack_runs([Run(1, 2, 3)]), 0, -1),
        wire.AddPeer("a", b"", 0, 0, 0),
        wire.AddPeer("a", b"x" * (wire.METADATA_BYTES_MAX + 1), 0, 0, 0),
        wire.ReadProgress(-1),
        wire.ReadDone(99, 0, b"", True, ""),  # type: ignore[arg-type]
    ],
    ids=range(9),
)
def test_unlawful_values_are_refused_by_the_receiver(message: msgspec.Struct) -> None:
    (frame,) = FrameDecoder().feed(wire.CODEC.encode(message))
    with pytest.raises(RemoteProtocolError):
        wire.CODEC.decode(frame)


def test_a_frame_over_the_limit_is_refused_by_its_header() -> None:
    data = wire.CODEC.encode(wire.Fatal(wire.FatalCode.ARENA, "x" * (wire.BODY_BYTES_MAX + 1)))
    for part in (data, data[:12]):
        with pytest.raises(RemoteProtocolError, match="too large"):
            wire.cut(FrameDecoder(wire.BODY_BYTES_MAX), part)


def test_the_largest_read_fits_a_frame() -> None:
    runs = [Run((1 << 64) - 1, (1 << 64) - 1, (1 << 64) - 1)] * wire.RUNS_MAX
    data = wire.CODEC.encode(wire.Read("a" * 256, wire.pack_runs(runs), 0xFFFFFFFF, 1 << 62))
    assert len(wire.cut(FrameDecoder(wire.BODY_BYTES_MAX), data)) == 1


@given(st.lists(st.tuples(U64, U64), max_size=50))
def test_extents_come_out_as_they_went_in(extents: list[tuple[int, int]]) -> None:
    assert wire.unpack_extents(wire.pack_extents(extents)) == extents


@given(st.binary(max_size=100))
def test_any_bytes_unpack_without_an_error(packed: bytes) -> None:
    assert len(wire.unpack_extents(packed)) == len(packed) // 16


@pytest.mark.parametrize(
    "runs", [[], [Run(0, 0, 1)] * (wire.RUNS_MAX + 1), [Run(-1, 0, 1)], [Run(0, 1 << 64, 1)]], ids=range(4)
)
def test_runs_that_cannot_be_packed_are_an_invalid_argument(runs: list[Run]) -> None:
    with pytest.raises(InvalidArgument):
        wire.pack_runs(runs)


@given(st.binary(max_size=200))
def test_noise_is_a_protocol_error_or_not_yet_a_frame(noise: bytes) -> None:
    try:
        for frame in wire.cut(FrameDecoder(wire.BODY_BYTES_MAX), noise):
            wire.CODEC.decode(frame)
    except RemoteProtocolError:
        pass


def test_agent_names_are_unique_per_start_and_share_their_node() -> None:
    names = {wire.agent_name(255, epoch, incarnation) for epoch in (1, 11) for incarnation in (1, 11, 111)}
    assert len(names) == 6
    assert {wire.node_of(name) for name in names} == {"ff"}
