"""asyncio face of the native threads: futures for copies and receives.

One instance per process. Everything here runs on the event loop's thread; the bytes move on native threads without the
GIL. A socket handed to :meth:`Movers.receive` is the I/O thread's until the result is there.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, NamedTuple, TypeVar

from p2pkv import _native
from p2pkv.errors import Busy
from p2pkv.transport.base import CallOff
from p2pkv.types import CHECKSUM_BYTES

TRANSFERS_MAX: Final = 4_096
"""At once; each is a socket and some hundred bytes."""

INLINE_BYTES_MAX: Final = 128 << 10
"""Copies up to this run on the loop's thread: about 20 us, less than waking another thread twice."""

PARTIAL_BYTES: Final = 2 << 20
"""Finished blocks are reported each time so many bytes have come, so that copying on overlaps with receiving."""


class Parts(NamedTuple):
    """How finely an engine is told of what comes, so that copying on overlaps with receiving: in bytes of finished
    blocks, and of a block that is not here whole yet."""

    partial: int
    ahead: int


FEW_PROCESSORS_PARTS: Final = Parts(PARTIAL_BYTES, 1 << 20)
"""Every piece of news takes the engine's thread a processor that the pull itself needs."""
MANY_PROCESSORS_PARTS: Final = Parts(512 << 10, 256 << 10)
"""The engine looks for news on a processor of its own (``native/gets.hpp``)."""


def parts_here() -> Parts:
    """What pays on this host."""
    return MANY_PROCESSORS_PARTS if _native.many_processors() else FEW_PROCESSORS_PARTS


class Code(enum.IntEnum):
    """How a transfer ended; mirrors ``p2pkv::Code`` in native/transfer.hpp."""

    OK = 0
    TIMEOUT = 1
    STALLED = 2
    CLOSED = 3
    PROTOCOL = 4
    CANCELLED = 5
    REFUSED = 6


class Work(enum.IntEnum):
    """What a copy job does; mirrors ``p2pkv::Work`` in native/workers.hpp."""

    COPY = 0
    COPY_HASH = 1
    HASH = 2


class Moved(NamedTuple):
    """End of a transfer. ``detail`` is text, or the owner's ERROR body where ``code`` is REFUSED.

    ``waited_s``: until the first byte of the answer; 0 when there was none.
    """

    code: Code
    bytes_moved: int
    detail: bytes
    waited_s: float = 0.0


class Copied(NamedTuple):
    """End of a copy job: per item whether its memory was there, and its digest (zeros when only copied)."""

    ok: bytes
    digests: bytes

    def digest(self, index: int) -> bytes:
        """The 16-byte xxh3_128 of one item."""
        return self.digests[index * CHECKSUM_BYTES : (index + 1) * CHECKSUM_BYTES]


T = TypeVar("T")

OnBlocks = Callable[[int, bytes, bytes], None]
"""(index of the first block, a status byte per block, 16 digest bytes per block)."""


class _Transfer(NamedTuple):
    future: asyncio.Future[Moved]
    on_blocks: OnBlocks | None


class Movers:
    """The native threads of one agent that Python gives work to: copies, and one I/O thread for receiving."""

    def __init__(self, copy_threads: int = 2, partial_bytes: int = PARTIAL_BYTES) -> None:
        self._workers = _native.Workers(copy_threads)
        self._receiver = _native.IoEngine(TRANSFERS_MAX)
        self._partial_bytes = partial_bytes
        self._ids = itertools.count(1)
        self._transfers: dict[int, _Transfer] = {}
        self._copies: dict[int, asyncio.Future[Copied]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Attach to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._workers.fd, self._on_copied)
        self._loop.add_reader(self._receiver.fd, self._on_moved, self._receiver)

    def stop(self) -> None:
        """End all transfers as cancelled, finish running copies, join the threads (milliseconds)."""
        self._receiver.stop()
        self._on_moved(self._receiver)
        self._workers.stop()
        self._on_copied()
        for future in self._copies.values():
            future.cancel()
        self._copies.clear()
        if self._loop is not None:
            for fd in (self._workers.fd, self._receiver.fd):
                self._loop.remove_reader(fd)
            self._loop = None

    async def receive(
        self,
        sock: socket.socket,
        request: bytes,
        blocks: Sequence[tuple[int, int]],
        *,
        deadline_s: float,
        first_byte_s: float,
        stall_s: float,
        on_blocks: OnBlocks,
        call_off: CallOff | None = None,
    ) -> Moved:
        """Send ``request``, receive GOT into (address, length) blocks. See ``native/transfer.hpp``.

        ``call_off``: ends it as cancelled, once the I/O thread has let go of memory and socket.
        Cancelling the caller cancels the transfer and still waits until the I/O thread has let go of memory and socket.

        Raises:
            Busy: too many transfers at once; nothing was sent.
        """
        job = next(self._ids)
        future: asyncio.Future[Moved] = asyncio.get_running_loop().create_future()
        self._transfers[job] = _Transfer(future, on_blocks)
        if not self._receiver.receive(
            job, sock.fileno(), request, blocks, deadline_s, first_byte_s, stall_s, self._partial_bytes
        ):
            del self._transfers[job]
            raise Busy("too many transfers at once", limit=TRANSFERS_MAX)
        if call_off is not None:
            call_off.on_call(partial(self._receiver.cancel, job))
        return await self._settle(self._receiver, job, future)

    @property
    def receiver(self) -> _native.IoEngine:
        """The thread that receives, for native code that submits transfers of its own."""
        return self._receiver

    def cancel_receives(self) -> None:
        """End every receive under way as cancelled; their futures follow when the I/O thread has let go of them."""
        for job, transfer in self._transfers.items():
            if transfer.on_blocks is not None:
                self._receiver.cancel(job)

    async def copy(self, work: Work, items: Sequence[tuple[int, int, int]], *, deadline_s: float = -1.0) -> Copied:
        """Run (destination, source, length) items; small ones at once, others on the copy threads.

        Nothing is written after ``deadline_s`` (negative: none). Cancelling the caller does not stop the copy, and the
        call still waits for it: the memory is in use until it is done.
        """
        if sum(item[2] for item in items) <= INLINE_BYTES_MAX:
            return Copied(*_native.run_now(work, items, deadline_s))
        job = next(self._ids)
        future: asyncio.Future[Copied] = asyncio.get_running_loop().create_future()
        self._copies[job] = future
        self._workers.submit(job, work, items, deadline_s)
        return await _uncancelled(future)

    async def _settle(self, engine: _native.IoEngine, job: int, future: asyncio.Future[Moved]) -> Moved:
        try:
            return await future
        except asyncio.CancelledError:
            if job in self._transfers:  # memory and socket are in use until its final event
                ended: asyncio.Future[Moved] = asyncio.get_running_loop().create_future()
                self._transfers[job] = _Transfer(ended, None)
                engine.cancel(job)
                await _uncancelled(ended)
            raise

    def _on_copied(self) -> None:
        for job, ok, digests in self._workers.drain():
            future = self._copies.pop(job, None)
            if future is not None and not future.done():
                future.set_result(Copied(ok, digests))

    def _on_moved(self, engine: _native.IoEngine) -> None:
        for job, final, code, first, statuses, digests, moved, waited, detail in engine.drain():
            transfer = self._transfers[job]
            if statuses and transfer.on_blocks is not None:
                transfer.on_blocks(first, statuses, digests)
            if final:
                del self._transfers[job]
                if not transfer.future.done():
                    transfer.future.set_result(Moved(Code(code), moved, detail, waited))


async def _uncancelled(future: asyncio.Future[T]) -> T:
    """Wait for a future that something else still needs, even while the caller is being cancelled."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    return future.result()
