"""Tickets: how the two ends of a TCP connection prove that they have the cell's key, and which lives they are.

A ticket is a sealed frame (:mod:`.sealed`) whose payload begins with a byte that no gossip frame begins with, so that
neither can be taken for the other. HELLO's names the life that is dialed and is admitted once, as every frame is; the
one in WELCOME names the HELLO that it answers. They say nothing of what follows on the connection: where a network can
be listened to or written to, use TLS.
"""

from __future__ import annotations

import struct
from typing import Final

from p2pkv.gossip.sealed import HEADER, Life, Opened, Opener, Sealer

_HELLO: Final = struct.Struct("<BQQ")
_WELCOME: Final = struct.Struct("<BQQ")
_HELLO_KIND: Final = 0x81
_WELCOME_KIND: Final = 0x82


def hello_ticket(sealer: Sealer, to: Life) -> bytes:
    """For HELLO to this life."""
    return sealer.seal(_HELLO.pack(_HELLO_KIND, to.node, to.instance))


def check_hello(opener: Opener, ticket: bytes, *, claimed: Life, own: Life, now: float) -> bool:
    """Whether a HELLO is from the life that it claims, to this one, and came for the first time."""
    opened = opener.open(ticket, now)
    return isinstance(opened, Opened) and opened.life == claimed and opened.payload == _HELLO.pack(
        _HELLO_KIND, own.node, own.instance
    )  # fmt: skip


def welcome_ticket(sealer: Sealer, hello: bytes) -> bytes:
    """For WELCOME to the HELLO with this ticket."""
    return sealer.seal(_WELCOME.pack(_WELCOME_KIND, *_name(hello)))


def check_welcome(opener: Opener, ticket: bytes, *, claimed: Life, hello: bytes, now: float) -> bool:
    """Whether a WELCOME is from the life that it claims, to this HELLO."""
    opened = opener.open(ticket, now)
    return isinstance(opened, Opened) and opened.life == claimed and opened.payload == _WELCOME.pack(
        _WELCOME_KIND, *_name(hello)
    )  # fmt: skip


def _name(ticket: bytes) -> tuple[int, int]:
    """A ticket's instance and counter: no other has both."""
    fields = HEADER.unpack_from(ticket)
    return fields[5], fields[6]
