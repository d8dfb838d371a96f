"""Blocks ahead of need: what an engine wishes to have here, or elsewhere; and for a new node, what peers used last.

All of it comes behind whatever anybody waits for: fetches of this kind get room only while nobody else wants it, and a
quarter of it at most (:mod:`p2pkv.transport.admission`). What an engine of this node wishes for may push older blocks
out, as its own puts do. What others propose, and warming up, only fills memory that is free: what is here by somebody's
use is worth more than a guess.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec

from p2pkv.agent.hot import FEATURE, HotPeers
from p2pkv.agent.service import CacheService
from p2pkv.errors import Busy, InvalidArgument, LayoutMismatch, OutOfSpace, P2PKVError
from p2pkv.gossip.driver import PeerNetwork
from p2pkv.types import Layout, Status
from p2pkv.wire.engine import Done, Warm, Warming
from p2pkv.wire.engine import Replicated as ReplicatedAnswer
from p2pkv.wire.engine_types import Source
from p2pkv.wire.peer import HOT_MAX, Replicate, Replicated

log = logging.getLogger(__name__)

BATCH_BYTES: Final = 32 << 20
"""Pulled at a time: enough to keep several holders busy, and soon over when there is no room left."""
BATCH_S: Final = 30.0
ROOM_LEFT: Final = 0.02
"""Of the arena: it is not filled to the brim by guesses."""
SEEN_MAX: Final = 1 << 20
"""Blocks that one warm-up looks at."""
REPLICATING_MAX: Final = 16
"""Proposals of peers that are worked on at once; then they hear that this node is busy."""
REPLICATE_S: Final = 60.0
ASK_S: Final = 2.0


class WarmStats(msgspec.Struct):
    """Counters since the start, in blocks; for metrics."""

    prefetched: int = 0
    prefetch_failed: int = 0
    replicated: int = 0
    replicate_refused: int = 0
    warmed: int = 0


class _Run:
    """One warm-up, as far as it is."""

    def __init__(self, top_bytes: int, now: float) -> None:
        self.top_bytes = top_bytes
        self.began_at = now
        self.ended_at: float | None = None
        self.peers = 0
        self.seen_bytes = 0
        self.here = 0
        self.pulled = 0
        self.failed = 0
        self.bytes_pulled = 0
        self.complete = False
        self.why = ""
        self.kept: set[Layout] = set()
        self.left_out: dict[Layout, str] = {}
        """Layouts that cannot be kept here, and why."""


def _step(block_bytes: int) -> int:
    """Blocks of a batch."""
    return max(1, BATCH_BYTES // block_bytes)


class _Filled(NamedTuple):
    """What became of a batch, in blocks: each was here, was asked for, or had no room."""

    here: int
    asked: int
    came: int
    no_room: int


class Ahead:
    """See the module's docstring. On the event loop's thread."""

    def __init__(
        self,
        service: CacheService,
        network: PeerNetwork,
        *,
        usable: Callable[[int], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._service = service
        self._network = network
        self._usable = usable
        self._clock = clock
        self._run: _Run | None = None
        self._warming: asyncio.Task[None] | None = None
        self._replicating: set[asyncio.Task[None]] = set()
        self._promised_bytes = 0  # of proposals that were begun and have not come yet
        self._filling = asyncio.Lock()
        self.stats = WarmStats()
        network.on(Replicate, self._on_replicate)

    async def stop(self) -> None:
        """End what is under way; fetches end by themselves."""
        tasks = [*self._replicating, *([self._warming] if self._warming else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- prefetch

    async def prefetch(self, namespace: int, keys: Sequence[bytes], deadline_s: float) -> Done:
        """Have these blocks here. A status per key: OK where it is."""
        local = self._service.store.present(namespace, keys)
        statuses = await self._pull(namespace, keys, deadline_s)
        good = [status is Status.OK for status in statuses]
        came = [is_good and not here for is_good, here in zip(good, local, strict=True)]
        self.stats.prefetched += sum(came)
        self.stats.prefetch_failed += len(keys) - sum(good)
        sources = bytes(
            Source.LOCAL if here else (Source.PEER if is_good else Source.NONE)
            for here, is_good in zip(local, good, strict=True)
        )
        return Done(bytes(statuses), sources, 0, sum(came) * self._service.block_bytes(namespace))

    async def _pull(self, namespace: int, keys: Sequence[bytes], deadline_s: float) -> list[Status]:
        """Fetch what is not here, in the background. What is here is OK."""
        present = self._service.store.present(namespace, keys)
        statuses = [Status.OK if here else Status.MISS for here in present]
        missing = [i for i, here in enumerate(present) if not here]
        fetcher = self._service.fetcher
        if fetcher is None or not missing:
            return statuses

        def on_fetched(position: int, status: Status) -> None:
            statuses[missing[position]] = status

        wanted = [keys[i] for i in missing]
        await asyncio.wait([fetcher.fetch(namespace, wanted, deadline_s, on_fetched, background=True)])
        return statuses

    def _room(self, namespace: int, promised_bytes: int = 0) -> int:
        """Blocks that fit without any other having to go."""
        stats = self._service.store.stats()
        free = stats.free_bytes - int(ROOM_LEFT * stats.capacity_bytes) - promised_bytes
        return max(0, free) // max(1, self._service.block_bytes(namespace))

    async def _fill(self, namespace: int, keys: Sequence[bytes], deadline_s: float) -> _Filled:
        """Pull a batch as far as memory is free now. One at a time: several would take the same room for theirs."""
        async with self._filling:
            present = self._service.store.present(namespace, keys)
            missing = [key for key, here in zip(keys, present, strict=True) if not here]
            asked = missing[: self._room(namespace)]
            statuses = await self._pull(namespace, asked, deadline_s)
        return _Filled(sum(present), len(asked), statuses.count(Status.OK), len(missing) - len(asked))

    # --- replicas elsewhere

    async def replicate(self, namespace: int, keys: Sequence[bytes], nodes: Sequence[int]) -> ReplicatedAnswer:
        """Have nodes pull these blocks. They answer at once and pull when they have nothing better to do."""
        answers = await asyncio.gather(*(self._propose(node, namespace, keys) for node in nodes))
        here, begun, reasons = zip(*answers, strict=True)
        return ReplicatedAnswer(list(here), list(begun), list(reasons))

    async def _propose(self, node: int, namespace: int, keys: Sequence[bytes]) -> tuple[int, int, str]:
        peer = self._network.peer(node)
        if node == self._service.node:
            return 0, 0, "this node itself"
        if peer is None or FEATURE not in peer.card.features:
            return 0, 0, "unknown, or of a version that does not do this"
        here = begun = 0
        try:
            for first in range(0, len(keys), HOT_MAX):
                link = await self._network.reach(node, ASK_S)
                answer = await link.request(Replicate(namespace, list(keys[first : first + HOT_MAX])), ASK_S)
                assert isinstance(answer, Replicated)  # the link pairs requests with the type of their answers
                here, begun = here + answer.here, begun + answer.begun
        except P2PKVError as error:
            return here, begun, error.message
        return here, begun, ""

    def _on_replicate(self, asker: object, proposal: msgspec.Struct) -> Replicated:
        assert isinstance(proposal, Replicate)
        namespace, service = proposal.namespace, self._service
        if not service.block_bytes(namespace):
            layout = next((layout for layout in self._layouts() if layout.namespace == namespace), None)
            if layout is None:
                self.stats.replicate_refused += len(proposal.hashes)
                raise Busy("no node that this one knows has told of that layout")
            service.adopt(layout)
        present = service.store.present(namespace, proposal.hashes)
        missing = [key for key, here in zip(proposal.hashes, present, strict=True) if not here]
        missing = missing[: self._room(namespace, self._promised_bytes)]
        if not missing:
            return Replicated(sum(present), 0)
        if len(self._replicating) >= REPLICATING_MAX:
            self.stats.replicate_refused += len(missing)
            raise Busy("this node is busy with earlier proposals")

        block_bytes = service.block_bytes(namespace)
        self._promised_bytes += len(missing) * block_bytes
        task = asyncio.get_running_loop().create_task(self._pull_proposed(namespace, block_bytes, missing))
        self._replicating.add(task)
        task.add_done_callback(self._replicating.discard)
        return Replicated(sum(present), len(missing))

    async def _pull_proposed(self, namespace: int, block_bytes: int, keys: list[bytes]) -> None:
        """Pull what was promised, batch by batch, until it is here, its time is over, or others have taken the room."""
        ends_at = self._clock() + REPLICATE_S
        try:
            while keys and (left_s := ends_at - self._clock()) > 0:
                batch = keys[: _step(block_bytes)]
                filled = await self._fill(namespace, batch, min(left_s, BATCH_S))
                self.stats.replicated += filled.came
                if filled.no_room:
                    return
                keys = keys[len(batch) :]
                self._promised_bytes -= len(batch) * block_bytes
        finally:
            self._promised_bytes -= len(keys) * block_bytes

    def _layouts(self) -> list[Layout]:
        """What peers keep that this node could keep, too, each once; layouts that contradict ours are left out."""
        found: dict[int, Layout] = {}
        for peer in self._network.peers():
            if peer.alive:
                found.update((layout.namespace, layout) for layout in peer.card.layouts)
        ours = self._service.layouts
        return [layout for layout in found.values() if not any(layout.conflicts(other) for other in ours)]

    # --- warming up

    def warm(self, wish: Warm) -> Warming:
        """Begin, end, or only tell how it goes."""
        running = self._warming is not None and not self._warming.done()
        if wish.stop and running:
            assert self._warming is not None and self._run is not None
            self._warming.cancel()
            self._run.why, self._run.ended_at = "it was stopped", self._clock()
            running = False
        elif wish.top_bytes:
            if running:
                raise Busy("this node is warming up already", hint="Wait for it, or stop it first.")
            self._run = _Run(wish.top_bytes, self._clock())
            self._warming = asyncio.get_running_loop().create_task(self._warm(self._run, wish.deadline_ms / 1000))
            running = True
        return self._told(running)

    def _told(self, running: bool) -> Warming:
        run = self._run
        if run is None:
            return Warming(False, False, 0, 0, 0, 0, 0, 0, 0, 0, "there was none")
        took_s = (self._clock() if run.ended_at is None else run.ended_at) - run.began_at
        counts = (run.here, run.pulled, run.failed, run.bytes_pulled)
        return Warming(
            running, run.complete, run.peers, run.top_bytes, run.seen_bytes, *counts, int(took_s * 1000), run.why
        )

    async def _warm(self, run: _Run, deadline_s: float) -> None:
        try:
            async with asyncio.timeout(deadline_s):
                run.why = await self._warm_until(run)
                run.complete = bool(run.kept) or not run.left_out
        except TimeoutError:
            run.why = "its time was over"
        except P2PKVError as error:
            run.why = error.message
        except Exception as error:
            run.why = f"a bug: {error!r}"
            log.exception("warming up failed")
        finally:
            run.ended_at = self._clock()
            if run.left_out:
                first = next(iter(run.left_out.values()))
                run.why += f"; {len(run.left_out)} of their layouts cannot be kept here: {first}"
        log.info("warmed up: %d blocks pulled, %d were here: %s", run.pulled, run.here, run.why)

    async def _warm_until(self, run: _Run) -> str:
        """Returns why it has ended."""
        turns = [(layout, HotPeers(self._network, layout.namespace, self._usable, self._service.node))
                 for layout in self._layouts()]  # fmt: skip
        turns = [(layout, peers) for layout, peers in turns if peers.asked]
        if not turns:
            return "no peer has anything"
        run.peers = max(peers.asked for _, peers in turns)
        seen: set[tuple[int, bytes]] = set()
        while turns:
            layout, peers = turns.pop(0)
            try:
                namespace = self._service.adopt(layout)
            except (LayoutMismatch, InvalidArgument, OutOfSpace) as error:  # peers may keep what we cannot: go on
                run.left_out[layout] = error.message
                continue
            run.kept.add(layout)
            page = [key for key in await peers.page() if (namespace, key) not in seen]
            if not page:
                if peers.left:
                    turns.append((layout, peers))
                continue
            seen.update((namespace, key) for key in page)
            if why := await self._warm_page(run, namespace, layout.block_bytes, page):
                return why
            if len(seen) > SEEN_MAX:
                return "it has looked at as many blocks as it may"
            turns.append((layout, peers))
        return "that is all that peers have"

    async def _warm_page(self, run: _Run, namespace: int, block_bytes: int, page: list[bytes]) -> str:
        """Returns why to go no further, or nothing."""
        wanted = (run.top_bytes - run.seen_bytes) // block_bytes
        step = _step(block_bytes)
        for first in range(0, min(len(page), wanted), step):
            filled = await self._fill(namespace, page[first : min(first + step, wanted)], BATCH_S)
            run.seen_bytes += (filled.here + filled.asked) * block_bytes
            run.here += filled.here
            run.pulled += filled.came
            run.bytes_pulled += filled.came * block_bytes
            run.failed += filled.asked - filled.came
            self.stats.warmed += filled.came
            if filled.no_room:
                return "there is no free memory left"
        return "that was all that was asked for" if wanted <= len(page) else ""
