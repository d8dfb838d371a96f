"""Bring missing blocks into the local store: find holders, pull from several at once, publish what is proven.

* Who is asked for what, and who takes over from whom, is decided by :mod:`.deal`; :mod:`.fetching` does it.
* Single flight: however many callers want a block, it is pulled once; the others get the same bytes.
* A block's destination is a reserved slot of the local store. It is committed (and so becomes visible here and to
  peers) only when the transport has proven its bytes; otherwise the slot is given back, or quarantined while a
  given-up transfer may still write into it.
* What is in flight is bounded; requests take turns (:mod:`.admission`). What is brought ahead of need gives way to what
  is waited for, and stops doing so for what somebody begins to wait for.
* Every block asked for is reported exactly once, by the deadline.

Knows the store only through :class:`Landing`, and the cell only through ``holders``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Generic

from p2pkv.transport.admission import Admission
from p2pkv.transport.counts import FetchStats, PullCounts
from p2pkv.transport.estimates import Moved
from p2pkv.transport.fetching import Flight, OneFetch
from p2pkv.transport.landing import HoldersOf, Landing, OnFetched, P, PickTransport
from p2pkv.transport.peers import Peers
from p2pkv.transport.plan import Source
from p2pkv.types import Status

log = logging.getLogger(__name__)

CROWD_SHARE: Final = 8
"""Of what may be in flight a piece takes at most an eighth when there are several requests, so that they take turns."""


class Fetcher(Generic[P]):
    """See the module's docstring. Runs on the event loop's thread.

    Args:
        peers: what is known of every source, and who is not asked now.
        blocks_max: being pulled at once; more are answered BUSY.
        distrusted: (node, namespace, hash) -> whether the node is not asked for this block.
        on_rejected: told of (node, namespace, hashes) that came and failed their checksum.
        in_flight_bytes: on their way at once; what is beyond that waits for its turn.
        watch: whether somebody else (the lane) is pulling this block now; :meth:`landed_elsewhere` follows if so.
        salt: of this node; see :func:`p2pkv.transport.plan.plan`.
    """

    def __init__(
        self,
        *,
        landing: Landing[P],
        holders: HoldersOf,
        transport: PickTransport,
        peers: Peers,
        blocks_max: int = 65_536,
        in_flight_bytes: int = 1 << 30,
        watch: Callable[[int, bytes], bool] = lambda namespace, key: False,
        distrusted: Callable[[int, int, bytes], bool] = lambda node, namespace, key: False,
        on_rejected: Callable[[int, int, list[bytes]], None] = lambda node, namespace, keys: None,
        salt: int = 0,
    ) -> None:
        self.watch = watch
        self.distrusted = distrusted
        self.on_rejected = on_rejected
        self.elsewhere: dict[tuple[int, bytes], asyncio.Future[Status]] = {}
        self.landing = landing
        self.holders = holders
        self.transport = transport
        self.blocks_max = blocks_max
        self.salt = salt
        self.flights: dict[tuple[int, bytes], Flight] = {}
        self._fetches: dict[asyncio.Task[None], OneFetch[P]] = {}
        self.peers = peers
        self.admission = Admission(in_flight_bytes)
        self.stats = FetchStats()

    @property
    def in_flight(self) -> int:
        """Blocks being pulled, or about to be."""
        return len(self.flights)

    def piece_bytes_max(self) -> int:
        """No piece is larger now."""
        return self.admission.limit_bytes // (CROWD_SHARE if len(self._fetches) > 1 else 1)

    def landed_elsewhere(self, namespace: int, keys: Sequence[bytes], statuses: Sequence[Status]) -> None:
        """What became of blocks that were watched."""
        for key, status in zip(keys, statuses, strict=True):
            flight = self.elsewhere.pop((namespace, key), None)
            if flight is not None and not flight.done():
                flight.set_result(status)

    def count_elsewhere(self, source: Source, counts: PullCounts, moved: Moved, *, silent: bool, reason: str) -> None:
        """Take into account a pull that was made elsewhere. ``silent``: the node did not answer at all.

        A pull that took no time was read out of the node's memory without its knowing: nothing is learnt of it.
        """
        self.stats.pulls += 1
        self.stats.blocks_pulled += counts.pulled
        self.stats.bytes_pulled += counts.bytes_moved
        asked = moved.seconds > 0
        if asked:
            self.peers.began(source, 0)
            if not silent:
                self.peers.answered(source, counts.pulled + counts.failed, counts.rejected)
            self.peers.ended(source, 0, moved)
        if silent:
            self.peers.silent(source.node)
        elif asked and not counts.failed:
            self.peers.good(source.node)
        if counts.failed:
            self.count_failures(source.node, counts, reason)

    def count_failures(self, node: int, counts: PullCounts, reason: str) -> None:
        """Count and log a pull that did not give everything."""
        stats = self.stats
        stats.pulls_failed += 1
        stats.blocks_failed += counts.failed
        stats.blocks_rejected += counts.rejected
        stats.blocks_missed_at_holder += counts.missed
        if counts.rejected and not counts.pulled:
            self.peers.wrong(node)
        if counts.rejected:
            log.warning("%d block(s) from %016x failed their checksum and were discarded", counts.rejected, node)
        elif reason:
            total = counts.pulled + counts.failed
            log.info("a pull from %016x gave %d of %d blocks: %s", node, counts.pulled, total, reason)

    def fetch(
        self,
        namespace: int,
        hashes: Sequence[bytes],
        deadline_s: float,
        on_fetched: OnFetched,
        *,
        excluded: Iterable[int] = (),
        worst: Mapping[int, Status] | None = None,
        background: bool = False,
        give_up_s: Sequence[float] = (),
    ) -> asyncio.Task[None]:
        """Begin to fetch blocks that are not here; the task ends when every one has been reported and nothing that this
        call began is under way any more.

        The task belongs to the fetcher: wait for it, and end it early by :meth:`cancel` alone, because a slot that
        bytes are on their way to must not be given back. It has a deadline of its own.

        ``excluded``: nodes that have been asked already. ``worst``: by position, what they did. ``background``: whoever
        needs blocks now comes first. ``give_up_s``: by position, from now: if the first block that is still missing is
        not here by then, it and all behind it are given up, because whoever wants them is quicker without.
        """
        loop = asyncio.get_running_loop()
        fetch = OneFetch(self, namespace, list(hashes), time.monotonic() + deadline_s, on_fetched, background)
        fetch.give_up_at = [time.monotonic() + seconds for seconds in give_up_s]
        fetch.worst.update(worst or {})
        for node in excluded:
            fetch.deal.exclude(node)
        task = loop.create_task(fetch.run())
        self._fetches[task] = fetch
        task.add_done_callback(self._ended)
        return task

    def cancel(self, task: asyncio.Task[None]) -> None:
        """Nobody wants what this call of :meth:`fetch` was for: what is under way is called off, and the task ends
        soon. What has landed stays; who else waits for the rest fetches it."""
        fetch = self._fetches.get(task)
        if fetch is not None:
            fetch.cancel()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._fetches.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fetch failed: %r", error, exc_info=error)

    async def stop(self) -> None:
        """Call everything off, and wait until that is done."""
        for fetch in list(self._fetches.values()):
            fetch.cancel()
        if self._fetches:
            await asyncio.wait(list(self._fetches))
