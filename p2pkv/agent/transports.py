"""Which transports this agent runs, and which one a pull from a given peer goes over.

``auto``: NIXL where there is an RDMA device; between two agents of one host the faster of the two as measured at start;
TCP otherwise (NIXL's own TCP is slower than ours, see ``docs/architecture.md``).
``tcp`` and ``nixl`` force one; a peer that does not offer it is read over TCP, which every agent offers.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from p2pkv import _native
from p2pkv.agent import topology
from p2pkv.agent.same_host import nixl_is_faster
from p2pkv.agent.service import CacheService
from p2pkv.config import Transport as TransportSettings
from p2pkv.config import is_loopback, parse_size
from p2pkv.errors import TransportUnavailable
from p2pkv.gossip.driver import PeerNetwork
from p2pkv.store.arena import Arena
from p2pkv.transport.base import Transport
from p2pkv.transport.movers import Movers, parts_here
from p2pkv.transport.nixl import NixlTransport
from p2pkv.transport.nixl_process import NixlOptions
from p2pkv.transport.tcp import TcpTransport
from p2pkv.wire.peer import Hello

log = logging.getLogger(__name__)

STOP_S: Final = 3.0

UNKNOWN_LINK_BYTES_PER_S: Final = 1.25e9
"""10 Gb/s, where the host does not say."""

PREPARING_MAX: Final = 64
"""Connections that are being made ahead of a pull; what is beyond that is made by the pull."""

DATA_CONNECTIONS_MAX: Final = 4_096
"""Of all peers together; an idle one is a descriptor and some hundred bytes."""


def known_link_bytes_per_s(host: str, rdma: bool) -> float:
    """What this host's own link carries; 0: it does not say."""
    speeds = (topology.link_bytes_per_s(host), topology.rdma_bytes_per_s() if rdma else None)
    return max((speed for speed in speeds if speed), default=0.0)


def link_bytes_per_s(host: str, rdma: bool) -> float:
    """What this host's own link carries, or what is likely where it does not say."""
    return known_link_bytes_per_s(host, rdma) or UNKNOWN_LINK_BYTES_PER_S


def has_rdma() -> bool:
    """Whether the kernel knows an RDMA device."""
    devices = Path("/sys/class/infiniband")
    return devices.is_dir() and any(devices.iterdir())


class Transports:
    """See the module's docstring. Lives on the event loop."""

    def __init__(
        self,
        *,
        settings: TransportSettings,
        node: int,
        epoch: int,
        movers: Movers,
        arena: Arena,
        service: CacheService,
        network: PeerNetwork,
        host: str,
        lease_ttl_s: float,
        on_change: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._network = network
        serve_max = 0
        if settings.serve_max:
            serve_max = parse_size(
                settings.serve_max, key="transport.serve_max", percent_of=int(link_bytes_per_s(host, has_rdma()))
            )
        self.server = _native.Server(
            service.store.core, arena.fd, arena.base_address, lease_ttl_s, DATA_CONNECTIONS_MAX, serve_max
        )
        """Answers peers' reads over TCP."""
        self.tcp = TcpTransport(
            movers=movers,
            arena=arena,
            server=self.server,
            open_data=network.open_data,
            streams=settings.streams,
            stream_bytes=parse_size(settings.stream_bytes, key="transport.stream_bytes"),
            idle_connections=settings.idle_connections,
            stall_s=settings.stall_ms / 1000,
            lease_ttl_s=lease_ttl_s,
            slot_of=network.node_slot,
        )
        ucx = {}
        if settings.nixl_devices:
            ucx["UCX_NET_DEVICES"] = settings.nixl_devices
        elif is_loopback(host):
            ucx["UCX_NET_DEVICES"] = "lo"  # UCX's own sockets would listen on every interface
        if settings.nixl_tls:
            ucx["UCX_TLS"] = settings.nixl_tls
        self.nixl_reads = _native.NixlReads(service.store.core, arena.base_address, parts_here().partial)
        """One-sided reads for engines' GETs; for the lane, which stops it."""
        self._on_change = on_change
        self._preparing: dict[tuple[int, str], asyncio.Task[None]] = {}
        self._nixl = NixlTransport(
            arena=arena,
            source=service,
            network=network,
            node=node,
            epoch=epoch,
            options=NixlOptions(
                ucx=ucx,
                quarantine_bytes_max=parse_size(
                    settings.quarantine, key="transport.quarantine", percent_of=arena.capacity_bytes
                ),
                quarantine_s=settings.quarantine_s,
            ),
            lease_ttl_s=lease_ttl_s,
            on_clear=lambda token: service.clear_quarantine(("nixl", token)),
            on_endpoint=self._on_nixl_endpoint,
            native=self.nixl_reads,
            on_inline=self._prepare,
            stall_s=settings.stall_ms / 1000,
            may_send=self.server.may_send,
        )
        self.nixl: NixlTransport | None = None
        """The NIXL transport, while this agent runs it."""
        self.why_no_nixl = "transport.kind is tcp"
        self.rdma = has_rdma()
        self._same_host_nixl = False

    async def start(self) -> None:
        """Start what the settings ask for.

        Raises:
            TransportUnavailable: ``transport.kind`` is nixl and it does not run on this host.
        """
        await self.tcp.start()
        kind = self._settings.kind
        if kind == "tcp":
            return
        if kind == "auto" and not self.rdma:
            self._same_host_nixl = nixl_is_faster()
            if not self._same_host_nixl:
                self.why_no_nixl = "no RDMA device, and TCP is faster between agents of this host"
                return
        try:
            await self._nixl.start()
        except TransportUnavailable as error:
            self.why_no_nixl = error.message
            if kind == "nixl":
                raise
            log.info("no NIXL, so TCP it is: %s", error)
            return
        self.nixl, self.why_no_nixl = self._nixl, ""

    async def stop(self) -> None:
        """Stop all; bounded."""
        self.nixl_reads.stop()
        preparing = list(self._preparing.values())
        for task in preparing:
            task.cancel()
        await asyncio.gather(*preparing, return_exceptions=True)
        async with asyncio.timeout(STOP_S):
            await self.tcp.stop()
            if self.nixl is not None:
                await self.nixl.stop()

    def pick(self, node: int) -> Transport:
        """The transport for a pull from this node, now."""
        transport = self._pick(node)
        self.nixl_reads.want(node, transport is self.nixl)
        return transport

    def review(self, node: int) -> None:
        """What this node offers, or what we can do, has changed: native code, which does not ask, has to know."""
        self.pick(node)

    def setup_s(self, node: int) -> float:
        """How long it will take until this node can be asked; 0: we are connected."""
        return self._pick(node).setup_s(node)

    def prepare(self, node: int) -> None:
        """Connect to a node from which something will probably be pulled; in the background."""
        transport = self.pick(node)
        if transport.setup_s(node):
            self._connect(node, transport)

    def _prepare(self, node: int) -> None:
        """Native code asks owners on idle data connections: have one, for the next time."""
        if not self.tcp.pool.idle_at(node):
            self._connect(node, self.tcp)

    def _connect(self, node: int, transport: Transport) -> None:
        if (node, transport.name) in self._preparing or len(self._preparing) >= PREPARING_MAX:
            return
        task = asyncio.get_running_loop().create_task(transport.prepare(node))
        self._preparing[node, transport.name] = task
        task.add_done_callback(lambda _: self._preparing.pop((node, transport.name), None))

    def _on_nixl_endpoint(self) -> None:
        endpoint = self._nixl.process.ready
        self.server.set_endpoint(endpoint.name if endpoint is not None else "")
        for peer in self._network.peers():
            self.review(int(peer.node))
        self._on_change()

    def _pick(self, node: int) -> Transport:
        if self.nixl is None or not self.nixl.ready:
            return self.tcp
        peer = self._network.peer(node)
        if peer is None or "nixl" not in peer.card.transports:
            return self.tcp
        if self._settings.kind == "nixl" or self.rdma:
            return self.nixl
        same_host = peer.card.host_id == self._network.card.host_id
        return self.nixl if same_host and self._same_host_nixl else self.tcp

    def names(self) -> list[str]:
        """What peers may read us over, for the card."""
        return ["tcp", "nixl"] if self.nixl is not None and self.nixl.ready else ["tcp"]

    def describe(self) -> str:
        """For the log."""
        return "+".join(self.names())

    def accept(self, sock: socket.socket, hello: Hello, leftover: bytes) -> None:
        """Serve a data connection."""
        same_host = hello.card.host_id == self._network.card.host_id
        self.tcp.accept(sock, hello.card.node, leftover, same_host=same_host)

    def peer_gone(self, node: int) -> None:
        """Drop what is kept for a peer that is unreachable or has left."""
        self.tcp.peer_gone(node)
        self.nixl_reads.want(node, False)
        if self.nixl is not None:
            self.nixl.peer_gone(node)
