"""An engine's socket: frames and descriptors in, a bounded queue of frames out. What they say is for others.

Descriptors come beside the frame that they belong to, as SCM_RIGHTS ancillary data; what nobody takes is closed.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from p2pkv.errors import RemoteProtocolError
from p2pkv.wire.frame import Frame, FrameDecoder

RECV_BYTES: Final = 16 << 10
"""CPython allocates this much for every receive; much more would be mapped and unmapped each time."""
FDS_MAX: Final = 8
SEND_QUEUE_BYTES_MAX: Final = 16 << 20
"""Answers that an engine does not read; beyond it the engine is disconnected."""


class EngineWire:
    """One connected, non-blocking socket, which is this object's from now on. On the event loop.

    Args:
        on_frame: gets each frame; may raise RemoteProtocolError, and may call :meth:`stop`.
        on_end: called once, when the engine is gone, or has to go: "" the engine closed it; else why.
        on_nonsense: called before that with what was wrong with its frames; it may still :meth:`send`.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        on_frame: Callable[[Frame], None],
        on_end: Callable[[str], None],
        on_nonsense: Callable[[RemoteProtocolError], None],
    ) -> None:
        self._sock = sock
        self._on_frame = on_frame
        self._on_end = on_end
        self._on_nonsense = on_nonsense
        self._loop = asyncio.get_running_loop()
        self._decoder = FrameDecoder()
        self._fds: deque[int] = deque()
        self._out = bytearray()
        self._stopped = False
        self._hangup = select.poll()
        self._hangup.register(sock, select.POLLRDHUP | select.POLLHUP)
        self.fds_lost = False
        """Whether descriptors came with the present frame that this process had no room for."""

    def start(self) -> None:
        """Begin to read."""
        self._loop.add_reader(self._sock.fileno(), self._on_readable)

    def still_there(self) -> bool:
        """Whether the engine has not closed the connection, asked of the kernel rather than of what was read so far."""
        return not self._stopped and not self._hangup.poll(0)

    def stop(self) -> None:
        """Neither read nor write any more. The socket stays open until :meth:`close`."""
        if self._stopped:
            return
        self._stopped = True
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        while self._fds:
            os.close(self._fds.popleft())

    def close(self) -> None:
        """Close the socket: what the engine waits for to know that nothing is done for it any more."""
        self.stop()
        self._sock.close()

    # --- in

    def take_fd(self) -> int | None:
        """The oldest descriptor that has come, which is the caller's from now on."""
        return self._fds.popleft() if self._fds else None

    def drop_fd(self) -> None:
        """Close the oldest descriptor that has come, if there is one."""
        if self._fds:
            os.close(self._fds.popleft())

    def _on_readable(self) -> None:
        try:
            data, fds, flags, _ = socket.recv_fds(self._sock, RECV_BYTES, FDS_MAX, socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data, fds, flags = b"", [], 0
        self._fds.extend(fds)
        if flags & socket.MSG_CTRUNC:
            self.fds_lost = True
        if not data:
            self._on_end("")
            return
        try:
            for frame in self._decoder.feed(data):
                self._on_frame(frame)
                if self._stopped:
                    return
        except RemoteProtocolError as error:
            self._on_nonsense(error)
            self._on_end(str(error))
            return
        if not self._decoder.pending_bytes:
            self.fds_lost = False
        # Descriptors that no request asked for. One that came with the beginning of a frame may still be asked for.
        while len(self._fds) > (1 if self._decoder.pending_bytes else 0):
            os.close(self._fds.popleft())

    # --- out

    def send(self, data: bytes) -> None:
        """Send a frame, now or when the engine reads."""
        if self._stopped:
            return
        if not self._out:
            try:
                sent = self._sock.send(data, socket.MSG_NOSIGNAL)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                self._on_end("")
                return
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self._sock.fileno(), self._on_writable)
        self._out += data
        if len(self._out) > SEND_QUEUE_BYTES_MAX:
            self._on_end("it does not read its answers")

    def send_fds(self, data: bytes, descriptors: Sequence[int]) -> None:
        """Send the first frame of all, with descriptors, which stay the caller's.

        Raises:
            OSError: the engine is gone.
        """
        socket.send_fds(self._sock, [data], list(descriptors))

    def _on_writable(self) -> None:
        try:
            sent = self._sock.send(self._out, socket.MSG_NOSIGNAL)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._on_end("")
            return
        del self._out[:sent]
        if not self._out:
            self._loop.remove_writer(self._sock.fileno())
