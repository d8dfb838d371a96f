"""The TCP transport: the owner sends from its memfd, the reader receives straight into its slots.

Reader: GET on a pooled data connection (several at once when a batch is large), the answer is received by the native
I/O thread, block by block, each proven by its checksum while it is hot in the cache; then RELEASE.

Owner: GET pins the blocks, answers with GOT and the payloads by ``sendfile``, all on one native thread
(``native/server.hpp``). Zero-copy sends keep *references* to the arena's pages in the socket queue, so "sent" does not
mean "read": the lease is held until the reader's RELEASE, its next GET on that connection, the connection's end, or the
lease's expiry, whichever comes first.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from p2pkv import _native
from p2pkv.errors import Busy, P2PKVError, PeerUnavailable, RemoteProtocolError
from p2pkv.transport.base import ArenaMemory, CallOff, PullRequest, PullResult, is_silence
from p2pkv.transport.movers import Code, Moved, Movers, OnBlocks
from p2pkv.transport.patience import Patience
from p2pkv.transport.setup_time import SetupTime
from p2pkv.types import Status
from p2pkv.wire.frame import HEADER, Frame
from p2pkv.wire.peer import CODEC, Get, PeerError, PeerType, Release

log = logging.getLogger(__name__)

OpenData = Callable[[int, float], Awaitable[socket.socket]]
"""(node, deadline in seconds) -> a connected, non-blocking data connection that has been introduced."""

RELEASE_NOW: Final = CODEC.encode(Release(0))
DIAL_S: Final = 0.002
"""What a connection is expected to take before there was one."""

_STATUS_OF_CODE: Final = {
    Code.TIMEOUT: Status.TIMEOUT,
    Code.STALLED: Status.TIMEOUT,
    Code.CLOSED: Status.UNREACHABLE,
    Code.PROTOCOL: Status.UNREACHABLE,
    Code.CANCELLED: Status.LOST,
    Code.REFUSED: Status.BUSY,
}


_STATUS_OF_REFUSAL: Final = {"busy": Status.BUSY, "draining": Status.UNREACHABLE}
"""Everything else is something that asking again does not change."""


class TcpTransport:
    """See the module's docstring; the contract is in :mod:`p2pkv.transport.base`.

    Args:
        movers: the process's native threads.
        arena: where blocks are sent from and received into.
        server: answers the data connections of peers; stopped with the transport.
        open_data: dials a peer's data connection.
        streams, stream_bytes: a pull uses one connection for each ``stream_bytes``, at most ``streams``.
        idle_connections: kept per peer, in :attr:`pool`, from which native code takes them too.
        slot_of: a node's place in the index, by which native code finds its connections; None = it has none.
        stall_s: a pull without progress for so long is given up.
    """

    name = "tcp"

    def __init__(
        self,
        *,
        movers: Movers,
        arena: ArenaMemory,
        server: _native.Server,
        open_data: OpenData,
        streams: int = 4,
        stream_bytes: int = 8 << 20,
        idle_connections: int = 8,
        stall_s: float = 0.5,
        lease_ttl_s: float = 10.0,
        slot_of: Callable[[int], int | None] = lambda node: None,
    ) -> None:
        self._movers = movers
        self._arena = arena
        self._server = server
        self._open_data = open_data
        self._streams = streams
        self._stream_bytes = stream_bytes
        self._stall_s = stall_s
        self._lease_ttl_s = lease_ttl_s
        self._patience = Patience(stall_s)
        self._setup = SetupTime(DIAL_S)
        self._slot_of = slot_of
        self.pool = _native.Pool(idle_connections, stall_s)
        """Idle data connections."""
        self._dialing: set[asyncio.Timeout] = set()
        self._preparing: set[int] = set()
        self._stopped = False

    async def start(self) -> None:
        """Listen to what the server has to say; connections are dialled when first needed."""
        asyncio.get_running_loop().add_reader(self._server.fd, self._on_server_events)

    async def stop(self) -> None:
        """End pulls in flight, close idle and served connections."""
        self._stopped = True
        for dialing in self._dialing:
            dialing.reschedule(0.0)
        self._movers.cancel_receives()
        self.pool.clear()
        self._server.stop()
        asyncio.get_running_loop().remove_reader(self._server.fd)
        self._on_server_events()

    def peer_gone(self, node: int) -> None:
        """Close the idle connections to a node."""
        self._patience.forget(node)
        self.pool.drop(node)

    # --- reader ---

    async def pull(self, request: PullRequest) -> PullResult:
        """Pull over as many streams as the size is worth; see the contract."""
        statuses = [Status.MISS] * len(request.hashes)
        groups = split([extent.length for extent in request.destinations], self._stream_bytes, self._streams)
        deadline = time.monotonic() + request.deadline_s
        if len(groups) == 1:
            ends = [await self._pull_run(request, 0, len(request.hashes), deadline, statuses)]
        else:
            ends = await asyncio.gather(
                *(self._pull_run(request, first, last, deadline, statuses) for first, last in groups)
            )
        return PullResult(
            statuses,
            sum(end.bytes_moved for end in ends),
            "; ".join(sorted({end.reason for end in ends if end.reason})),
            waited_s=min((end.waited_s for end in ends if end.waited_s), default=0.0),
            setup_s=min(end.setup_s for end in ends),
        )

    async def _pull_run(
        self, request: PullRequest, first: int, last: int, deadline: float, statuses: list[Status]
    ) -> _End:
        """Pull ``request.hashes[first:last]`` over one connection."""
        base = self._arena.base_address
        blocks = [(base + extent.offset, extent.length) for extent in request.destinations[first:last]]
        get = CODEC.encode(Get(request.namespace, list(request.hashes[first:last]), int(self._lease_ttl_s * 1000)))

        reported = first  # the native thread reports blocks in order

        def on_blocks(start: int, block_statuses: bytes, digests: bytes) -> None:
            nonlocal reported
            for i, status in enumerate(block_statuses):
                index = first + start + i
                statuses[index] = Status(status) if status in _STATUSES else Status.INVALID
                request.on_block(index, statuses[index], digests[i * 16 : i * 16 + 16])
            reported = first + start + len(block_statuses)

        moved, setup_s = Moved(Code.CLOSED, 0, b""), 0.0
        for fresh in (False, True):
            sock = None if fresh else self._idle_connection(request.node)
            pooled = sock is not None
            try:
                if sock is None:
                    # A holder that stands still must not use up the time in which another one could be asked.
                    dial_s = max(0.001, min(deadline - time.monotonic(), self._stall_s))
                    dialed_at = time.monotonic()
                    try:
                        sock = await self._dial(request.node, dial_s, request.call_off)
                    finally:
                        setup_s = time.monotonic() - dialed_at
                moved = await self._exchange(request, sock, get, blocks, deadline - time.monotonic(), on_blocks)
            except Busy as error:
                moved = Moved(Code.REFUSED, 0, CODEC.encode(PeerError("busy", str(error)))[HEADER.size :])
            except (P2PKVError, OSError, TimeoutError) as error:
                # Who does not even answer a dial is silent; who refuses it, or breaks it off, is not.
                moved = Moved(
                    Code.TIMEOUT if is_silence(error) else Code.CLOSED, 0, f"cannot connect: {error}".encode()
                )
            # An idle connection may have died unnoticed (the peer restarted): that says nothing about the peer now.
            if not (pooled and moved.code is Code.CLOSED and reported == first):
                break
        if moved.code is Code.OK:
            return _End(moved.bytes_moved, "", moved.waited_s, setup_s)
        refusal = _refusal(moved) if moved.code is Code.REFUSED else None
        status = (
            _STATUS_OF_CODE[moved.code] if refusal is None else _STATUS_OF_REFUSAL.get(refusal.code, Status.INVALID)
        )
        statuses[reported:last] = [status] * (last - reported)
        said = _describe(moved) if refusal is None else f"refused: {refusal.message}"
        return _End(moved.bytes_moved, said, moved.waited_s, setup_s)

    async def _dial(self, node: int, deadline_s: float, call_off: CallOff | None = None) -> socket.socket:
        """A fresh data connection, or what keeps us from one; ended early by :meth:`stop`, or when it is called off."""
        if self._stopped:
            raise PeerUnavailable("the transport is stopping")
        async with asyncio.timeout(deadline_s + 1.0) as limit:
            self._dialing.add(limit)
            if call_off is not None:
                call_off.on_call(lambda: limit.reschedule(0.0) if limit in self._dialing else None)
            began = time.monotonic()
            try:
                sock = await self._open_data(node, deadline_s)
                # An answer comes no sooner than a connection: so a peer that has not answered anything yet, and does
                # not, is waited for as long as its link is worth.
                self._patience.learn(node, time.monotonic() - began)
                self._setup.learn(time.monotonic() - began)
                return sock
            finally:
                self._dialing.discard(limit)

    async def _exchange(
        self,
        request: PullRequest,
        sock: socket.socket,
        get: bytes,
        blocks: list[tuple[int, int]],
        left_s: float,
        on_blocks: OnBlocks,
    ) -> Moved:
        node, reusable = request.node, False
        try:
            moved = await self._movers.receive(
                sock,
                get,
                blocks,
                deadline_s=max(0.001, left_s),
                first_byte_s=self._patience.of(node),
                stall_s=self._stall_s,
                on_blocks=on_blocks,
                call_off=request.call_off,
            )
            reusable = moved.code is Code.OK
            self._patience.learn(node, moved.waited_s)
            return moved
        finally:
            if reusable:
                self._give_back(node, sock)
            else:
                sock.close()

    def setup_s(self, node: int) -> float:
        """A dial, unless a connection is idle."""
        return 0.0 if self.pool.idle_at(node) else self._setup.expected_s

    async def prepare(self, node: int) -> None:
        """Have an idle data connection to a node, if one can be had: for native code, which does not dial."""
        if self._stopped or self.pool.idle_at(node) or node in self._preparing:
            return
        self._preparing.add(node)
        try:
            sock = await self._dial(node, self._stall_s)
        except (P2PKVError, OSError, TimeoutError) as error:
            log.debug("no data connection to %016x: %s", node, error)
        else:
            self._give_back(node, sock)
        finally:
            self._preparing.discard(node)

    def _idle_connection(self, node: int) -> socket.socket | None:
        fd = self.pool.take(node)
        # The family is only for people to read; without it the constructor would ask the kernel for everything.
        return None if fd < 0 else socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=fd)

    def _give_back(self, node: int, sock: socket.socket) -> None:
        try:
            sock.send(RELEASE_NOW, socket.MSG_NOSIGNAL)
        except OSError:
            sock.close()  # the owner sees the close and releases
            return
        if self._stopped:
            sock.close()
            return
        self.pool.give(node, self._slot_of(node) or 0, sock.detach())
        self.pool.learn(node, self._patience.slowest(node))  # native code has not seen all that we have

    # --- owner ---

    @property
    def bytes_served(self) -> int:
        """Payload bytes that were sent to peers."""
        return self._server.bytes_served

    def accept(self, sock: socket.socket, node: int, leftover: bytes = b"", *, same_host: bool = False) -> None:
        """Have a data connection that ``node`` opened served; takes the non-blocking socket over.

        ``same_host``: the reader runs on this machine: blocks are copied into the socket, not sent by reference.
        """
        if not self._server.add(sock.detach(), node, same_host, leftover):
            log.warning("data connection of %016x is refused: this agent has too many, or stops", node)

    def _on_server_events(self) -> None:
        for node, text in self._server.drain():
            log.warning("data connection of %016x is closed: %s", node, text)


_STATUSES: Final = frozenset(Status)


class _End(NamedTuple):
    """Of one stream of a pull. ``reason``: why it ended badly, or ""."""

    bytes_moved: int
    reason: str
    waited_s: float
    setup_s: float


def split(lengths: Sequence[int], part_bytes: int, parts_max: int) -> list[tuple[int, int]]:
    """Cut a list into at most ``parts_max`` contiguous runs of about equal bytes, each worth ``part_bytes`` or more."""
    total = sum(lengths)
    parts = max(1, min(parts_max, total // part_bytes, len(lengths)))
    runs: list[tuple[int, int]] = []
    first, got = 0, 0
    for i, length in enumerate(lengths):
        got += length
        if got * parts >= total * (len(runs) + 1) and len(runs) < parts - 1:
            runs.append((first, i + 1))
            first = i + 1
    if first < len(lengths) or not runs:
        runs.append((first, len(lengths)))
    return runs


def _refusal(moved: Moved) -> PeerError | None:
    """What an owner's ERROR says; None: nothing that makes sense."""
    try:
        refusal = CODEC.decode(Frame(PeerType.ERROR, 0, 0, moved.detail))
    except RemoteProtocolError:
        return None
    return refusal if isinstance(refusal, PeerError) else None


def _describe(moved: Moved) -> str:
    return f"{moved.code.name.lower()}: {moved.detail.decode(errors='replace')}"
