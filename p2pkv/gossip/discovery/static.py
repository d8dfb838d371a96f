"""Seeds from the configuration: ``host:port``. Names are resolved anew at every dial."""

from __future__ import annotations

from collections.abc import Iterable

from p2pkv.config import parse_address
from p2pkv.gossip.discovery.base import Found
from p2pkv.wire.peer import Address


class StaticSeeds:
    """A list that does not change."""

    source = "static"

    def __init__(self, seeds: Iterable[str]) -> None:
        """Raises ConfigError on anything that is not ``host:port``."""
        self._addresses = [Address(*parse_address(seed, key="peer.seeds")) for seed in seeds]

    async def start(self, found: Found) -> None:
        """Name them all, once."""
        found(self.source, self._addresses)

    async def stop(self) -> None:
        """Nothing to stop."""
