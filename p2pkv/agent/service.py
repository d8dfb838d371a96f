"""What the agent does for engines and peers, apart from how they are spoken to: match, get, store, load, pin.

Composes the store, the index, the fetcher and the copy threads. Runs on the event loop's thread; bytes move on native
threads. Nothing here knows sockets.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from p2pkv.agent.lane import EngineLane, Landed
from p2pkv.agent.layouts import Layouts
from p2pkv.agent.regions import MappedRegion
from p2pkv.agent.worth import HERE, PLAN_BLOCKS_MAX, Worth, race_s
from p2pkv.errors import Busy
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import Holder, PrefixIndex
from p2pkv.store.arena import Arena
from p2pkv.store.base import Block, Reservation
from p2pkv.store.dram import DramStore
from p2pkv.transport.base import Held, HeldBlock
from p2pkv.transport.counts import PullCounts
from p2pkv.transport.estimates import Moved
from p2pkv.transport.fetch import Fetcher
from p2pkv.transport.movers import Code, Movers, Work
from p2pkv.transport.plan import Limit, Plan, Prefill
from p2pkv.transport.plan import Source as PeerSource
from p2pkv.types import Layout, Status, Tier, namespace_salt
from p2pkv.wire.engine import Done, Matched, NodeMatch
from p2pkv.wire.engine_types import Source
from p2pkv.wire.fields import Extent

log = logging.getLogger(__name__)

SELF_SLOT: Final = 0
"""The index's slot of this node's own blocks."""


TRY_S: Final = 10.0
"""For a block that is pulled only to see: on a slow link it takes seconds."""


class Ready(NamedTuple):
    """Blocks of one request that are settled: held in the arena under ``lease``, or known not to come."""

    lease: int
    indices: list[int]
    statuses: list[Status]
    sources: list[Source]
    extents: list[Extent]
    more: bool


class ServiceStats(msgspec.Struct):
    """Counters since the start, in blocks and bytes."""

    hits_local: int = 0
    hits_peer: int = 0
    misses: int = 0
    bytes_local: int = 0
    bytes_peer: int = 0
    stored: int = 0
    stored_again: int = 0
    store_failed: int = 0
    bytes_stored: int = 0
    bytes_pinned_for_peers: int = 0
    stores_discarded: int = 0


class CacheService:
    """See the module's docstring.

    Args:
        members: slot of the index -> node id, for answers that name nodes.
        on_layouts: called when the set of layouts in use has changed, so that the node's card can be told again.
    """

    def __init__(
        self,
        *,
        node: int,
        store: DramStore,
        arena: Arena,
        index: PrefixIndex,
        ownership: OwnershipLog,
        movers: Movers,
        lease_ttl_s: float,
        slot_node: Callable[[int], int | None],
        on_layouts: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.node = node
        self.store = store
        self.arena = arena
        self.index = index
        self.ownership = ownership
        self.movers = movers
        self.lease_ttl_s = lease_ttl_s
        self.fetcher: Fetcher[Reservation] | None = (
            None  # set once the cell is joined; without it every remote block is a miss
        )
        self.worth: Worth | None = None  # with the fetcher
        self.paces: dict[int, Prefill] = {}  # by namespace, what an engine has said last of what computing takes
        self.lane: EngineLane | None = None  # what answers GETs without us, once it is there
        self.stats = ServiceStats()
        self._slot_node = slot_node
        self._layouts = Layouts(store, on_layouts, self.publish)
        self._clock = clock

    # --- layouts ---

    @property
    def layouts(self) -> list[Layout]:
        """Layouts that the store has blocks or engines for."""
        return self.store.layouts()

    def open(self, layout: Layout) -> int:
        """An engine begins to use a layout; returns its namespace.

        Raises:
            LayoutMismatch: a live engine of this node keeps the same cache with another layout.
            InvalidArgument: the layout is impossible, or does not fit the arena.
        """
        return self._layouts.open(layout)

    def adopt(self, layout: Layout) -> int:
        """Keep blocks of a layout that a peer has told of; see :meth:`Layouts.adopt`."""
        return self._layouts.adopt(layout)

    def close(self, layout: Layout) -> None:
        """An engine has gone. Its blocks stay."""
        self._layouts.close(layout)

    # --- for peers (BlockSource) ---

    def pin(self, namespace: int, hashes: Sequence[bytes], ttl_s: float, holder: int) -> Held:
        """Hold blocks for a peer; see :class:`p2pkv.transport.base.BlockSource`."""
        pinned = self.store.pin(namespace, hashes, ttl_s, self._clock(), holder)
        if pinned.considered < len(hashes) and not pinned.lease_id:
            raise Busy("this peer holds as much as it may", node=f"{holder:016x}")
        blocks = [None if b is None else HeldBlock(b.offset, b.length, b.generation, b.checksum) for b in pinned.blocks]
        return Held(pinned.lease_id, pinned.ttl_s, blocks)

    def release(self, lease: int, holder: int) -> bool:
        """End a peer's lease; True when it was in force all along. Nobody can end another's."""
        return self.store.release(lease, self._clock(), holder)

    # --- for the fetcher (Landing) ---

    def block_bytes(self, namespace: int) -> int:
        """Of each of a namespace's blocks; 0: the namespace is not known here."""
        return self.store.block_bytes(namespace)

    def reserve(self, namespace: int, key: bytes) -> Reservation | Status:
        """A slot for a block that is about to be pulled."""
        return self.store.reserve(namespace, key, self._clock())

    def commit(self, place: Reservation, checksum: bytes) -> None:
        """A pulled block is proven: it is ours now."""
        self.store.commit(place, checksum, self._clock())
        self.publish()

    def abort(self, place: Reservation) -> None:
        """A pulled block did not come."""
        self.store.abort(place)
        self.publish()

    def quarantine(self, place: Reservation, token: tuple[str, int]) -> None:
        """A pulled block did not come, but its bytes still may."""
        self.store.quarantine(place, token)

    def clear_quarantine(self, token: tuple[str, int]) -> None:
        """Nothing can land any more in what was quarantined under this token."""
        self.store.clear_quarantine(token)

    # --- index ---

    def holders(self, namespace: int, hashes: Sequence[bytes]) -> list[list[PeerSource]]:
        """Per hash where live peers hold it, by the local index."""
        found = self.index.holders(self._keys(namespace, hashes))
        known: dict[Holder, PeerSource | None] = {}  # most of a chain has the same few
        out = []
        for per_key in found:
            sources = []
            for holder in per_key:
                if holder not in known:
                    node = None if holder.node == SELF_SLOT else self._slot_node(holder.node)
                    known[holder] = None if node is None else PeerSource(int(node), holder.tier)
                if (source := known[holder]) is not None:
                    sources.append(source)
            out.append(sources)
        return out

    def sources(self, namespace: int, hashes: Sequence[bytes]) -> list[list[PeerSource]]:
        """Per hash where it can be had: here, else at live peers, by the local index."""
        local = self.store.present(namespace, hashes)
        holders = self.holders(namespace, hashes)
        return [[HERE] if here else there for here, there in zip(local, holders, strict=True)]

    def plan(
        self, namespace: int, hashes: Sequence[bytes], prefill: Prefill | None, deadline_s: float = math.inf
    ) -> Plan:
        """How a chain would be pulled now, and, where the engine's pace is known, how far that pays."""
        assert self.worth is not None
        return self.worth.plan(
            self.sources(namespace, hashes),
            block_bytes=self.block_bytes(namespace),
            prefill=prefill,
            deadline_s=deadline_s,
        )

    def match(
        self, namespace: int, hashes: Sequence[bytes], *, detail: bool, prefill: Prefill | None = None
    ) -> Matched:
        """Who holds how much of a chain; no network. ``prefill``: what computing takes whoever asks; blocks of peers
        that would come later than that are not named. None: all are."""
        keys = self._keys(namespace, hashes)
        local = self.store.present(namespace, hashes)
        anywhere = self.index.contains_any(keys)
        present = bytes(
            Source.LOCAL if here else (Source.PEER if there else Source.NONE)
            for here, there in zip(local, anywhere, strict=True)
        )
        if prefill is not None:
            self.paces[namespace] = prefill
        if prefill is not None and Source.PEER in present:
            present = self._worth_pulling(namespace, hashes, present, prefill)
        nodes: list[NodeMatch] = []
        if detail:
            for row in self.index.match(keys):
                node = self.node if row.node == SELF_SLOT else self._slot_node(row.node)
                if node is not None:
                    nodes.append(NodeMatch(int(node), row.depth, *row.by_tier))
        return Matched(present, _prefix(local), _prefix(present), nodes)

    def _worth_pulling(self, namespace: int, hashes: Sequence[bytes], present: bytes, prefill: Prefill) -> bytes:
        """``present`` without the blocks of peers that are sooner computed."""
        assert self.worth is not None
        sources = self.sources(namespace, hashes[:PLAN_BLOCKS_MAX])
        planned = self.worth.plan(
            sources, block_bytes=self.block_bytes(namespace), prefill=prefill, deadline_s=math.inf
        )
        self.worth.promise(planned)
        self.worth.refuse(planned, namespace, hashes, sources)
        if planned.limit is Limit.COMPLETE:
            return present  # of a longer chain what is behind the plan, too: pulling pays as far as was looked
        behind = bytes(Source.NONE if source == Source.PEER else source for source in present[planned.stop :])
        return present[: planned.stop] + behind

    def _keys(self, namespace: int, hashes: Sequence[bytes]) -> array[int]:
        salt = namespace_salt(namespace)
        return array("Q", [int.from_bytes(h[:8], "little") ^ salt for h in hashes])

    # --- engines: get ---

    def get_local(self, namespace: int, keys: Sequence[bytes], holder: int) -> Ready:
        """Hold what is here. ``more`` is True when something is not: :meth:`get_rest` goes on with that."""
        pinned = self.store.pin(namespace, keys, self.lease_ttl_s, self._clock(), holder)
        indices, extents = [], []
        for i, block in enumerate(pinned.blocks):
            if block is not None:
                indices.append(i)
                extents.append(Extent(block.offset, block.length))
        self.stats.hits_local += len(indices)
        self.stats.bytes_local += sum(extent.length for extent in extents)
        n = len(indices)
        return Ready(pinned.lease_id, indices, [Status.OK] * n, [Source.LOCAL] * n, extents, n < len(keys))

    def get_rest(
        self,
        namespace: int,
        keys: Sequence[bytes],
        have: Sequence[int],
        deadline_s: float,
        holder: int,
        on_ready: Callable[[Ready], None],
        still_wanted: Callable[[], bool] = lambda: True,
        excluded: Sequence[int] = (),
        failed: Mapping[int, Status] | None = None,
        give_up_s: Sequence[float] = (),
    ) -> asyncio.Task[None] | None:
        """Pull what :meth:`get_local` did not find; ``on_ready`` gets what is settled, as it is settled.

        The last call has ``more`` False and comes before the returned future is done; ``None``: it has come already.
        ``still_wanted``: once it is False nothing more is held for the caller. ``excluded``: nodes that have been asked
        already, and what that did by position of the key in ``failed``. ``give_up_s``: by position of the key, see
        :meth:`~p2pkv.transport.fetch.Fetcher.fetch`.
        """
        here = set(have)
        missing = [i for i in range(len(keys)) if i not in here]
        if self.fetcher is None:
            on_ready(self._settle(namespace, keys, [(i, Status.MISS) for i in missing], holder, more=False))
            return None
        loop = asyncio.get_running_loop()
        settled: list[tuple[int, Status]] = []
        left = len(missing)

        def flush() -> None:
            nonlocal settled, left
            batch, settled = settled, []
            left -= len(batch)
            if batch and still_wanted():
                on_ready(self._settle(namespace, keys, batch, holder, more=left > 0))

        def on_fetched(position: int, status: Status) -> None:
            settled.append((missing[position], status))
            if len(settled) == left:
                flush()  # the last ones: now
            elif len(settled) == 1:
                loop.call_soon(flush)  # together with what else this turn of the loop brings

        worst = {position: failed[i] for position, i in enumerate(missing) if i in failed} if failed else None
        return self.fetcher.fetch(
            namespace,
            [keys[i] for i in missing],
            deadline_s,
            on_fetched,
            excluded=excluded,
            worst=worst,
            give_up_s=[give_up_s[i] for i in missing] if give_up_s else (),
        )

    def cancel(self, fetching: asyncio.Task[None] | None) -> None:
        """Nobody waits any more for what :meth:`get_rest` pulls; harmless once it has ended."""
        if fetching is not None and self.fetcher is not None:
            self.fetcher.cancel(fetching)

    def _settle(
        self, namespace: int, keys: Sequence[bytes], batch: list[tuple[int, Status]], holder: int, *, more: bool
    ) -> Ready:
        came = [i for i, status in batch if status is Status.OK]
        pinned = self.store.pin(namespace, [keys[i] for i in came], self.lease_ttl_s, self._clock(), holder)
        blocks: dict[int, Block | None] = dict(zip(came, pinned.blocks, strict=True))
        ready = Ready(pinned.lease_id, [], [], [], [], more)
        for i, status in batch:
            block = blocks.get(i)
            if block is not None:
                self.stats.hits_peer += 1
                self.stats.bytes_peer += block.length
            else:
                self.stats.misses += 1
                if status is Status.OK or self.store.lookup(namespace, keys[i]) is not None:
                    status = Status.BUSY  # it came and had to go again, or this engine may hold no more at once
            ready.indices.append(i)
            ready.statuses.append(status)
            ready.sources.append(Source.NONE if block is None else Source.PEER)
            ready.extents.append(Extent(0, 0) if block is None else Extent(block.offset, block.length))
        return ready

    def try_one(self, namespace: int, key: bytes) -> None:
        """Pull one block in the background, to see how its holders are by now."""
        if self.fetcher is not None:
            self.fetcher.fetch(namespace, [key], TRY_S, _nobody_waits, background=True)

    # --- engines: regions ---

    async def store_blocks(
        self,
        namespace: int,
        keys: Sequence[bytes],
        region: MappedRegion,
        slots: Sequence[int],
        deadline_s: float,
        still_there: Callable[[], bool],
    ) -> Done:
        """Copy slots of a region into the store.

        ``still_there``: whether the engine still waits. Once it does not, its slots may have changed under the copy,
        and nothing of it is published.
        """
        addresses = region.addresses(slots)
        statuses = [Status.EXISTS] * len(keys)
        places: list[tuple[int, Reservation]] = []
        for i, key in enumerate(keys):
            place = self.reserve(namespace, key)
            if isinstance(place, Status):
                statuses[i] = place
            else:
                places.append((i, place))
        base = self.arena.base_address
        items = [(base + place.offset, addresses[i], place.length) for i, place in places]
        committed = 0
        try:
            with region:
                copied = await self.movers.copy(Work.COPY_HASH, items, deadline_s=max(0.0, deadline_s))
            engine_waits = still_there()
            for n, (i, place) in enumerate(places):
                if copied.ok[n] and engine_waits:
                    self.store.commit(place, copied.digest(n), self._clock())
                    statuses[i] = Status.OK
                    self.stats.bytes_stored += place.length
                else:
                    self.store.abort(place)
                    statuses[i] = Status.INVALID if engine_waits else Status.LOST
                    self.stats.stores_discarded += 1
                committed += 1
        finally:
            for _, place in places[committed:]:
                self.store.abort(place)
            self.store.touch(namespace, keys, self._clock())  # so that of the chain the tail is evicted first
            self.publish()
        for i, status in enumerate(statuses):
            if status is Status.BUSY and self.store.lookup(namespace, keys[i]) is not None:
                statuses[i] = Status.EXISTS  # whoever was writing it is done (this request, if it names it twice)
        counts = Counter(statuses)
        self.stats.stored += counts[Status.OK]
        self.stats.stored_again += counts[Status.EXISTS]
        self.stats.store_failed += len(keys) - counts[Status.OK] - counts[Status.EXISTS]
        return Done(bytes(statuses), bytes(len(keys)), 0, 0)

    async def load_blocks(
        self,
        namespace: int,
        keys: Sequence[bytes],
        region: MappedRegion,
        slots: Sequence[int],
        deadline_s: float,
        holder: int,
        *,
        prefill: Prefill | None = None,
    ) -> Done:
        """Write blocks into slots of a region; what arrives is copied while the rest is on its way.

        ``prefill``: what computing takes whoever asks; what falls behind that is given up.
        """
        deadline = self._clock() + deadline_s
        addresses = region.addresses(slots)
        statuses = bytearray([Status.TIMEOUT]) * len(keys)
        sources = bytearray(len(keys))
        moved = {Source.LOCAL: 0, Source.PEER: 0, Source.NONE: 0}

        async def copy_out(ready: Ready) -> None:
            """Copy one batch; statuses count only once the bytes are in the region."""
            base = self.arena.base_address
            good = [n for n, status in enumerate(ready.statuses) if status is Status.OK]
            try:
                items = [
                    (addresses[ready.indices[n]], base + ready.extents[n].offset, ready.extents[n].length) for n in good
                ]
                with region:
                    copied = await self.movers.copy(Work.COPY, items, deadline_s=max(0.0, deadline - self._clock()))
            finally:
                held = not ready.lease or self.store.release(ready.lease, self._clock(), holder)
            for n, i in enumerate(ready.indices):
                statuses[i] = ready.statuses[n]
            for position, n in enumerate(good):
                i = ready.indices[n]
                if not held:
                    statuses[i] = Status.TIMEOUT  # the lease ran out under the copy: the slot may be another's now
                elif not copied.ok[position]:
                    statuses[i] = Status.TIMEOUT if self._clock() >= deadline else Status.INVALID
                else:
                    sources[i] = ready.sources[n]
                    moved[ready.sources[n]] += ready.extents[n].length

        fetching: asyncio.Task[None] | None = None
        with region:
            local = self.get_local(namespace, keys, holder)
            copies = [asyncio.ensure_future(copy_out(local))] if local.indices else []
            wanted = True
            try:
                if local.more:
                    give_up: Sequence[float] = ()
                    if prefill is not None:
                        give_up = race_s(self.plan(namespace, keys, prefill), len(keys), prefill)
                    fetching = self.get_rest(
                        namespace,
                        keys,
                        local.indices,
                        deadline_s,
                        holder,
                        lambda ready: copies.append(asyncio.ensure_future(copy_out(ready))),
                        lambda: wanted,
                        give_up_s=give_up,
                    )
                    if fetching is not None:
                        await asyncio.wait([fetching])
            finally:
                wanted = False
                self.cancel(fetching)
                await asyncio.gather(*copies)
        return Done(bytes(statuses), bytes(sources), moved[Source.LOCAL], moved[Source.PEER])

    def on_landed(self, landed: Landed) -> None:
        """A pull of the lane's has ended: tell peers what is here now, and whoever waited for it; count."""
        self.publish()
        if self.fetcher is None:
            return
        if landed.keys:
            self.fetcher.landed_elsewhere(landed.namespace, landed.keys, landed.statuses)
        if landed.rejected:
            self.fetcher.on_rejected(landed.node, landed.namespace, landed.rejected)
        if (end := landed.end) is not None:
            self.fetcher.count_elsewhere(
                PeerSource(landed.node, Tier.DRAM),
                PullCounts(end.blocks, end.bytes_moved, end.failed, end.rejected, end.missed),
                Moved(end.waited_s, end.took_s, end.bytes_moved),
                silent=landed.code is Code.STALLED and not end.blocks,
                reason=end.reason,
            )

    def totals(self) -> ServiceStats:
        """All counters since the start, with those of the lane and what engines say that they read by themselves."""
        blocks, size = self.store.core.read_unasked()
        stats = msgspec.structs.replace(
            self.stats, hits_local=self.stats.hits_local + blocks, bytes_local=self.stats.bytes_local + size
        )
        if self.lane is None:
            return stats
        by_itself = self.lane.counters()
        names = ("hits_local", "bytes_local", "hits_peer", "bytes_peer", "misses")
        return msgspec.structs.replace(stats, **{name: getattr(stats, name) + by_itself[name] for name in names})

    # --- ownership ---

    def publish(self) -> None:
        """Pass what the store did to the ownership log and to our own slot of the index."""
        changes = self.store.take_changes()
        if changes is None:
            return
        now = self._clock()
        for keys, tier in ((changes.gone, Tier.GONE), (changes.dram, Tier.DRAM)):
            if keys:
                self.ownership.record(keys, tier, now, urgent=tier is Tier.GONE)
                self.index.apply(SELF_SLOT, keys, tier)

    def tick(self) -> None:
        """Once a second or so: end leases that are over, publish what that freed."""
        self.store.expire(self._clock())
        self.publish()


def _nobody_waits(position: int, status: Status) -> None:
    """Of what is pulled to see."""


def _prefix(flags: Sequence[int | bool]) -> int:
    """How many of them are truthy from the beginning."""
    for i, flag in enumerate(flags):
        if not flag:
            return i
    return len(flags)
