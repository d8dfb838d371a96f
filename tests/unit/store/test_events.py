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
