"""The NIXL transport: PIN over the control connection, one-sided READs by the NIXL process, RELEASE.

Reader: PIN names the blocks; the answer says where in the owner's arena they lie and what their checksums are. The
NIXL process reads them into our slots, and what has landed is checksummed here, piece by piece, while the rest is on
its way. RELEASE follows; whether the lease held all along is counted, but it is the checksum that proves the bytes.

Owner: PIN takes a lease. Where the reader needs it (no RDMA, not the same host) the NIXL process keeps progressing for
as long as the lease lasts.

Where reads end within our own system call (``inline``), engines' GETs need none of this: native code asks the owner's
server on a data connection and the NIXL process itself (``native/nixl_reads.hpp``). This module connects the two
processes and says so.

A read that is given up may still write: its slots are named ``unsafe`` in the result, and ``on_clear`` tells when they
are safe again (the transfer has ended, or its process is gone).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import msgspec

from p2pkv import _native
from p2pkv.errors import Busy, DeadlineExceeded, P2PKVError, PeerUnavailable, TransportUnavailable
from p2pkv.transport.base import ArenaMemory, BlockSource, CallOff, PullRequest, PullResult, is_silence
from p2pkv.transport.nixl_native import NativeReads
from p2pkv.transport.nixl_process import NixlOptions, NixlProcess
from p2pkv.transport.nixl_wire import Run
from p2pkv.transport.patience import Patience
from p2pkv.transport.setup_time import SetupTime
from p2pkv.types import CHECKSUM_BYTES, Status
from p2pkv.wire.fields import Extent
from p2pkv.wire.peer import (
    NixlConnect,
    NixlEndpoint,
    NixlEndpointReply,
    Pin,
    Pinned,
    Release,
    Released,
)

log = logging.getLogger(__name__)

CONNECT_S: Final = 2.0
"""For two NIXL processes to find each other: 20 to 200 ms, once per pair."""

SETUP_S: Final = 0.05
"""What it is expected to take before it was seen."""
RELEASE_S: Final = 1.0


class Link(Protocol):
    """A control connection to an owner."""

    async def request(
        self, message: msgspec.Struct, deadline_s: float, *, on_late: Callable[[msgspec.Struct], None] | None = None
    ) -> msgspec.Struct: ...


class Asker(Protocol):
    """Who a request came from."""

    @property
    def node_id(self) -> int: ...


class Requests(Protocol):
    """Where requests of readers come in, and links to owners are found."""

    def on(self, message_type: type[msgspec.Struct], handler: Callable[[Any, Any], Any], /) -> None: ...
    def link(self, node_id: int, /) -> Link | None: ...
    async def reach(self, node_id: int, deadline_s: float, /) -> Link: ...


class _Owner(NamedTuple):
    """A peer whose NIXL process ours is connected to."""

    name: str
    inline: bool


class NixlStats(msgspec.Struct):
    """Counters since the start."""

    reads: int = 0
    bytes_read: int = 0
    leases_lost: int = 0
    reconnects: int = 0


class NixlTransport:
    """See the module's docstring; the contract is in :mod:`p2pkv.transport.base`.

    Args:
        on_clear: called with a result's token when nothing can write to its unsafe slots any more.
        on_endpoint: called when the NIXL process came or went.
        native: does inline reads by itself for engines' GETs, over idle data connections; None: nothing does.
        on_inline: called with a node that was asked from here although it could have been read natively: a data
            connection to it may be missing.
        stall_s: an owner that does not answer PIN for so long is given up; sooner where it is known to be quick.
        may_send: whether so many bytes may be read from here now.
    """

    name = "nixl"

    def __init__(
        self,
        *,
        arena: ArenaMemory,
        source: BlockSource,
        network: Requests,
        node: int,
        epoch: int,
        options: NixlOptions,
        lease_ttl_s: float,
        on_clear: Callable[[int], None],
        on_endpoint: Callable[[], None],
        native: _native.NixlReads | None = None,
        on_inline: Callable[[int], None] = lambda node: None,
        stall_s: float = 0.5,
        may_send: Callable[[int], bool] = lambda size: True,
    ) -> None:
        self._may_send = may_send
        self._arena = arena
        self._source = source
        self._network = network
        self._lease_ttl_s = lease_ttl_s
        self._on_endpoint = on_endpoint
        self._stall_s = stall_s
        self._patience = Patience(stall_s)
        self._setup = SetupTime(SETUP_S)
        self._owners: dict[int, _Owner] = {}
        self._connecting: dict[int, asyncio.Task[_Owner]] = {}
        self._releases: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._native = native
        self._on_inline = on_inline
        self.stats = NixlStats()
        self.process = NixlProcess(
            arena.fd,
            arena.capacity_bytes,
            node=node,
            epoch=epoch,
            options=options,
            native=NativeReads(native, self.peer_gone, self._not_inline) if native is not None else None,
            on_ready=lambda _: self._endpoint_changed(),
            on_down=self._on_down,
            on_clear=on_clear,
        )

    @property
    def ready(self) -> bool:
        """Whether the NIXL process runs."""
        return self.process.ready is not None

    async def start(self) -> None:
        """Start the NIXL process and begin to answer readers.

        Raises:
            TransportUnavailable: NIXL is missing or does not work on this host.
        """
        await self.process.start()
        self._network.on(Pin, self._on_pin)
        self._network.on(Release, self._on_release)
        self._network.on(NixlConnect, self._on_connect)

    async def stop(self) -> None:
        """Kill the NIXL process; pulls in flight fail."""
        self._stopping = True
        tasks = [*self._connecting.values(), *self._releases]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.process.stop()

    def peer_gone(self, node: int) -> None:
        """Forget the peer's NIXL process; when it is back, it is another."""
        self._patience.forget(node)
        if self._native is not None:
            self._native.drop_peer(node)
        owner = self._owners.pop(node, None)
        if owner is not None:
            self.process.remove_peer(owner.name)

    def _not_inline(self, node: int) -> None:
        """A native read had to wait for the owner's process. Other reads may be on the connection: it stays."""
        owner = self._owners.get(node)
        if owner is not None:
            self.process.not_inline(owner.name)
            self._owner(node)  # tells native code

    def _endpoint_changed(self) -> None:
        if not self._stopping:
            self._on_endpoint()

    def _on_down(self, reason: str) -> None:
        self._owners.clear()
        self._endpoint_changed()

    # --- reader ---

    async def pull(self, request: PullRequest) -> PullResult:
        """PIN, READ, checksum, RELEASE; see the contract."""
        deadline = time.monotonic() + request.deadline_s
        statuses = [Status.MISS] * len(request.hashes)
        began = time.monotonic()
        try:
            owner, pinned, asked_at = await self._pin(request, deadline)
        except P2PKVError as error:
            setup_s = time.monotonic() - began
            return PullResult([_status_of(error)] * len(request.hashes), 0, str(error), setup_s=setup_s)
        waited_s, setup_s = time.monotonic() - asked_at, asked_at - began
        if owner.inline:
            self._on_inline(request.node)
        if not pinned.lease:
            return PullResult(statuses, 0, waited_s=waited_s, setup_s=setup_s)
        landing = _Landing(request, pinned, self._arena.base_address, statuses)
        if not landing.runs:
            self._release(request.node, pinned.lease)
            return PullResult(statuses, 0, "the peer's blocks are not as long as the layout says")
        call_off = CallOff()
        request.call_off.on_call(call_off)
        watch = asyncio.get_running_loop().create_task(self._watch(request.node, landing, call_off))
        try:
            outcome = await self.process.read(
                owner.name, landing.runs, max(0.001, deadline - time.monotonic()), landing.on_progress, call_off
            )
        except P2PKVError as error:  # nothing was begun: no room for it, or the peer's blocks have no bytes
            landing.fail(_status_of(error))
            return PullResult(statuses, 0, str(error))
        else:
            landing.on_progress(outcome.done_bytes)
        finally:
            watch.cancel()
            self._release(request.node, pinned.lease)
        self.stats.reads += 1
        self.stats.bytes_read += outcome.done_bytes
        if outcome.error is None:
            return PullResult(statuses, outcome.done_bytes, waited_s=waited_s, setup_s=setup_s)
        landing.fail(Status.TIMEOUT if landing.silent else _status_of(outcome.error))
        unsafe = landing.touched_by(outcome.open)
        return PullResult(statuses, outcome.done_bytes, str(outcome.error), unsafe, outcome.read_id, waited_s, setup_s)

    async def _watch(self, node: int, landing: _Landing, call_off: CallOff) -> None:
        """Call a read off that nobody is left at the other end of. What NIXL tells is whole pieces, and a slow link may
        take long for one; so when none has come for long, the owner is asked for nothing, to see whether it answers."""
        while True:
            seen = landing.landed
            await asyncio.sleep(self._stall_s)
            link = self._network.link(node)
            if landing.landed > seen or link is None:  # who breaks off is noticed elsewhere
                continue
            try:
                await link.request(Pin(0, [], 0, False), self._stall_s)
            except P2PKVError as error:
                if is_silence(error) and landing.landed == seen:
                    landing.silent = True
                    call_off()
                    return

    async def _pin(self, request: PullRequest, deadline: float) -> tuple[_Owner, Pinned, float]:
        """A lease, and a connection to the very NIXL process that it names; once more if that has been replaced.
        And when the lease was asked for."""
        link = await self._network.reach(request.node, max(0.001, min(deadline - time.monotonic(), self._stall_s)))
        for attempt in range(2):
            owner = self._owner(request.node) or await self._connect(request.node, link, deadline - time.monotonic())
            pin = Pin(request.namespace, list(request.hashes), int(self._lease_ttl_s * 1000), not owner.inline)
            # A holder that stands still must not use up the time in which another one could be asked.
            asked_at = time.monotonic()
            wait_s = max(0.001, min(deadline - asked_at, self._patience.of(request.node)))
            pinned = await link.request(pin, wait_s, on_late=functools.partial(self._give_back, request.node))
            self._patience.learn(request.node, time.monotonic() - asked_at)
            assert isinstance(pinned, Pinned)  # the link pairs requests with the type of their answers
            count = len(request.hashes)
            lists = (pinned.statuses, pinned.extents, pinned.generations)
            if any(len(x) != count for x in lists) or len(pinned.checksums) != count * CHECKSUM_BYTES:
                raise PeerUnavailable("the peer's answer to PIN is of the wrong length")
            if not pinned.lease or pinned.nixl == owner.name:
                return owner, pinned, asked_at
            self._release(request.node, pinned.lease)
            self.peer_gone(request.node)
            self.stats.reconnects += 1
            if attempt:
                break
        raise PeerUnavailable("the peer's NIXL process keeps changing")

    def setup_s(self, node: int) -> float:
        """Two NIXL processes have to find each other, unless they have."""
        return 0.0 if self._owner(node) is not None else self._setup.expected_s

    async def prepare(self, node: int) -> None:
        """Connect the NIXL processes."""
        if self._owner(node) is not None or node in self._connecting:
            return
        try:
            link = await self._network.reach(node, self._stall_s)
            await self._connect(node, link, CONNECT_S)
        except P2PKVError as error:
            log.debug("no connection to the NIXL process of %016x: %s", node, error)

    def _owner(self, node: int) -> _Owner | None:
        """The owner's NIXL process if ours is still connected to it; asked each time, because connections break."""
        owner = self._owners.get(node)
        if owner is None:
            return None
        connection = self.process.connected(owner.name)
        if connection is None:
            del self._owners[node]
            return None
        if connection.inline != owner.inline:
            self._owners[node] = owner = owner._replace(inline=connection.inline)
            self._tell_native(node, owner)
        return owner

    def _tell_native(self, node: int, owner: _Owner) -> None:
        """Native code reads from an owner whose process need not take part."""
        if self._native is None:
            return
        if owner.inline:
            self._native.set_peer(node, owner.name)
        else:
            self._native.drop_peer(node)

    async def _connect(self, node: int, link: Link, left_s: float) -> _Owner:
        """Connect the two NIXL processes; callers share one attempt."""
        task = self._connecting.get(node)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._connect_once(node, link))
            self._connecting[node] = task
            task.add_done_callback(lambda done: self._connected(node, done))
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                return await asyncio.shield(task)
        except TimeoutError:
            raise DeadlineExceeded("the NIXL processes did not connect in time") from None

    def _connected(self, node: int, task: asyncio.Task[_Owner]) -> None:
        self._connecting.pop(node, None)
        if not task.cancelled() and task.exception() is None:
            self._owners[node] = owner = task.result()
            self._tell_native(node, owner)

    async def _connect_once(self, node: int, link: Link) -> _Owner:
        ours, began = self.process.ready, time.monotonic()
        if ours is None:
            raise TransportUnavailable("our NIXL process is being restarted")
        reply = await link.request(NixlConnect(ours, int(CONNECT_S * 1000)), min(CONNECT_S, self._stall_s))
        assert isinstance(reply, NixlEndpointReply)
        if reply.endpoint is None:
            raise PeerUnavailable("the peer's NIXL process is being restarted")
        connection = await self.process.add_peer(reply.endpoint, CONNECT_S)
        self._setup.learn(time.monotonic() - began)
        return _Owner(reply.endpoint.name, connection.inline)

    def _give_back(self, node: int, answer: object) -> None:
        """A lease came when nobody waited for it any more."""
        if isinstance(answer, Pinned) and answer.lease:
            self._release(node, answer.lease)

    def _release(self, node: int, lease: int) -> None:
        """Give a lease back without waiting for the answer; what it says is counted."""
        link = self._network.link(node)
        if link is None:
            return

        async def release() -> None:
            try:
                answer = await link.request(Release(lease), RELEASE_S)
            except P2PKVError:
                return  # it runs out by itself
            if isinstance(answer, Released) and not answer.held:
                self.stats.leases_lost += 1

        task = asyncio.get_running_loop().create_task(release())
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    # --- owner ---

    def _on_pin(self, asker: Asker, pin: Pin) -> Pinned:
        endpoint = self.process.ready
        if endpoint is None:
            raise Busy("the NIXL process is being restarted")
        held = self._source.pin(pin.namespace, pin.hashes, min(pin.ttl_ms / 1000, self._lease_ttl_s), asker.node_id)
        if held.lease and not self._may_send(sum(block.length for block in held.blocks if block is not None)):
            self._source.release(held.lease, asker.node_id)
            raise Busy("this node sends as much as it may", hint="Its transport.serve_max says how much.")
        if pin.serve and held.lease:
            self.process.serve(held.lease, time.monotonic() + held.ttl_s)
        statuses = bytearray()
        extents: list[Extent] = []
        generations: list[int] = []
        checksums = bytearray()
        for block in held.blocks:
            statuses.append(Status.MISS if block is None else Status.OK)
            extents.append(Extent(0, 0) if block is None else Extent(block.offset, block.length))
            generations.append(0 if block is None else block.generation)
            checksums += bytes(CHECKSUM_BYTES) if block is None else block.checksum
        return Pinned(
            held.lease,
            int(held.ttl_s * 1000),
            bytes(statuses),
            extents,
            generations,
            bytes(checksums),
            endpoint.name,
        )

    def _on_release(self, asker: Asker, release: Release) -> Released:
        self.process.serve_done(release.lease)
        return Released(self._source.release(release.lease, asker.node_id))

    def _on_connect(self, asker: Asker, connect: NixlConnect) -> NixlEndpointReply:
        endpoint: NixlEndpoint | None = self.process.ready
        if endpoint is not None:
            until = time.monotonic() + min(connect.serve_ms / 1000, CONNECT_S)
            self.process.serve(("connect", asker.node_id), until)
        return NixlEndpointReply(endpoint)


def _status_of(error: P2PKVError) -> Status:
    """Of the blocks that an attempt did not bring: what it says of the peer."""
    if isinstance(error, Busy):
        return Status.BUSY
    if isinstance(error, TransportUnavailable):  # our own NIXL process: no fault of the peer's
        return Status.LOST
    return Status.TIMEOUT if is_silence(error) else Status.UNREACHABLE


class _Landing:
    """The blocks of one read as they land: which bytes along the runs belong to which, and their checksums so far."""

    def __init__(self, request: PullRequest, pinned: Pinned, base_address: int, statuses: list[Status]) -> None:
        self._request = request
        self._base = base_address
        self._statuses = statuses
        self._checksums = pinned.checksums
        self._wanted: list[int] = []
        self.runs: list[Run] = []
        for i, extent in enumerate(pinned.extents):
            if pinned.statuses[i] != Status.OK:
                continue
            destination = request.destinations[i]
            if extent.length != destination.length or not 0 <= extent.offset < 1 << 63:
                statuses[i] = Status.INVALID
                continue
            self._wanted.append(i)
            self.runs.append(Run(extent.offset, destination.offset, extent.length))
        self.silent = False  # the owner has not answered for long
        self.landed = 0  # bytes along the runs
        self._next = 0  # position in _wanted of the block that is being checksummed
        self._hashed = 0  # bytes of it that are
        self._before = 0  # bytes of the blocks before it
        self._hasher = _native.Hasher()

    def on_progress(self, done_bytes: int) -> None:
        """The first ``done_bytes`` bytes along the runs have landed: checksum them while they are in the cache."""
        self.landed = done_bytes
        while self._next < len(self._wanted):
            i = self._wanted[self._next]
            extent = self._request.destinations[i]
            here = min(done_bytes - self._before, extent.length)
            if here > self._hashed:
                self._hasher.update(self._base + extent.offset + self._hashed, here - self._hashed)
                self._hashed = here
            if here < extent.length:
                return
            checksum = self._hasher.digest()
            good = checksum == self._checksums[i * CHECKSUM_BYTES : (i + 1) * CHECKSUM_BYTES]
            self._statuses[i] = Status.OK if good else Status.REJECTED
            self._request.on_block(i, self._statuses[i], checksum)
            self._before += extent.length
            self._next += 1
            self._hashed = 0
            self._hasher = _native.Hasher()

    def fail(self, status: Status) -> None:
        """The blocks that have not landed whole never will."""
        for i in self._wanted[self._next :]:
            self._statuses[i] = status

    def touched_by(self, extents: Sequence[tuple[int, int]]) -> frozenset[int]:
        """Which blocks that have not landed whole overlap these (offset, length) extents of the arena.

        A read that nobody answered for in time names all of its extents; what has landed is not written to again.
        """
        unsafe = set()
        for i in self._wanted[self._next :]:
            destination = self._request.destinations[i]
            end = destination.offset + destination.length
            if any(offset < end and destination.offset < offset + length for offset, length in extents):
                unsafe.add(i)
        return frozenset(unsafe)
