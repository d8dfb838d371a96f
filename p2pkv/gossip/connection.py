"""One control connection on an asyncio transport: frames in, a bounded queue of frames out. No protocol."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from typing import Final, cast

from p2pkv.errors import RemoteProtocolError
from p2pkv.gossip import net
from p2pkv.gossip.link import PeerLink
from p2pkv.wire.frame import Frame, FrameDecoder

TRANSPORT_BYTES: Final = 256 << 10
"""What asyncio's own (copied, per connection) buffer may hold; the rest waits in the queue as shared frames."""
BLOCKED_MAX_S: Final = 10.0
"""A reader whose socket has taken nothing for so long is disconnected, however little it is behind."""


class ControlConnection(asyncio.Protocol):
    """Cuts what comes into frames; queues what goes out. Used on the event loop's thread only.

    Args:
        on_frame, on_malformed, on_lost: called from the loop; after ``on_lost`` nothing else is. ``on_lost`` is not
            called for a connection that was closed from here.
        queue_bytes_max: frames that wait beyond it make the connection close, "reads too slowly".
    """

    def __init__(
        self,
        *,
        on_frame: Callable[[Frame], None],
        on_malformed: Callable[[RemoteProtocolError], None],
        on_lost: Callable[[str], None],
        queue_bytes_max: int,
        counters: Counter[str],
    ) -> None:
        self.link: PeerLink | None = None
        self.closed = asyncio.Event()
        self._on_frame = on_frame
        self._on_malformed = on_malformed
        self._on_lost = on_lost
        self._queue_bytes_max = queue_bytes_max
        self._counters = counters
        self._decoder = FrameDecoder()
        self._transport: asyncio.Transport | None = None
        self._queue: deque[bytes] = deque()
        self._queued_bytes = 0
        self._blocked_since: float | None = None
        self._over = False
        self.used_at = 0.0
        """When something was last sent or received that somebody needed; the owner's to keep."""

    @property
    def over(self) -> bool:
        """Whether nothing can be sent or will be received any more."""
        return self._over

    @property
    def queued_bytes(self) -> int:
        """Bytes of frames that the transport has not taken yet."""
        return self._queued_bytes

    @property
    def rtt_ms(self) -> float | None:
        """Round-trip time as the kernel sees it."""
        sock = self._transport.get_extra_info("socket") if self._transport is not None and not self.over else None
        return net.rtt_ms(sock) if sock is not None else None

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is there."""
        transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self._transport = transport
        if self.over:
            transport.abort()
            return
        transport.set_write_buffer_limits(high=TRANSPORT_BYTES)
        self._pump()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        self._counters["bytes_received"] += len(data)
        try:
            for frame in self._decoder.feed(data):
                if self.over:  # a frame before this one may have made it so
                    return
                self._counters["frames_received"] += 1
                self._on_frame(frame)
        except RemoteProtocolError as error:
            self._on_malformed(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._end(str(exc) if exc is not None else "closed by the peer", tell=True)
        self.closed.set()

    def pause_writing(self) -> None:
        """The socket takes no more for now."""
        self._blocked_since = asyncio.get_running_loop().time()

    def resume_writing(self) -> None:
        """The socket takes bytes again."""
        self._blocked_since = None
        self._pump()

    # --- our side

    def send(self, frame: bytes) -> bool:
        """Queue a frame; False when the connection is over. The frame is shared and must not change."""
        if self.over:
            return False
        self._queue.append(frame)
        self._queued_bytes += len(frame)
        self._pump()
        if self._queued_bytes > self._queue_bytes_max:
            self._fail("reads too slowly")
            return False
        return not self.over

    def check_progress(self, now: float) -> None:
        """Disconnect a peer whose socket has taken nothing for too long. ``now`` is the loop's time."""
        if self._blocked_since is not None and now - self._blocked_since > BLOCKED_MAX_S:
            self._fail("does not read")

    def close(self, reason: str) -> None:
        """Close after what is queued has been offered to the socket; ``on_lost`` is not called."""
        if self.over:
            return
        transport, left = self._transport, self._queue
        self._end(reason, tell=False)
        if transport is None:
            self.closed.set()
            return
        if self._blocked_since is None:
            transport.writelines(left)  # at most what was queued before the transport was there
            transport.close()
            # A peer that does not read its goodbye must not keep the socket.
            asyncio.get_running_loop().call_later(1.0, transport.abort)
        else:
            transport.abort()

    def abort(self, reason: str) -> None:
        """Close at once."""
        self._end(reason, tell=False)
        if self._transport is not None:
            self._transport.abort()
        else:
            self.closed.set()

    def _fail(self, reason: str) -> None:
        if self.over:
            return
        self._counters["slow_readers"] += 1
        if self._transport is not None:
            self._transport.abort()
        # Not from inside send(): the core is in the middle of something.
        asyncio.get_running_loop().call_soon(self._end, reason, True)

    def _pump(self) -> None:
        transport = self._transport
        while transport is not None and self._queue and self._blocked_since is None:
            frame = self._queue.popleft()
            self._queued_bytes -= len(frame)
            self._counters["bytes_sent"] += len(frame)
            self._counters["frames_sent"] += 1
            transport.write(frame)

    def _end(self, reason: str, tell: bool) -> None:
        if self.over:
            return
        self._over = True
        self._queue = deque()
        self._queued_bytes = 0
        if self.link is not None:
            self.link.close(reason)
        if tell:
            self._on_lost(reason)
