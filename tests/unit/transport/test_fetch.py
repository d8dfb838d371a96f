"""The fetcher over a made-up store and made-up transports: every block is reported once, in time, and no slot
is lost.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv.transport.base import PullRequest, PullResult
from p2pkv.transport.breaker import Fault
from p2pkv.transport.deal import HORIZON_BLOCKS, TRIES_MAX
from p2pkv.transport.estimates import Estimates
from p2pkv.transport.fetch import Fetcher
from p2pkv.transport.peers import Peers
from p2pkv.transport.plan import Estimate, Source
from p2pkv.types import Status, Tier

NS = 7
LENGTH = 10


@dataclass
class Slot:
    key: bytes
    offset: int
    length: int = LENGTH
    end: str = ""  # "committed", "aborted" or "quarantined", once


class Landing:
    """A store of a few slots."""

    def __init__(self, room: int = 1000) -> None:
        self.room = room
        self.here: dict[bytes, bytes] = {}
        self.writing: dict[bytes, Slot] = {}
        self.slots: list[Slot] = []
        self.tokens: list[object] = []
        self._offsets = itertools.count(0, LENGTH)

    def block_bytes(self, namespace: int) -> int:
        return LENGTH

    def reserve(self, namespace: int, key: bytes) -> Slot | Status:
        assert namespace == NS
        if key in self.here:
            return Status.EXISTS
        if key in self.writing:
            return Status.BUSY
        if len(self.here) + len(self.writing) >= self.room:
            return Status.NO_SPACE
        slot = self.writing[key] = Slot(key, next(self._offsets))
        self.slots.append(slot)
        return slot

    def _end(self, place: Slot, how: str) -> None:
        assert not place.end, f"{place} ends twice"
        place.end = how
        del self.writing[place.key]

    def commit(self, place: Slot, checksum: bytes) -> None:
        self._end(place, "committed")
        self.here[place.key] = checksum

    def abort(self, place: Slot) -> None:
        self._end(place, "aborted")

    def quarantine(self, place: Slot, token: tuple[str, int]) -> None:
        self._end(place, "quarantined")
        self.tokens.append(token)


Behaviour = Callable[[PullRequest], Awaitable[PullResult]]


@dataclass
class Peer:
    """A transport to one node that does what the test says."""

    behaviour: Behaviour
    asked: list[list[bytes]] = field(default_factory=list)
    name: str = "made-up"

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def prepare(self, node: int) -> None: ...
    def setup_s(self, node: int) -> float:
        return 0.0

    def peer_gone(self, node: int) -> None: ...

    async def pull(self, request: PullRequest) -> PullResult:
        self.asked.append(list(request.hashes))
        return await self.behaviour(request)


def gives(
    statuses: Callable[[bytes], Status] = lambda _: Status.OK, after_s: float = 0.0, unsafe: bool = False
) -> Behaviour:
    """A peer that answers per key, perhaps later."""

    async def pull(request: PullRequest) -> PullResult:
        if after_s:
            await asyncio.sleep(min(after_s, request.deadline_s))
            if after_s > request.deadline_s:
                return PullResult([Status.TIMEOUT] * len(request.hashes), 0, "late")
        out = []
        for i, key in enumerate(request.hashes):
            out.append(statuses(key))
            if out[-1] in (Status.OK, Status.REJECTED):
                request.on_block(i, out[-1], b"c" + key)
        bad = frozenset(i for i, status in enumerate(out) if status is not Status.OK)
        return PullResult(out, 0, "some reason", bad if unsafe else frozenset(), 77)

    return pull


def expected(source: Source) -> Estimate:
    """The lower a node's number, the quicker: it is asked first, and for all."""
    return Estimate(first_byte_s=float(source.node), bytes_per_s=1e9)


class Bench:
    """A fetcher with peers 1, 2, ..; ``held`` says per key who has it."""

    def __init__(
        self,
        *behaviours: Behaviour,
        held: dict[bytes, list[int]] | None = None,
        room: int = 1000,
        in_flight_bytes: int = 1 << 30,
    ) -> None:
        self.landing = Landing(room)
        self.known = Peers(expected, heard_at=lambda node: float("-inf"))
        self.peers = {node: Peer(behaviour) for node, behaviour in enumerate(behaviours, start=1)}
        self.held = held
        self.fetcher: Fetcher[Slot] = Fetcher(
            landing=self.landing,
            holders=self._holders,
            transport=lambda node: self.peers[node],
            peers=self.known,
            in_flight_bytes=in_flight_bytes,
        )

    def _holders(self, namespace: int, hashes: Sequence[bytes]) -> list[list[Source]]:
        nodes = [list(self.peers) if self.held is None else self.held.get(key, []) for key in hashes]
        return [[Source(node, Tier.DRAM) for node in some] for some in nodes]

    async def fetch(self, keys: list[bytes], deadline_s: float = 5.0) -> list[Status]:
        reported: dict[int, Status] = {}

        def on_fetched(i: int, status: Status) -> None:
            assert i not in reported, "reported twice"
            reported[i] = status

        loop = asyncio.get_running_loop()
        started = loop.time()
        await self.fetcher.fetch(NS, keys, deadline_s, on_fetched)
        assert loop.time() - started < deadline_s + 0.5
        return [reported[i] for i in range(len(keys))]

    def tidy(self) -> bool:
        """No slot is left open and no flight in the air."""
        return not self.landing.writing and self.fetcher.in_flight == 0 and all(s.end for s in self.landing.slots)


KEYS = [bytes([i]) * 8 for i in range(6)]


async def test_what_a_peer_has_is_here_afterwards() -> None:
    bench = Bench(gives())
    assert await bench.fetch(KEYS) == [Status.OK] * 6
    assert bench.landing.here == {key: b"c" + key for key in KEYS}
    assert bench.tidy() and bench.fetcher.stats.blocks_pulled == 6


async def test_what_nobody_has_is_a_miss_and_costs_no_slot() -> None:
    bench = Bench(gives(), held={KEYS[0]: [1]})
    assert await bench.fetch(KEYS[:3]) == [Status.OK, Status.MISS, Status.MISS]
    assert len(bench.landing.slots) == 1 and bench.tidy()


@pytest.mark.parametrize("connecting", [True, False])
async def test_being_slow_to_connect_is_not_taken_for_being_slow(connecting: bool) -> None:
    """Given up because computing is quicker: what that says of the peer's pace depends on what it was waited for."""

    async def never(request: PullRequest) -> PullResult:
        ended = asyncio.Event()
        request.call_off.on_call(ended.set)
        began = time.monotonic()
        await ended.wait()
        took_s = time.monotonic() - began
        return PullResult([Status.LOST], 0, "called off", setup_s=took_s if connecting else 0.0)

    bench = Bench(never)
    bench.known.estimates = Estimates(lambda source: Estimate(0.001, 1e9))
    before = bench.known.estimate(Source(1, Tier.DRAM)).bytes_per_s
    reported: list[Status] = []
    await bench.fetcher.fetch(NS, KEYS[:1], 5.0, lambda _, status: reported.append(status), give_up_s=[0.02])
    assert reported and Status.OK not in reported and bench.tidy()
    after = bench.known.estimate(Source(1, Tier.DRAM)).bytes_per_s
    assert after == pytest.approx(before) if connecting else after < before / 2


async def test_what_is_here_already_is_not_asked_for() -> None:
    bench = Bench(gives())
    bench.landing.here[KEYS[0]] = b"x"
    assert await bench.fetch(KEYS[:2]) == [Status.OK, Status.OK]
    assert bench.peers[1].asked == [[KEYS[1]]]


@pytest.mark.parametrize(
    "bad", [Status.MISS, Status.REJECTED, Status.TIMEOUT, Status.UNREACHABLE, Status.BUSY, Status.INVALID]
)
async def test_the_next_holder_is_asked_for_what_the_first_one_did_not_give(bad: Status) -> None:
    bench = Bench(gives(lambda key: bad if key in KEYS[2:4] else Status.OK), gives())
    assert await bench.fetch(KEYS) == [Status.OK] * 6
    assert bench.peers[2].asked == [KEYS[2:4]]
    assert bench.fetcher.stats.blocks_rejected == (2 if bad is Status.REJECTED else 0)
    assert bench.tidy()


@pytest.mark.parametrize(
    ("how", "its_fault"),
    [
        (Status.REJECTED, True),
        (Status.UNREACHABLE, True),
        (Status.TIMEOUT, True),  # in part: the others came
        (Status.MISS, False),
        (Status.BUSY, False),
        (Status.LOST, False),
    ],
)
async def test_how_often_a_holder_fails_is_learnt(how: Status, its_fault: bool) -> None:
    bench = Bench(gives(lambda key: how if key in KEYS[2:4] else Status.OK), gives())
    assert await bench.fetch(KEYS) == [Status.OK] * 6
    assert (bench.known.estimate(Source(1, Tier.DRAM)).failing > 0.0) == its_fault
    assert bench.known.estimate(Source(2, Tier.DRAM)).failing == 0.0


async def test_that_a_holder_is_silent_is_its_breakers_affair_alone() -> None:
    bench = Bench(gives(lambda _: Status.TIMEOUT), gives())
    assert await bench.fetch(KEYS) == [Status.OK] * 6
    assert not bench.known.usable(1)
    assert bench.known.estimate(Source(1, Tier.DRAM)).failing == 0.0


async def test_a_holder_that_failed_is_not_asked_again() -> None:
    bench = Bench(gives(lambda _: Status.UNREACHABLE))
    assert Status.OK not in await bench.fetch(KEYS)
    assert len(bench.peers[1].asked) == 1 and bench.tidy()


async def test_a_silent_holder_costs_one_wait_and_is_not_asked_again_before_a_probe_went_through() -> None:
    bench = Bench(gives(lambda _: Status.TIMEOUT), gives())
    for key in KEYS[:3]:
        assert await bench.fetch([key]) == [Status.OK]
    assert len(bench.peers[1].asked) == 1
    bench.known.good(1)
    assert await bench.fetch(KEYS[3:4]) == [Status.OK]
    assert len(bench.peers[1].asked) == 2


async def test_who_only_a_silent_holder_could_help_is_told_at_once() -> None:
    bench = Bench(gives(lambda _: Status.TIMEOUT))
    await bench.fetch(KEYS[:1])
    assert await bench.fetch(KEYS[1:2]) == [Status.MISS]
    assert len(bench.peers[1].asked) == 1


@pytest.mark.parametrize("bad", [Status.MISS, Status.INVALID])
async def test_a_holder_that_answers_is_not_silent(bad: Status) -> None:
    bench = Bench(gives(lambda _: bad))
    await bench.fetch(KEYS[:1])
    await bench.fetch(KEYS[1:2])
    assert len(bench.peers[1].asked) == 2


async def test_who_sends_nothing_but_wrong_bytes_is_not_asked_again() -> None:
    bench = Bench(gives(lambda _: Status.REJECTED))
    for key in KEYS[:6]:
        assert Status.OK not in await bench.fetch([key])
    assert len(bench.peers[1].asked) == Fault.WRONG.value


async def test_a_busy_holder_is_asked_again_after_a_pause() -> None:
    answers = iter([Status.BUSY, Status.BUSY, Status.OK])
    bench = Bench(gives(lambda _: next(answers)))
    assert await bench.fetch(KEYS[:1]) == [Status.OK]
    assert len(bench.peers[1].asked) == 3 and bench.tidy()


async def test_who_is_busy_for_ever_is_given_up() -> None:
    bench = Bench(gives(lambda _: Status.BUSY))
    assert await bench.fetch(KEYS[:1]) == [Status.BUSY]
    assert 3 < len(bench.peers[1].asked) < 10 and bench.tidy()


async def test_an_impatient_caller_says_nothing_about_the_peer() -> None:
    """Its deadline was too short; others with more time are not to suffer from it."""
    bench = Bench(gives(after_s=0.1))
    assert Status.OK not in await bench.fetch(KEYS[:1], deadline_s=0.005)
    assert await bench.fetch(KEYS[1:2]) == [Status.OK]


async def test_only_so_many_holders_are_tried() -> None:
    bench = Bench(*[gives(lambda _: Status.MISS)] * 6)
    assert Status.OK not in await bench.fetch(KEYS[:1])
    assert sum(len(peer.asked) for peer in bench.peers.values()) == TRIES_MAX


async def test_slots_that_may_still_be_written_to_are_quarantined_under_the_transports_token() -> None:
    bench = Bench(gives(lambda key: Status.OK if key == KEYS[0] else Status.TIMEOUT, unsafe=True))
    statuses = await bench.fetch(KEYS[:3])
    assert statuses[0] is Status.OK and Status.OK not in statuses[1:]
    assert [slot.end for slot in bench.landing.slots] == ["committed", "quarantined", "quarantined"]
    assert set(bench.landing.tokens) == {("made-up", 77)}


async def test_a_full_store_is_no_space_for_what_does_not_fit() -> None:
    bench = Bench(gives(), room=4)
    assert sorted(await bench.fetch(KEYS)) == [Status.OK] * 4 + [Status.NO_SPACE] * 2


async def test_a_block_that_somebody_else_is_writing_is_busy() -> None:
    bench = Bench(gives())
    bench.landing.reserve(NS, KEYS[0])
    assert await bench.fetch(KEYS[:2]) == [Status.BUSY, Status.OK]


async def test_a_pull_that_its_own_deadline_ended_a_little_early_is_not_held_against_the_node() -> None:
    """The event loop's timers count whole milliseconds, and so may the transport's."""

    async def ends_early(request: PullRequest) -> PullResult:
        return PullResult([Status.TIMEOUT] * len(request.hashes), 0, "cannot connect in time")

    bench = Bench(ends_early)
    assert Status.OK not in await bench.fetch(KEYS[:1], deadline_s=0.003)
    assert bench.known.usable(1)
    assert Status.OK not in await bench.fetch(KEYS[:1], deadline_s=5.0)
    assert not bench.known.usable(1), "with all the time that it could want it said nothing"


async def test_a_slow_peer_costs_no_more_than_the_deadline() -> None:
    bench = Bench(gives(after_s=60))
    statuses = await bench.fetch(KEYS, deadline_s=0.1)
    assert Status.OK not in statuses and bench.tidy()


async def test_whoever_asks_for_the_same_block_meanwhile_joins_the_pull() -> None:
    bench = Bench(gives(after_s=0.05))
    answers = await asyncio.gather(*(bench.fetch(KEYS) for _ in range(5)))
    assert answers == [[Status.OK] * 6] * 5
    assert len(bench.peers[1].asked) == 1 and bench.tidy()


async def test_who_joined_a_pull_that_fails_tries_for_itself() -> None:
    first = True

    async def once_badly(request: PullRequest) -> PullResult:
        nonlocal first
        await asyncio.sleep(0.02)
        if first:
            first = False
            return PullResult([Status.UNREACHABLE] * len(request.hashes), 0)
        return await gives()(request)

    bench = Bench(once_badly)
    mine, joined = await asyncio.gather(bench.fetch(KEYS[:1]), bench.fetch(KEYS[:1]))
    assert mine == [Status.UNREACHABLE] and joined == [Status.OK]


async def test_who_joined_a_slow_pull_does_not_wait_longer_than_its_own_deadline() -> None:
    bench = Bench(gives(after_s=0.6))
    patient = asyncio.ensure_future(bench.fetch(KEYS[:1], 5.0))
    await asyncio.sleep(0)
    assert await bench.fetch(KEYS[:1], 0.05) == [Status.TIMEOUT]
    assert await patient == [Status.OK]


async def test_a_key_that_is_named_twice_is_pulled_once_and_reported_twice() -> None:
    bench = Bench(gives())
    assert await bench.fetch([KEYS[0], KEYS[1], KEYS[0]]) == [Status.OK] * 3
    assert bench.peers[1].asked == [KEYS[:2]] and bench.tidy()


async def test_a_transport_with_a_bug_loses_no_slot_and_no_report() -> None:
    async def broken(_: PullRequest) -> PullResult:
        raise RuntimeError("a bug")

    bench = Bench(broken)
    reported: list[Status] = []
    task = bench.fetcher.fetch(NS, KEYS, 1.0, lambda _, status: reported.append(status))
    await asyncio.wait([task])
    assert len(reported) == 6 and Status.OK not in reported
    assert bench.tidy()
    with pytest.raises(RuntimeError):
        task.result()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_peers_do_every_block_is_reported_once_and_every_slot_is_closed(data: st.DataObject) -> None:
    outcomes = st.sampled_from([s for s in Status if s is not Status.EXISTS])
    tables = [{key: data.draw(outcomes) for key in KEYS} for _ in range(data.draw(st.integers(1, 4), label="peers"))]
    held = {key: data.draw(st.lists(st.integers(1, len(tables)), unique=True)) for key in KEYS}
    keys = data.draw(st.lists(st.sampled_from(KEYS), max_size=8))
    here = data.draw(st.sets(st.sampled_from(KEYS)))

    async def run() -> None:
        bench = Bench(*(gives(table.__getitem__, unsafe=True) for table in tables), held=held)
        bench.landing.here = dict.fromkeys(here, b"")
        statuses = await bench.fetch(keys)
        for key, status in zip(keys, statuses, strict=True):
            if held[key]:
                assert (status is Status.OK) == (key in bench.landing.here)
            else:
                assert status is not Status.OK
        assert bench.tidy()

    asyncio.run(run())


async def test_what_somebody_waits_for_does_not_wait_behind_what_nobody_waits_for() -> None:
    """Brought ahead of need, and not let in yet, when a caller comes that needs it: it has that caller's place now."""
    room = 32 * LENGTH  # a piece of two blocks fits into its eighth
    bench = Bench(gives(), in_flight_bytes=room)
    admission = bench.fetcher.admission
    assert admission.take("first", room, lambda: None)
    ahead = bench.fetcher.fetch(NS, KEYS[:2], 5.0, lambda position, status: None, background=True)
    await asyncio.sleep(0)
    waiting = asyncio.ensure_future(bench.fetch(KEYS[:2]))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not admission.take("came later, and waits on", room, lambda: None)
    admission.give_back(room)
    assert await asyncio.wait_for(waiting, 2.0) == [Status.OK] * 2
    await ahead
    assert admission.used_bytes == 0 and admission.waiting == 1 and bench.tidy()


async def test_what_is_brought_ahead_of_need_leaves_room_for_others() -> None:
    ended = asyncio.Event()

    async def waits(request: PullRequest) -> PullResult:
        await ended.wait()
        return await gives()(request)

    bench = Bench(waits)
    bench.fetcher.blocks_max = 4
    reported: dict[int, Status] = {}
    ahead = bench.fetcher.fetch(NS, KEYS[:4], 5.0, reported.__setitem__, background=True)
    waiting = asyncio.ensure_future(bench.fetch(KEYS[4:6]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert reported == {2: Status.BUSY, 3: Status.BUSY}
    ended.set()
    assert await waiting == [Status.OK] * 2
    await ahead


async def test_a_fetch_that_is_cancelled_calls_off_what_it_pulls_and_others_get_it_by_themselves() -> None:
    asked = 0

    async def hangs_once(request: PullRequest) -> PullResult:
        nonlocal asked
        asked += 1
        if asked > 1:
            return await gives()(request)
        called_off = asyncio.Event()
        request.call_off.on_call(called_off.set)
        await called_off.wait()
        return PullResult([Status.LOST] * len(request.hashes), 0, "called off")

    bench = Bench(hangs_once)
    reported: dict[int, Status] = {}
    first = bench.fetcher.fetch(NS, KEYS[:2], 60.0, reported.__setitem__)
    await asyncio.sleep(0)
    other = asyncio.ensure_future(bench.fetch(KEYS[:1], deadline_s=50.0))
    while not asked:
        await asyncio.sleep(0)
    bench.fetcher.cancel(first)
    await asyncio.wait_for(first, 1.0)
    assert sorted(reported) == [0, 1] and Status.OK not in reported.values()
    assert await asyncio.wait_for(other, 1.0) == [Status.OK]
    assert bench.known.usable(1) and bench.tidy() and bench.fetcher.admission.used_bytes == 0
    bench.fetcher.cancel(first)  # too late, and harmless


async def test_a_fetch_that_waits_for_others_can_be_cancelled_too() -> None:
    bench = Bench(gives(after_s=0.2))
    first = asyncio.ensure_future(bench.fetch(KEYS[:2]))
    await asyncio.sleep(0)
    second = bench.fetcher.fetch(NS, KEYS[:2], 60.0, lambda position, status: None)
    await asyncio.sleep(0)
    bench.fetcher.cancel(second)
    await asyncio.wait_for(second, 0.1)
    assert await first == [Status.OK] * 2


async def test_stopping_ends_what_is_under_way_long_before_its_deadline() -> None:
    bench = Bench(gives(), in_flight_bytes=LENGTH)
    assert bench.fetcher.admission.take("whoever never gives it back", LENGTH, lambda: None)
    fetching = bench.fetcher.fetch(NS, KEYS, 600.0, lambda position, status: None)
    await asyncio.sleep(0)
    await asyncio.wait_for(bench.fetcher.stop(), 1.0)
    assert fetching.done() and bench.tidy()


async def test_a_long_chain_none_of_which_finds_a_slot_is_told_so_at_once() -> None:
    """Longer than what is dealt out at once (HORIZON_BLOCKS)."""
    bench = Bench(gives(), room=0)
    keys = [i.to_bytes(8, "big") for i in range(HORIZON_BLOCKS + 80)]
    assert set(await asyncio.wait_for(bench.fetch(keys, deadline_s=60.0), 5.0)) == {Status.NO_SPACE}
