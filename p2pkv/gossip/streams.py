"""The two ends of an ownership stream: what an owner sends to its readers, and what a reader makes of it.

Pure. The log and the replica themselves are :mod:`p2pkv.index.ownership`'s; here they are put on a connection: the
owner's side encodes each message once for all its readers, the reader's side says what each one means for the peer.
"""

from __future__ import annotations

import enum
from typing import Final

from p2pkv.errors import OutOfSpace
from p2pkv.index.ownership import Outcome, OwnerReplica, OwnershipLog, Sync
from p2pkv.index.prefix import Index
from p2pkv.wire.peer import CODEC, Delta, Resync, Snapshot

TAIL_BYTES_MIN: Final = 256 << 10
"""A checkpoint is kept until the deltas after it weigh as much as itself, and at least this much."""


class Feed:
    """An owner's stream to any number of readers: a *checkpoint* (a snapshot's frames) and the *tail* of later deltas.

    A new reader gets both; all readers share the same frames. When a whole cell restarts, a thousand readers join
    within a second at a hundred different sequence numbers: this costs one snapshot, not a thousand. Memory: at most
    two checkpoints' worth, none while nobody has joined since the last one was given up.
    """

    def __init__(self, log: OwnershipLog) -> None:
        self._log = log
        self._checkpoint: list[bytes] | None = None
        self._tail: list[bytes] = []
        self._tail_bytes_left = 0

    @property
    def seq(self) -> int:
        """Of the last delta that was given out."""
        return self._log.seq

    def flush(self, now: float) -> list[bytes]:
        """Frames of the deltas that are due, for every reader."""
        frames = [CODEC.encode(delta) for delta in self._log.poll(now)]
        if self._checkpoint is not None and frames:
            self._tail += frames
            self._tail_bytes_left -= sum(map(len, frames))
            if self._tail_bytes_left < 0:
                self._checkpoint = None
                self._tail = []
        return frames

    def heartbeat(self) -> bytes:
        """The frame that says where the log stands."""
        return CODEC.encode(self._log.heartbeat())

    def catch_up(self) -> list[bytes]:
        """Frames that bring any reader to the last delta given out, and prove it by a heartbeat."""
        if self._checkpoint is None:
            self._checkpoint = [CODEC.encode(part) for part in self._log.snapshot()]
            self._tail_bytes_left = max(TAIL_BYTES_MIN, sum(map(len, self._checkpoint)))
        return [*self._checkpoint, *self._tail, self.heartbeat()]


class Heard(enum.Enum):
    """What a message of a stream says about the entries kept here."""

    CURRENT = "current"  # they are the owner's set, at the sequence number just heard
    OPEN = "open"  # nothing: a part of a snapshot, a repetition, a delta that must wait
    DIVERGED = "diverged"  # they are not what the owner says
    OVERFLOW = "overflow"  # the index is full


class OwnerStream:
    """One owner's stream as its reader keeps it, over as many connections as it takes, for one life of the owner.

    Writes the index's ``slot`` and nothing else. RemoteProtocolError passes through.
    """

    def __init__(self, index: Index, slot: int, now: float) -> None:
        self._index = index
        self._replica = OwnerReplica(index, slot, now)
        self.slot = slot

    @property
    def seq(self) -> int:
        """How far the owner's log has been followed."""
        return self._replica.seq

    @property
    def proven_at(self) -> float | None:
        """When the entries here were last known to be the owner's set."""
        return self._replica.synced_at

    @property
    def entries(self) -> int:
        """Of the owner, in the index."""
        return self._index.count(self.slot)

    def hear(self, message: Delta | Snapshot, now: float) -> Heard:
        """Take the next message."""
        replica = self._replica
        try:
            if isinstance(message, Delta):
                outcome = replica.on_delta(message, now)
            else:
                outcome = replica.on_snapshot(message, now)
        except OutOfSpace:
            return Heard.OVERFLOW
        if outcome in (Outcome.DIVERGED, Outcome.REJECTED) or replica.sync is Sync.DIVERGED:
            return Heard.DIVERGED
        if outcome in (Outcome.APPLIED, Outcome.HEARTBEAT, Outcome.INSTALLED) and replica.sync is Sync.SYNCED:
            return Heard.CURRENT
        return Heard.OPEN

    def wanted(self, now: float) -> Resync | None:
        """The RESYNC that is due, if any."""
        return self._replica.poll(now)
