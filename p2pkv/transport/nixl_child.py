"""One incarnation of the NIXL child as the agent sees it: starting it, frames in and out, killing and reaping it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from p2pkv.errors import P2PKVError
from p2pkv.transport import nixl_wire as wire
from p2pkv.wire.frame import FrameDecoder

RECEIVE_BYTES: Final = 1 << 14
"""Python allocates this much for every receive: larger ones cost page faults."""

QUIET: Final = {"UCX_HANDLE_ERRORS": "none", "UCX_LOG_LEVEL": "error", "NIXL_LOG_LEVEL": "ERROR"}
"""Without UCX's own signal handlers a crash is an immediate death, not a backtrace that holds the arena for seconds."""


class Child:
    """One incarnation: the process, the socket to it, and whether it is ready or dead."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        sock: socket.socket,
        lane: socket.socket,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.process = process
        self.lane = lane
        """Our end of the second socket, not blocking; whoever takes it over detaches it."""
        self.started_at = time.monotonic()
        self.ready: asyncio.Future[wire.Ready] = loop.create_future()
        self.dead: asyncio.Future[str] = loop.create_future()
        self._sock = sock
        self._loop = loop
        self._decoder = FrameDecoder(wire.BODY_BYTES_MAX)
        self._unsent = bytearray()

    def watch(self, on_message: Callable[[msgspec.Struct, int], None]) -> None:
        """Deliver every message of the child to ``on_message`` until it is dead."""
        self._loop.add_reader(self._sock, self._receive, on_message)

    def _receive(self, on_message: Callable[[msgspec.Struct, int], None]) -> None:
        try:
            data = self._sock.recv(RECEIVE_BYTES)
            if not data:
                self.give_up("it exited")
            for frame in wire.cut(self._decoder, data):
                if not self.dead.done():
                    self._deliver(on_message, wire.CODEC.decode(frame), frame.request_id)
        except BlockingIOError:
            pass
        except (OSError, P2PKVError) as error:
            self.give_up(str(error))

    def _deliver(
        self, on_message: Callable[[msgspec.Struct, int], None], message: msgspec.Struct, request_id: int
    ) -> None:
        try:
            on_message(message, request_id)
        except P2PKVError:
            raise
        except Exception as error:  # a caller's callback: the messages behind this one must not be lost for it
            context = {"message": "a callback of the NIXL transport failed", "exception": error}
            self._loop.call_exception_handler(context)

    def send(self, message: msgspec.Struct, request_id: int = 0) -> None:
        """Queue a command. The queue is bounded by the reads and connects that the agent has open."""
        if self.dead.done():
            return
        data = wire.CODEC.encode(message, request_id)
        if not self._unsent:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                pass
            except OSError as error:
                self.give_up(str(error))
                return
            if data:
                self._loop.add_writer(self._sock, self._flush)
        self._unsent += data

    def _flush(self) -> None:
        try:
            del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError as error:
            self.give_up(str(error))
            return
        if not self._unsent:
            self._loop.remove_writer(self._sock)

    def give_up(self, reason: str) -> None:
        """Kill it. What it was doing stops when it is reaped."""
        if self.dead.done():
            return
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self.lane.close()
        self.process.kill()
        self.dead.set_result(reason)

    async def reap(self) -> int:
        """Wait until the kernel has taken the process down: after this nothing it started can write memory."""
        return await asyncio.to_thread(self.process.wait)


def spawn(
    loop: asyncio.AbstractEventLoop,
    name: str,
    arena_fd: int,
    arena_bytes: int,
    ucx: Mapping[str, str],
    idle_ms: float,
    bell_fd: int = -1,
) -> Child:
    """Start a child; it inherits the arena, its ends of two new socketpairs, standard error, and nothing else.

    ``bell_fd``: the eventfd that it rings after what it sends on the second socket; -1 = nobody listens there.

    Call it on a thread that lives as long as the agent: the kernel kills the child with the thread that started it."""
    ours, theirs = socket.socketpair()
    lane, their_lane = socket.socketpair()
    ours.setblocking(False)
    lane.setblocking(False)
    root = str(Path(__file__).resolve().parents[2])  # so that it finds this very package, installed or not
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    with theirs, their_lane:
        command = [
            sys.executable, "-m", "p2pkv.transport.nixl_worker",
            "--fd", str(theirs.fileno()),
            "--lane-fd", str(their_lane.fileno()),
            "--bell-fd", str(bell_fd),
            "--arena-fd", str(arena_fd),
            "--arena-bytes", str(arena_bytes),
            "--name", name,
            "--parent-pid", str(os.getpid()),
            "--idle-ms", str(idle_ms),
        ]  # fmt: skip
        process = subprocess.Popen(
            command,
            env={**QUIET, **os.environ, **ucx, "PYTHONPATH": os.pathsep.join(paths)},
            pass_fds=[fd for fd in (theirs.fileno(), their_lane.fileno(), arena_fd, bell_fd) if fd >= 0],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    return Child(process, ours, lane, loop)
