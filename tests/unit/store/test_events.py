"""Ownership events: in order, and bounded without losing what the reader must know."""

from __future__ import annotations

import random

import pytest

from p2pkv.store import events
from p2pkv.store.events import OwnershipEvents
from p2pkv.types import Tier


def test_events_come_out_in_order_and_once() -> None:
    queue = OwnershipEvents()
    said = [(1, Tier.DRAM), (2, Tier.DRAM), (1, Tier.GONE), (1, Tier.DRAM)]
    for each in said:
        queue.add(*each)
    assert len(queue) == 4
    assert queue.take() == said
    assert queue.take() == []


def test_what_is_left_out_is_what_cancels_and_the_rest_stays_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "COMPACT_AT", 7)
    queue = OwnershipEvents()
    said = [(1, Tier.DRAM), (9, Tier.GONE), (2, Tier.DRAM), (3, Tier.DRAM), (9, Tier.DRAM), (2, Tier.GONE)]
    for key, tier in [*said, (1, Tier.GONE), (1, Tier.DRAM)]:
        queue.add(key, tier)
    assert queue.take() == [(3, Tier.DRAM), (1, Tier.DRAM)]


def test_a_queue_of_events_that_all_matter_is_not_searched_again_at_every_event(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "COMPACT_AT", 64)
    real, searches = OwnershipEvents._compact, 0

    def counted(queue: OwnershipEvents) -> None:
        nonlocal searches
        searches += 1
        real(queue)

    monkeypatch.setattr(OwnershipEvents, "_compact", counted)
    queue = OwnershipEvents()
    for key in range(10_000):
        queue.add(key, Tier.DRAM)
    assert len(queue.take()) == 10_000
    assert searches < 10


@pytest.mark.parametrize("seed", range(5))
def test_a_queue_that_nobody_takes_stays_bounded_and_still_tells_the_truth(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that takes now and then has the owner's set each time, and little ever waits."""
    monkeypatch.setattr(events, "COMPACT_AT", 64)
    rng, queue = random.Random(seed), OwnershipEvents()
    owner: set[int] = set()
    reader: set[int] = set()
    fresh, most = 0, 0
    for _ in range(20_000):
        if len(owner) >= 20 or (owner and rng.random() < 0.4):
            key, tier = rng.choice(sorted(owner)), Tier.GONE
            owner.remove(key)
        else:
            fresh += 1
            key, tier = (fresh if rng.random() < 0.7 else rng.randrange(1, 40)), Tier.DRAM
            if key in owner:
                continue
            owner.add(key)
        queue.add(key, tier)
        most = max(most, len(queue))
        if rng.random() < 0.0005:
            for key, tier in queue.take():
                (reader.discard if tier is Tier.GONE else reader.add)(key)
            assert reader == owner
    assert most <= 2 * 64 + 1
    for key, tier in queue.take():
        (reader.discard if tier is Tier.GONE else reader.add)(key)
    assert reader == owner
