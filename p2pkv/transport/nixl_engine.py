"""What the NIXL child decides: which piece of which read flies next, what is done, what is late, what is still unsafe.

Sans-IO but for the :class:`Fabric`, which is NIXL in the child and a fake in tests. ``now`` is a parameter; answers are
appended to :attr:`Engine.out` and sent by whoever drives it. One thread.

Rules, each with a test:

1. A read is OK only when every byte of every run has landed. Pieces are counted in order, so ``done_bytes`` is a prefix.
2. A read is answered by its deadline whatever the fabric does: nothing here waits.
3. A transfer that has not ended is never released: releasing it frees the handle, not the wire, and bytes would land
   in memory that somebody else owns by then. It is kept, and its extents are *open*, until the fabric says it ended.
4. A transfer that failed may have parts that the fabric forgot (NIXL drops the requests of a handle at its first
   error), so its extents stay open for a settling time in which the worker is progressed.
5. A peer is disconnected only when nothing of it is in flight.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import msgspec
import numpy as np

from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_wire import ReadStatus

PIECE_BYTES_MIN: Final = 1 << 20
"""A handle costs about 12 us; under 1 MiB that shows, and above it one read would hold up the others."""

PIECE_BYTES_MAX: Final = 4 << 20
PIECES_PER_READ: Final = 8
"""A large read uses larger pieces: its reader overlaps checksums well enough with an eighth outstanding."""

PIECE_RUNS_MAX: Final = 128
PIECES_IN_FLIGHT_MAX: Final = 16
"""Per read: 16 to 64 MiB, more than the bandwidth-delay product of a 400 Gbit/s link."""

SETTLE_S: Final = 0.25
"""Rule 4. UCX flushes a failed endpoint within a few progress calls; this is a hundred times what was measured."""

QUARANTINE_POLL_S: Final = 0.02
SPIN_S: Final = 200e-6
SLEEP_MAX_S: Final = 1e-3
SERVE_SLEEP_MAX_S: Final = 200e-6
"""While a peer reads from here each of its round trips waits for our next progress call."""

WORK_S: Final = 3e-6
"""NIXL does not tell whether progress did anything; an empty call takes 1 us, one that moved bytes takes longer."""

TURN_S: Final = 2e-3
"""Longest that reads are driven before commands and deadlines are looked at again."""

READS_MAX: Final = 1_024
PEERS_MAX: Final = 4_096


class FabricError(Exception):
    """A NIXL call failed. ``disconnected``: the peer's process or the way to it is gone."""

    def __init__(self, detail: str, *, disconnected: bool = False) -> None:
        super().__init__(detail)
        self.disconnected = disconnected


class Fabric(Protocol):
    """One-sided reads into the registered arena. Every call may raise :class:`FabricError`; none blocks on a peer.

    Descriptor tables are C-contiguous u64[n][3]: address, length, 0.
    """

    def connect(self, metadata: bytes) -> str:
        """Load a peer's metadata; returns the agent name it contains."""

    def disconnect(self, name: str) -> None:
        """Forget a peer that has nothing in flight."""

    def create(self, peer: str, local: np.ndarray, remote: np.ndarray) -> object:
        """A transfer of all rows; nothing flies yet."""

    def post(self, transfer: object) -> bool:
        """Start it. True: it has already ended."""

    def ended(self, transfer: object) -> bool:
        """Progress, and say whether every row has landed."""

    def release(self, transfer: object) -> None:
        """Free a transfer that has ended, failed and settled, or was never posted."""

    def progress(self) -> None:
        """Let the worker serve peers and connections."""

    def probe(self, peer: str, remote_address: int, length: int) -> object:
        """A transfer of ``length`` bytes (at most 64 KiB) into scratch memory that nobody uses."""


class Peer:
    """An owner that can be read from, or soon."""

    __slots__ = ("base", "bytes", "in_flight", "inline", "metadata", "name", "probe", "since", "state", "waiters")

    def __init__(self, request: wire.AddPeer, now: float) -> None:
        self.name = request.name
        self.metadata = request.metadata
        self.base = request.base
        self.bytes = request.arena_bytes
        self.state = "connecting"  # -> "ready" -> "gone"
        self.since = now
        self.probe: object | None = None
        self.inline = False
        self.in_flight = 0
        self.waiters: list[tuple[int, float]] = []  # (request id, deadline) of ADD_PEERs without an answer


class Piece:
    """One posted transfer and the own extents that it writes."""

    __slots__ = ("length", "local", "settled_at", "transfer")

    def __init__(self, transfer: object, local: np.ndarray, length: int) -> None:
        self.transfer = transfer
        self.local = local
        self.length = length
        self.settled_at: float | None = None  # set once it failed: rule 4


class ReadOp:
    """One READ: what is left to post (run, offset in it), what flies, how much has landed."""

    __slots__ = (
        "deadline", "done_bytes", "flying", "lengths", "local", "next_offset", "next_run", "peer", "piece_bytes",
        "read_id", "remote", "reported", "total",
    )  # fmt: skip

    def __init__(self, read_id: int, peer: Peer, runs: np.ndarray, base: int, deadline: float) -> None:
        self.read_id = read_id
        self.peer = peer
        self.deadline = deadline
        self.lengths: list[int] = runs[:, 2].tolist()
        self.total = sum(self.lengths)
        self.remote = np.zeros((len(runs), 3), np.uint64)
        self.local = np.zeros((len(runs), 3), np.uint64)
        self.remote[:, 0] = runs[:, 0] + np.uint64(peer.base)
        self.local[:, 0] = runs[:, 1] + np.uint64(base)
        self.remote[:, 1] = self.local[:, 1] = runs[:, 2]
        self.piece_bytes = min(max(self.total // PIECES_PER_READ, PIECE_BYTES_MIN), PIECE_BYTES_MAX)
        self.next_run = 0
        self.next_offset = 0
        self.flying: deque[Piece] = deque()
        self.done_bytes = 0
        self.reported = 0

    @property
    def postable(self) -> bool:
        """Something is left, and the window has room."""
        return self.next_run < len(self.lengths) and len(self.flying) < PIECES_IN_FLIGHT_MAX

    def take(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Descriptors of the next piece (local, remote, bytes): whole runs, or a part of a run that is too long."""
        first, offset, room = self.next_run, self.next_offset, self.piece_bytes
        left = self.lengths[first] - offset
        if offset or left > room:
            length = min(left, room)
            rows = []
            for table in (self.local, self.remote):
                row = table[first : first + 1].copy()
                row[0, 0] += np.uint64(offset)
                row[0, 1] = length
                rows.append(row)
            self.next_offset += length
            if length == left:
                self.next_run, self.next_offset = first + 1, 0
            return rows[0], rows[1], length
        end, length = first, 0
        while end < len(self.lengths) and end - first < PIECE_RUNS_MAX and length + self.lengths[end] <= room:
            length += self.lengths[end]
            end += 1
        self.next_run = end
        return self.local[first:end], self.remote[first:end], length


class Quarantined:
    """What is left of a read that was answered before all of it had ended."""

    __slots__ = ("peer", "pieces", "read_id")

    def __init__(self, read_id: int, peer: Peer, pieces: list[Piece]) -> None:
        self.read_id = read_id
        self.peer = peer
        self.pieces = pieces


class Engine:
    """All reads, peers and quarantined transfers of one child.

    Args:
        fabric: where transfers go.
        base: address of the own arena. arena_bytes: its size.
        clock: only for measuring how long a fabric call took; decisions use ``now``.
    """

    def __init__(
        self, fabric: Fabric, base: int, arena_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.out: deque[tuple[msgspec.Struct, int]] = deque()
        self._fabric = fabric
        self._base = base
        self._bytes = arena_bytes
        self._clock = clock
        self._peers: dict[str, Peer] = {}
        self._retired: list[Peer] = []
        self._reads: dict[int, ReadOp] = {}
        self._quarantine: dict[int, Quarantined] = {}
        self._quarantine_poll_at = 0.0
        self._serve_until = 0.0
        self._worked_at = 0.0
        self._ok = self._failed = self._timed_out = self._bytes_read = 0

    # requests

    def add_peer(self, request_id: int, request: wire.AddPeer, now: float) -> None:
        """Connect and warm up; answered PEER_ADDED when reads are fast, or at the deadline. Idempotent."""
        peer = self._peers.get(request.name)
        if peer is not None and (peer.metadata != request.metadata or peer.state == "gone"):
            self._retire(peer, now)
            peer = None
        if peer is None:
            for older in [p for p in self._peers.values() if wire.node_of(p.name) == wire.node_of(request.name)]:
                self._retire(older, now)
            if any(p.name == request.name for p in self._retired):
                return self._added(request_id, request.name, "its earlier connection still has transfers in flight")
            if len(self._peers) + len(self._retired) >= PEERS_MAX:
                return self._added(request_id, request.name, "too many peers")
            peer = Peer(request, now)
            try:
                name = self._fabric.connect(request.metadata)
                if name != request.name:
                    self._fabric.disconnect(name)
                    raise FabricError(f"its metadata is that of {name!r}")
                peer.probe = self._start(peer, self._fabric.probe(name, peer.base, min(8, peer.bytes)))
            except FabricError as error:
                return self._added(request_id, request.name, str(error))
            self._peers[peer.name] = peer
            self._worked_at = now
        if peer.state == "ready":
            return self._added(request_id, peer.name, "", peer)
        peer.waiters.append((request_id, request.deadline_ns / 1e9))
        return None

    def remove_peer(self, name: str, now: float) -> None:
        """Forget a peer. Its reads end now; what flies is quarantined."""
        if peer := self._peers.get(name):
            self._retire(peer, now)

    def read(self, read_id: int, request: wire.Read, now: float) -> None:
        """Queue a read; :meth:`step` posts it."""
        peer = self._peers.get(request.peer)
        if peer is None or peer.state == "gone":
            return self._refuse(read_id, ReadStatus.NO_PEER, "never added, or gone since")
        if len(self._reads) >= READS_MAX:
            return self._refuse(read_id, ReadStatus.BUSY, "too many reads")
        if read_id in self._reads or read_id in self._quarantine:
            return self._refuse(read_id, ReadStatus.INVALID, "read id in use")
        if len(request.runs) % wire.RUN_BYTES:
            return self._refuse(read_id, ReadStatus.INVALID, "runs are not whole")
        runs = np.frombuffer(request.runs, np.uint64).reshape(-1, 3)
        if problem := problem_of(runs, self._bytes, peer.bytes):
            return self._refuse(read_id, ReadStatus.INVALID, problem)
        self._reads[read_id] = ReadOp(read_id, peer, runs, self._base, request.deadline_ns / 1e9)
        self._worked_at = now
        return None

    def cancel(self, read_id: int, now: float) -> None:
        """Answer a read now. Unknown ids are reads that have just ended."""
        if op := self._reads.get(read_id):
            self._finish(op, ReadStatus.CANCELLED, "", now)

    def serve(self, until: float, now: float) -> None:
        """Keep progressing for peers until then; replaces the earlier time."""
        self._serve_until = until
        self._worked_at = now

    def stats(self) -> wire.StatsReply:
        """Counters and levels."""
        return wire.StatsReply(
            self._ok, self._failed, self._timed_out, self._bytes_read, len(self._reads), len(self._peers),
            sum(p.length for q in self._quarantine.values() for p in q.pieces), time.process_time_ns(),
        )  # fmt: skip

    # time

    def wait_s(self, now: float, idle_s: float) -> float:
        """How long the driver may sleep on its socket before the next :meth:`step`."""
        reads = self._reads.values()
        if any(op.postable for op in reads):
            return 0.0
        quiet = now - self._worked_at
        adaptive = 0.0 if quiet < SPIN_S else max(20e-6, quiet / 8)
        if now < self._serve_until:
            return min(adaptive, SERVE_SLEEP_MAX_S)
        if reads or any(p.waiters for p in self._peers.values()):
            return min(adaptive, SLEEP_MAX_S)
        return QUARANTINE_POLL_S if self._quarantine else idle_s

    def step(self, now: float) -> None:
        """Progress everything once. At most one piece per read is posted, so that no read holds up the others:
        over CMA a post lasts as long as its bytes take."""
        started = self._clock()
        self._fabric.progress()
        if self._clock() - started > WORK_S:
            self._worked_at = now
        for peer in [p for p in self._peers.values() if p.probe is not None]:
            self._advance(peer, now)
        for op in list(self._reads.values()):
            spent = self._clock() - started
            self._drive(op, now + spent)
            if op.read_id in self._reads:  # to the end of the queue: the next turn begins with those not served now
                self._reads[op.read_id] = self._reads.pop(op.read_id)
            if spent > TURN_S:
                break
        if self._quarantine and now >= self._quarantine_poll_at:
            self._quarantine_poll_at = now + QUARANTINE_POLL_S / 2
            self._poll_quarantine(now)
        for peer in [p for p in self._retired if not p.in_flight]:
            self._retired.remove(peer)
            self._disconnect(peer)

    # reads

    def _drive(self, op: ReadOp, now: float) -> None:
        suspect: Piece | None = None
        try:
            while op.flying:
                suspect = op.flying[0]
                if not self._fabric.ended(suspect.transfer):
                    break
                self._land(op, op.flying.popleft(), now)
            suspect = None
            if op.postable and now < op.deadline:
                local, remote, length = op.take()
                suspect = Piece(self._fabric.create(op.peer.name, local, remote), local, length)
                op.flying.append(suspect)
                op.peer.in_flight += 1
                if self._fabric.post(suspect.transfer) and op.flying[0] is suspect:
                    self._land(op, op.flying.pop(), now)
        except FabricError as error:
            if error.disconnected:
                op.peer.state = "gone"
            if suspect is not None:
                suspect.settled_at = now + SETTLE_S
            status = ReadStatus.DISCONNECTED if error.disconnected else ReadStatus.ERROR
            return self._finish(op, status, str(error), now)
        if op.done_bytes == op.total:
            return self._finish(op, ReadStatus.OK, "", now)
        if now >= op.deadline:
            return self._finish(op, ReadStatus.TIMEOUT, "", now)
        if op.done_bytes > op.reported:
            op.reported = op.done_bytes
            self.out.append((wire.ReadProgress(op.done_bytes), op.read_id))
        return None

    def _land(self, op: ReadOp, piece: Piece, now: float) -> None:
        self._fabric.release(piece.transfer)
        op.peer.in_flight -= 1
        op.done_bytes += piece.length
        self._bytes_read += piece.length
        self._worked_at = now

    def _finish(self, op: ReadOp, status: ReadStatus, detail: str, now: float) -> None:
        """Answer, and quarantine what has not ended."""
        del self._reads[op.read_id]
        open_pieces = [piece for piece in op.flying if not self._ended(piece, op.peer, now)]
        extents = self._extents(open_pieces)
        if open_pieces:
            self._quarantine[op.read_id] = Quarantined(op.read_id, op.peer, open_pieces)
        self._ok += status is ReadStatus.OK
        self._timed_out += status is ReadStatus.TIMEOUT
        self._failed += status not in (ReadStatus.OK, ReadStatus.TIMEOUT)
        self.out.append((wire.ReadDone(status, op.done_bytes, wire.pack_extents(extents), detail[:1000]), op.read_id))

    def _refuse(self, read_id: int, status: ReadStatus, detail: str) -> None:
        self._failed += 1
        self.out.append((wire.ReadDone(status, 0, b"", detail), read_id))

    def _extents(self, pieces: list[Piece]) -> list[tuple[int, int]]:
        rows = [row for piece in pieces for row in piece.local[:, :2].tolist()]
        return [(address - self._base, length) for address, length in rows]

    # quarantine

    def _ended(self, piece: Piece, peer: Peer, now: float) -> bool:
        """Whether nothing of a given-up piece can still land; then it is released."""
        if piece.settled_at is None:
            try:
                if not self._fabric.ended(piece.transfer):
                    return False
            except FabricError as error:
                if error.disconnected:
                    peer.state = "gone"
                piece.settled_at = now + SETTLE_S
                return False
        elif now < piece.settled_at:
            return False
        self._fabric.release(piece.transfer)
        peer.in_flight -= 1
        return True

    def _poll_quarantine(self, now: float) -> None:
        for held in list(self._quarantine.values()):
            held.pieces = [piece for piece in held.pieces if not self._ended(piece, held.peer, now)]
            if not held.pieces:
                del self._quarantine[held.read_id]
                if held.read_id >= 0:
                    self.out.append((wire.QuarantineClear(), held.read_id))

    # peers

    def _start(self, peer: Peer, transfer: object) -> object:
        """Post a probe. Over a connection that exists it may end at once, which :meth:`_advance` finds out."""
        peer.inline = self._fabric.post(transfer)
        peer.in_flight += 1
        return transfer

    def _advance(self, peer: Peer, now: float) -> None:
        """The connection's handshake needs both sides' progress. A first probe of 8 bytes carries it; a second of
        64 KiB sets up the path that large reads take and shows whether they end inside the post."""
        probe = peer.probe
        first = peer.state == "connecting"
        try:
            if probe is not None and self._fabric.ended(probe):
                self._fabric.release(probe)
                peer.in_flight -= 1
                peer.probe = None
                self._worked_at = now
                if first:
                    peer.state = "probing"
                    length = min(65_536, peer.bytes)
                    peer.probe = self._start(peer, self._fabric.probe(peer.name, peer.base, length))
                else:
                    peer.state = "ready"
        except FabricError as error:
            # Probes write into scratch memory: they need no settling.
            if peer.probe is not None:
                self._fabric.release(peer.probe)
                peer.in_flight -= 1
                peer.probe = None
            peer.state = "gone"
            self._answer(peer, str(error), now)
            return self._retire(peer, now)
        if peer.state == "ready":
            self._answer(peer, "", now)
        for request_id, deadline in [w for w in peer.waiters if w[1] <= now]:
            peer.waiters.remove((request_id, deadline))
            self._added(request_id, peer.name, "it did not answer in time; is its process progressing (SERVE)?")
        return None

    def _answer(self, peer: Peer, error: str, now: float) -> None:
        waiters, peer.waiters = peer.waiters, []
        for request_id, _ in waiters:
            self._added(request_id, peer.name, error, peer, now)

    def _added(self, request_id: int, name: str, error: str, peer: Peer | None = None, now: float | None = None) -> None:
        took = int((now - peer.since) * 1e6) if peer and now is not None else 0
        inline = peer is not None and peer.inline
        self.out.append((wire.PeerAdded(name, error[:1000], inline, took), request_id))

    def _retire(self, peer: Peer, now: float) -> None:
        self._peers.pop(peer.name, None)
        for op in [op for op in self._reads.values() if op.peer is peer]:
            self._finish(op, ReadStatus.NO_PEER, "the peer was removed or replaced", now)
        self._answer(peer, "the peer was removed or replaced", now)
        if peer.probe is not None:
            self._quarantine_probe(peer)
        if peer.in_flight:
            self._retired.append(peer)
        else:
            self._disconnect(peer)

    def _quarantine_probe(self, peer: Peer) -> None:
        """A retired peer's probe must end before the peer is disconnected; it has no extents of the arena, no read,
        and nobody waits to hear of its end."""
        probe, peer.probe = peer.probe, None
        piece = Piece(probe, np.zeros((0, 3), np.uint64), 0)
        self._quarantine[-id(peer)] = Quarantined(-id(peer), peer, [piece])

    def _disconnect(self, peer: Peer) -> None:
        try:
            self._fabric.disconnect(peer.name)
        except FabricError:
            pass  # NIXL has dropped it by itself; there is nothing left to free


def problem_of(runs: np.ndarray, arena_bytes: int, peer_bytes: int) -> str:
    """Why a read would leave one of the two arenas; empty if it does not. ``runs``: u64[n][3] as :func:`pack_runs` packs."""
    remote, local, length = runs[:, 0], runs[:, 1], runs[:, 2]
    if not length.all():
        return "a run is empty"
    for offset, limit, whose in ((remote, peer_bytes, "the peer's"), (local, arena_bytes, "the own")):
        # In this order nothing wraps around: length <= limit, so limit - length is the last lawful offset.
        if (length > limit).any() or (offset > np.uint64(limit) - length).any():
            return f"a run leaves {whose} arena"
    return ""
