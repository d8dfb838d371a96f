"""Where seeds come from: the configuration, DNS, multicast. All at once; see :mod:`.base` for the contract."""

from __future__ import annotations

from p2pkv.config import Peer
from p2pkv.gossip.discovery.base import Discovery
from p2pkv.gossip.discovery.dns import DnsSeeds
from p2pkv.gossip.discovery.static import StaticSeeds
from p2pkv.gossip.discovery.zeroconf import ZeroconfSeeds
from p2pkv.types import NodeId
from p2pkv.wire.peer import Card

__all__ = ["Discovery", "DnsSeeds", "StaticSeeds", "ZeroconfSeeds", "from_settings"]


def from_settings(settings: Peer, *, cell: str, card: Card) -> list[Discovery]:
    """The sources that a configuration asks for. ``card`` carries the address as bound.

    Raises:
        ConfigError: a seed is not ``host:port``.
    """
    sources: list[Discovery] = []
    if settings.seeds:
        sources.append(StaticSeeds(settings.seeds))
    if settings.dns:
        sources.append(DnsSeeds(settings.dns))
    if settings.zeroconf:
        sources.append(ZeroconfSeeds(cell=cell, node=NodeId(card.node), address=card.address))
    return sources
