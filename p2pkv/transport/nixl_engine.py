"""What the NIXL child decides: which piece of which read flies next, what is done, what is late, what is still unsafe.

Sans-IO but for the :class:`Fabric`, which is NIXL in the child and a fake in tests. ``now`` is a parameter; answers are
appended to :attr:`Engine.out` and sent by whoever drives it. One thread.

Rules, each with a test:

1. A read is OK only when every byte of every run has landed. Pieces count in order, so ``done_bytes`` is a prefix.
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
from typing import Final

import msgspec

from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_fabric import Fabric, FabricError
from p2pkv.transport.nixl_reads import HandedOver, Peer, Piece, Quarantined, ReadOp, problem_of, runs_of
from p2pkv.transport.nixl_wire import ReadStatus

SETTLE_S: Final = 0.25
"""Rule 4. UCX flushes a failed endpoint within a few progress calls; nothing was ever seen to land later than that."""

QUARANTINE_POLL_S: Final = 0.02
SPIN_S: Final = 200e-6
SLEEP_MAX_S: Final = 1e-3
"""Naps grow to this while a transfer stalls, or nobody makes use of our serving: a tenth of a core instead of all."""

WORK_S: Final = 10e-6
"""NIXL does not tell whether progress did anything. An empty call takes 1 us, or 5 with cold caches; one that moved
bytes takes longer."""

PROBES_INLINE: Final = 3
PROBES_MAX: Final = 6
"""The first reads of a connection may take another way than later ones, and over tcp a quick owner's answer may come
within the post: a peer is inline when so many probes in a row were, among at most so many."""

PROBE_BYTES: Final = 64 << 10
READS_INLINE: Final = 8
"""While a host is busy every probe may come before the connection has taken its last shape. So many later reads in a
row, none shorter than a probe, that ended within their posts show better."""

TURN_S: Final = 2e-3
"""Longest that reads are driven before commands and deadlines are looked at again."""

READS_MAX: Final = 1_024
PEERS_MAX: Final = 4_096
WAITERS_MAX: Final = 64
ADDRESS_MAX: Final = 1 << 64
DEADLINE_POLL_S: Final = 1e-3


class Engine:
    """All reads, peers and quarantined transfers of one child.

    Args:
        fabric: where transfers go.
        base: address of the own arena. arena_bytes: its size.
        clock: only for measuring how long a fabric call took; decisions use ``now``.
        on_inline: called with True when a peer's reads are found to end within their posts, with False when it goes.
    """

    def __init__(
        self,
        fabric: Fabric,
        base: int,
        arena_bytes: int,
        clock: Callable[[], float] = time.monotonic,
        on_inline: Callable[[Peer, bool], None] = lambda peer, inline: None,
    ) -> None:
        self.out: deque[tuple[msgspec.Struct, int]] = deque()
        self._fabric = fabric
        self._base = base
        self._bytes = arena_bytes
        self._clock = clock
        self._on_inline = on_inline
        self._peers: dict[str, Peer] = {}
        self._connecting: list[Peer] = []
        self._retired: list[Peer] = []
        self._reads: dict[int, ReadOp] = {}
        self._quarantine: dict[int, Quarantined] = {}
        self._quarantine_poll_at = 0.0
        self._deadline_poll_at = 0.0
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
            if problem := self._connect(peer):
                return self._added(request_id, request.name, problem)
            self._peers[peer.name] = peer
            self._connecting.append(peer)
            self._worked_at = now
        if peer.state == "ready":
            return self._added(request_id, peer.name, "", peer)
        if len(peer.waiters) >= WAITERS_MAX:
            return self._added(request_id, peer.name, "too many are waiting for it already")
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
        if problem := problem_of(runs_of(request), self._bytes, peer.bytes):
            return self._refuse(read_id, ReadStatus.INVALID, problem)
        self._begin(read_id, request, peer, now)
        return None

    def _begin(self, read_id: int, request: wire.Read, peer: Peer, now: float) -> ReadOp:
        deadline = request.deadline_ns / 1e9
        op = ReadOp(read_id, peer, runs_of(request), self._base, request.piece_bytes, deadline)
        self._reads[read_id] = op
        self._worked_at = now
        return op

    def go_on(self, handed: HandedOver, now: float) -> None:
        """Take over a read that native code has begun, as it stands.

        Raises:
            FabricError: it flies from a peer that is not known here; only the end of this process ends it for sure.
        """
        peer = self._peers.get(handed.request.peer)
        done_bytes = handed.done_bytes
        if handed.handle is None:
            if handed.error is not None:
                status = ReadStatus.DISCONNECTED if handed.error.disconnected else ReadStatus.ERROR
                return self._refuse(handed.read_id, status, str(handed.error), done_bytes)
            if not done_bytes:
                return self.read(handed.read_id, handed.request, now)
            if peer is None or peer.state == "gone":
                return self._refuse(handed.read_id, ReadStatus.NO_PEER, "gone in the middle of the read", done_bytes)
            op = self._begin(handed.read_id, handed.request, peer, now)
            op.skip(done_bytes)
            op.done_bytes = op.reported = done_bytes
            return None
        if peer is None:
            raise FabricError("a read flies from a peer that is not known")
        op = self._begin(handed.read_id, handed.request, peer, now)
        op.skip(done_bytes)
        op.done_bytes = op.reported = done_bytes
        piece = Piece(self._fabric.adopt(handed.handle), op.skip(handed.flying_bytes), handed.flying_bytes)
        op.flying.append(piece)
        op.flying_bytes = handed.flying_bytes
        op.inline = False
        peer.in_flight += 1
        if handed.error is None:
            return None
        piece.settled_at = now + SETTLE_S
        if handed.error.disconnected:
            self._gone(peer)
        status = ReadStatus.DISCONNECTED if handed.error.disconnected else ReadStatus.ERROR
        return self._finish(op, status, str(handed.error), now)

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
        for op in self._reads.values():
            if op.postable:
                return 0.0
        quiet = now - self._worked_at
        adaptive = 0.0 if quiet < SPIN_S else max(20e-6, quiet / 8)
        if now < self._serve_until or self._reads or any(peer.waiters for peer in self._connecting):
            return min(adaptive, SLEEP_MAX_S)
        return QUARANTINE_POLL_S if self._quarantine else idle_s

    def step(self, now: float) -> None:
        """Progress everything once. At most one piece per read is posted, so that no read holds up the others:
        over CMA a post lasts as long as its bytes take."""
        started = self._clock()
        if self._reads:
            if now >= self._deadline_poll_at:
                self._deadline_poll_at = now + DEADLINE_POLL_S
                for op in [op for op in self._reads.values() if op.deadline <= now]:
                    self._finish(op, ReadStatus.TIMEOUT, "", now)
            self._drive_all(now, started)  # whose calls progress, too
        else:
            self._fabric.progress()
            if self._clock() - started > WORK_S:
                self._worked_at = now
        if self._connecting:
            for peer in list(self._connecting):
                self._advance(peer, now)
        if self._quarantine and now >= self._quarantine_poll_at:
            self._quarantine_poll_at = now + QUARANTINE_POLL_S / 2
            self._poll_quarantine(now)
        if self._retired:
            for peer in [p for p in self._retired if not p.in_flight]:
                self._retired.remove(peer)
                self._disconnect(peer.name)

    # reads

    def _drive_all(self, now: float, started: float) -> None:
        for op in list(self._reads.values()):
            spent = self._clock() - started
            self._drive(op, now + spent)
            if op.read_id in self._reads:  # to the end of the queue: the next turn begins with those not served now
                self._reads[op.read_id] = self._reads.pop(op.read_id)
            if spent > TURN_S:
                break

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
                op.flying_bytes += length
                op.peer.in_flight += 1
                if not self._fabric.post(suspect.transfer):
                    op.inline = False
                elif op.flying[0] is suspect:
                    self._land(op, op.flying.pop(), now)
        except FabricError as error:
            if error.disconnected:
                self._gone(op.peer)
            if suspect is not None:
                suspect.settled_at = now + SETTLE_S
            status = ReadStatus.DISCONNECTED if error.disconnected else ReadStatus.ERROR
            return self._finish(op, status, str(error), now)
        if op.done_bytes == op.total:
            return self._finish(op, ReadStatus.OK, "", now)
        if op.wants_progress and op.done_bytes > op.reported:
            op.reported = op.done_bytes
            self.out.append((wire.ReadProgress(op.done_bytes), op.read_id))
        return None

    def _land(self, op: ReadOp, piece: Piece, now: float) -> None:
        self._fabric.release(piece.transfer)
        op.peer.in_flight -= 1
        op.flying_bytes -= piece.length
        op.done_bytes += piece.length
        self._bytes_read += piece.length
        self._worked_at = now

    def _finish(self, op: ReadOp, status: ReadStatus, detail: str, now: float) -> None:
        """Answer, and quarantine what has not ended."""
        del self._reads[op.read_id]
        extents = b""
        if op.flying and (pieces := [piece for piece in op.flying if not self._ended(piece, op.peer, now)]):
            extents = wire.pack_extents(
                [(address - self._base, length) for piece in pieces for address, length, _ in piece.local]
            )
            self._quarantine[op.read_id] = Quarantined(op.read_id, op.peer, pieces)
        if status is ReadStatus.OK:
            self._ok += 1
        elif status is ReadStatus.TIMEOUT:
            self._timed_out += 1
        else:
            self._failed += 1
        self._learn(op, status)
        inline = op.inline and op.peer.inline
        self.out.append((wire.ReadDone(status, op.done_bytes, extents, inline, detail[:1000]), op.read_id))

    def _learn(self, op: ReadOp, status: ReadStatus) -> None:
        """Whether the peer is inline: one read that was not says no, some in a row that ended well say yes."""
        peer = op.peer
        if not op.inline:
            peer.reads_inline = 0
            self._set_inline(peer, False)
        elif status is ReadStatus.OK and not peer.inline and op.total >= PROBE_BYTES:
            peer.reads_inline += 1
            if peer.reads_inline >= READS_INLINE:
                self._set_inline(peer, True)

    def _set_inline(self, peer: Peer, inline: bool) -> None:
        if peer.inline != inline:
            peer.inline = inline
            self._on_inline(peer, inline)

    def _refuse(self, read_id: int, status: ReadStatus, detail: str, done_bytes: int = 0) -> None:
        self._failed += 1
        self.out.append((wire.ReadDone(status, done_bytes, b"", True, detail[:1000]), read_id))

    # quarantine

    def _ended(self, piece: Piece, peer: Peer, now: float) -> bool:
        """Whether nothing of a given-up piece can still land; then it is released."""
        if piece.settled_at is None:
            try:
                if not self._fabric.ended(piece.transfer):
                    return False
            except FabricError as error:
                if error.disconnected:
                    self._gone(peer)
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

    def _connect(self, peer: Peer) -> str:
        """Load the metadata and post the first probe; returns what is wrong. All of it is a peer's word."""
        if not 0 < peer.bytes <= ADDRESS_MAX - peer.base:
            return "its arena lies outside the address space"
        try:
            name = self._fabric.connect(peer.metadata)
        except FabricError as error:
            return str(error)
        if name != peer.name:
            if name not in self._peers and all(name != other.name for other in self._retired):
                self._disconnect(name)
            return f"its metadata is that of {name!r}"
        try:
            self._probe(peer, 8)
        except FabricError as error:
            self._disconnect(name)
            return str(error)
        return ""

    def _probe(self, peer: Peer, length: int) -> None:
        """Post a small read. Over a connection that exists it may end at once, which :meth:`_advance` finds out."""
        transfer = self._fabric.probe(peer.name, peer.base, min(length, peer.bytes))
        try:
            inline = self._fabric.post(transfer)
        except FabricError:
            self._fabric.release(transfer)
            raise
        peer.probe = transfer
        peer.probes += 1
        peer.probes_inline = peer.probes_inline + 1 if inline else 0
        peer.in_flight += 1

    def _advance(self, peer: Peer, now: float) -> None:
        """The connection's handshake needs both sides' progress. A first probe of 8 bytes carries it; those of 64 KiB
        that follow set up the path that large reads take, and show whether they end inside the post."""
        probe = peer.probe
        try:
            if probe is not None and self._fabric.ended(probe):
                self._fabric.release(probe)
                peer.in_flight -= 1
                peer.probe = None
                self._worked_at = now
                inline = peer.probes_inline >= PROBES_INLINE
                if inline or peer.probes_inline + PROBES_MAX - peer.probes < PROBES_INLINE:
                    peer.state = "ready"
                    self._set_inline(peer, inline)
                    self._connecting.remove(peer)
                else:
                    self._probe(peer, PROBE_BYTES)
        except FabricError as error:
            # Probes write into scratch memory: they need no settling.
            if peer.probe is not None:
                self._fabric.release(peer.probe)
                peer.in_flight -= 1
                peer.probe = None
            self._gone(peer)
            self._answer(peer, str(error), now)
            return self._retire(peer, now)
        if peer.state == "ready":
            self._answer(peer, "", now)
        for request_id, deadline in [w for w in peer.waiters if w[1] <= now]:
            peer.waiters.remove((request_id, deadline))
            self._added(request_id, peer.name, wire.SILENT)
        return None

    def _answer(self, peer: Peer, error: str, now: float) -> None:
        waiters, peer.waiters = peer.waiters, []
        for request_id, _ in waiters:
            self._added(request_id, peer.name, error, peer, now)

    def _added(
        self, request_id: int, name: str, error: str, peer: Peer | None = None, now: float | None = None
    ) -> None:
        took = int((now - peer.since) * 1e6) if peer and now is not None else 0
        inline = peer is not None and peer.inline
        self.out.append((wire.PeerAdded(name, error[:1000], inline, took), request_id))

    def _gone(self, peer: Peer) -> None:
        peer.state = "gone"
        self._set_inline(peer, False)

    def _retire(self, peer: Peer, now: float) -> None:
        self._set_inline(peer, False)
        self._peers.pop(peer.name, None)
        if peer in self._connecting:
            self._connecting.remove(peer)
        for op in [op for op in self._reads.values() if op.peer is peer]:
            self._finish(op, ReadStatus.NO_PEER, "the peer was removed or replaced", now)
        self._answer(peer, "the peer was removed or replaced", now)
        if peer.probe is not None:
            self._quarantine_probe(peer)
        if peer.in_flight:
            self._retired.append(peer)
        else:
            self._disconnect(peer.name)

    def _quarantine_probe(self, peer: Peer) -> None:
        """A retired peer's probe must end before the peer is disconnected; it has no extents of the arena, no read,
        and nobody waits to hear of its end."""
        probe, peer.probe = peer.probe, None
        piece = Piece(probe, [], 0)
        self._quarantine[-id(peer)] = Quarantined(-id(peer), peer, [piece])

    def _disconnect(self, name: str) -> None:
        try:
            self._fabric.disconnect(name)
        except FabricError:
            pass  # NIXL has dropped it by itself; there is nothing left to free
