"""The TCP transport: the owner sends from its memfd, the reader receives straight into its slots.

Reader: GET on a pooled data connection (several at once when a batch is large), the answer is received by the native
I/O thread, block by block, each proven by its checksum while it is hot in the cache; then RELEASE.

Owner: GET pins the blocks, answers with GOT and the payloads by ``sendfile``. Zero-copy sends keep *references* to the
arena's pages in the socket queue, so "sent" does not mean "read": the lease is held until the reader's RELEASE, its
next GET on that connection, the connection's end, or the lease's expiry, whichever comes first.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from p2pkv.errors import Busy, P2PKVError, PeerUnavailable, RemoteProtocolError, Unavailable
from p2pkv.transport.base import ArenaMemory, BlockSource, PullRequest, PullResult
from p2pkv.transport.movers import Code, Moved, Movers, OnBlocks
from p2pkv.transport.patience import Patience
from p2pkv.types import Status
from p2pkv.wire.frame import FRAME_VERSION, HEADER, Frame, FrameDecoder
from p2pkv.wire.peer import CODEC, GOT_RECORD, Get, PeerError, PeerType, Release

log = logging.getLogger(__name__)

OpenData = Callable[[int, float], Awaitable[socket.socket]]
"""(node, deadline in seconds) -> a connected, non-blocking data connection that has been introduced."""

RECV_BYTES: Final = 16 << 10
"""CPython allocates this much for every receive; much more would be mapped and unmapped each time."""
REQUEST_BYTES_MAX: Final = 2 << 20
RELEASE_NOW: Final = CODEC.encode(Release(0))

_STATUS_OF_CODE: Final = {
    Code.TIMEOUT: Status.TIMEOUT,
    Code.STALLED: Status.TIMEOUT,
    Code.CLOSED: Status.UNREACHABLE,
    Code.PROTOCOL: Status.UNREACHABLE,
    Code.CANCELLED: Status.LOST,
    Code.REFUSED: Status.BUSY,
}


class TcpTransport:
    """See the module's docstring; the contract is in :mod:`p2pkv.transport.base`.

    Args:
        movers: the process's native threads.
        arena: where blocks are sent from and received into.
        source: pins and releases local blocks for peers.
        open_data: dials a peer's data connection.
        streams, stream_bytes: a pull uses one connection for each ``stream_bytes``, at most ``streams``.
        idle_connections: kept per peer.
        stall_s: a pull without progress for so long is given up.
    """

    name = "tcp"

    def __init__(
        self,
        *,
        movers: Movers,
        arena: ArenaMemory,
        source: BlockSource,
        open_data: OpenData,
        streams: int = 4,
        stream_bytes: int = 8 << 20,
        idle_connections: int = 8,
        stall_s: float = 0.5,
        lease_ttl_s: float = 10.0,
    ) -> None:
        self._movers = movers
        self._arena = arena
        self._source = source
        self._open_data = open_data
        self._streams = streams
        self._stream_bytes = stream_bytes
        self._idle_connections = idle_connections
        self._stall_s = stall_s
        self._lease_ttl_s = lease_ttl_s
        self._patience = Patience(stall_s)
        self._idle: dict[int, deque[socket.socket]] = {}
        self._serving: set[_Serving] = set()
        self._dialing: set[asyncio.Timeout] = set()
        self._stopped = False
        self.bytes_served = 0

    async def start(self) -> None:
        """Nothing to make ready: connections are dialled when first needed."""

    async def stop(self) -> None:
        """End pulls in flight, close idle and served connections."""
        self._stopped = True
        for dialing in self._dialing:
            dialing.reschedule(0.0)
        self._movers.cancel_receives()
        for node in list(self._idle):
            self.peer_gone(node)
        for serving in list(self._serving):
            serving.close()

    def peer_gone(self, node: int) -> None:
        """Close the idle connections to a node."""
        self._patience.forget(node)
        for sock in self._idle.pop(node, ()):
            sock.close()

    # --- reader ---

    async def pull(self, request: PullRequest) -> PullResult:
        """Pull over as many streams as the size is worth; see the contract."""
        statuses = [Status.MISS] * len(request.hashes)
        groups = split([extent.length for extent in request.destinations], self._stream_bytes, self._streams)
        deadline = asyncio.get_running_loop().time() + request.deadline_s
        if len(groups) == 1:
            ends = [await self._pull_run(request, 0, len(request.hashes), deadline, statuses)]
        else:
            ends = await asyncio.gather(
                *(self._pull_run(request, first, last, deadline, statuses) for first, last in groups)
            )
        return PullResult(
            statuses,
            sum(moved for moved, _ in ends),
            "; ".join(sorted({reason for _, reason in ends if reason})),
        )

    async def _pull_run(
        self, request: PullRequest, first: int, last: int, deadline: float, statuses: list[Status]
    ) -> tuple[int, str]:
        """Pull ``request.hashes[first:last]`` over one connection; returns (bytes, why it ended badly or "")."""
        loop = asyncio.get_running_loop()
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

        moved = Moved(Code.CLOSED, 0, b"")
        for fresh in (False, True):
            sock = None if fresh else self._idle_connection(request.node)
            pooled = sock is not None
            try:
                if sock is None:
                    # A holder that stands still must not use up the time in which another one could be asked.
                    dial_s = max(0.001, min(deadline - loop.time(), self._stall_s))
                    sock = await self._dial(request.node, dial_s)
                moved = await self._exchange(request.node, sock, get, blocks, deadline - loop.time(), on_blocks)
            except Busy as error:
                moved = Moved(Code.REFUSED, 0, CODEC.encode(PeerError("busy", str(error)))[HEADER.size :])
            except (P2PKVError, OSError, TimeoutError) as error:
                moved = Moved(Code.CLOSED, 0, f"cannot connect: {error}".encode())
            # An idle connection may have died unnoticed (the peer restarted): that says nothing about the peer now.
            if not (pooled and moved.code is Code.CLOSED and reported == first):
                break
        if moved.code is Code.OK:
            return moved.bytes_moved, ""
        statuses[reported:last] = [_STATUS_OF_CODE[moved.code]] * (last - reported)
        return moved.bytes_moved, _describe(moved)

    async def _dial(self, node: int, deadline_s: float) -> socket.socket:
        """A fresh data connection, or what keeps us from one; ended early by :meth:`stop`."""
        if self._stopped:
            raise PeerUnavailable("the transport is stopping")
        async with asyncio.timeout(deadline_s + 1.0) as limit:
            self._dialing.add(limit)
            try:
                return await self._open_data(node, deadline_s)
            finally:
                self._dialing.discard(limit)

    async def _exchange(
        self,
        node: int,
        sock: socket.socket,
        get: bytes,
        blocks: list[tuple[int, int]],
        left_s: float,
        on_blocks: OnBlocks,
    ) -> Moved:
        reusable = False
        try:
            moved = await self._movers.receive(
                sock,
                get,
                blocks,
                deadline_s=max(0.001, left_s),
                first_byte_s=self._patience.of(node),
                stall_s=self._stall_s,
                on_blocks=on_blocks,
            )
            self._patience.learn(node, moved.waited_s)
            reusable = moved.code is Code.OK
            return moved
        finally:
            if reusable:
                self._give_back(node, sock)
            else:
                sock.close()

    def _idle_connection(self, node: int) -> socket.socket | None:
        idle = self._idle.get(node)
        return idle.pop() if idle else None

    def _give_back(self, node: int, sock: socket.socket) -> None:
        try:
            sock.send(RELEASE_NOW, socket.MSG_NOSIGNAL)
        except OSError:
            sock.close()  # the owner sees the close and releases
            return
        idle = self._idle.setdefault(node, deque())
        if len(idle) >= self._idle_connections:
            idle.popleft().close()
        idle.append(sock)

    # --- owner ---

    def accept(self, sock: socket.socket, node: int, leftover: bytes = b"", *, same_host: bool = False) -> None:
        """Serve a data connection that ``node`` opened; takes the non-blocking socket over.

        ``same_host``: the reader runs on this machine: blocks are copied into the socket, not sent by reference.
        """
        _Serving(self, sock, node, self._arena.base_address if same_host else 0).start(leftover)


_STATUSES: Final = frozenset(Status)


class _Serving:
    """The owner's side of one data connection: one request at a time, one lease at a time."""

    def __init__(self, transport: TcpTransport, sock: socket.socket, node: int, mapping: int) -> None:
        self._transport = transport
        self._mapping = mapping
        self._sock = sock
        self._node = node
        self._decoder = FrameDecoder(REQUEST_BYTES_MAX)
        self._frames: deque[Frame] = deque()
        self._lease = 0
        self._sending: asyncio.Future[Moved] | None = None
        self._closed = False
        self._loop = asyncio.get_running_loop()

    def start(self, leftover: bytes) -> None:
        self._transport._serving.add(self)
        self._loop.add_reader(self._sock.fileno(), self._on_readable)
        if leftover:
            self._on_bytes(leftover)

    def close(self) -> None:
        """Give the lease back and close; while the I/O thread still has the socket, that waits for it to let go."""
        if self._closed:
            return
        if self._sending is not None:
            self._sock.shutdown(socket.SHUT_RDWR)  # ends the transfer; _on_sent closes
            return
        self._closed = True
        self._loop.remove_reader(self._sock.fileno())
        self._sock.close()
        self._release()
        self._transport._serving.discard(self)

    def _release(self) -> None:
        if self._lease:
            self._transport._source.release(self._lease, self._node)
            self._lease = 0

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(RECV_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self._on_bytes(data)
        else:
            self.close()

    def _on_bytes(self, data: bytes) -> None:
        try:
            self._frames.extend(self._decoder.feed(data))
            self._serve()
        except RemoteProtocolError as error:
            log.warning("data connection of %016x is closed: %s", self._node, error)
            self._refuse("protocol", str(error))
            self.close()

    def _serve(self) -> None:
        while self._frames and self._sending is None and not self._closed:
            message = CODEC.decode(self._frames.popleft())
            self._release()  # whatever comes next means that the reader is done with the last answer
            if isinstance(message, Get):
                self._answer(message)
            elif not isinstance(message, Release):
                raise RemoteProtocolError(
                    "only GET and RELEASE belong on a data connection", got=type(message).__name__
                )
        if len(self._frames) > 16:
            raise RemoteProtocolError("a data connection carries one request at a time", queued=len(self._frames))

    def _answer(self, get: Get) -> None:
        transport = self._transport
        ttl_s = min(get.ttl_ms / 1000, transport._lease_ttl_s)
        try:
            held = transport._source.pin(get.namespace, get.hashes, ttl_s, self._node)
        except P2PKVError as error:
            self._refuse("busy" if isinstance(error, Unavailable) else "namespace", str(error))
            return
        self._lease = held.lease
        records = bytearray()
        runs: list[tuple[int, int]] = []
        for block in held.blocks:
            if block is None:
                records += _MISS_RECORD
                continue
            records += GOT_RECORD.pack(Status.OK, block.length, block.generation, block.checksum)
            if runs and runs[-1][0] + runs[-1][1] == block.offset:
                runs[-1] = (runs[-1][0], runs[-1][1] + block.length)
            else:
                runs.append((block.offset, block.length))
        header = HEADER.pack(len(records), FRAME_VERSION, PeerType.GOT, 0, 0) + records
        try:
            self._sending = transport._movers.send(
                self._sock,
                header,
                transport._arena.fd,
                runs,
                deadline_s=held.ttl_s,
                stall_s=held.ttl_s,
                mapping=self._mapping,
            )
        except Busy as error:
            self._release()
            self._refuse("busy", str(error))
            return
        self._loop.remove_reader(self._sock.fileno())
        self._sending.add_done_callback(self._on_sent)

    def _on_sent(self, future: asyncio.Future[Moved]) -> None:
        self._sending = None
        if future.cancelled() or future.result().code is not Code.OK:
            self._loop.remove_reader(self._sock.fileno())
            self.close()
            return
        self._transport.bytes_served += future.result().bytes_moved
        self._loop.add_reader(self._sock.fileno(), self._on_readable)
        self._on_bytes(b"")

    def _refuse(self, code: str, message: str) -> None:
        try:
            self._sock.send(CODEC.encode(PeerError(code, message[:1000])), socket.MSG_NOSIGNAL)
        except OSError:
            self.close()


_MISS_RECORD: Final = GOT_RECORD.pack(Status.MISS, 0, 0, bytes(16))


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


def _describe(moved: Moved) -> str:
    if moved.code is Code.REFUSED:
        try:
            refusal = CODEC.decode(Frame(PeerType.ERROR, 0, 0, moved.detail))
        except RemoteProtocolError as error:
            return str(error)
        return f"refused: {refusal.message}" if isinstance(refusal, PeerError) else "refused"
    return f"{moved.code.name.lower()}: {moved.detail.decode(errors='replace')}"
