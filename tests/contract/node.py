"""A bare node for the transports' contract: arena, store, peer network and one transport, with nothing above them.

Several live in one event loop. What an owner that is asked over NIXL does can be watched through :class:`Source`; over
TCP the native server answers, without asking anybody here.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, NamedTuple

from p2pkv import _native
from p2pkv.config import Peer
from p2pkv.errors import Busy
from p2pkv.gossip.driver import PeerNetwork
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.store.arena import Arena
from p2pkv.store.base import LeaseLimits, Reservation
from p2pkv.store.dram import DramStore
from p2pkv.transport.base import CallOff, Held, HeldBlock, NullTransport, PullRequest, PullResult, Transport
from p2pkv.transport.movers import Movers
from p2pkv.transport.nixl import NixlTransport
from p2pkv.transport.nixl_process import NixlOptions
from p2pkv.transport.patience import Patience
from p2pkv.transport.tcp import TcpTransport
from p2pkv.types import Layout, Status
from p2pkv.wire.fields import Extent
from p2pkv.wire.peer import Address, Card
from tests.cluster.agents import make_layout

ARENA_BYTES = 96 << 20
LEASES_PER_HOLDER_MAX = 64
"""More than one test's pulls at once need, few enough to be used up at once."""
UCX_OVER_TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
"""Not one system call from memory to memory: the owner's process has to take part in every read."""


class Source:
    """What the NIXL transport serves from. ``on_pin``: gets every lease's blocks, before the reader hears of them."""

    def __init__(self, store: DramStore) -> None:
        self.store = store
        self.on_pin: Callable[[Sequence[HeldBlock | None]], None] = lambda _: None
        self.ttl_max_s = 10.0

    def pin(self, namespace: int, hashes: Sequence[bytes], ttl_s: float, holder: int) -> Held:
        pinned = self.store.pin(namespace, hashes, min(ttl_s, self.ttl_max_s), time.monotonic(), holder)
        if pinned.considered < len(hashes) and not pinned.lease_id:
            raise Busy("this peer holds as much as it may")
        blocks = [None if b is None else HeldBlock(b.offset, b.length, b.generation, b.checksum) for b in pinned.blocks]
        self.on_pin(blocks)
        return Held(pinned.lease_id, pinned.ttl_s, blocks)

    def release(self, lease: int, holder: int) -> bool:
        return self.store.release(lease, time.monotonic(), holder)

    @property
    def leases(self) -> int:
        self.store.expire(time.monotonic())
        return self.store.stats().leases


class Unhurried(Patience):
    """Owner and reader share one busy thread here: an answer that takes long says nothing about the owner."""

    def of(self, node: int) -> float:
        return self._ceiling_s


class Pulled(NamedTuple):
    """A pull, what was reported on the way, and how long it took."""

    result: PullResult
    reports: list[tuple[int, Status, bytes]]
    places: list[Reservation]
    seconds: float

    @property
    def statuses(self) -> list[Status]:
        return self.result.statuses


class Node:
    """See the module's docstring. ``kind``: tcp, nixl, nixl-tcp (NIXL made to use its TCP) or null."""

    def __init__(self, kind: str, *, stall_s: float = 2.0, native_reads: bool = False) -> None:
        self.kind = kind
        self.id = random.SystemRandom().getrandbits(63) | 1
        self.arena = Arena.create(ARENA_BYTES)
        self.store = DramStore(
            ARENA_BYTES,
            leases=LeaseLimits(bytes_per_holder_max=ARENA_BYTES // 2, leases_per_holder_max=LEASES_PER_HOLDER_MAX),
        )
        self.server: _native.Server | None = None
        """What answers over TCP."""
        self.native: _native.NixlReads | None = None
        """What reads by itself for engines' GETs; here it only hears of owners."""
        if native_reads:
            self.native = _native.NixlReads(self.store.core, self.arena.base_address, 1 << 20)
        self.source = Source(self.store)
        self.movers = Movers(1)
        self.cleared: list[int] = []
        name = kind.partition("-")[0]
        self.network = PeerNetwork(
            settings=Peer(port=0),
            cell="default",
            card=Card(self.id, 1, Address("", 0), "", "test", [], ["tcp", name]),
            log=OwnershipLog(1, hold_ms=0),
            index=PrefixIndex(),
        )
        self.transport: Transport = self._make_transport(name, stall_s)

    def _make_transport(self, name: str, stall_s: float) -> Transport:
        if name == "null":
            return NullTransport()
        if name == "tcp":
            self.server = _native.Server(self.store.core, self.arena.fd, self.arena.base_address, 10.0, 256)
            tcp = TcpTransport(
                movers=self.movers, arena=self.arena, server=self.server, open_data=self.network.open_data,
                stream_bytes=4 << 20, stall_s=stall_s,
            )  # fmt: skip
            tcp._patience = Unhurried(stall_s)
            self.network.on_data_connection = lambda sock, hello, rest: tcp.accept(sock, hello.card.node, rest)
            return tcp
        nixl = NixlTransport(
            arena=self.arena, source=self.source, network=self.network, node=self.id, epoch=1,
            options=NixlOptions(ucx=UCX_OVER_TCP if self.kind == "nixl-tcp" else {}),
            lease_ttl_s=10.0, on_clear=self.cleared.append, on_endpoint=lambda: None, native=self.native,
        )  # fmt: skip
        nixl._patience = Unhurried(stall_s)
        return nixl

    async def start(self) -> Node:
        self.movers.start()
        await self.transport.start()
        await self.network.start()
        return self

    async def stop(self) -> None:
        await self.network.stop()
        if self.native is not None:
            self.native.stop()
        await self.transport.stop()
        self.movers.stop()
        self.arena.close()

    async def meet(self, node: int, address: tuple[str, int], deadline_s: float = 10.0) -> None:
        """Dial an owner; returns when its stream is current."""
        self.network._on_seeds("test", [Address(*address)])
        await until(lambda: (peer := self.network.peer(node)) is not None and peer.alive, deadline_s)

    # --- blocks

    def namespace(self, layout: Layout) -> int:
        """The layout's namespace, registered here."""
        return self.store.register(layout)

    def put(self, layout: Layout, key: bytes, content: bytes) -> Reservation:
        """Store a block."""
        place = self.reserve(layout, key)
        self.arena.view(place.offset, place.length)[:] = content
        self.store.commit(place, _native.xxh3_128(content), time.monotonic())
        return place

    def reserve(self, layout: Layout, key: bytes) -> Reservation:
        """A slot to pull into."""
        place = self.store.reserve(self.namespace(layout), key, time.monotonic())
        assert isinstance(place, Reservation), place
        return place

    @contextmanager
    def spent(self, holder: int, layout: Layout, key: bytes) -> Iterator[None]:
        """While this lasts, ``holder`` has as many leases here as it may have."""
        leases: list[int] = []
        while (pinned := self.store.pin(layout.namespace, [key], 10.0, time.monotonic(), holder)).lease_id:
            leases.append(pinned.lease_id)
        assert leases
        try:
            yield
        finally:
            for lease in leases:
                assert self.store.release(lease, time.monotonic(), holder)

    @contextmanager
    def overwritten(self, places: Sequence[Reservation]) -> Iterator[None]:
        """Have other bytes lie in these slots when they are sent than were put there.

        Over NIXL they come between the answer to PIN and the read; over TCP nobody is asked in between.
        """

        def overwrite(_: object = None) -> None:
            for place in places:
                self.arena.view(place.offset, place.length)[:] = b"\x5a" * place.length

        if self.server is not None:
            overwrite()
            yield
            return
        self.source.on_pin = overwrite
        try:
            yield
        finally:
            self.source.on_pin = lambda _: None

    def bytes_at(self, place: Reservation) -> bytes:
        return bytes(self.arena.view(place.offset, place.length))

    async def pull(
        self,
        owner: int,
        layout: Layout,
        keys: Sequence[bytes],
        *,
        deadline_s: float = 20.0,
        length: int | None = None,
        call_off: CallOff | None = None,
    ) -> Pulled:
        """Pull into fresh slots of which every byte is 0xEE. ``length`` asks for another block size than the layout's.

        The slots are given back (or parked, where the result calls them unsafe) before this returns, so that a test
        can check that nobody writes to them afterwards: they are not reused here.
        """
        place_layout = layout if length is None else make_layout(length, model=f"another-{length}")
        places = [self.reserve(place_layout, os.urandom(16)) for _ in keys]
        for place in places:
            self.arena.view(place.offset, place.length)[:] = b"\xee" * place.length
        reports: list[tuple[int, Status, bytes]] = []
        loop = asyncio.get_running_loop()
        started = loop.time()
        result = await self.transport.pull(
            PullRequest(
                owner,
                layout.namespace,
                list(keys),
                [Extent(place.offset, place.length) for place in places],
                deadline_s,
                lambda *report: reports.append(report),
                call_off or CallOff(),
            )
        )
        return Pulled(result, reports, places, loop.time() - started)

    def forget(self, pulled: Pulled) -> None:
        """Give the slots of a pull back."""
        for place in pulled.places:
            self.store.abort(place)


@asynccontextmanager
async def meeting(owner: Node, reader: Node) -> AsyncIterator[tuple[Node, Node]]:
    """Both started, the reader connected to the owner; stopped at the end."""
    try:
        await owner.start()
        await reader.start()
        await reader.meet(owner.id, ("127.0.0.1", owner.network.port))
        yield owner, reader
    finally:
        await reader.stop()
        await owner.stop()


async def until(what: Callable[[], Any], deadline_s: float = 10.0) -> None:
    """Wait until ``what`` is true."""
    async with asyncio.timeout(deadline_s):
        while not what():
            await asyncio.sleep(0.002)
