"""The agent process: makes the parts, connects them, runs until told to stop, and stops in bounded time.

Start: identity, arena, store, native threads, peers, transports, engines, HTTP: each step either works or names what is
wrong. Stop (SIGTERM, SIGINT): refuse new work, say goodbye to peers, let reads under lease end, close everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from p2pkv import _native
from p2pkv.agent.hot import FEATURE as HOT
from p2pkv.agent.hot import HotAnswers
from p2pkv.agent.identity import Identity
from p2pkv.agent.ipc import EngineServer
from p2pkv.agent.kept_estimates import KeptEstimates
from p2pkv.agent.lane import EngineLane
from p2pkv.agent.neighbours import Neighbours
from p2pkv.agent.populate import Populator
from p2pkv.agent.remembered import FILE, Remembered
from p2pkv.agent.service import CacheService
from p2pkv.agent.sources import Sources
from p2pkv.agent.suspicion import FEATURE as SUSPECT
from p2pkv.agent.suspicion import Suspicion
from p2pkv.agent.tokenizers import Tokenizers
from p2pkv.agent.topology import BITS
from p2pkv.agent.transports import Transports, has_rdma, known_link_bytes_per_s
from p2pkv.agent.warm import Ahead
from p2pkv.agent.worth import Worth
from p2pkv.config import Config, parse_size
from p2pkv.gossip.driver import PeerNetwork
from p2pkv.gossip.views import PeerView
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.store.arena import Arena
from p2pkv.store.base import LeaseLimits
from p2pkv.store.directory import DirectoryFiles
from p2pkv.store.dram import DramStore
from p2pkv.store.memory import available_memory
from p2pkv.transport.fetch import Fetcher
from p2pkv.transport.movers import Movers, parts_here
from p2pkv.wire.peer import Address, Card

if TYPE_CHECKING:
    from p2pkv.agent.http import HttpServer

log = logging.getLogger("p2pkv.agent")

TICK_S: Final = 1.0
SPREAD_BYTES: Final = 8 << 20
"""So much that several peers hold is pulled from several at once: that is worth the event loop's half millisecond."""
SAVE_S: Final = 2.0
"""How long a stopping agent waits for what it knows of others to be on disk."""
DRAIN_S: Final = 5.0
"""How long a stopping agent waits for leases of peers and jobs of engines before it goes anyway."""


def host_id() -> str:
    """Equal for two agents that share a kernel and a network namespace: the boot id and the namespace's inode."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:
        return socket.gethostname()


class Agent:
    """One agent. ``start``, then ``stop``, on one event loop; ``run`` does both around a wait.

    Attributes are the parts, for the HTTP endpoint, the metrics and tests.
    """

    def __init__(self, config: Config, *, identity: Identity | None = None) -> None:
        self.config = config
        self.started_at = time.monotonic()
        self.ready = False
        self.draining = False
        self._stopped = asyncio.Event()
        self._exits = contextlib.AsyncExitStack()
        self._identity = identity
        self.neighbours: Neighbours | None = None

    async def start(self) -> None:
        """Bring everything up.

        Raises:
            ConfigError: a setting is impossible on this host; what was started is stopped again.
        """
        try:
            await self._start()
        except BaseException:
            await self._exits.aclose()
            raise
        # What is there now stays: a full collection need not look at it again (90 ms at a million blocks otherwise).
        gc.collect()
        gc.freeze()
        self.ready = True
        log.info(
            "agent %016x (epoch %d): engines at %s, peers at %s:%d, arena %d MiB on %s pages, transport %s",
            self.node,
            self.identity.epoch,
            self.config.socket_path,
            self.config.peer.host,
            self.network.port,
            self.arena.capacity_bytes >> 20,
            self.arena.backing.pages.value,
            self.transports.describe(),
        )

    async def _start(self) -> None:
        config, exits = self.config, self._exits
        http_server: type[HttpServer] | None = None
        if config.http.enabled:
            # Takes 0.5 s or more: only where it is wanted, and before anybody counts on this loop to turn.
            from p2pkv.agent.http import HttpServer as http_server
        self.tokenizers = Tokenizers(config.http.tokenizers if config.http.enabled else ())
        self.identity = self._identity or Identity.load(config.state_dir)
        exits.callback(self.identity.close)
        self.node = int(self.identity.node)

        capacity = parse_size(config.store.capacity, key="store.capacity", percent_of=available_memory().bytes)
        self.arena = Arena.create(capacity, huge=config.store.huge_pages)
        if config.store.lock_memory:
            self.arena.lock()
        extent = None if config.store.extent == "auto" else parse_size(config.store.extent, key="store.extent")
        lease_ttl_s = config.store.lease_ttl_ms / 1000
        self.store = DramStore(
            self.arena.capacity_bytes,
            extent_bytes=extent,
            evict=config.store.eviction == "lru",
            leases=LeaseLimits(
                ttl_max_s=lease_ttl_s,
                leases_max=config.store.leases_max,
                bytes_per_holder_max=self.arena.capacity_bytes // 2,
            ),
            quarantine_bytes_max=parse_size(
                config.transport.quarantine, key="transport.quarantine", percent_of=self.arena.capacity_bytes
            ),
        )
        self.directory: DirectoryFiles | None = None
        if config.engine.directory:
            self.directory = DirectoryFiles(self.store, self.arena.capacity_bytes)
            exits.callback(self.directory.close)
        populator = Populator(self.arena)
        exits.push_async_callback(populator.stop)
        self.store.watch_extents(populator.used)
        populator.used(0, 0)
        self.index = PrefixIndex()
        self.ownership = OwnershipLog(self.identity.epoch, hold_ms=config.peer.hold_ms)
        self.movers = Movers(config.store.copy_threads)
        self.movers.start()
        exits.callback(self.movers.stop)
        self.service = CacheService(
            node=self.node,
            store=self.store,
            arena=self.arena,
            index=self.index,
            ownership=self.ownership,
            movers=self.movers,
            lease_ttl_s=lease_ttl_s,
            slot_node=lambda slot: self.network.slot_node(slot),
            on_layouts=self._tell_card,
        )
        self.network = PeerNetwork(
            settings=config.peer,
            cell=config.peer.cell,
            card=Card(
                self.node,
                self.identity.epoch,
                Address("", 0),
                "",
                host_id(),
                [],
                ["tcp"],
                features=[SUSPECT, HOT],
                rack=config.peer.rack,
                link_mbps=int(known_link_bytes_per_s(config.peer.host, has_rdma()) * BITS / 1e6),
            ),
            log=self.ownership,
            index=self.index,
            renew=self.identity.renew,
        )
        self.transports = Transports(
            settings=config.transport,
            node=self.node,
            epoch=self.identity.epoch,
            movers=self.movers,
            arena=self.arena,
            service=self.service,
            network=self.network,
            host=config.peer.host,
            lease_ttl_s=lease_ttl_s,
            on_change=self._tell_card,
        )
        self.sources = Sources(self.network, self.transports, config.peer.host)
        self.kept_estimates = KeptEstimates(self.identity.directory, self.sources.peers)
        self.kept_estimates.load()
        self.suspicion = Suspicion(
            store=self.store,
            arena=self.arena,
            movers=self.movers,
            network=self.network,
            on_change=lambda namespace, key, distrusted: self.lane.distrust(namespace, key, distrusted),
            on_dropped=self.service.publish,
            lease_ttl_s=lease_ttl_s,
        )
        exits.push_async_callback(self.suspicion.stop)
        self.service.fetcher = Fetcher(
            landing=self.service,
            holders=self.service.holders,
            transport=self.transports.pick,
            peers=self.sources.peers,
            in_flight_bytes=parse_size(
                config.transport.in_flight, key="transport.in_flight", percent_of=self.arena.capacity_bytes
            ),
            watch=lambda namespace, key: self.lane.watch(namespace, key),
            distrusted=self.suspicion.distrusted,
            on_rejected=self.suspicion.rejected,
            salt=self.node,
        )
        exits.push_async_callback(self.sources.stop)
        self.service.worth = Worth(
            self.sources.peers,
            link_bytes_per_s=self.sources.link_bytes_per_s,
            salt=self.node,
            try_one=self.service.try_one,
            prepare=self.transports.prepare,
        )
        self.hot = HotAnswers(self.store, self.network)
        self.ahead = Ahead(self.service, self.network, usable=self.sources.peers.usable)
        exits.push_async_callback(self.service.fetcher.stop)
        exits.push_async_callback(self.transports.stop)
        await self.transports.start()
        directory = self.identity.directory if config.peer.remember_s else None
        self.remembered = Remembered(str(directory / FILE) if directory else "", purge_s=config.peer.purge_s)
        self.network.on_data_connection = self.transports.accept
        self.network.on_peer_change = self._on_peer_change
        self.network.load_bytes = lambda: self.store.stats().pinned_bytes
        await self.network.start()
        exits.push_async_callback(self.network.stop)
        parts = parts_here()
        neighbour_max = parse_size(config.transport.neighbour_max, key="transport.neighbour_max")
        native = _native.Lane(
            self.store.core,
            self.movers.receiver,
            self.transports.tcp.pool,
            self.transports.nixl_reads,
            self.index.lookup,
            arena=self.arena.base_address,
            lease_ttl_s=lease_ttl_s,
            stall_s=config.transport.stall_ms / 1000,
            stream_bytes=parse_size(config.transport.stream_bytes, key="transport.stream_bytes"),
            streams=config.transport.streams,
            partial_bytes=parts.partial,
            ahead_bytes=parts.ahead,
            one_sided_min=parse_size(config.transport.one_sided_min, key="transport.one_sided_min"),
            neighbour_max=neighbour_max,
            spread_bytes=SPREAD_BYTES,
            in_flight_max=config.engine.in_flight_max,
        )
        self.lane = self.service.lane = EngineLane(native, self.service.on_landed)
        self.lane.start()
        exits.callback(self.lane.stop)
        if not config.engine.short_way:
            self.lane.drain()  # all of it is the event loop's
        self.engines = EngineServer(
            self.service,
            path=config.socket_path,
            epoch=self.identity.epoch,
            connections_max=config.engine.connections_max,
            in_flight_max=config.engine.in_flight_max,
            regions_max=config.engine.regions_max,
            lane=self.lane,
            directory=self.directory,
            ahead=self.ahead,
        )
        exits.push_async_callback(self.ahead.stop)
        await self.engines.start()
        exits.push_async_callback(self.engines.stop)
        if neighbour_max and self.transports.nixl is not None:
            self.neighbours = Neighbours(self.lane, self.node, self.network.card.host_id)
            exits.push_async_callback(self.neighbours.stop)
            for peer in self.network.peers():
                self.neighbours.review(peer)

        self.http_port = 0
        if http_server is not None:
            http = http_server(self)
            await http.start()
            exits.push_async_callback(http.stop)
            self.http_port = http.port
        self._tell_card()
        for work in (self._tick(), self._remember()):
            exits.callback(asyncio.get_running_loop().create_task(work).cancel)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for tick in (self.service.tick, self.suspicion.tick, self.kept_estimates.tick, self.remembered.tick):
                try:
                    tick()
                except Exception:  # a bug there must not end the others' work: leases have to expire
                    log.exception("%s failed", tick.__qualname__)

    async def _remember(self) -> None:
        await self.remembered.load(self.network.peers)
        while self.config.peer.remember_s:
            await asyncio.sleep(self.config.peer.remember_s)
            await self.remembered.save(self.index, self.network.peers())

    def _tell_card(self) -> None:
        """Tell peers what this node keeps and how it can be read now."""
        if not hasattr(self, "network"):
            return
        http = self.config.http
        card = msgspec.structs.replace(
            self.network.card,
            http=f"{http.host}:{self.http_port}" if getattr(self, "http_port", 0) else "",
            layouts=self.service.layouts,
            transports=self.transports.names(),
            socket=str(Path(self.engines.path).absolute()) if self.neighbours is not None else "",
        )
        self.network.set_card(card)

    def _on_peer_change(self, peer: PeerView) -> None:
        self.remembered.heard(peer)
        if self.neighbours is not None:
            self.neighbours.review(peer)
        if peer.alive:
            self.transports.review(int(peer.node))
        else:
            self.transports.peer_gone(int(peer.node))
            self.sources.gone(int(peer.node))

    def request_stop(self) -> None:
        """Make :meth:`run` end; safe from a signal handler."""
        self._stopped.set()

    async def run(self) -> None:
        """Start, wait for :meth:`request_stop`, stop."""
        await self.start()
        try:
            await self._stopped.wait()
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Drain and close; bounded by :data:`DRAIN_S` and some."""
        self.ready = False
        self.draining = self.engines.draining = True
        log.info("draining")
        self.lane.drain()
        saving = asyncio.create_task(self.remembered.save(self.index, self.network.peers()))
        await asyncio.sleep(0)  # it has begun
        self.network.leave()
        deadline = time.monotonic() + DRAIN_S
        while time.monotonic() < deadline and (self.engines.in_flight or self._leases()):
            await asyncio.sleep(0.02)
        await asyncio.gather(self.kept_estimates.stop(SAVE_S), self.remembered.stop(SAVE_S))
        saving.cancel()
        await self._exits.aclose()
        log.info("stopped")

    def _leases(self) -> int:
        self.store.expire(time.monotonic())
        return self.store.stats().leases
