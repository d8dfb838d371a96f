"""Sockets that say whatever a test wants them to, to an agent's Unix socket and to its peer port."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time

import msgspec

from p2pkv.gossip.keyring import Keyring, public
from p2pkv.gossip.sealed import Life, Opened, Opener, Sealer
from p2pkv.gossip.tickets import hello_ticket
from p2pkv.types import Layout
from p2pkv.wire import engine, peer
from p2pkv.wire.codec import Codec
from p2pkv.wire.frame import HEADER, PROTOCOL_MAX, PROTOCOL_MIN, Frame, FrameDecoder
from tests.cluster.agents import AgentProcess

CLOSE_S = 5.0
"""Longest that an agent may take to close a connection that broke the rules; a handshake has 2 s."""


class RawConnection:
    """A blocking stream socket that frames what it is asked to. A context manager."""

    def __init__(self, sock: socket.socket, codec: Codec) -> None:
        self.sock = sock
        self._codec = codec
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []
        self._next_id = 0
        self.control: RawConnection | None = None
        """Of a lane: the connection that it belongs to."""
        sock.settimeout(CLOSE_S)

    def __enter__(self) -> RawConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()
        if self.control is not None:
            self.control.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, message: msgspec.Struct, fds: tuple[int, ...] = ()) -> msgspec.Struct:
        """Send a request and return its answer."""
        self._next_id += 1
        data = self._codec.encode(message, self._next_id)
        if fds:
            socket.send_fds(self.sock, [data], fds)
        else:
            self.sock.sendall(data)
        while True:
            answer = self.receive()
            assert answer is not None, "closed instead of an answer"
            if answer.request_id == self._next_id:
                return self._codec.decode(answer)

    def receive(self) -> Frame | None:
        """The next frame; None when the connection has ended."""
        while not self._frames:
            try:
                data = self.sock.recv(65_536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._frames += list(self._decoder.feed(data))
        return self._frames.pop(0)

    def closed_by_the_agent(self) -> list[msgspec.Struct]:
        """Wait until the agent has closed the connection; the messages that came before."""
        last_words = []
        deadline = time.monotonic() + CLOSE_S
        while (frame := self.receive()) is not None:
            last_words.append(self._codec.decode(frame))
            assert time.monotonic() < deadline, "the agent goes on talking"
        return last_words


def engine_connection(agent: AgentProcess, *, attach: bool = True, layout: Layout | None = None) -> RawConnection:
    """A connection to the Unix socket: attached unless told otherwise, with ``layout`` open."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(agent.socket)
    connection = RawConnection(sock, engine.CODEC)
    if attach or layout:
        ready = connection.ask(engine.Attach(PROTOCOL_MIN, PROTOCOL_MAX, "raw", os.getpid()))
        assert isinstance(ready, engine.Ready)
    if layout:
        assert isinstance(connection.ask(engine.Open(layout)), engine.Opened)
    return connection


def lane_connection(agent: AgentProcess, *, layout: Layout | None = None) -> RawConnection:
    """The channel for GETs that an agent offers with READY; ``layout`` is open on its connection, which it keeps."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.connect(agent.socket)
    sock.settimeout(CLOSE_S)
    sock.sendall(engine.CODEC.encode(engine.Attach(PROTOCOL_MIN, PROTOCOL_MAX, "raw", os.getpid()), 1))
    _, fds, _, _ = socket.recv_fds(sock, 65_536, 4)
    assert len(fds) == 2, "the arena, and a channel for GETs"
    os.close(fds[0])
    lane = RawConnection(socket.socket(fileno=fds[1]), engine.CODEC)
    lane.control = RawConnection(sock, engine.CODEC)
    if layout:
        assert isinstance(lane.control.ask(engine.Open(layout)), engine.Opened)
    return lane


HELLO_FRAME = struct.Struct("<BBBBQI")
"""Type, protocol_min, protocol_max, flags, echo, card number; then address and card: docs/protocol.md."""


class Stranger:
    """A life that knows the cell's key, and nothing else; a context manager."""

    def __init__(self, *, node: int = 0, keys: Keyring | None = None) -> None:
        node = node or int.from_bytes(os.urandom(7), "little") | 1
        self.life = Life(node, 1, int.from_bytes(os.urandom(7), "little") | 1)
        ring = keys or public()
        self.sealer = Sealer(ring, "default", self.life)
        self.opener = Opener(ring, "default", 0.0)
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.sock.settimeout(0.3)

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.sock.getsockname()[1]}"

    def hello(self, echo: int = 0, *, ask: bool = True, known: bool = False, card: bytes = b"\x90") -> bytes:
        """The payload of a HELLO."""
        address = self.address.encode()
        return (
            HELLO_FRAME.pack(2, 2, 3, ask | known << 1, echo, 1)
            + bytes([len(address)]) + address + len(card).to_bytes(2, "little") + card
        )  # fmt: skip

    def say(self, agent: AgentProcess, payload: bytes) -> None:
        self.sock.sendto(self.sealer.seal(payload), ("127.0.0.1", agent.peer_port))

    def listen(self) -> Opened:
        """The next frame from anybody. Raises TimeoutError."""
        while True:
            opened = self.opener.open(self.sock.recv(2_048), time.monotonic())
            if isinstance(opened, Opened):
                return opened

    def life_of(self, agent: AgentProcess) -> Life:
        """Whom one would have to introduce oneself to: said in answer to a HELLO."""
        deadline = time.monotonic() + CLOSE_S
        while time.monotonic() < deadline:
            self.say(agent, self.hello())
            with contextlib.suppress(TimeoutError):
                return self.listen().life
        raise AssertionError("the agent does not answer HELLO")

    def card(self) -> peer.Card:
        # Port 9 (discard): whoever dials back finds nobody, as with a peer that died at once.
        address = peer.Address("127.0.0.1", 9)
        return peer.Card(self.life.node, self.life.epoch, address, "", "elsewhere", [], ["tcp"], self.life.instance)


def peer_connection(agent: AgentProcess, role: str = "", *, node: int = 0) -> RawConnection:
    """A connection to the peer port, introduced as ``role`` ("control" or "data") where one is named."""
    ticket = b""
    if role:
        with Stranger(node=node) as stranger:
            ticket, card = hello_ticket(stranger.sealer, stranger.life_of(agent)), stranger.card()
    sock = socket.create_connection(("127.0.0.1", agent.peer_port), timeout=CLOSE_S)
    connection = RawConnection(sock, peer.CODEC)
    if role:
        connection.send(peer.CODEC.encode(peer.Hello(PROTOCOL_MIN, PROTOCOL_MAX, "default", role, card, ticket)))
        welcome = connection.receive()
        assert welcome is not None and isinstance(peer.CODEC.decode(welcome), peer.Welcome)
    return connection


def header(length: int, message_type: int, *, version: int = 1, flags: int = 0, request_id: int = 1) -> bytes:
    """A frame's header, as wrong as asked for."""
    return HEADER.pack(length, version, message_type, flags, request_id)
