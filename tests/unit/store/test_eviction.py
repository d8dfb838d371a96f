"""Eviction policies keep their order, skip what is held, and agree with the obvious model."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import islice

import pytest

from p2pkv.store.eviction import EvictionPolicy, Lru, NoEviction
from p2pkv.store.reference import Block


def block(i: int) -> Block:
    return Block(1, b"%08d" % i, 0, 4096, i, 0.0)


def nobody(_: Block) -> bool:
    return False


def order(policy: EvictionPolicy[Block], held: Callable[[Block], bool] = nobody) -> list[int]:
    return [each.generation for each in policy.victims(held)]


@pytest.fixture
def four() -> tuple[Lru[Block], list[Block]]:
    lru: Lru[Block] = Lru()
    blocks = [block(i) for i in range(4)]
    for each in blocks:
        lru.insert(each)
    return lru, blocks


def test_blocks_are_told_apart_by_identity_not_by_value() -> None:
    assert len({block(1), block(1)}) == 2


def test_the_least_recently_used_goes_first(four: tuple[Lru[Block], list[Block]]) -> None:
    lru, blocks = four
    lru.access(blocks[0])
    lru.access(blocks[2])
    assert order(lru) == [1, 3, 0, 2]


def test_what_is_removed_is_no_victim(four: tuple[Lru[Block], list[Block]]) -> None:
    lru, blocks = four
    lru.remove(blocks[1])
    assert order(lru) == [0, 2, 3]
    lru.check_integrity([blocks[0], blocks[2], blocks[3]])
    with pytest.raises(AssertionError):
        lru.check_integrity(blocks)


def test_what_is_held_is_no_victim_and_counts_as_used(four: tuple[Lru[Block], list[Block]]) -> None:
    lru, blocks = four
    assert order(lru, lambda each: each in (blocks[0], blocks[1])) == [2, 3]
    assert order(lru) == [2, 3, 0, 1]


def test_one_victim_is_the_first_of_many(four: tuple[Lru[Block], list[Block]]) -> None:
    lru, blocks = four
    for held in (nobody, lambda each: each is blocks[0], lambda each: each is not blocks[3], lambda each: True):
        one = lru.victim(held)
        assert [one] == (list(lru.victims(held))[:1] or [None])
    assert NoEviction().victim(nobody) is None


def test_looking_at_a_few_victims_does_not_change_the_order_of_the_rest(four: tuple[Lru[Block], list[Block]]) -> None:
    lru, _ = four
    assert [each.generation for each in islice(lru.victims(nobody), 2)] == [0, 1]
    assert order(lru) == [0, 1, 2, 3]


@pytest.mark.parametrize("by", ["victim", "victims"])
def test_many_held_blocks_at_the_cold_end_are_walked_over_once_and_not_at_every_eviction(by: str) -> None:
    lru, asked = Lru(), 0
    for i in range(2_000):
        lru.insert(block(i))

    def held(each: Block) -> bool:
        nonlocal asked
        asked += 1
        return each.generation < 1_000

    for _ in range(500):
        victim = next(lru.victims(held)) if by == "victims" else lru.victim(held)
        assert victim is not None
        lru.remove(victim)
    assert asked == 1_000 + 500


@pytest.mark.parametrize("seed", range(3))
def test_lru_agrees_with_sorting_by_time_of_last_use(seed: int) -> None:
    rng, lru = random.Random(seed), Lru()
    used: dict[Block, int] = {}
    for step in range(2_000):
        op = rng.random()
        if op < 0.4 or not used:
            each = block(step)
            lru.insert(each)
        elif op < 0.8:
            each = rng.choice(list(used))
            lru.access(each)
        else:
            each = next(lru.victims(nobody))
            assert used[each] == min(used.values())
            lru.remove(each)
            del used[each]
            continue
        used[each] = step
    assert order(lru) == [each.generation for each in sorted(used, key=lambda each: used[each])]


def test_no_eviction_never_has_a_victim() -> None:
    policy, each = NoEviction(), block(1)
    policy.insert(each)
    policy.access(each)
    assert order(policy) == []
    policy.remove(each)
    policy.check_integrity([])
