"""A node joins a cell of a thousand that hold 25 million entries: when has it all of them?

The joiner is the core that ships, with a real index; its time is measured and moves a clock that also knows how long
bytes take at 10 Gb/s. The members are played by what they would send: a heartbeat five times a second each, and to a
WANT the sets that it names, 4 MiB of them at most, as the core does (``p2pkv/gossip/core/repair.cpp``).
"""

from __future__ import annotations

import heapq
import itertools
import os
import struct
import time
from typing import Final, NamedTuple

from p2pkv.gossip._gossip import Gossip
from p2pkv.gossip.sealed import Life
from p2pkv.index.hashing import entries_checksum
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier

BITS_PER_S: Final = 10e9
RTT_S: Final = 0.001
BEAT_S: Final = 0.2
SERVE_BYTES: Final = 4 << 20
PART_KEYS: Final = 16_384
SEQ: Final = 160
LIMIT_S: Final = 60.0

_LIFE: Final = struct.Struct("<QIQ")
_HELLO: Final = struct.Struct("<BBBBQI")
_DELTA: Final = struct.Struct("<BQQI5H")
_SNAPSHOT: Final = struct.Struct("<BQIQQQII5I")
_WANT: Final = struct.Struct("<BII")
_WANTED: Final = struct.Struct("<BI")


class Joined(NamedTuple):
    """Seconds until everything was there, and how many of them the joiner worked; bytes that it got."""

    seconds: float
    working_s: float
    received_bytes: int
    entries: int
    wants: int


class Member:
    """What one owner has, as letters and frames."""

    def __init__(self, number: int, blocks: int) -> None:
        self.life = Life(number + 2, 1, number + 2)
        self.address = f"10.0.{number >> 8}.{number & 255}:7841"
        keys = os.urandom(8 * blocks)
        checksum = entries_checksum(keys, Tier.DRAM)
        address = self.address.encode()
        hello = _HELLO.pack(2, 2, 3, 2, 1, 1) + bytes([len(address)]) + address + b"\x01\x00c"
        beat = _DELTA.pack(1, SEQ, checksum, 1, 0, 0, 0, 0, 0) + b"\x00"
        self.frames = [hello, beat]
        pieces = [keys[at : at + 8 * PART_KEYS] for at in range(0, len(keys), 8 * PART_KEYS)] or [b""]
        self.snapshot = [
            _SNAPSHOT.pack(18, *self.life, SEQ, checksum, part, len(pieces), 0, 0, len(piece) // 8, 0, 0) + piece
            for part, piece in enumerate(pieces)
        ]


class Joining:
    """One run. Times are simulated seconds, of which the joiner's own are measured."""

    def __init__(self, nodes: int, blocks: int) -> None:
        self._members = [Member(number, blocks) for number in range(nodes - 1)]
        self._by_address = {member.address: member for member in self._members}
        self._by_life = {member.life: member for member in self._members}
        self._index = PrefixIndex()
        self._log = OwnershipLog(1)
        self._now = 0.0
        self._card_free = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Member, bytes, bool]] = []
        self._working_s = 0.0
        self._bytes = 0
        self._core = Gossip(
            {"members_max": max(16, nodes)}, 1, 1, 1, "10.1.0.1:7841", self._index.entries, self._log.entries, 1, 0.0
        )
        self._core.set_card(0.0, 1, b"c")

    def run(self) -> Joined:
        """Until every set is there."""
        for number, member in enumerate(self._members):
            self._send(member, member.frames[0], 0.0, letter=False)
            self._send(member, member.frames[1], BEAT_S * number / len(self._members), letter=False)
        wanted = len(self._members)
        blocks = sum(len(part) // 8 for member in self._members for part in member.snapshot)
        while self._core.alive < wanted and self._now < LIMIT_S:
            at, _, member, payload, letter = heapq.heappop(self._events)
            while self._core.next_timer < at:
                self._work(self._core.next_timer, None, b"", letter=False)
            self._work(at, member, payload, letter=letter)
            if not letter and payload is member.frames[1]:
                self._send(member, payload, self._now + BEAT_S, letter=False)
        assert blocks >= self._index.stats().entries
        return Joined(
            self._now, self._working_s, self._bytes, self._index.stats().entries, self._core.counts["wants_out"]
        )

    def _work(self, at: float, member: Member | None, payload: bytes, *, letter: bool) -> None:
        """The joiner does something, no sooner than it has done what was before."""
        self._now = max(self._now, at)
        core, began = self._core, time.perf_counter()
        if member is None:
            core.on_timer(self._now)
        elif letter:
            core.on_letter(self._now, *member.life, payload)
        else:
            core.on_frame(self._now, *member.life, member.address, payload)
        _, letters, _ = core.take()
        took = time.perf_counter() - began
        self._now += took
        self._working_s += took
        for text, address in letters:
            if text[0] == 17:
                self._serve(self._by_address[address], text)

    def _serve(self, member: Member, want: bytes) -> None:
        """What a member answers."""
        _, number, count = _WANT.unpack_from(want)
        sent = 0
        for i in range(count):
            if sent >= SERVE_BYTES:
                break
            owner = self._by_life[Life(*_LIFE.unpack_from(want, _WANT.size + 28 * i))]
            for part in owner.snapshot:
                sent += len(part)
                self._send(member, part, self._now + RTT_S, letter=True)
        self._send(member, _WANTED.pack(19, number), self._now + RTT_S, letter=True)

    def _send(self, member: Member, payload: bytes, at: float, *, letter: bool) -> None:
        if letter:  # all of them come through the joiner's one network card
            self._card_free = max(self._card_free, at) + len(payload) * 8 / BITS_PER_S
            self._bytes += len(payload)
            at = self._card_free
        heapq.heappush(self._events, (at, next(self._order), member, payload, letter))
