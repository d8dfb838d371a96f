"""An owner without an agent, and readers that are raw sockets: what the tests of the native server share."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from p2pkv import _native
from p2pkv.store.arena import Arena
from p2pkv.store.base import LeaseLimits, Reservation
from p2pkv.store.dram import DramStore
from p2pkv.types import Layout, Status
from p2pkv.wire.frame import HEADER, HEADER_BYTES, Frame
from p2pkv.wire.peer import CODEC, GOT_RECORD, Get, PeerError, PeerType, Release

NODE = 0xA1
BLOCK = 65_536
PATIENCE_S = 10.0


def layout_of(block_bytes: int = BLOCK) -> Layout:
    return Layout(model="m", revision=str(block_bytes), kv_dtype="bf16", block_tokens=16, block_bytes=block_bytes)


def until(what: Callable[[], object], deadline_s: float = PATIENCE_S) -> None:
    """Wait until ``what`` is true: for what another thread does, and nobody is told of."""
    deadline = time.monotonic() + deadline_s
    while not what():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.001)


class Record(NamedTuple):
    """One entry of GOT."""

    status: int
    length: int
    generation: int
    checksum: bytes


class Answer(NamedTuple):
    """GOT and what came after it, or the owner's ERROR."""

    records: list[Record]
    payloads: list[bytes | None]
    error: PeerError | None = None


class Reader:
    """One data connection, seen from the other side. A context manager."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(PATIENCE_S)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def ask(self, namespace: int, keys: Sequence[bytes], ttl_ms: int = 10_000) -> None:
        self.sock.sendall(CODEC.encode(Get(namespace, list(keys), ttl_ms)))

    def release(self) -> None:
        self.sock.sendall(CODEC.encode(Release(0)))

    def get(self, namespace: int, keys: Sequence[bytes], ttl_ms: int = 10_000) -> Answer:
        self.ask(namespace, keys, ttl_ms)
        return self.answer()

    def answer(self) -> Answer:
        length, _, kind, _, _ = HEADER.unpack(self.exactly(HEADER_BYTES))
        body = self.exactly(length)
        if kind == PeerType.ERROR:
            error = CODEC.decode(Frame(kind, 0, 0, body))
            assert isinstance(error, PeerError)
            return Answer([], [], error)
        assert kind == PeerType.GOT
        records = [Record(*row) for row in GOT_RECORD.iter_unpack(body)]
        return Answer(records, [self.exactly(r.length) if r.status == Status.OK else None for r in records])

    def exactly(self, length: int) -> bytes:
        got = bytearray()
        while len(got) < length:
            part = self.sock.recv(length - len(got))
            if not part:
                raise EOFError(f"closed after {len(got)} of {length} bytes")
            got += part
        return bytes(got)

    def rest(self) -> bytes:
        """All that comes until the owner closes."""
        got = bytearray()
        try:
            while part := self.sock.recv(1 << 16):
                got += part
        except ConnectionResetError:
            pass
        return bytes(got)

    def last_words(self) -> str:
        """The text of the one ERROR with code "protocol" that came before the owner closed; "" if none could come."""
        said = self.rest()
        if not said:
            return ""
        length, _, kind, _, _ = HEADER.unpack(said[:HEADER_BYTES])
        assert kind == PeerType.ERROR and len(said) == HEADER_BYTES + length
        error = CODEC.decode(Frame(kind, 0, 0, said[HEADER_BYTES:]))
        assert isinstance(error, PeerError) and error.code == "protocol"
        return error.message


class Owner:
    """Arena, store and server. ``narrow`` connections have so little buffer that an answer does not fit into them."""

    def __init__(
        self,
        capacity_bytes: int = 32 << 20,
        *,
        lease_ttl_s: float = 10.0,
        connections_max: int = 256,
        leases: LeaseLimits | None = None,
    ) -> None:
        self.arena = Arena.create(capacity_bytes)
        self.store = DramStore(self.arena.capacity_bytes, leases=leases)
        self.server = _native.Server(
            self.store.core, self.arena.fd, self.arena.base_address, lease_ttl_s, connections_max
        )
        self._listener = socket.create_server(("127.0.0.1", 0))

    def close(self) -> None:
        self.server.stop()
        self._listener.close()
        self.arena.close()

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(
        self, *, node: int = NODE, same_host: bool = False, leftover: bytes = b"", narrow: bool = False
    ) -> Reader:
        reader = socket.socket()
        if narrow:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        reader.connect(self._listener.getsockname())
        sock, _ = self._listener.accept()
        if narrow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        sock.setblocking(False)
        self.server.add(sock.detach(), node, same_host, leftover)
        return Reader(reader)

    def put(self, layout: Layout, count: int = 1) -> dict[bytes, bytes]:
        """Store blocks of random bytes."""
        namespace = self.store.register(layout)
        blocks = {os.urandom(16): os.urandom(layout.block_bytes) for _ in range(count)}
        for key, content in blocks.items():
            place = self.store.reserve(namespace, key, time.monotonic())
            assert isinstance(place, Reservation)
            self.arena.view(place.offset, place.length)[:] = content
            self.store.commit(place, _native.xxh3_128(content), time.monotonic())
        return blocks

    @property
    def leases(self) -> int:
        """In force, by the store's own books."""
        return self.store.stats().leases

    def idle(self) -> bool:
        """Nobody is connected and nothing is held."""
        return self.server.active == 0 and self.leases == 0
