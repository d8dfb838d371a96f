"""The NIXL child: ``python -m p2pkv.transport.nixl_worker --fd N --arena-fd M ...``, started by :mod:`.nixl_process`.

It maps the arena that it inherits, registers it with NIXL once, and moves bytes when its agent says so over the one
socket that it inherits. It sleeps on that socket while nothing flies; it spins, then naps, while something does. It has
no thread of its own, never unmaps the arena, never deregisters it, opens no socket of its own (UCX opens some), never
imports torch, and never outlives its agent: the kernel kills it with its parent, and it exits when the socket closes.

Crashing is allowed here: what it takes along is connections and transfers in flight, never a block.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Final

import msgspec

from p2pkv.errors import P2PKVError, RemoteProtocolError
from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_engine import Engine
from p2pkv.transport.nixl_fabric import FabricError, NixlFabric, load_nixl, map_arena
from p2pkv.wire.frame import Frame, FrameDecoder

RECEIVE_BYTES: Final = 1 << 14
OUT_BYTES_MAX: Final = 8 << 20
"""Answers that the agent has not taken. Their number is bounded by the reads it may have open; past this, it hangs."""

PR_SET_PDEATHSIG: Final = 1
PR_SET_TIMERSLACK: Final = 29


class Link:
    """The child's end of the socketpair: frames in, frames out, never blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = FrameDecoder(wire.BODY_BYTES_MAX)
        self._unsent = bytearray()

    def receive(self, seconds: float) -> list[Frame]:
        """The frames that are here, or that come within that time (none also when the backlog can be sent).
        The agent going away ends this process."""
        if seconds > 0.0:
            readable, _, _ = select.select([self._sock], [self._sock] if self._unsent else [], [], seconds)
            if self._unsent:
                self.flush()
            if not readable:
                return []
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        if not data:
            os._exit(wire.EXIT_ORPHAN)
        return wire.cut(self._decoder, data)

    def send(self, engine: Engine) -> None:
        """Send what the engine has to say. Behind a full socket progress is dropped, as later words repeat it."""
        while engine.out:
            message, request_id = engine.out.popleft()
            if not (self._unsent and isinstance(message, wire.ReadProgress)):
                self._unsent += wire.CODEC.encode(message, request_id)
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes of the backlog."""
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            if len(self._unsent) > OUT_BYTES_MAX:
                fail(wire.EXIT_PROTOCOL, "the agent does not read its answers")
        except (BrokenPipeError, ConnectionResetError):
            os._exit(wire.EXIT_ORPHAN)


def fail(code: int, why: str) -> None:
    """End the process without running destructors: UCX's may wait for peers."""
    print(f"nixl child {os.getpid()}: {why}", file=sys.stderr, flush=True)
    os._exit(code)


def handle(engine: Engine, message: msgspec.Struct, request_id: int, now: float) -> None:
    """Hand one command to the engine."""
    match message:
        case wire.Read():
            engine.read(request_id, message, now)
        case wire.Cancel():
            engine.cancel(request_id, now)
        case wire.Serve():
            engine.serve(message.until_ns / 1e9, now)
        case wire.AddPeer():
            engine.add_peer(request_id, message, now)
        case wire.RemovePeer():
            engine.remove_peer(message.name, now)
        case wire.Stats():
            engine.out.append((engine.stats(), request_id))
        case wire.Shutdown():
            os._exit(os.EX_OK)
        case _:
            raise RemoteProtocolError("this message only travels from child to agent", type=type(message).__name__)


def run(link: Link, engine: Engine, idle_s: float) -> None:
    """Serve until the agent goes away.

    The idle tick (10 per second, 20 us each) keeps UCX's own housekeeping alive, and lets a peer connect, slowly, whose
    SERVE did not reach us."""
    while True:
        for frame in link.receive(engine.wait_s(time.monotonic(), idle_s)):
            handle(engine, wire.CODEC.decode(frame), frame.request_id, time.monotonic())
        engine.step(time.monotonic())
        if engine.out:
            link.send(engine)


def bind_to_parent(parent_pid: int) -> None:
    """Die with the agent, even if it is killed between two of our instructions."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)  # naps of 20 us, not of 20 + 50
    if os.getppid() != parent_pid:
        os._exit(wire.EXIT_ORPHAN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the agent decides
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # a core would contain the arena


def start(options: argparse.Namespace, engine_out: Callable[[msgspec.Struct], None]) -> Engine:
    """Everything that can fail on a host; what fails is reported to the agent, and the process ends."""
    code = wire.FatalCode.NO_NIXL
    try:
        module = load_nixl()
        logging.getLogger("nixl").setLevel(logging.WARNING)
        version = importlib.import_module("importlib.metadata").version(module.__name__.replace("_", "-"))
        code = wire.FatalCode.ARENA
        arena, base = map_arena(options.arena_fd, options.arena_bytes)
        code = wire.FatalCode.NO_BACKEND
        fabric = NixlFabric(module, options.name, base, options.arena_bytes)
    except Exception as error:  # whatever a vendor's library throws: it is reported, with its type, and ends us
        engine_out(wire.Fatal(code, f"{type(error).__name__}: {error}"[:1000]))
        fail(wire.EXIT_FATAL, f"{code.name}: {error}")
        raise
    globals()["_arena"] = arena  # mapped for as long as the process lives: peers have its address
    engine = Engine(fabric, base, options.arena_bytes)
    engine_out(wire.Ready(options.name, fabric.metadata, base, options.arena_bytes, module.__name__, version))
    return engine


def main() -> None:
    """Parse the command line of :class:`~.nixl_process.NixlProcess`, start, run."""
    parser = argparse.ArgumentParser(prog="nixl_worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--arena-fd", type=int, required=True)
    parser.add_argument("--arena-bytes", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--idle-ms", type=float, default=100.0)
    options = parser.parse_args()
    bind_to_parent(options.parent_pid)
    sock = socket.socket(fileno=os.dup(options.fd) if options.fd >= wire.CHILD_FD_LIMIT else options.fd)
    sock.setblocking(True)
    engine = start(options, lambda message: sock.sendall(wire.CODEC.encode(message)))
    sock.setblocking(False)
    gc.collect()
    gc.freeze()
    try:
        run(Link(sock), engine, options.idle_ms / 1e3)
    except P2PKVError as error:
        fail(wire.EXIT_PROTOCOL, str(error))
    except FabricError as error:
        fail(wire.EXIT_FATAL, str(error))
    except BaseException:
        fail(os.EX_SOFTWARE, traceback.format_exc())


if __name__ == "__main__":
    main()
