"""The agent's side of its NIXL child: starts it, talks to it, notices its death, starts the next one.

Everything runs on the agent's event loop; no call blocks it but the start of a child (some ms of ``vfork``). What a
caller can rely on:

* :meth:`NixlProcess.read` answers by its deadline plus :data:`GRACE_S`, whatever the child or the peer does.
* Bytes of a read that has ended may still arrive while they are in *quarantine*: ``on_quarantine`` names them before
  the read's answer does, ``on_clear`` comes when nothing can write them any more: the transfer ended, or the child
  that ran it was reaped. Slots touched by quarantined bytes must not be reused in between.
* ``on_clear(read_id)`` never comes before the caller of that read has run with the outcome up to its next ``await``.
* Quarantine is bounded in bytes and time. Beyond either the child is killed: the one sure way to stop a transfer.
* After a child's death every pending read fails within milliseconds, and a new child (a new *incarnation*, with a new
  agent name, knowing no peers) follows after a pause that doubles up to a limit.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgspec

from p2pkv.errors import (
    Busy,
    DeadlineExceeded,
    InvalidArgument,
    P2PKVError,
    PeerUnavailable,
    RemoteProtocolError,
    TransportUnavailable,
)
from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.base import CallOff
from p2pkv.transport.nixl_child import Child, spawn
from p2pkv.transport.nixl_native import NativeReads
from p2pkv.transport.nixl_quarantine import Quarantine
from p2pkv.transport.nixl_wire import ReadStatus, Run
from p2pkv.wire.peer import NixlEndpoint

log = logging.getLogger(__name__)

GRACE_S: Final = 0.02
"""The child answers at the deadline; this long after it the agent answers in its place. Covers one long post."""

SERVE_SCAN_MAX: Final = 256
"""With more peers reading at once, serving simply goes on until the last one's time is over."""

STABLE_S: Final = 10.0
"""A child that lived this long resets the pause before its successor."""

ASKED_MAX: Final = 1_024

STOP_S: Final = 0.5
"""For the child to leave by itself; it has nothing to clean up, so this only ever runs out when it hangs."""

INSTALL_HINT: Final = "Install it (make nixl, or pip install --no-deps nixl-cu12 numpy), or set transport.kind to tcp"


@dataclass(frozen=True, kw_only=True)
class NixlOptions:
    """Settings of the child and of its supervision."""

    ucx: Mapping[str, str] = field(default_factory=dict)  # UCX_* for the child, e.g. {"UCX_NET_DEVICES": "mlx5_0:1"}
    start_s: float = 30.0  # importing NIXL and registering the arena; RDMA pins it, about 1 s per 10 GB
    hang_s: float = 5.0  # a child that misses a read's deadline and then a ping for this long is killed
    quarantine_bytes_max: int = 1 << 30  # more than this in quarantine: the child is killed
    quarantine_s: float = 30.0  # in quarantine for longer than this: likewise
    reads_max: int = 1_000  # open at once; more are refused with Busy
    backoff_s: float = 0.05  # before the first restart; doubles
    backoff_max_s: float = 10.0
    idle_ms: float = 100.0  # the child's housekeeping tick


class ReadOutcome(NamedTuple):
    """How a read ended. The first ``done_bytes`` bytes along its runs have landed whatever ``error`` is; ``error`` is
    None when that is all of them. ``open``: (offset, length) of the own arena that may still be written, until
    ``on_clear(read_id)``."""

    done_bytes: int
    error: P2PKVError | None
    read_id: int = 0
    open: Sequence[tuple[int, int]] = ()


class Connection(NamedTuple):
    """What is known of a connection. ``inline``: reads end within their posts, so the owner's child need not serve; the
    latest read knows best."""

    inline: bool
    connect_us: int


class _Pending:
    """A read without an answer."""

    __slots__ = ("done_bytes", "due", "future", "on_progress", "peer", "runs")

    def __init__(
        self,
        peer: str,
        runs: Sequence[Run],
        due: float,
        future: asyncio.Future[ReadOutcome],
        on_progress: Callable[[int], None] | None,
    ) -> None:
        self.peer = peer
        self.runs = runs
        self.due = due
        self.future = future
        self.on_progress = on_progress
        self.done_bytes = 0


class NixlProcess:
    """A supervised NIXL child.

    Args:
        arena_fd: memfd of the arena; the child inherits it. Stays the caller's.
        arena_bytes: its size, in bytes.
        node, epoch: of this agent; with the incarnation they make the NIXL agent name.
        on_ready: called with the endpoint of every new incarnation: what peers need in order to read from here.
        on_down: called with the reason when an incarnation has died; peers' connections are gone.
        native: reads that native code asks for by itself; their parked bytes count towards the bounds of quarantine.
        on_quarantine, on_clear: see the module's docstring. Extents are (offset, length) in the arena, bytes.

    Callbacks run on the event loop and must not block or raise.
    """

    def __init__(
        self,
        arena_fd: int,
        arena_bytes: int,
        *,
        node: int,
        epoch: int,
        options: NixlOptions | None = None,
        native: NativeReads | None = None,
        on_ready: Callable[[NixlEndpoint], None] | None = None,
        on_down: Callable[[str], None] | None = None,
        on_quarantine: Callable[[int, Sequence[tuple[int, int]]], None] | None = None,
        on_clear: Callable[[int], None] | None = None,
    ) -> None:
        self._arena_fd = arena_fd
        self._arena_bytes = arena_bytes
        self._node = node
        self._epoch = epoch
        self._options = options or NixlOptions()
        self._native = native
        self._on_ready = on_ready
        self._on_down = on_down
        self._on_quarantine = on_quarantine
        self._on_clear = on_clear
        self.ready: NixlEndpoint | None = None
        self.incarnation = 0
        self.restarts = 0
        self.kills_for_quarantine = 0
        self._ids = itertools.count(1)  # never reused: a late answer must not be taken for another read's
        self._child: Child | None = None
        self._peers: dict[str, Connection] = {}
        self._pending: dict[int, _Pending] = {}
        self._asked: dict[int, asyncio.Future[msgspec.Struct]] = {}
        self._quarantine = Quarantine(self._options.quarantine_bytes_max, self._options.quarantine_s)
        self._undelivered: set[int] = set()  # reads whose callers have not been told yet
        self._clear_later: set[int] = set()
        self._due_timer: asyncio.TimerHandle | None = None
        self._due_at = 0.0
        self._quarantine_timer: asyncio.TimerHandle | None = None
        self._serving: dict[Hashable, float] = {}
        self._serve_until = 0.0
        self._ping: asyncio.TimerHandle | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    # life

    async def start(self) -> NixlEndpoint:
        """Start the first child and wait until it is ready.

        Raises:
            TransportUnavailable: NIXL is missing, UCX does not work here, or the child did not get ready in time.
        """
        self._loop = asyncio.get_running_loop()
        if self._native is not None:
            self._native.start(self._quarantine, self._check_quarantine, self._on_native_late)
        child = self._spawn()
        try:
            async with asyncio.timeout(self._options.start_s):
                await self._until_ready(child)
        except TimeoutError:
            await self._bury(child, "it did not get ready in time")
            raise TransportUnavailable(
                "the NIXL process did not get ready in time", seconds=self._options.start_s, hint=INSTALL_HINT
            ) from None
        except BaseException as error:
            await self._bury(child, str(error))
            raise
        assert self.ready is not None
        self._supervisor = self._loop.create_task(self._supervise(child))
        return self.ready

    async def stop(self) -> None:
        """Kill the child and fail what is pending. Idempotent."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is not None:
            supervisor.cancel()
            await asyncio.gather(supervisor, return_exceptions=True)
        if (child := self._child) is not None:
            child.send(wire.Shutdown())
            await asyncio.wait((child.dead,), timeout=STOP_S)
            await self._bury(child, "the transport is stopping")
        if self._native is not None and self._loop is not None:
            self._native.stop()
        for timer in (self._ping, self._quarantine_timer, self._due_timer):
            if timer is not None:
                timer.cancel()

    @property
    def pid(self) -> int | None:
        """The living child's process id."""
        return self._child.process.pid if self._child and not self._child.dead.done() else None

    @property
    def quarantined(self) -> frozenset[int]:
        """Ids of reads with bytes in quarantine."""
        return self._quarantine.ids

    @property
    def quarantined_bytes(self) -> int:
        """Upper bound of the bytes that may still be written by reads that have ended."""
        return self._quarantine.bytes

    # use

    def connected(self, name: str) -> Connection | None:
        """The connection to a peer's NIXL process, if this incarnation has one."""
        return self._peers.get(name)

    async def add_peer(self, endpoint: NixlEndpoint, deadline_s: float = 2.0) -> Connection:
        """Connect to an owner's child and warm the connection up; older incarnations of that node are forgotten.
        The owner's child must be serving meanwhile (20 to 200 ms), or it takes some of its idle ticks.

        Raises:
            DeadlineExceeded: it did not answer in time. PeerUnavailable: NIXL refused.
            TransportUnavailable: the own child is not there.
        """
        if known := self._peers.get(endpoint.name):
            return known
        request = wire.AddPeer(
            endpoint.name, endpoint.metadata, endpoint.base, endpoint.arena_bytes,
            wire.monotonic_ns_after(time.monotonic(), deadline_s),
        )  # fmt: skip
        answer = await self._ask(request, deadline_s + 10 * GRACE_S)
        if not isinstance(answer, wire.PeerAdded) or answer.error == wire.SILENT:
            raise DeadlineExceeded("the NIXL processes did not connect in time", peer=endpoint.name)
        if answer.error:
            raise PeerUnavailable("cannot connect to a peer's NIXL process", peer=endpoint.name, reason=answer.error)
        node = wire.node_of(endpoint.name)
        for older in [name for name in self._peers if wire.node_of(name) == node]:
            del self._peers[older]
        self._peers[endpoint.name] = connection = Connection(answer.inline, answer.connect_us)
        way = "reads end inside their posts" if answer.inline else "its process has to take part in reads"
        log.info("connected to NIXL process %s in %d us: %s", endpoint.name, answer.connect_us, way)
        return connection

    def not_inline(self, name: str) -> None:
        """The latest read from a peer did not end within its posts."""
        if known := self._peers.get(name):
            self._peers[name] = known._replace(inline=False)

    def remove_peer(self, name: str) -> None:
        """Forget a peer; its reads in flight fail."""
        self._peers.pop(name, None)
        if self._child is not None:
            self._child.send(wire.RemovePeer(name))

    async def read(
        self,
        peer: str,
        runs: Sequence[Run],
        deadline_s: float,
        on_progress: Callable[[int], None] | None = None,
        call_off: CallOff | None = None,
    ) -> ReadOutcome:
        """Read runs of a peer's arena into the own one.

        ``call_off`` ends the read early; what may still be written then is in the outcome, as at the deadline.

        ``on_progress(done_bytes)``: so many bytes, counted along ``runs``, have landed and are stable. Not called for
        the last ones: then the outcome comes. Cancelling the caller cancels the read; its bytes go into quarantine.

        Never raises for what happens on the way, only:
            InvalidArgument: a run leaves the own arena. Busy: too many reads are open.
        """
        packed = wire.pack_runs(runs)
        for run in runs:
            if run.length < 1 or run.local_offset + run.length > self._arena_bytes:
                limit = self._arena_bytes
                raise InvalidArgument("a run is empty or leaves the arena", run=tuple(run), arena_bytes=limit)
        if len(self._pending) >= self._options.reads_max:
            raise Busy("too many NIXL reads are open", reads=len(self._pending))
        child, loop = self._child, self._loop
        if child is None or loop is None or self.ready is None:
            return ReadOutcome(0, TransportUnavailable("the NIXL process is not running (it is being restarted)"))
        read_id = next(self._ids) % wire.LANE_ID_MIN
        now = time.monotonic()
        piece_bytes = piece_bytes_for(sum(run.length for run in runs)) if on_progress is not None else 0
        child.send(wire.Read(peer, packed, piece_bytes, wire.monotonic_ns_after(now, deadline_s)), read_id)
        pending = _Pending(peer, runs, now + deadline_s + GRACE_S, loop.create_future(), on_progress)
        self._pending[read_id] = pending
        self._watch(pending.due)
        self._undelivered.add(read_id)
        if call_off is not None:
            call_off.on_call(lambda: child.send(wire.Cancel(), read_id) if read_id in self._pending else None)
        try:
            return await pending.future
        except asyncio.CancelledError:
            if read_id in self._pending:
                self._abandon(read_id, DeadlineExceeded("the read was cancelled"))
                child.send(wire.Cancel(), read_id)
            raise
        finally:
            self._undelivered.discard(read_id)
            if read_id in self._clear_later:
                self._clear_later.discard(read_id)
                loop.call_soon(self._clear, read_id)  # after the caller has seen the outcome

    def serve(self, token: Hashable, until: float) -> None:
        """A peer whose reads are not inline reads from here: keep the child progressing until then
        (``time.monotonic()``), or until :meth:`serve_done`. One entry per token; the caller bounds their number."""
        self._serving[token] = until
        if until > self._serve_until:
            self._send_serve(until)

    def serve_done(self, token: Hashable) -> None:
        """That peer has finished."""
        if self._serving.pop(token, None) is None:
            return
        if len(self._serving) <= SERVE_SCAN_MAX:
            now = time.monotonic()
            self._serving = {token: until for token, until in self._serving.items() if until > now}
            latest = max(self._serving.values(), default=0.0)
            if latest < self._serve_until:
                self._send_serve(latest)

    def _send_serve(self, until: float) -> None:
        self._serve_until = until
        if self._child is not None and self.ready is not None:
            self._child.send(wire.Serve(wire.monotonic_ns_after(until, 0.0)))

    async def stats(self, timeout_s: float = 1.0) -> wire.StatsReply:
        """The child's counters.

        Raises:
            TransportUnavailable: there is no child, or it does not answer.
        """
        answer = await self._ask(wire.Stats(), timeout_s)
        if not isinstance(answer, wire.StatsReply):
            raise TransportUnavailable("the NIXL process does not answer", seconds=timeout_s)
        return answer

    # supervision

    def _spawn(self) -> Child:
        assert self._loop is not None
        self.incarnation += 1
        name = wire.agent_name(self._node, self._epoch, self.incarnation)
        options = self._options
        bell_fd = self._native.bell_fd if self._native is not None else -1
        self._child = spawn(self._loop, name, self._arena_fd, self._arena_bytes, options.ucx, options.idle_ms, bell_fd)
        self._child.watch(self._on_message)
        return self._child

    async def _until_ready(self, child: Child) -> None:
        await asyncio.wait((child.ready, child.dead), return_when=asyncio.FIRST_COMPLETED)
        if not child.ready.done():
            reason = child.dead.result()
            raise TransportUnavailable("the NIXL process died while it started", reason=reason, hint=INSTALL_HINT)
        ready = child.ready.result()  # raises what FATAL said
        self.ready = NixlEndpoint(ready.name, ready.metadata, ready.base, ready.arena_bytes)
        log.info("NIXL process %d is ready: %s (%s %s)", child.process.pid, ready.name, ready.package, ready.version)
        if self._serve_until > time.monotonic():
            self._send_serve(self._serve_until)
        if self._native is not None:
            self._native.attach(child)
        if self._on_ready is not None:
            self._on_ready(self.ready)

    async def _supervise(self, child: Child) -> None:
        pause = self._options.backoff_s
        while True:
            reason = await asyncio.shield(child.dead)
            await self._bury(child, reason)
            if time.monotonic() - child.started_at > STABLE_S:
                pause = self._options.backoff_s
            log.warning("the NIXL process died (%s); the next one starts in %.2f s", reason, pause)
            await asyncio.sleep(pause)
            pause = min(2 * pause, self._options.backoff_max_s)
            self.restarts += 1
            child = self._spawn()
            try:
                async with asyncio.timeout(self._options.start_s):
                    await self._until_ready(child)
            except (TimeoutError, P2PKVError) as error:
                child.give_up(str(error) or "it did not get ready in time")

    async def _bury(self, child: Child, reason: str) -> None:
        """Fail what depends on a child, make sure that it is gone, then free what it may have been writing to."""
        child.give_up(reason)
        self.ready = None
        self._peers.clear()
        error = TransportUnavailable("the NIXL process died with the read in flight", reason=reason)
        for read_id in list(self._pending):
            self._abandon(read_id, error)
        asked, self._asked = self._asked, {}
        for future in asked.values():
            if not future.done():
                future.set_exception(TransportUnavailable("the NIXL process died", reason=reason))
        if self._on_down is not None:
            self._on_down(reason)
        await child.reap()
        if self._native is not None:
            self._native.reaped()
        if self._child is child:
            self._child = None
        if self._ping is not None:
            self._ping.cancel()
            self._ping = None
        for read_id in self._quarantine.ids:
            if read_id < wire.LANE_ID_MIN:  # the others' end is told by native code
                self._clear(read_id)

    # messages

    def _on_message(self, message: msgspec.Struct, request_id: int) -> None:
        if self._ping is not None:
            self._ping.cancel()  # it lives
            self._ping = None
        match message:
            case wire.ReadDone():
                self._on_done(request_id, message)
            case wire.ReadProgress():
                if pending := self._pending.get(request_id):
                    pending.done_bytes = message.done_bytes
                    if pending.on_progress is not None:
                        pending.on_progress(message.done_bytes)
            case wire.QuarantineClear():
                self._clear(request_id)
            case wire.PeerAdded() | wire.StatsReply():
                future = self._asked.pop(request_id, None)
                if future is not None and not future.done():
                    future.set_result(message)
            case wire.Ready() if self._child is not None and not self._child.ready.done():
                self._child.ready.set_result(message)
            case wire.Fatal() if self._child is not None and not self._child.ready.done():
                hint = INSTALL_HINT if message.code is wire.FatalCode.NO_NIXL else "Run p2pkv doctor"
                context = {"code": message.code.name, "reason": message.detail}
                self._child.ready.set_exception(TransportUnavailable("NIXL cannot be used", hint=hint, **context))
            case _:
                what = type(message).__name__
                raise RemoteProtocolError("the NIXL process sent what only an agent may send", type=what)

    def _on_done(self, read_id: int, done: wire.ReadDone) -> None:
        pending = self._pending.pop(read_id, None)
        if pending is None:
            if not done.open:
                self._clear(read_id)  # abandoned by us, and ended by now
            return
        extents = wire.unpack_extents(done.open) if done.open else []
        if extents:
            self._hold(read_id, extents)
        if done.status in (ReadStatus.NO_PEER, ReadStatus.DISCONNECTED):
            self._peers.pop(pending.peer, None)
        elif (known := self._peers.get(pending.peer)) and (done.status is ReadStatus.OK or not done.inline):
            self._peers[pending.peer] = known._replace(inline=done.inline)
        if not pending.future.done():
            pending.future.set_result(ReadOutcome(done.done_bytes, error_of(done, pending.peer), read_id, extents))

    async def _ask(self, message: msgspec.Struct, timeout_s: float) -> msgspec.Struct | None:
        child, loop = self._child, self._loop
        if child is None or loop is None or self.ready is None:
            raise TransportUnavailable("the NIXL process is not running (it is being restarted)")
        if len(self._asked) >= ASKED_MAX:
            raise Busy("too many questions to the NIXL process are open", questions=len(self._asked))
        request_id = next(self._ids) % wire.LANE_ID_MIN
        future: asyncio.Future[msgspec.Struct] = loop.create_future()
        self._asked[request_id] = future
        child.send(message, request_id)
        try:
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            return None
        finally:
            self._asked.pop(request_id, None)

    # late reads

    def _watch(self, due: float) -> None:
        """One timer for all reads, at the earliest due time: cheaper than one each, as hardly any fires."""
        if self._due_timer is None and self._loop is not None:
            self._due_timer = self._loop.call_later(max(0.0, due - time.monotonic()), self._sweep)
            self._due_at = due
        elif due < self._due_at and self._due_timer is not None:
            self._due_timer.cancel()
            self._due_timer = None
            self._watch(due)

    def _sweep(self) -> None:
        """Answer the reads that the child has not answered in time, and find out whether it lives."""
        self._due_timer = None
        now = time.monotonic()
        overdue = [read_id for read_id, pending in self._pending.items() if pending.due <= now]
        for read_id in overdue:
            self._abandon(read_id, DeadlineExceeded("a NIXL read did not end in time"))
        if overdue:
            self._find_out_whether_it_lives()
        if self._pending:
            self._watch(min(pending.due for pending in self._pending.values()))

    def _find_out_whether_it_lives(self) -> None:
        if self._ping is None and self._child is not None and self._loop is not None:
            self._child.send(wire.Stats(), next(self._ids) % wire.LANE_ID_MIN)
            self._ping = self._loop.call_later(self._options.hang_s, self._hung, self._child)

    def _on_native_late(self, broken: bool) -> None:
        """A read of native code was not answered in time, or its socket has ended."""
        if broken and self._child is not None and self.ready is not None:
            self._child.give_up("its second socket ended")
        elif not broken:
            self._find_out_whether_it_lives()

    def _hung(self, child: Child) -> None:
        self._ping = None
        child.give_up("it did not answer a ping")

    def _abandon(self, read_id: int, error: P2PKVError) -> None:
        """Answer a read whose end is not known: all of it may still be written."""
        pending = self._pending.pop(read_id)
        extents = [(run.local_offset, run.length) for run in pending.runs]
        self._hold(read_id, extents)
        if not pending.future.done():
            pending.future.set_result(ReadOutcome(pending.done_bytes, error, read_id, extents))

    def _hold(self, read_id: int, extents: Sequence[tuple[int, int]]) -> None:
        self._quarantine.hold(read_id, extents, time.monotonic())
        if self._on_quarantine is not None:
            self._on_quarantine(read_id, extents)
        self._check_quarantine()

    def _clear(self, read_id: int) -> None:
        """The end of a quarantine must not be heard before its beginning: the caller may not have run yet."""
        if read_id in self._undelivered:
            self._clear_later.add(read_id)
        elif self._quarantine.clear(read_id) and self._on_clear is not None:
            self._on_clear(read_id)

    def _check_quarantine(self, timer_fired: bool = False) -> None:
        """Kill the child if too much is held, else look again when the oldest entry is due."""
        if timer_fired:
            self._quarantine_timer = None
        now = time.monotonic()
        if reason := self._quarantine.excess(now):
            if self._child is not None and not self._child.dead.done():
                self.kills_for_quarantine += 1
                self._child.give_up(reason)
        elif self._quarantine_timer is None and self._loop is not None:
            due = self._quarantine.due()
            if due is not None:
                self._quarantine_timer = self._loop.call_later(due - now, self._check_quarantine, True)


def piece_bytes_for(total: int) -> int:
    """In which steps progress of a read is worth hearing.

    A step costs about 100 us (cold caches in the child, a wake-up of the agent), as much as copying 400 KiB on one
    host; and checksumming the last step is what the reader waits for at the end: so a quarter, from 2 MiB."""
    return min(max(total // 4, 2 << 20), 8 << 20)


def error_of(done: wire.ReadDone, peer: str) -> P2PKVError | None:
    """The typed error of a read that did not end well."""
    match done.status:
        case ReadStatus.OK:
            return None
        case ReadStatus.TIMEOUT | ReadStatus.CANCELLED:
            return DeadlineExceeded("a NIXL read did not end in time", peer=peer, done_bytes=done.done_bytes)
        case ReadStatus.BUSY:
            return Busy("the NIXL process has too many reads open", peer=peer)
        case ReadStatus.INVALID:
            return InvalidArgument("the NIXL process refused a read", peer=peer, reason=done.detail)
        case _:
            return PeerUnavailable("a NIXL read failed", peer=peer, status=done.status.name, reason=done.detail)
