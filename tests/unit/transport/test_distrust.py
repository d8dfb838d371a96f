"""Blocks that are not asked of a node for a while."""

from __future__ import annotations

from p2pkv.transport import distrust as module
from p2pkv.transport.distrust import TTL_S, Distrust

KEY, OTHER = b"k" * 16, b"o" * 16


def test_a_node_is_distrusted_for_this_block_and_no_other() -> None:
    distrust = Distrust()
    distrust.add(1, 7, KEY, 0.0)
    assert distrust.has(1, 7, KEY)
    assert not distrust.has(2, 7, KEY) and not distrust.has(1, 8, KEY) and not distrust.has(1, 7, OTHER)
    assert distrust.anybody(7, KEY) and not distrust.anybody(7, OTHER)


def test_it_ends_when_the_owner_has_looked_or_time_is_over() -> None:
    distrust = Distrust()
    distrust.add(1, 7, KEY, 0.0)
    distrust.add(2, 7, KEY, 1.0)
    distrust.lift(1, 7, KEY)
    distrust.lift(1, 7, KEY)
    assert not distrust.has(1, 7, KEY) and distrust.anybody(7, KEY)
    assert distrust.expire(TTL_S) == [] and distrust.expire(TTL_S + 1) == [(2, 7, KEY)]
    assert not distrust.anybody(7, KEY) and len(distrust) == 0


def test_a_second_bad_answer_begins_the_time_anew() -> None:
    distrust = Distrust()
    distrust.add(1, 7, KEY, 0.0)
    distrust.add(1, 7, KEY, 30.0)
    assert distrust.expire(TTL_S + 1) == [] and len(distrust) == 1
    distrust.lift(1, 7, KEY)
    assert not distrust.anybody(7, KEY)


def test_the_oldest_gives_way_when_there_are_too_many_and_whoever_adds_hears_of_it() -> None:
    distrust = Distrust()
    gone = [distrust.add(i, 7, KEY, float(i)) for i in range(module.BLOCKS_MAX + 10)]
    assert gone == [None] * module.BLOCKS_MAX + [(i, 7, KEY) for i in range(10)]
    assert distrust.add(module.BLOCKS_MAX, 7, KEY, 1e6) is None, "what is there already needs no room"
    assert len(distrust) == module.BLOCKS_MAX
    assert not distrust.has(9, 7, KEY) and distrust.has(10, 7, KEY) and distrust.anybody(7, KEY)
