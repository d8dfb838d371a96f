"""Seeds on the LAN by multicast DNS (zeroconf), where multicast works: most Kubernetes networks drop it.

Published: the cell's name, the peer port, the node id. Never secrets: everybody on the LAN reads it.
The zeroconf package is imported when discovery starts, not before.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from p2pkv.errors import ConfigError
from p2pkv.gossip.addresses import WILDCARDS
from p2pkv.gossip.discovery.base import SEEDS_MAX, Found
from p2pkv.types import NodeId
from p2pkv.wire.peer import Address

if TYPE_CHECKING:
    from zeroconf import ServiceStateChange, Zeroconf
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

SERVICE: Final = "_p2pkv._tcp.local."
RESOLVE_MS: Final = 3_000
RESOLVES_MAX: Final = 32
"""Look-ups of announced names at the same time: a flood of announcements does not become a flood of tasks."""

log = logging.getLogger("p2pkv.gossip.zeroconf")


class ZeroconfSeeds:
    """Announces this agent and browses for others of its cell.

    Args:
        cell: only agents that announce the same cell are named.
        node: own node id; own announcements are not named.
        address: what is announced: an IP address (or a name that resolves to one) and the peer port.
        interfaces: IP addresses of the interfaces to use; None = the announced address's.
    """

    source = "zeroconf"

    def __init__(self, *, cell: str, node: NodeId, address: Address, interfaces: Iterable[str] | None = None) -> None:
        self._cell = cell
        self._node = node
        self._address = address
        self._interfaces = list(interfaces) if interfaces is not None else None
        self._seen: dict[str, tuple[Address, ...]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._info: Any = None
        self._registration: asyncio.Task[None] | None = None

    async def start(self, found: Found) -> None:
        """Announce and browse, in the background.

        Raises:
            ConfigError: the package is missing, or the address cannot be announced.
        """
        try:
            from zeroconf import ServiceInfo
            from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf
        except ImportError as error:
            raise ConfigError("peer.zeroconf needs the zeroconf package", hint="pip install zeroconf") from error
        hosts = await self._hosts()
        try:
            self._zeroconf = AsyncZeroconf(interfaces=self._interfaces or hosts)
        except OSError as error:
            raise ConfigError(
                "zeroconf cannot use the network", hosts=hosts, reason=str(error),
                hint="Multicast is not available there: use peer.seeds or peer.dns.",
            ) from error  # fmt: skip
        self._info = ServiceInfo(
            SERVICE,
            f"{self._node}.{SERVICE}",
            port=self._address.port,
            properties={"cell": self._cell, "node": str(self._node)},
            parsed_addresses=hosts,
            server=f"p2pkv-{self._node}.local.",
        )
        # Probing for a name conflict takes about 1.7 s: not the start's business.
        self._registration = asyncio.create_task(self._register(), name="p2pkv-zeroconf-register")

        def on_change(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
            self._on_change(found, name, removed=state_change.name == "Removed")

        self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, SERVICE, handlers=[on_change])

    async def stop(self) -> None:
        """Withdraw the announcement and close the sockets."""
        tasks = [*self._tasks.values(), *([self._registration] if self._registration else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        if self._browser is not None:
            await self._browser.async_cancel()
        if self._zeroconf is not None:
            try:
                async with asyncio.timeout(1.0):
                    await self._zeroconf.async_unregister_all_services()
            except TimeoutError:
                log.debug("announcement not withdrawn in time")
            await self._zeroconf.async_close()
        self._zeroconf = self._browser = None

    async def _hosts(self) -> list[str]:
        """The IP addresses to announce: what the name resolves to, or all of this machine's for a wildcard."""
        host = self._address.host
        if host in WILDCARDS:
            import ifaddr  # comes with zeroconf

            found = [ip.ip for adapter in ifaddr.get_adapters() for ip in adapter.ips if isinstance(ip.ip, str)]
            return [ip for ip in found if not ip.startswith("127.")][:4] or ["127.0.0.1"]
        try:
            async with asyncio.timeout(RESOLVE_MS / 1000):
                infos = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError) as error:
            raise ConfigError(
                "zeroconf cannot announce this address", host=host, reason=str(error),
                hint="Set peer.advertise to an address that others can reach.",
            ) from error  # fmt: skip
        return [str(infos[0][4][0])]

    async def _register(self) -> None:
        assert self._zeroconf is not None
        try:
            await (await self._zeroconf.async_register_service(self._info))
        except Exception as error:  # the package raises many kinds; discovery must not take the agent along
            log.warning("cannot announce this agent by zeroconf: %s", error)

    def _on_change(self, found: Found, name: str, *, removed: bool) -> None:
        if removed:
            if self._seen.pop(name, None):
                self._name_all(found)
        elif name not in self._tasks and len(self._tasks) < RESOLVES_MAX:
            task = asyncio.create_task(self._look_up(found, name), name="p2pkv-zeroconf-resolve")
            self._tasks[name] = task
            task.add_done_callback(lambda _: self._tasks.pop(name, None))

    async def _look_up(self, found: Found, name: str) -> None:
        from zeroconf.asyncio import AsyncServiceInfo

        assert self._zeroconf is not None
        info = AsyncServiceInfo(SERVICE, name)
        try:
            if not await info.async_request(self._zeroconf.zeroconf, RESOLVE_MS):
                return
        except Exception as error:  # malformed announcements of others
            log.debug("cannot resolve %s: %s", name, error)
            return
        addresses = self.accept(dict(info.properties), info.parsed_addresses(), info.port)
        if addresses and (name in self._seen or len(self._seen) < SEEDS_MAX) and self._seen.get(name) != addresses:
            self._seen[name] = addresses
            self._name_all(found)

    def accept(self, properties: dict[bytes, bytes | None], hosts: list[str], port: int | None) -> tuple[Address, ...]:
        """The addresses of an announcement: none if it is our own, of another cell, or not an agent's."""
        if properties.get(b"cell") != self._cell.encode() or properties.get(b"node") == str(self._node).encode():
            return ()
        if not port or not 0 < port < 65_536:
            return ()
        return tuple(Address(host, port) for host in hosts[:4])

    def _name_all(self, found: Found) -> None:
        found(self.source, [address for addresses in self._seen.values() for address in addresses][:SEEDS_MAX])
