"""What the engine remembers: peers, reads and how they are cut into pieces, and what is left of given-up reads.

Values and arithmetic only; :mod:`.nixl_engine` decides.
"""

from __future__ import annotations

from collections import deque
from operator import add
from typing import Final, NamedTuple

from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_fabric import FabricError, Table

PIECE_BYTES_MIN: Final = 256 << 10
PIECE_BYTES_MAX: Final = 8 << 20
"""Over CMA a post lasts as long as its bytes take, 2 ms for 8 MiB, and nothing else is served meanwhile."""

PIECE_RUNS_MAX: Final = 128
WINDOW_BYTES: Final = 16 << 20
"""In flight per read, and so what a given-up read leaves in quarantine. A 400 Gbit/s link with 100 us of delay holds
5 MB."""

Runs = tuple[list[int], list[int], list[int]]
"""Remote offsets, local offsets, lengths."""


class Peer:
    """An owner that can be read from, or soon."""

    __slots__ = (
        "base", "bytes", "in_flight", "inline", "metadata", "name", "probe", "probes", "probes_inline", "reads_inline",
        "since", "state", "waiters",
    )  # fmt: skip

    def __init__(self, request: wire.AddPeer, now: float) -> None:
        self.name = request.name
        self.metadata = request.metadata
        self.base = request.base
        self.bytes = request.arena_bytes
        self.state = "connecting"  # -> "ready" -> "gone"
        self.since = now
        self.probe: object | None = None
        self.probes = 0
        self.probes_inline = 0  # the latest so many in a row
        self.reads_inline = 0  # likewise, once it is ready
        self.inline = False
        self.in_flight = 0
        self.waiters: list[tuple[int, float]] = []  # (request id, deadline) of ADD_PEERs without an answer


class Piece:
    """One posted transfer and the own extents that it writes."""

    __slots__ = ("length", "local", "settled_at", "transfer")

    def __init__(self, transfer: object, local: Table, length: int) -> None:
        self.transfer = transfer
        self.local = local
        self.length = length
        self.settled_at: float | None = None  # set once it failed: rule 4


class ReadOp:
    """One READ: what is left to post (run, offset in it), what flies, how much has landed."""

    __slots__ = (
        "deadline", "done_bytes", "flying", "flying_bytes", "inline", "lengths", "local", "next_offset", "next_run",
        "peer", "piece_bytes", "read_id", "remote", "reported", "total", "wants_progress", "window",
    )  # fmt: skip

    def __init__(self, read_id: int, peer: Peer, runs: Runs, base: int, piece_bytes: int, deadline: float) -> None:
        self.read_id = read_id
        self.peer = peer
        self.deadline = deadline
        remote, local, self.lengths = runs
        self.remote = [offset + peer.base for offset in remote]
        self.local = [offset + base for offset in local]
        self.total = sum(self.lengths)
        self.wants_progress = piece_bytes > 0
        self.piece_bytes = min(max(piece_bytes, PIECE_BYTES_MIN), PIECE_BYTES_MAX) if piece_bytes else PIECE_BYTES_MAX
        self.window = WINDOW_BYTES - self.piece_bytes + 1
        self.next_run = 0
        self.next_offset = 0
        self.flying_bytes = 0
        self.inline = True  # so far every piece ended inside its post
        self.flying: deque[Piece] = deque()
        self.done_bytes = 0
        self.reported = 0

    @property
    def postable(self) -> bool:
        """Something is left, and the window has room."""
        return self.next_run < len(self.lengths) and self.flying_bytes < self.window

    def take(self) -> tuple[Table, Table, int]:
        """Descriptors of the next piece (local, remote, bytes): whole runs, or a part of a run that is too long."""
        first, offset, room = self.next_run, self.next_offset, self.piece_bytes
        lengths = self.lengths
        left = lengths[first] - offset
        if offset or left >= room:
            length = min(left, room)
            if length == left:
                self.next_run, self.next_offset = first + 1, 0
            else:
                self.next_offset = offset + length
            return [(self.local[first] + offset, length, 0)], [(self.remote[first] + offset, length, 0)], length
        end, last, length = first, min(len(lengths), first + PIECE_RUNS_MAX), 0
        while end < last and length + lengths[end] <= room:
            length += lengths[end]
            end += 1
        self.next_run = end
        local = [(self.local[i], lengths[i], 0) for i in range(first, end)]
        remote = [(self.remote[i], lengths[i], 0) for i in range(first, end)]
        return local, remote, length

    def skip(self, length: int) -> Table:
        """Leave out the next so many bytes, because somebody else has posted them; returns their own extents."""
        table: Table = []
        while length > 0:
            left = self.lengths[self.next_run] - self.next_offset
            taken = min(left, length)
            table.append((self.local[self.next_run] + self.next_offset, taken, 0))
            length -= taken
            self.next_offset += taken
            if taken == left:
                self.next_run, self.next_offset = self.next_run + 1, 0
        return table


class Quarantined:
    """What is left of a read that was answered before all of it had ended."""

    __slots__ = ("peer", "pieces", "read_id")

    def __init__(self, read_id: int, peer: Peer, pieces: list[Piece]) -> None:
        self.read_id = read_id
        self.peer = peer
        self.pieces = pieces


class HandedOver(NamedTuple):
    """A read that native code cannot go on with: its request, how many bytes have landed, and the piece that flies.

    ``handle``: NIXL's, of the piece; None = nothing flies. ``error``: the piece, or the making of it, failed.
    """

    read_id: int
    request: wire.Read
    done_bytes: int
    handle: int | None
    flying_bytes: int
    error: FabricError | None


def runs_of(request: wire.Read) -> Runs:
    """The runs of a request, unpacked."""
    numbers = memoryview(request.runs).cast("Q").tolist()
    return numbers[0::3], numbers[1::3], numbers[2::3]


def problem_of(runs: Runs, arena_bytes: int, peer_bytes: int) -> str:
    """Why a read would leave one of the two arenas; empty if it does not."""
    remote, local, lengths = runs
    if min(lengths) < 1:
        return "a run is empty"
    if max(map(add, remote, lengths)) > peer_bytes:
        return "a run leaves the peer's arena"
    if max(map(add, local, lengths)) > arena_bytes:
        return "a run leaves the own arena"
    return ""
