"""A pull that this node's own side lost says nothing about the peer."""

from __future__ import annotations

from p2pkv.transport.breaker import Fault
from p2pkv.transport.deal import TRIES_MAX
from p2pkv.types import Status
from tests.unit.transport.test_fetch import KEYS, Bench, Peer, gives


async def test_pulls_that_were_lost_here_end_their_fetch_and_open_no_breaker() -> None:
    answers = iter([Status.LOST] * 2 * Fault.FAILED.value)
    bench = Bench(gives(lambda _: next(answers, Status.OK)))
    for key in KEYS[:2] * Fault.FAILED.value:
        assert await bench.fetch([key]) == [Status.LOST]
    assert len(bench.peers[1].asked) == 2 * Fault.FAILED.value, "each fetch asks it once"
    assert bench.known.usable(1)
    assert await bench.fetch(KEYS[:1]) == [Status.OK] and bench.tidy()


async def test_another_holder_is_asked_for_what_was_lost_here() -> None:
    bench = Bench(gives(lambda _: Status.LOST), gives())
    assert await bench.fetch(KEYS) == [Status.OK] * 6
    assert bench.known.usable(1) and bench.tidy()


async def test_what_was_lost_here_is_asked_of_the_same_holder_in_another_way() -> None:
    """As over TCP when our NIXL process has died."""
    bench = Bench(gives(lambda key: Status.LOST if key in KEYS[2:4] else Status.OK))
    before, after = bench.peers[1], Peer(gives())
    bench.fetcher.transport = lambda node: after if before.asked else before
    assert await bench.fetch(KEYS) == [Status.OK] * 6
    assert (before.asked, after.asked) == ([KEYS], [KEYS[2:4]])
    assert bench.known.usable(1) and bench.tidy()


async def test_ways_that_come_and_go_and_lose_everything_are_not_tried_for_ever() -> None:
    ways = [Peer(gives(lambda _: Status.LOST)) for _ in range(2)]
    bench = Bench(gives())
    bench.fetcher.transport = lambda node: ways[sum(len(way.asked) for way in ways) % 2]
    assert await bench.fetch(KEYS[:1]) == [Status.LOST]
    assert sum(len(way.asked) for way in ways) == TRIES_MAX and bench.tidy()
