"""Seeds behind a DNS name: every A and AAAA record of, say, a headless Service, looked up again and again."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Final

from p2pkv.config import parse_address
from p2pkv.gossip.discovery.base import SEEDS_MAX, Found
from p2pkv.wire.peer import Address

REFRESH_S: Final = 10.0
"""A headless Service's records change as pods come and go; cluster DNS caches them for 5 to 30 s anyway."""
LOOKUP_S: Final = 5.0

log = logging.getLogger("p2pkv.gossip.dns")

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """IP addresses behind a name, by the system's resolver. Raises OSError."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return sorted({str(info[4][0]) for info in infos})


class DnsSeeds:
    """Looks a name up every ``refresh_s`` seconds; keeps the last answer while the resolver fails."""

    source = "dns"

    def __init__(self, name: str, *, refresh_s: float = REFRESH_S, resolve: Resolve = resolve) -> None:
        """``name`` is ``host:port``; raises ConfigError otherwise."""
        self._host, self._port = parse_address(name, key="peer.dns")
        self._refresh_s = refresh_s
        self._resolve = resolve
        self._task: asyncio.Task[None] | None = None

    async def start(self, found: Found) -> None:
        """Begin to look up, in a task of its own."""
        self._task = asyncio.create_task(self._run(found), name="p2pkv-dns-seeds")

    async def stop(self) -> None:
        """End the task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self, found: Found) -> None:
        known: list[str] | None = None
        failed = False
        while True:
            try:
                async with asyncio.timeout(LOOKUP_S):
                    hosts = (await self._resolve(self._host, self._port))[:SEEDS_MAX]
            except (OSError, TimeoutError) as error:
                # A Service without ready pods has no records: normal for the first pod of a cell.
                log.log(
                    logging.DEBUG if failed else logging.INFO,
                    "cannot look up seeds behind %s: %s; trying again every %g s", self._host, error, self._refresh_s,
                )  # fmt: skip
                failed = True
            else:
                failed = False
                if hosts != known:
                    known = hosts
                    found(self.source, [Address(host, self._port) for host in hosts])
            await asyncio.sleep(self._refresh_s)
