"""A pull that this node's own side lost says nothing about the peer."""

from __future__ import annotations

from p2pkv.transport.breaker import Fault
from p2pkv.types import Status
from tests.unit.transport.test_fetch import KEYS, Bench, gives


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
