"""The NIXL child: ``python -m p2pkv.transport.nixl_worker --fd N --lane-fd L ...``, started by :mod:`.nixl_process`.

It maps the arena that it inherits, registers it with NIXL once, and moves bytes when its agent says so over the two
sockets that it inherits. It sleeps on them while nothing flies; it spins, then naps, while something does. It has
no thread of its own, never unmaps the arena, never deregisters it, opens no socket of its own (UCX opens some), never
imports torch, and never outlives its agent: the kernel kills it with its parent, and it exits when a socket closes.

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
import signal
import socket
import sys
import time
import traceback
from typing import Final

import msgspec

from p2pkv import _native
from p2pkv.errors import P2PKVError, RemoteProtocolError
from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_engine import Engine
from p2pkv.transport.nixl_fabric import FabricError, NixlFabric, load_nixl, map_arena
from p2pkv.transport.nixl_reads import HandedOver, Peer
from p2pkv.wire.frame import Frame, FrameDecoder

RECEIVE_BYTES: Final = 1 << 14
OUT_BYTES_MAX: Final = 8 << 20
"""Answers that the agent has not taken. Their number is bounded by the reads it may have open; past this, it hangs."""

LANE_PIECES: Final = 64
"""Pieces that native code reads before the engine gets a turn: some 30 ms at most."""

PR_SET_PDEATHSIG: Final = 1
PR_SET_TIMERSLACK: Final = 29


class Link:
    """The child's end of the supervisor's socketpair: frames in, frames out, never blocking."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.fd = sock.fileno()
        self._decoder = FrameDecoder(wire.BODY_BYTES_MAX)
        self._unsent = bytearray()
        sock.setblocking(False)

    @property
    def full(self) -> bool:
        """Something could not be sent yet."""
        return bool(self._unsent)

    def receive(self) -> list[Frame]:
        """The frames that are here. The agent going away ends this process."""
        try:
            data = self._sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        if not data:
            os._exit(wire.EXIT_ORPHAN)
        return wire.cut(self._decoder, data)

    def say(self, message: msgspec.Struct, request_id: int) -> None:
        """Send a message. Behind a full socket progress is dropped, as later words repeat it."""
        data = wire.CODEC.encode(message, request_id)
        if not self._unsent:
            try:
                data = data[self._sock.send(data) :]
            except BlockingIOError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                os._exit(wire.EXIT_ORPHAN)
        elif isinstance(message, wire.ReadProgress):
            return
        self._unsent += data
        if len(self._unsent) > OUT_BYTES_MAX:
            fail(wire.EXIT_PROTOCOL, "the agent does not read its answers")

    def flush(self) -> None:
        """Send what the socket takes of the backlog."""
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):
            os._exit(wire.EXIT_ORPHAN)


def fail(code: int, why: str) -> None:
    """End the process without running destructors: UCX's may wait for peers."""
    print(f"nixl child {os.getpid()}: {why}", file=sys.stderr, flush=True)
    os._exit(code)


def handle_frame(engine: Engine, frame: Frame, now: float) -> None:
    """Hand one command to the engine."""
    message, request_id = wire.CODEC.decode(frame), frame.request_id
    match message:
        case wire.Read() if request_id < wire.LANE_ID_MIN:
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
            raise RemoteProtocolError("this message does not belong here", type=type(message).__name__)


class Links:
    """Both sockets, and who is to hear what.

    The second one is native code's, at both ends (``native/inline_reads.hpp``): what it cannot do itself comes here.
    """

    def __init__(
        self, supervisor: socket.socket, lane: socket.socket, bell_fd: int, fabric: NixlFabric, base: int, size: int
    ) -> None:
        lane.setblocking(False)
        self._supervisor = Link(supervisor)
        self._lane_socket = lane
        self._lane = _native.InlineReads(lane.fileno(), bell_fd, *fabric.native_calls(), base, size)
        self._fabric = fabric

    def on_inline(self, peer: Peer, inline: bool) -> None:
        """A peer can be read by native code, or cannot any more."""
        if inline:
            self._lane.add_peer(peer.name, peer.base, peer.bytes)
        else:
            self._lane.remove_peer(peer.name)

    def receive(self, engine: Engine, seconds: float) -> None:
        """Hand the engine what is here, or comes within that time; meanwhile native code reads."""
        supervisor = self._supervisor
        pieces = LANE_PIECES if seconds > 0 else 1  # where the engine has reads of its own they take turns
        try:
            handed_over, ready = self._lane.serve(seconds, supervisor.fd, supervisor.full, pieces)
        except RuntimeError as error:
            if str(error) == "closed":
                os._exit(wire.EXIT_ORPHAN)
            raise RemoteProtocolError(str(error)) from error
        now = time.monotonic()
        for read_id, body, done_bytes, handle, flying_bytes, raised in handed_over:
            request = wire.CODEC.decode(Frame(wire.NixlType.READ, read_id, 0, body))
            assert isinstance(request, wire.Read)
            fault = self._fabric.error_of(raised) if raised is not None else None
            engine.go_on(HandedOver(read_id, request, done_bytes, handle, flying_bytes, fault), now)
        if ready:
            supervisor.flush()
            for frame in supervisor.receive():
                handle_frame(engine, frame, time.monotonic())

    def send(self, engine: Engine) -> None:
        """Say what the engine has to say."""
        while engine.out:
            message, request_id = engine.out.popleft()
            if request_id >= wire.LANE_ID_MIN:
                self._lane.send(wire.CODEC.encode(message, request_id))
            else:
                self._supervisor.say(message, request_id)


def run(links: Links, engine: Engine, idle_s: float) -> None:
    """Serve until the agent goes away.

    The idle tick (10 per second, 20 us each) keeps UCX's own housekeeping alive, and lets a peer connect, slowly, whose
    SERVE did not reach us."""
    while True:
        links.receive(engine, engine.wait_s(time.monotonic(), idle_s))
        engine.step(time.monotonic())
        if engine.out:
            links.send(engine)


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


def start(options: argparse.Namespace, supervisor: socket.socket, lane: socket.socket) -> tuple[Links, Engine]:
    """Everything that can fail on a host; what fails is reported to the agent, and the process ends."""

    def say(message: msgspec.Struct) -> None:
        supervisor.sendall(wire.CODEC.encode(message))

    code = wire.FatalCode.NO_NIXL
    try:
        module = load_nixl()
        logging.getLogger("nixl").setLevel(logging.WARNING)
        version = importlib.import_module("importlib.metadata").version(module.__name__.replace("_", "-"))
        code = wire.FatalCode.ARENA
        arena = map_arena(options.arena_fd, options.arena_bytes)
        base = arena.address
        code = wire.FatalCode.NO_BACKEND
        fabric = NixlFabric(module, options.name, base, options.arena_bytes)
    except Exception as error:  # whatever a vendor's library throws: it is reported, with its type, and ends us
        say(wire.Fatal(code, f"{type(error).__name__}: {error}"[:1000]))
        fail(wire.EXIT_FATAL, f"{code.name}: {error}")
        raise
    globals()["_arena"] = arena  # mapped for as long as the process lives: peers have its address
    say(wire.Ready(options.name, fabric.metadata, base, options.arena_bytes, module.__name__, version))
    links = Links(supervisor, lane, options.bell_fd, fabric, base, options.arena_bytes)
    return links, Engine(fabric, base, options.arena_bytes, on_inline=links.on_inline)


def main() -> None:
    """Parse the command line of :class:`~.nixl_process.NixlProcess`, start, run."""
    parser = argparse.ArgumentParser(prog="nixl_worker")
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--lane-fd", type=int, required=True)
    parser.add_argument("--bell-fd", type=int, default=-1)
    parser.add_argument("--arena-fd", type=int, required=True)
    parser.add_argument("--arena-bytes", type=int, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--idle-ms", type=float, default=100.0)
    options = parser.parse_args()
    bind_to_parent(options.parent_pid)
    sock, lane = socket.socket(fileno=options.fd), socket.socket(fileno=options.lane_fd)
    links, engine = start(options, sock, lane)
    gc.collect()
    gc.freeze()
    try:
        run(links, engine, options.idle_ms / 1e3)
    except P2PKVError as error:
        fail(wire.EXIT_PROTOCOL, str(error))
    except FabricError as error:
        fail(wire.EXIT_FATAL, str(error))
    except BaseException:
        fail(os.EX_SOFTWARE, traceback.format_exc())


if __name__ == "__main__":
    main()
