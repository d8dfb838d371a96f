"""One request for blocks, from claiming them until every one has been reported and every slot is closed."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic

from p2pkv.transport.base import CallOff, PullRequest, PullResult
from p2pkv.transport.counts import PullCounts
from p2pkv.transport.deal import Deal, Piece
from p2pkv.transport.estimates import Moved
from p2pkv.transport.landing import OnFetched, P
from p2pkv.types import Status
from p2pkv.wire.fields import Extent

if TYPE_CHECKING:
    from p2pkv.transport.fetch import Fetcher

log = logging.getLogger(__name__)

EARLY_S: Final = 0.005
"""Before the deadline a pull may have been ended by it: the event loop's clock counts whole milliseconds."""
BACKGROUND_SHARE: Final = 0.5
"""Of the blocks that may be in flight, those brought ahead of need take at most so many."""
LATE_S: Final = 0.05
"""What a transport may take beyond the deadline to clean up before it is called late in the log."""


class Flight:
    """A block that is being brought, or will be, and by which fetch."""

    __slots__ = ("by", "end")

    def __init__(self, by: OneFetch[Any], end: asyncio.Future[Status]) -> None:
        self.by = by
        self.end = end


class _Pull(Generic[P]):
    """A piece that is being pulled, and where its blocks go."""

    __slots__ = ("background", "call_off", "indices", "moved_bytes", "piece", "places", "size")

    def __init__(self, piece: Piece, indices: list[int], places: list[P], background: bool) -> None:
        self.piece = piece
        self.background = background  # as it was let in
        self.indices = indices
        self.places = places
        self.size = sum(place.length for place in places)
        self.moved_bytes = 0
        self.call_off = CallOff()


class OneFetch(Generic[P]):
    """One call of :meth:`Fetcher.fetch`."""

    def __init__(
        self,
        fetcher: Fetcher[P],
        namespace: int,
        hashes: list[bytes],
        deadline: float,
        on_fetched: OnFetched,
        background: bool,
    ) -> None:
        self._fetcher = fetcher
        self._namespace = namespace
        self._hashes = hashes
        self._deadline = deadline
        self._on_fetched = on_fetched
        self._background = background
        first: dict[bytes, int] = {}
        self._twins: dict[int, list[int]] = {}  # a key that is named again gets the answer of its first mention
        for i, key in enumerate(hashes):
            if (twin := first.setdefault(key, i)) != i:
                self._twins.setdefault(twin, []).append(i)
        self._left = dict.fromkeys(first.values())  # not reported yet; an ordered set
        self._new = list(self._left)  # to be claimed: nobody is known to be bringing them
        self._claimed: set[int] = set()  # ours to bring: others wait for us
        self._awaited: set[int] = set()  # others are bringing them
        self._pulls: dict[Piece, _Pull[P]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self.give_up_at: list[float] = []
        self._overtaken = False
        self._cancelled = False
        self.worst: dict[int, Status] = {}  # what the last holder that was asked did with a block
        block_bytes = fetcher.landing.block_bytes(namespace)
        self.deal = Deal(
            fetcher.peers.estimate,
            block_bytes=block_bytes,
            piece_bytes_max=fetcher.piece_bytes_max,
            salt=fetcher.salt,
        )

    def cancel(self) -> None:
        """Nobody wants the blocks any more: what is under way is called off. Who waits for them tries by itself."""
        self._cancelled = True
        self._news.set()

    def hurry(self) -> None:
        """Somebody waits for what was brought ahead of need: from now on it comes before other such things."""
        if not self._background:
            return
        self._background = False
        self._fetcher.admission.leave(self)  # the line of those that nobody waits for
        for position in self._awaited:
            flight = self._fetcher.flights.get((self._namespace, self._hashes[position]))
            if flight is not None:
                flight.by.hurry()
        self._news.set()

    async def run(self) -> None:
        try:
            while self._left and not self._cancelled and (now := time.monotonic()) < self._deadline:
                self._news.clear()
                if now >= self._overtaken_at():
                    self._overtaken = True
                    self._fetcher.stats.blocks_overtaken += len(self._left)
                    break
                self._claim()
                for position in self.deal.hopeless():
                    self._give_up(position, self.worst.get(position, Status.MISS))
                if self._ask(now):
                    for piece in self.deal.late(now):
                        self._pulls[piece].call_off()
                if not self._left:
                    break
                await self._wait(min(self._deadline, self.deal.wake_at(now), self._overtaken_at()))
        finally:
            self._fetcher.admission.leave(self)
            flying = {position for piece in self._pulls for position in piece.left}
            for position in list(self._left):
                status = self.worst.get(position, Status.TIMEOUT)
                if position in flying:  # whoever waits for us does so until the slot is free
                    self._report(position, status)
                else:
                    self._give_up(position, status)
            if self._overtaken or self._cancelled:
                for pull in list(self._pulls.values()):
                    pull.call_off()
            if self._tasks:  # they end by the deadline, too
                await asyncio.wait(self._tasks)
        for task in self._tasks:
            task.result()

    def _overtaken_at(self) -> float:
        """When whoever wants the blocks is quicker without those that are missing."""
        return self.give_up_at[next(iter(self._left))] if self.give_up_at and self._left else math.inf

    async def _wait(self, until: float) -> None:
        if self._news.is_set():
            return
        timer = None if until == math.inf else self._loop.call_at(until, self._news.set)
        try:
            await self._news.wait()
        finally:
            if timer is not None:
                timer.cancel()

    # --- reports

    def _report(self, position: int, status: Status) -> None:
        if position in self._left:
            del self._left[position]
            for mention in (position, *self._twins.get(position, ())):
                self._on_fetched(mention, status)

    def _give_up(self, position: int, status: Status) -> None:
        """Nobody is left to be asked, or there is no time: say so to the caller, and to those who wait for us."""
        self._let_go(position, status)
        self._report(position, status)

    def _let_go(self, position: int, status: Status) -> None:
        """The block is not ours to bring any more."""
        self.deal.withdraw(position)
        if position in self._claimed:
            self._claimed.discard(position)
            flight = self._fetcher.flights.pop((self._namespace, self._hashes[position]), None)
            if flight is not None and not flight.end.done():
                flight.end.set_result(status)

    # --- claiming

    def _claim(self) -> None:
        """Wait for what others are bringing; the rest is ours, and others wait for us."""
        if not self._new:
            return
        fetcher, new = self._fetcher, self._new
        self._new, mine = [], []
        # What is brought ahead of need leaves room for what is waited for.
        flights_max = int(fetcher.blocks_max * (BACKGROUND_SHARE if self._background else 1.0))
        for position in new:
            if position not in self._left:
                continue
            name = (self._namespace, self._hashes[position])
            flight = fetcher.flights.get(name)
            if flight is not None:
                if not self._background:
                    flight.by.hurry()
                self._await(position, flight.end)
            elif len(fetcher.flights) >= flights_max:
                self._report(position, Status.BUSY)
            else:
                fetcher.flights[name] = Flight(self, self._loop.create_future())
                self._claimed.add(position)
                mine.append(position)
        if not mine:
            return
        holders = fetcher.holders(self._namespace, [self._hashes[position] for position in mine])
        usable, distrusted = fetcher.peers.usable, fetcher.distrusted
        for position, sources in zip(mine, holders, strict=True):
            key = self._hashes[position]
            self.deal.offer(
                position,
                [s for s in sources if usable(s.node) and not distrusted(s.node, self._namespace, key)],
            )

    def _await(self, position: int, flight: asyncio.Future[Status]) -> None:
        self._awaited.add(position)
        self._fetcher.stats.flights_joined += 1
        flight.add_done_callback(partial(self._on_flight, position))

    def _on_flight(self, position: int, flight: asyncio.Future[Status]) -> None:
        """What somebody else was bringing is here, or will not come: then it is ours to try."""
        self._awaited.discard(position)
        if not flight.cancelled() and flight.result() is Status.OK:
            self._report(position, Status.OK)
        else:
            self._new.append(position)
        self._news.set()

    # --- asking

    def _ask(self, now: float) -> bool:
        """Ask for all that can be asked for now; whether there was room for it."""
        fetcher = self._fetcher
        while (piece := self.deal.next(now)) is not None:
            node = piece.source.node
            if not fetcher.peers.usable(node):
                self.deal.not_asked(piece)
                self.deal.exclude(node)
                self._news.set()  # some blocks may be hopeless now
                continue
            size = len(piece.positions) * max(1, fetcher.landing.block_bytes(self._namespace))
            background = self._background
            if not fetcher.admission.take(self, size, self._news.set, background=background):
                self.deal.not_asked(piece)
                return False
            pull = self._reserve(piece, background)
            if pull is None:
                fetcher.admission.give_back(size, background=background)
                continue
            self.deal.asked(piece)
            self._pulls[piece] = pull
            task = self._loop.create_task(self._pull(pull, size))
            self._tasks.add(task)
            task.add_done_callback(self._on_pulled)
        fetcher.admission.leave(self)
        return True

    def _on_pulled(self, task: asyncio.Task[None]) -> None:
        if task.exception() is None:
            self._tasks.discard(task)
        self._news.set()

    def _reserve(self, piece: Piece, background: bool) -> _Pull[P] | None:
        """Slots for the blocks of a piece; those that need none are settled. None: nothing is left of it."""
        indices: list[int] = []
        places: list[P] = []
        for position in piece.positions:
            place = self._place(position)
            if isinstance(place, Status):
                continue
            indices.append(position)
            places.append(place)
        piece.positions = indices
        piece.left = set(indices)
        return _Pull(piece, indices, places, background) if indices else None

    def _place(self, position: int) -> P | Status:
        fetcher, key = self._fetcher, self._hashes[position]
        place = fetcher.landing.reserve(self._namespace, key)
        if place is Status.BUSY:
            if fetcher.watch(self._namespace, key):
                name = (self._namespace, key)
                elsewhere = fetcher.elsewhere.get(name)
                if elsewhere is None:
                    elsewhere = fetcher.elsewhere[name] = self._loop.create_future()
                self._let_go(position, Status.LOST)  # who waits for us finds out by itself
                self._await(position, elsewhere)
                return place
            place = fetcher.landing.reserve(self._namespace, key)  # it may have ended between the two questions
        if isinstance(place, Status):
            self._give_up(position, Status.OK if place is Status.EXISTS else place)
        return place

    async def _pull(self, pull: _Pull[P], admitted: int) -> None:
        """One transport call; whatever happens, every place of it ends committed, aborted or quarantined."""
        fetcher, piece = self._fetcher, pull.piece
        peers, landing = fetcher.peers, fetcher.landing
        open_places = dict(enumerate(pull.places))

        def on_block(i: int, status: Status, checksum: bytes) -> None:
            if status is not Status.OK or i not in open_places:
                return
            place = open_places.pop(i)
            landing.commit(place, checksum)
            fetcher.stats.blocks_pulled += 1
            fetcher.stats.bytes_pulled += place.length
            pull.moved_bytes += place.length
            peers.landed(piece.source, place.length)
            position = pull.indices[i]
            self.deal.landed(piece, position, time.monotonic())
            self._let_go(position, Status.OK)
            self._report(position, Status.OK)

        fetcher.stats.pulls += 1
        peers.began(piece.source, pull.size)
        result: PullResult | None = None
        transport = fetcher.transport(piece.source.node)
        started = time.monotonic()
        try:
            result = await transport.pull(
                PullRequest(
                    node=piece.source.node,
                    namespace=self._namespace,
                    hashes=[self._hashes[position] for position in pull.indices],
                    destinations=[Extent(place.offset, place.length) for place in pull.places],
                    deadline_s=max(0.001, self._deadline - started),
                    on_block=on_block,
                    call_off=pull.call_off,
                )
            )
        finally:
            for i, place in open_places.items():
                if result is not None and i in result.unsafe:
                    landing.quarantine(place, (transport.name, result.token))
                else:
                    landing.abort(place)
            fetcher.admission.give_back(admitted, background=pull.background)
            # What our own side lost may come in another way: over TCP, while a NIXL process of ours is being restarted.
            again = fetcher.transport(piece.source.node) is not transport
            self._settle(pull, result, sorted(open_places), time.monotonic() - started, again)
        if time.monotonic() > self._deadline + LATE_S:
            log.warning("a pull over %s from %016x overran its deadline", transport.name, piece.source.node)

    def _settle(
        self, pull: _Pull[P], result: PullResult | None, missing: list[int], took_s: float, again: bool
    ) -> None:
        """Take into account how a pull ended, and have others asked for what it did not bring; or, ``again``, the same
        source for what was lost here."""
        piece, peers, now = pull.piece, self._fetcher.peers, time.monotonic()
        node = piece.source.node
        in_time = now < self._deadline - EARLY_S  # that the caller's deadline was too short says nothing about the node
        statuses = [result.statuses[i] if result is not None else Status.LOST for i in missing]
        for i, status in zip(missing, statuses, strict=True):
            position = pull.indices[i]
            self.worst[position] = status
            if pull.call_off.called:
                self.deal.called_off(piece, position)
            elif status is Status.BUSY:
                self.deal.busy(piece, position, now)
            elif status is Status.LOST and again:
                self.deal.lost(piece, position)
            else:
                self.deal.failed(piece, position)
            if position not in self._left:
                self._let_go(position, status)
        self.deal.ended(piece)
        del self._pulls[piece]
        waited_s = result.waited_s if result is not None else 0.0
        lost_bytes = pull.size - pull.moved_bytes
        came_bytes = max(pull.moved_bytes, result.bytes_moved if result is not None else 0)  # with the block half here
        asked_s = took_s - (result.setup_s if result is not None else 0.0)
        moved = Moved(waited_s, asked_s, came_bytes, pull.moved_bytes)
        if pull.call_off.called:
            self._fetcher.stats.pulls_taken_over += not (self._overtaken or self._cancelled)
            if not came_bytes:  # all that is known is that it was slower than one block in all this time
                known, less_bytes = peers.estimate(piece.source), pull.places[0].length // 2
                slower = asked_s > known.first_byte_s + less_bytes / known.bytes_per_s
                moved = Moved(0.0, asked_s, less_bytes if slower else 0)
            peers.ended(piece.source, lost_bytes, moved)
            return
        peers.ended(piece.source, lost_bytes, moved)
        silent = not came_bytes and Status.TIMEOUT in statuses
        if not silent:  # else its breaker opens: how often it fails is about a source that answers
            faults = sum(status in _FAULTS and (in_time or status is not Status.TIMEOUT) for status in statuses)
            peers.answered(piece.source, len(pull.indices), faults)
        if not missing or (pull.moved_bytes and set(statuses) == {Status.MISS}):  # it has the rest no more: no failure
            peers.good(node)
        if not missing:
            return
        if any(status in _BROKEN and not (again and status is Status.LOST) for status in statuses):
            self.deal.exclude(node)
        if in_time and silent:
            peers.silent(node)
        elif in_time and Status.UNREACHABLE in statuses:
            peers.failed(node)
        rejected = statuses.count(Status.REJECTED)
        if rejected:
            spoilt = [pull.indices[i] for i, status in zip(missing, statuses, strict=True) if status is Status.REJECTED]
            self._fetcher.on_rejected(node, self._namespace, [self._hashes[position] for position in spoilt])
        counts = PullCounts(len(pull.indices) - len(missing), 0, len(missing), rejected, statuses.count(Status.MISS))
        self._fetcher.count_failures(node, counts, result.reason if result is not None else "")


_FAULTS: Final = frozenset({Status.TIMEOUT, Status.UNREACHABLE, Status.REJECTED})
"""The source's own. That it does not have the block any more, or is busy, is none."""

_BROKEN: Final = frozenset({Status.TIMEOUT, Status.UNREACHABLE, Status.LOST})
"""After one of these a node is not asked again by the same fetch."""
