"""What an agent and its NIXL child say to each other over their socketpairs. One struct per message.

The agent asks, the child answers with the frame's request id repeated. For a READ that id *is* the read: progress,
the final answer and the end of its quarantine all carry it, and an agent never uses one twice.

    agent -> child                     child -> agent
    ADD_PEER                           PEER_ADDED
    READ, then perhaps CANCEL          READ_PROGRESS*  READ_DONE  [QUARANTINE_CLEAR, if READ_DONE left bytes open]
    REMOVE_PEER, SERVE, SHUTDOWN       (no answer)
    STATS                              STATS_REPLY
                                       READY once, before anything else; or FATAL instead of it

There are two sockets to a child: the supervisor's, for all of this, and a second one on which native code asks for
READs (``native/nixl_reads.hpp``). A read's id says which of the two it belongs to: see :data:`LANE_ID_MIN`.

Deadlines are absolute: nanoseconds of CLOCK_MONOTONIC, which parent and child share, so that time spent in the socket
counts. Runs travel packed, because a read may have thousands and both sides handle them as arrays.
"""

from __future__ import annotations

import enum
import os
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta

from p2pkv.errors import InvalidArgument
from p2pkv.wire.codec import Codec
from p2pkv.wire.frame import HEADER_BYTES, Frame, FrameDecoder, parse_header

RUN_BYTES: Final = 24
RUNS_MAX: Final = 16_384
"""As many as one PIN may name blocks."""

LANE_ID_MIN: Final = 1 << 31
"""Ids of reads from here on are those of the second socket."""

READ_BYTES_MAX: Final = 1 << 36
METADATA_BYTES_MAX: Final = 65_536
"""UCX's are 300 to 450 bytes with two devices; some KiB with many."""

BODY_BYTES_MAX: Final = RUN_BYTES * RUNS_MAX + 4_096
"""Largest lawful frame on the socketpair: a READ of RUNS_MAX runs."""

U32 = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
U63 = Annotated[int, Meta(ge=0, le=0x7FFFFFFFFFFFFFFF)]
U64 = Annotated[int, Meta(ge=0)]
"""msgpack itself bounds it at 2**64."""
AgentName = Annotated[str, Meta(min_length=1, max_length=256)]
Metadata = Annotated[bytes, Meta(min_length=1, max_length=METADATA_BYTES_MAX)]
PackedRuns = Annotated[bytes, Meta(min_length=RUN_BYTES, max_length=RUN_BYTES * RUNS_MAX)]
PackedExtents = Annotated[bytes, Meta(max_length=16 * RUNS_MAX)]
Detail = Annotated[str, Meta(max_length=1_024)]


class Run(NamedTuple):
    """One contiguous piece of a read. Offsets are bytes from the start of the owner's and of the own arena."""

    remote_offset: int
    local_offset: int
    length: int


def pack_runs(runs: Sequence[Run]) -> bytes:
    """u64[n][3], native (little-endian) order: remote offset, local offset, length.

    Raises:
        InvalidArgument: no run, too many, or a number that is negative or over 64 bits.
    """
    if not 1 <= len(runs) <= RUNS_MAX:
        raise InvalidArgument("a read has too few or too many runs", runs=len(runs), limit=RUNS_MAX)
    try:
        return array("Q", chain.from_iterable(runs)).tobytes()
    except (OverflowError, TypeError) as error:
        raise InvalidArgument("a run is not three unsigned 64-bit numbers") from error


def pack_extents(extents: Sequence[tuple[int, int]]) -> bytes:
    """u64[n][2]: offset and length."""
    return array("Q", [number for extent in extents for number in extent]).tobytes()


def unpack_extents(packed: bytes) -> list[tuple[int, int]]:
    """The reverse of :func:`pack_extents`; trailing bytes that are no whole extent are ignored."""
    numbers = array("Q")
    numbers.frombytes(packed[: len(packed) // 16 * 16])
    return [(numbers[i], numbers[i + 1]) for i in range(0, len(numbers), 2)]


def agent_name(node: int, epoch: int, incarnation: int) -> str:
    """Unique for ever: a restarted agent has a new epoch, a restarted child a new incarnation."""
    return f"{node:x}:{epoch}:{incarnation}"


def node_of(name: str) -> str:
    """The part of an agent name that its later incarnations share."""
    return name.partition(":")[0]


def monotonic_ns_after(now: float, seconds: float) -> int:
    """The absolute deadline, as the messages carry it, ``seconds`` after ``now`` (``time.monotonic()``)."""
    return max(0, int((now + seconds) * 1e9))


def cut(decoder: FrameDecoder, data: bytes) -> list[Frame]:
    """The frames that ``data`` completes. Nearly always it is exactly one, which then skips the decoder's buffer."""
    if not decoder.pending_bytes and len(data) >= HEADER_BYTES:
        length, message_type, flags, request_id = parse_header(data[:HEADER_BYTES], BODY_BYTES_MAX)
        if len(data) == HEADER_BYTES + length:
            return [Frame(message_type, request_id, flags, data[HEADER_BYTES:])]
    return list(decoder.feed(data))


class NixlType(enum.IntEnum):
    """Message types on the socketpair."""

    READY = 1
    FATAL = 2
    ADD_PEER = 3
    PEER_ADDED = 4
    REMOVE_PEER = 5
    READ = 6
    READ_PROGRESS = 7
    READ_DONE = 8
    QUARANTINE_CLEAR = 9
    CANCEL = 10
    SERVE = 11
    STATS = 12
    STATS_REPLY = 13
    SHUTDOWN = 14


class ReadStatus(enum.IntEnum):
    """How a read ended. Only OK means that every byte of every run has landed."""

    OK = 0
    ERROR = 1  # the fabric said so: peer gone, connection broken, memory not registered
    TIMEOUT = 2
    CANCELLED = 3
    NO_PEER = 4  # never added, or replaced by a newer incarnation
    INVALID = 5  # a run leaves one of the arenas
    BUSY = 6
    DISCONNECTED = 7  # the peer's process, or the way to it, is gone; ADD_PEER connects again


class FatalCode(enum.IntEnum):
    """Why a child could not start."""

    NO_NIXL = 1
    NO_BACKEND = 2
    ARENA = 3


class Ready(msgspec.Struct, frozen=True, array_like=True):
    """The arena is registered. ``base`` is the child's own address of it: what peers read from."""

    name: AgentName
    metadata: Metadata
    base: U64
    arena_bytes: U63
    package: AgentName  # "nixl_cu12", and which version of it
    version: AgentName


class Fatal(msgspec.Struct, frozen=True, array_like=True):
    """The child cannot work on this host and exits."""

    code: FatalCode
    detail: Detail


class AddPeer(msgspec.Struct, frozen=True, array_like=True):
    """Connect to an owner, forget older incarnations of it, and warm the connection up."""

    name: AgentName
    metadata: Metadata
    base: U64
    arena_bytes: U63
    deadline_ns: U63


SILENT: Final = "it did not answer in time; is its process progressing (SERVE)?"
"""An ``error`` of PeerAdded."""


class PeerAdded(msgspec.Struct, frozen=True, array_like=True):
    """``error`` empty: connected. ``inline``: reads finish without the owner's process doing anything, by a copy in
    this child's own system call (CMA), so the owner need not SERVE."""

    name: AgentName
    error: Detail
    inline: bool
    connect_us: U63


class RemovePeer(msgspec.Struct, frozen=True, array_like=True):
    """Forget a peer; its reads in flight end with NO_PEER."""

    name: AgentName


class Read(msgspec.Struct, frozen=True, array_like=True):
    """Read ``runs`` (:func:`pack_runs`) from a peer that was added. ``piece_bytes``: report progress in steps of about
    that; 0: do not report, and use the largest transfers."""

    peer: AgentName
    runs: PackedRuns
    piece_bytes: U32
    deadline_ns: U63


class ReadProgress(msgspec.Struct, frozen=True, array_like=True):
    """The first ``done_bytes`` bytes of the read, counted along its runs, have landed and will not change any more."""

    done_bytes: U63


class ReadDone(msgspec.Struct, frozen=True, array_like=True):
    """The last word on a read, in time. ``open`` (:func:`pack_extents` of the own arena) is what may still be written
    by transfers that cannot be called off: not to be reused before QUARANTINE_CLEAR, or before the child is reaped.
    ``inline``: no piece of it needed the owner's process, and none of later reads is expected to (see PEER_ADDED); of a
    read that did not end well, True says nothing."""

    status: ReadStatus
    done_bytes: U63
    open: PackedExtents
    inline: bool
    detail: Detail


class QuarantineClear(msgspec.Struct, frozen=True, array_like=True):
    """Nothing of this read is in flight any more."""


class Cancel(msgspec.Struct, frozen=True, array_like=True):
    """The asker gave up: as if the read's deadline were now."""


class Serve(msgspec.Struct, frozen=True, array_like=True):
    """A peer reads from here: keep progressing until then. Replaces the earlier SERVE; a time gone by ends it."""

    until_ns: U63


class Stats(msgspec.Struct, frozen=True, array_like=True):
    """Asks for counters; also the sign of life."""


class StatsReply(msgspec.Struct, frozen=True, array_like=True):
    """Counters since the child started, and levels now."""

    reads_ok: U63
    reads_failed: U63
    reads_timed_out: U63
    bytes_read: U63
    reads_active: U63
    peers: U63
    quarantined_bytes: U63
    cpu_ns: U63


class Shutdown(msgspec.Struct, frozen=True, array_like=True):
    """Exit now."""


CODEC: Final = Codec(
    {
        NixlType.READY: Ready,
        NixlType.FATAL: Fatal,
        NixlType.ADD_PEER: AddPeer,
        NixlType.PEER_ADDED: PeerAdded,
        NixlType.REMOVE_PEER: RemovePeer,
        NixlType.READ: Read,
        NixlType.READ_PROGRESS: ReadProgress,
        NixlType.READ_DONE: ReadDone,
        NixlType.QUARANTINE_CLEAR: QuarantineClear,
        NixlType.CANCEL: Cancel,
        NixlType.SERVE: Serve,
        NixlType.STATS: Stats,
        NixlType.STATS_REPLY: StatsReply,
        NixlType.SHUTDOWN: Shutdown,
    }
)

EXIT_PROTOCOL: Final = os.EX_PROTOCOL
EXIT_FATAL: Final = os.EX_UNAVAILABLE
EXIT_ORPHAN: Final = os.EX_OK
