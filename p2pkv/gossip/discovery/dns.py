"""Seeds behind a DNS name, looked up again and again: every A and AAAA record of, say, a headless Service
(``p2pkv.default.svc:7841``), or every SRV record (``_peers._udp.p2pkv.default.svc``), which names ports as well.
"""

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

Resolve = Callable[[str, int], Awaitable[list[Address]]]
"""Addresses behind a name; the port is 0 for SRV names. Raises OSError."""


async def resolve(host: str, port: int) -> list[Address]:
    """IP addresses behind a name, by the system's resolver."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [Address(host, port) for host in sorted({str(info[4][0]) for info in infos})]


async def resolve_services(name: str, _: int) -> list[Address]:
    """Hosts and ports behind an SRV name (RFC 2782), by the system's name servers. Weights do not matter to seeds."""
    from dns.asyncresolver import Resolver  # takes 60 ms: only where it is wanted
    from dns.exception import DNSException
    from dns.resolver import NXDOMAIN

    try:
        answer = await Resolver().resolve(name, "SRV", search=True, lifetime=LOOKUP_S)
    except NXDOMAIN as error:
        raise OSError(f"there is no {name}") from error
    except DNSException as error:
        raise OSError(str(error) or type(error).__name__) from error
    found = {(record.target.to_text(omit_final_dot=True), int(record.port)) for record in answer}
    return [Address(host, port) for host, port in sorted(found)]


_by_system: Final = resolve


def is_service(name: str) -> bool:
    """Whether a name is one of SRV records."""
    return name.startswith("_") and "._" in name


class DnsSeeds:
    """Looks a name up every ``refresh_s`` seconds; keeps the last answer while the resolver fails."""

    source = "dns"

    def __init__(self, name: str, *, refresh_s: float = REFRESH_S, resolve: Resolve | None = None) -> None:
        """``name`` is ``host:port``, or ``_service._proto.name``; raises ConfigError otherwise."""
        services = is_service(name)
        self._host, self._port = (name, 0) if services else parse_address(name, key="peer.dns")
        resolve = resolve or (resolve_services if services else _by_system)
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
        known: list[Address] | None = None
        failed = False
        while True:
            try:
                async with asyncio.timeout(LOOKUP_S):
                    seeds = (await self._resolve(self._host, self._port))[:SEEDS_MAX]
            except (OSError, TimeoutError) as error:
                # A Service without ready pods has no records: normal for the first pod of a cell.
                log.log(
                    logging.DEBUG if failed else logging.INFO,
                    "cannot look up seeds behind %s: %s; trying again every %g s", self._host, error, self._refresh_s,
                )  # fmt: skip
                failed = True
            else:
                failed = False
                if seeds != known:
                    known = seeds
                    found(self.source, seeds)
            await asyncio.sleep(self._refresh_s)
