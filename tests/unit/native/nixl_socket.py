"""The second socket of a NIXL process without NIXL: four callables that copy memory here, and the agent's end."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Sequence

import msgspec

from p2pkv import _native
from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_wire import LANE_ID_MIN, NixlType, Read, ReadDone, ReadProgress, Run
from p2pkv.wire.frame import HEADER, FrameDecoder
from tests.unit.native.serving import PATIENCE_S

PEER = "b:1:1"
ARENA = 4 << 20
NEVER_NS = (1 << 63) - 1
ID = LANE_ID_MIN + 5
UNTOUCHED = 0xEE

Rows = list[tuple[int, int, int]]
HandedOver = tuple[int, bytes, int, int | None, int, Exception | None]

THEIRS = bytearray(random.Random(1).randbytes(ARENA))
OURS = bytearray(ARENA)
"""Both arenas. One test at a time uses them."""


class Transfer:
    """What one handle stands for."""

    def __init__(self, local: Rows, remote: Rows, peer: str) -> None:
        self.local, self.remote, self.peer = local, remote, peer

    @property
    def length(self) -> int:
        return sum(length for _, length, _ in self.local)


class Fabric:
    """NIXL as over CMA: a post copies, and has ended when it returns. The test may spoil the n-th piece (from 0)."""

    def __init__(self) -> None:
        self.made: dict[int, Transfer] = {}  # by handle
        self.posted: list[Transfer] = []
        self.released: list[int] = []
        self.strays: list[Transfer] = []  # would have left an arena
        self.flies: set[int] = set()
        self.fail_descriptors: dict[int, Exception] = {}
        self.fail_create: dict[int, Exception] = {}
        self.fail_post: dict[int, Exception] = {}
        self.on_post: Callable[[], None] = lambda: None

    def descriptors(self, rows: Rows) -> object:
        if error := self.fail_descriptors.get(len(self.made)):
            raise error
        return list(rows)

    def create(self, local: object, remote: object, peer: str) -> int:
        if error := self.fail_create.get(len(self.made)):
            raise error
        assert isinstance(local, list) and isinstance(remote, list)
        transfer = Transfer(local, remote, peer)
        if not (inside(local, OURS) and inside(remote, THEIRS)):
            self.strays.append(transfer)
            raise MemoryError("a piece leaves the arena")
        handle = 1000 + len(self.made)
        self.made[handle] = transfer
        return handle

    def post(self, handle: int) -> int:
        """nixl_status_t: 0 for what has ended, 1 for what flies."""
        number = len(self.posted)
        transfer = self.made[handle]
        self.posted.append(transfer)
        if error := self.fail_post.get(number):
            raise error
        if number in self.flies:
            return 1
        for (to, length, _), (at, same, _) in zip(transfer.local, transfer.remote, strict=True):
            assert length == same
            to, at = to - _native.address_of(OURS), at - _native.address_of(THEIRS)
            OURS[to : to + length] = THEIRS[at : at + length]
        self.on_post()
        return 0

    def release(self, handle: int) -> None:
        assert handle not in self.released
        self.released.append(handle)


def inside(rows: Rows, arena: bytearray) -> bool:
    begin = _native.address_of(arena)
    return all(begin <= at and length > 0 and at + length <= begin + len(arena) for at, length, _ in rows)


def frame(kind: int, body: bytes, frame_id: int = ID, *, version: int = 1, length: int | None = None) -> bytes:
    return HEADER.pack(len(body) if length is None else length, version, kind, 0, frame_id) + body


def body_of(runs: Sequence[Run], *, peer: str = PEER, piece_bytes: int = 4 << 20, deadline_ns: int = NEVER_NS) -> bytes:
    return msgspec.msgpack.encode(Read(peer, wire.pack_runs(runs), piece_bytes, deadline_ns))


def landed(runs: Sequence[Run], done_bytes: int) -> bool:
    """Whether these are the first bytes of the read, counted along its runs."""
    for remote, local, length in runs:
        here = min(length, done_bytes)
        if OURS[local : local + here] != THEIRS[remote : remote + here]:
            return False
        done_bytes -= here
    return done_bytes == 0


class Bench:
    """The NIXL process's native half, and the agent's end ``far`` of its socket. A context manager."""

    def __init__(self) -> None:
        OURS[:] = bytes([UNTOUCHED]) * ARENA
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.other, self.other_far = socket.socketpair()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.fabric = Fabric()
        calls = self.fabric
        self.lane = _native.InlineReads(
            self.near.fileno(), self.bell, calls.descriptors, calls.create, calls.post, calls.release,
            _native.address_of(OURS), ARENA,
        )  # fmt: skip
        self.lane.add_peer(PEER, _native.address_of(THEIRS), ARENA)
        self._decoder = FrameDecoder(wire.BODY_BYTES_MAX)

    def __enter__(self) -> Bench:
        return self

    def kept(self, *handed_over: int | None) -> set[int]:
        """Handles that NIXL was neither given back nor somebody else has now."""
        return set(self.fabric.made) - set(self.fabric.released) - set(handed_over)

    def __exit__(self, *_: object) -> None:
        for sock in (self.near, self.far, self.other, self.other_far):
            sock.close()
        os.close(self.bell)

    def ask(self, body: bytes, read_id: int = ID) -> None:
        self.far.sendall(frame(NixlType.READ, body, read_id))

    def serve(self, seconds: float = 0.0, *, pieces: int = 1) -> list[HandedOver]:
        handed_over, _ = self.lane.serve(seconds, self.other.fileno(), False, pieces)
        return handed_over

    def heard(self) -> list[tuple[int, ReadProgress | ReadDone]]:
        """(read id, message), as far as they are here."""
        out: list[tuple[int, ReadProgress | ReadDone]] = []
        while True:
            try:
                data = self.far.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return out
            for got in self._decoder.feed(data):
                message = wire.CODEC.decode(got)
                assert isinstance(message, ReadProgress | ReadDone)
                out.append((got.request_id, message))

    def until_done(self, reads: int = 1) -> list[tuple[int, ReadProgress | ReadDone]]:
        """Serve, piece by piece, until so many reads have ended; all that is heard meanwhile."""
        out: list[tuple[int, ReadProgress | ReadDone]] = []
        deadline = time.monotonic() + PATIENCE_S
        while sum(isinstance(message, ReadDone) for _, message in out) < reads:
            assert time.monotonic() < deadline, "it does not end"
            assert self.serve() == []
            out += self.heard()
        return out

    def rung(self) -> int:
        """How often the bell was rung since it was last looked at."""
        try:
            return os.eventfd_read(self.bell)
        except BlockingIOError:
            return 0
