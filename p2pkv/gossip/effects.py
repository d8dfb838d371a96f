"""What the protocol core asks its driver to do. Values only; the core never does any of it itself."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from p2pkv.types import NodeId
from p2pkv.wire.frame import Frame
from p2pkv.wire.peer import Address, Card, Hello


@dataclass(frozen=True, slots=True)
class Dial:
    """Open a TCP connection to ``address``; report it as ``conn`` with ``on_dialed`` or ``on_closed``."""

    conn: int
    address: Address


@dataclass(frozen=True, slots=True)
class Send:
    """Append ``frame`` (header and body, shared, never changed) to the send queue of each connection, in order."""

    conns: tuple[int, ...]
    frame: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """Close a connection after what is queued on it has been offered to the socket once. The core has forgotten it."""

    conn: int
    reason: str


@dataclass(frozen=True, slots=True)
class Established:
    """Both sides have introduced themselves on a control connection. ``dialed``: we are the reader on it."""

    conn: int
    card: Card
    dialed: bool


@dataclass(frozen=True, slots=True)
class HandOver:
    """A data connection has been welcomed (its WELCOME was sent before): it belongs to the transport now."""

    conn: int
    hello: Hello


@dataclass(frozen=True, slots=True)
class Deliver:
    """A request from a reader, or an owner's answer to one of ours: not the core's business."""

    conn: int
    frame: Frame
    message: msgspec.Struct


@dataclass(frozen=True, slots=True)
class Changed:
    """What is known of a peer has changed: its state, card, address or layout conflicts (not its sequence number)."""

    node: NodeId


@dataclass(frozen=True, slots=True)
class Say:
    """A line for the log: ``level`` is one of logging's names in lower case."""

    level: str
    text: str


Effect = Dial | Send | Close | Established | HandOver | Deliver | Changed | Say
