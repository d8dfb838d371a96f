"""What a connection can be in the middle of, and which frames are lawful then."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from p2pkv.types import NodeId
from p2pkv.wire.peer import PeerType


class Phase(enum.Enum):
    """Of a connection. Accepted: WAITING -> SERVING. Dialed: DIALING -> GREETING -> READING."""

    WAITING = "waiting for HELLO"
    SERVING = "serving our stream"
    DIALING = "dialing"
    GREETING = "waiting for WELCOME"
    READING = "reading its stream"


LAWFUL: Final[dict[Phase, frozenset[int]]] = {
    Phase.WAITING: frozenset({PeerType.HELLO}),
    Phase.SERVING: frozenset(
        {
            PeerType.RESYNC, PeerType.ADVERT, PeerType.LEAVE, PeerType.ERROR,
            PeerType.PIN, PeerType.RELEASE, PeerType.NIXL_CONNECT,
        }
    ),
    Phase.DIALING: frozenset(),
    Phase.GREETING: frozenset({PeerType.WELCOME, PeerType.ERROR}),
    Phase.READING: frozenset(
        {
            PeerType.SNAPSHOT, PeerType.DELTA, PeerType.DIGEST, PeerType.ADVERT, PeerType.LEAVE, PeerType.ERROR,
            PeerType.PINNED, PeerType.RELEASED, PeerType.NIXL_ENDPOINT,
        }
    ),
}  # fmt: skip


@dataclass(slots=True)
class Conn:
    """One connection."""

    id: int
    phase: Phase
    since: float  # of the phase
    host: str  # of the other end, as seen
    node: NodeId | None = None
    resyncs: int = 0  # reader: asked since the stream was last current
    resync_at: float = float("-inf")  # reader: last asked; owner: last answered
