"""Bring missing blocks into the local store: find holders, pull, publish what is proven, try the next holder.

* Single flight: however many callers want a block, it is pulled once; the others get the same bytes.
* A block's destination is a reserved slot of the local store. It is committed (and so becomes visible here and to
  peers) only when the transport has proven its bytes; otherwise the slot is given back, or quarantined while a
  given-up transfer may still write into it.
* Every block asked for is reported exactly once, by the deadline.

Knows the store only through :class:`Landing`, and the cell only through ``holders``.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from p2pkv.transport.base import PullRequest, PullResult, Transport
from p2pkv.transport.plan import assign
from p2pkv.types import Status
from p2pkv.wire.fields import Extent

log = logging.getLogger(__name__)

ROUNDS_MAX: Final = 3
"""Times a block is tried, each time at holders that have not failed before."""

SUSPECTS_MAX: Final = 4_096

LATE_S: Final = 0.05
"""What a transport may take beyond the deadline to clean up before it is called late in the log."""


class Place(Protocol):
    """A reserved slot: where a block's bytes go."""

    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...


P = TypeVar("P", bound=Place)


class Landing(Protocol[P]):
    """The local store as the fetcher sees it. All calls return at once."""

    def reserve(self, namespace: int, key: bytes) -> P | Status:
        """A slot to write into; EXISTS when the block is here, BUSY when it is being written, NO_SPACE."""
        ...

    def commit(self, place: P, checksum: bytes) -> None: ...
    def abort(self, place: P) -> None: ...
    def quarantine(self, place: P, token: tuple[str, int]) -> None: ...


HoldersOf = Callable[[int, Sequence[bytes]], Sequence[Sequence[int]]]
"""(namespace, hashes) -> per hash the ids of live nodes that have it, ourselves excluded; the local index's word."""

PickTransport = Callable[[int], Transport]
"""node -> the transport to pull from it with."""

OnFetched = Callable[[int, Status], None]
"""(index into the asked hashes, OK when the block is in the local store now). Called once per hash."""


_SILENT: Final = frozenset({Status.TIMEOUT, Status.UNREACHABLE})


class PullCounts(NamedTuple):
    """How a pull ended, in blocks; ``rejected`` and ``missed`` are part of ``failed``."""

    pulled: int
    bytes_moved: int
    failed: int
    rejected: int
    missed: int


class FetchStats(msgspec.Struct):
    """Counters since the start."""

    blocks_pulled: int = 0
    bytes_pulled: int = 0
    blocks_rejected: int = 0
    blocks_missed_at_holder: int = 0
    blocks_failed: int = 0
    pulls: int = 0
    pulls_failed: int = 0
    flights_joined: int = 0


class Fetcher(Generic[P]):
    """See the module's docstring. Runs on the event loop's thread.

    Args:
        heard_at: when (on ``clock``) something was last heard from a node, apart from answers to pulls.
        blocks_max: being pulled at once; more are answered BUSY.
        watch: whether somebody else (the lane) is pulling this block now; :meth:`landed_elsewhere` follows if so.
    """

    def __init__(
        self,
        *,
        landing: Landing[P],
        holders: HoldersOf,
        transport: PickTransport,
        heard_at: Callable[[int], float],
        clock: Callable[[], float] = time.monotonic,
        blocks_max: int = 65_536,
        watch: Callable[[int, bytes], bool] = lambda namespace, key: False,
    ) -> None:
        self._watch = watch
        self._elsewhere: dict[tuple[int, bytes], asyncio.Future[Status]] = {}
        self._landing = landing
        self._holders = holders
        self._transport = transport
        self._heard_at = heard_at
        self._clock = clock
        self._blocks_max = blocks_max
        self._suspects: dict[int, float] = {}
        self._flights: dict[tuple[int, bytes], asyncio.Future[Status]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.stats = FetchStats()

    def suspect(self, node: int) -> None:
        """A node did not answer at all: it is not asked again before it has been heard from."""
        if len(self._suspects) < SUSPECTS_MAX:
            self._suspects[node] = self._clock()

    def silent_nodes(self) -> set[int]:
        """Nodes that are not to be asked now."""
        if not self._suspects:
            return set()
        for node, since in list(self._suspects.items()):
            if self._heard_at(node) > since:
                del self._suspects[node]
        return set(self._suspects)

    @property
    def in_flight(self) -> int:
        """Blocks being pulled."""
        return len(self._flights)

    def landed_elsewhere(self, namespace: int, keys: Sequence[bytes], statuses: Sequence[Status]) -> None:
        """What became of blocks that were watched."""
        for key, status in zip(keys, statuses, strict=True):
            flight = self._elsewhere.pop((namespace, key), None)
            if flight is not None and not flight.done():
                flight.set_result(status)

    def count_elsewhere(self, node: int, counts: PullCounts, *, silent: bool, reason: str) -> None:
        """Take into account a pull that was made elsewhere. ``silent``: the node did not answer at all."""
        self.stats.pulls += 1
        self.stats.blocks_pulled += counts.pulled
        self.stats.bytes_pulled += counts.bytes_moved
        if silent:
            self.suspect(node)
        if counts.failed:
            self.count_failures(node, counts, reason)

    def count_failures(self, node: int, counts: PullCounts, reason: str) -> None:
        """Count and log a pull that did not give everything."""
        stats = self.stats
        stats.pulls_failed += 1
        stats.blocks_failed += counts.failed
        stats.blocks_rejected += counts.rejected
        stats.blocks_missed_at_holder += counts.missed
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
    ) -> asyncio.Task[None]:
        """Begin to fetch blocks that are not here; the task ends when every one has been reported.

        The task belongs to the fetcher: wait for it, do not cancel it. Others may have joined what it pulls, and a slot
        that bytes are on their way to must not be given back; it has a deadline of its own.

        ``excluded``: nodes that have been asked already. ``worst``: by position, what they did.
        """
        loop = asyncio.get_running_loop()
        fetch = _Fetch(self, namespace, list(hashes), loop.time() + deadline_s, on_fetched)
        fetch.failed_nodes.update(excluded)
        fetch.worst.update(worst or {})
        task = loop.create_task(fetch.run())
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fetch failed: %r", error, exc_info=error)

    async def stop(self) -> None:
        """Wait for what is under way; it ends when the transports are stopped, or by its deadlines."""
        if self._tasks:
            await asyncio.wait(self._tasks)


class _Fetch(Generic[P]):
    """One call of :meth:`Fetcher.fetch`."""

    def __init__(
        self, fetcher: Fetcher[P], namespace: int, hashes: list[bytes], deadline: float, on_fetched: OnFetched
    ) -> None:
        self._fetcher = fetcher
        self._namespace = namespace
        self._hashes = hashes
        self._deadline = deadline
        self._on_fetched = on_fetched
        first: dict[bytes, int] = {}
        self._twins: dict[int, list[int]] = {}  # a key that is named again gets the answer of its first mention
        for i, key in enumerate(hashes):
            if (twin := first.setdefault(key, i)) != i:
                self._twins.setdefault(twin, []).append(i)
        self._left = dict.fromkeys(first.values())  # an ordered set
        self.failed_nodes: set[int] = set()
        self.worst: dict[int, Status] = {}  # what the last holder that was asked did with a block
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        try:
            for _ in range(ROUNDS_MAX):
                if not self._left or self._loop.time() >= self._deadline:
                    return
                joined = self._join_flights()
                pulls = self._plan(joined)
                if not pulls and not joined:
                    return
                await self._round(pulls, joined)
        finally:
            for i in list(self._left):
                self._report(i, self.worst.get(i, Status.TIMEOUT))

    def _report(self, i: int, status: Status) -> None:
        if i in self._left:
            del self._left[i]
            for mention in (i, *self._twins.get(i, ())):
                self._on_fetched(mention, status)

    def _join_flights(self) -> dict[int, asyncio.Future[Status]]:
        flights = self._fetcher._flights
        joined = {}
        for i in self._left:
            flight = flights.get((self._namespace, self._hashes[i]))
            if flight is not None:
                joined[i] = flight
        self._fetcher.stats.flights_joined += len(joined)
        return joined

    def _plan(self, joined: dict[int, asyncio.Future[Status]]) -> list[_Pull[P]]:
        """Reserve slots for what can be pulled now; reports what cannot."""
        fetcher = self._fetcher
        wanted = [i for i in self._left if i not in joined]
        if not wanted:
            return []
        holders = fetcher._holders(self._namespace, [self._hashes[i] for i in wanted])
        runs, nobody = assign(holders, lambda node: 0.0, self.failed_nodes | fetcher.silent_nodes())
        for position in nobody:
            i = wanted[position]
            self._report(i, self.worst.get(i, Status.MISS))
        pulls: list[_Pull[P]] = []
        for node, positions in runs.items():
            pull: _Pull[P] = _Pull(node)
            for position in positions:
                i = wanted[position]
                self._reserve(i, pull, joined)
            if pull.indices:
                pulls.append(pull)
        return pulls

    def _reserve(self, i: int, pull: _Pull[P], joined: dict[int, asyncio.Future[Status]]) -> None:
        fetcher = self._fetcher
        if len(fetcher._flights) >= fetcher._blocks_max:
            self._report(i, Status.BUSY)
            return
        place = fetcher._landing.reserve(self._namespace, self._hashes[i])
        watched = place is Status.BUSY and fetcher._watch(self._namespace, self._hashes[i])
        if place is Status.BUSY and not watched:  # whoever pulls elsewhere may have ended between the two questions
            place = fetcher._landing.reserve(self._namespace, self._hashes[i])
        if place is Status.EXISTS:
            self._report(i, Status.OK)
        elif watched:
            name = (self._namespace, self._hashes[i])
            joined[i] = fetcher._elsewhere.setdefault(name, self._loop.create_future())
            fetcher.stats.flights_joined += 1
        elif isinstance(place, Status):
            self._report(i, place)
        else:
            pull.indices.append(i)
            pull.places.append(place)
            fetcher._flights[(self._namespace, self._hashes[i])] = self._loop.create_future()

    async def _round(self, pulls: list[_Pull[P]], joined: dict[int, asyncio.Future[Status]]) -> None:
        if len(pulls) == 1 and not joined:
            await self._pull(pulls[0])
            return
        waits = [asyncio.ensure_future(self._pull(pull)) for pull in pulls]
        if joined:
            waits.append(asyncio.ensure_future(self._await_joined(joined)))
        await asyncio.wait(waits)
        for wait in waits:
            wait.result()

    async def _await_joined(self, joined: dict[int, asyncio.Future[Status]]) -> None:
        for i, flight in joined.items():
            flight.add_done_callback(partial(self._on_joined, i))
        await asyncio.wait(joined.values(), timeout=max(0.0, self._deadline - self._loop.time()))

    def _on_joined(self, i: int, flight: asyncio.Future[Status]) -> None:
        if not flight.cancelled() and flight.result() is Status.OK:
            self._report(i, Status.OK)

    async def _pull(self, pull: _Pull[P]) -> None:
        """One transport call; whatever happens, every place of it ends committed, aborted or quarantined."""
        fetcher = self._fetcher
        open_places = dict(enumerate(pull.places))

        def on_block(position: int, status: Status, checksum: bytes) -> None:
            if status is not Status.OK or position not in open_places:
                return
            fetcher._landing.commit(open_places.pop(position), checksum)
            fetcher.stats.blocks_pulled += 1
            fetcher.stats.bytes_pulled += pull.places[position].length
            self._land(pull.indices[position], Status.OK)

        fetcher.stats.pulls += 1
        result: PullResult | None = None
        transport = fetcher._transport(pull.node)
        started = self._loop.time()
        try:
            result = await transport.pull(
                PullRequest(
                    node=pull.node,
                    namespace=self._namespace,
                    hashes=[self._hashes[i] for i in pull.indices],
                    destinations=[Extent(place.offset, place.length) for place in pull.places],
                    deadline_s=max(0.001, self._deadline - started),
                    on_block=on_block,
                )
            )
        finally:
            for position, place in open_places.items():
                if result is not None and position in result.unsafe:
                    fetcher._landing.quarantine(place, (transport.name, result.token))
                else:
                    fetcher._landing.abort(place)
            for position in open_places:
                status = result.statuses[position] if result is not None else Status.LOST
                self._land(pull.indices[position], status)
        if self._loop.time() > self._deadline + LATE_S:
            log.warning("a pull over %s from %016x overran its deadline", transport.name, pull.node)
        self._judge(pull, result)

    def _judge(self, pull: _Pull[P], result: PullResult) -> None:
        """Count how it went; a node that did not give everything is not asked again by this fetch."""
        bad = [status for status in result.statuses if status is not Status.OK]
        if not bad:
            return
        self.failed_nodes.add(pull.node)
        # That the caller's own deadline was too short says nothing about the node.
        in_time = self._loop.time() < self._deadline
        if in_time and not result.bytes_moved and any(status in _SILENT for status in bad):
            self._fetcher.suspect(pull.node)
        rejected = sum(status is Status.REJECTED for status in bad)
        missed = sum(status is Status.MISS for status in bad)
        good = len(result.statuses) - len(bad)
        self._fetcher.count_failures(pull.node, PullCounts(good, 0, len(bad), rejected, missed), result.reason)

    def _land(self, i: int, status: Status) -> None:
        flight = self._fetcher._flights.pop((self._namespace, self._hashes[i]), None)
        if flight is not None and not flight.done():
            flight.set_result(status)
        if status is Status.OK:
            self._report(i, status)
        else:
            self.worst[i] = status


class _Pull(Generic[P]):
    """Blocks to be pulled from one node, and where they go."""

    __slots__ = ("indices", "node", "places")

    def __init__(self, node: int) -> None:
        self.node = node
        self.indices: list[int] = []
        self.places: list[P] = []
