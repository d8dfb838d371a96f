"""Addresses of peers, as cards and as the gossip core name them."""

from __future__ import annotations

from typing import Final

import msgspec

from p2pkv.gossip.sealed import Life
from p2pkv.wire.peer import Address, Card

WILDCARDS: Final = frozenset({"", "*", "0.0.0.0", "::"})
"""Hosts that say "any of my addresses": the receiver takes the one that it sees."""


def observed(card: Card, host: str) -> Card:
    """The card with the host that its connection came from, where it names none that could be dialed."""
    if card.address.host not in WILDCARDS:
        return card
    return msgspec.structs.replace(card, address=Address(host, card.address.port))


def at(address: Address) -> str:
    """``host:port``, with brackets where the host has colons."""
    return f"[{address.host}]:{address.port}" if ":" in address.host else f"{address.host}:{address.port}"


def parse(text: str) -> Address:
    """The address that :func:`at` wrote; ValueError for anything else."""
    host, _, port = text.rpartition(":")
    return Address(host.removeprefix("[").removesuffix("]"), int(port))


def life_of(card: Card) -> Life:
    """Whose card it is."""
    return Life(card.node, card.epoch, card.instance)
