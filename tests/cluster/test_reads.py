"""Reads between agents when nothing goes wrong: whole chains, parts, the same block for many, and both ways at once."""

from __future__ import annotations

import threading

import pytest

from p2pkv.client.cache import Cache
from p2pkv.types import Status
from tests.cluster.agents import AgentProcess, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys

pytestmark = [pytest.mark.cluster]

BLOCK = 65_536
LAYOUT = make_layout(BLOCK)


def shared(pair: list[AgentProcess], count: int, block_bytes: int = BLOCK) -> tuple[Cache, list[bytes]]:
    """Blocks that the first agent has, as the second one sees them."""
    layout = make_layout(block_bytes)
    keys = new_keys(count)
    owner, reader = (agent.open(layout) for agent in pair)
    assert all(owner.put(keys, blocks_of(keys, block_bytes)))
    visible(reader, keys)
    return reader, keys


@pytest.mark.parametrize(("block_bytes", "count"), [(1, 5), (4_096, 500), (65_536, 100), ((5 << 20) + 13, 4)])
def test_what_one_agent_has_the_other_one_gets(pair: list[AgentProcess], block_bytes: int, count: int) -> None:
    reader, keys = shared(pair, count, block_bytes)
    out = [bytearray(block_bytes) for _ in keys]
    assert reader.get_into(keys, out, deadline_ms=10_000) == [True] * count
    assert out == blocks_of(keys, block_bytes)
    assert reader.match(keys).local == count, "the reader is a holder now"


def test_a_chain_may_be_partly_here_partly_there_and_partly_nowhere(pair: list[AgentProcess]) -> None:
    reader, there = shared(pair, 3)
    here, nowhere = new_keys(3), new_keys(3)
    assert all(reader.put(here, blocks_of(here, BLOCK)))
    keys = [key for row in zip(here, there, nowhere, strict=True) for key in row]
    assert reader.match(keys).present == ["local", "peer", None] * 3
    out = [bytearray(BLOCK) for _ in keys]
    assert reader.get_statuses(keys, out) == [Status.OK, Status.OK, Status.MISS] * 3
    for i, key in enumerate(keys):
        if i % 3 != 2:
            assert out[i] == block_of(key, BLOCK)


def test_a_block_that_is_asked_for_by_many_at_once_is_pulled_once(pair: list[AgentProcess]) -> None:
    reader, keys = shared(pair, 8, 1 << 18)
    before = pair[1].metric("p2pkv_pulled_blocks_total")
    answers: list[list[bool]] = []

    def read() -> None:
        out = [bytearray(1 << 18) for _ in keys]
        answers.append(reader.get_into(keys, out, deadline_ms=10_000))
        assert out == blocks_of(keys, 1 << 18)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == [[True] * 8] * 6
    assert pair[1].metric("p2pkv_pulled_blocks_total") - before == 8


def test_a_block_that_is_named_twice_in_one_get_comes_twice(pair: list[AgentProcess]) -> None:
    reader, [key] = shared(pair, 1)
    out = [bytearray(BLOCK), bytearray(BLOCK)]
    assert reader.get_into([key, key], out) == [True, True]
    assert out == [block_of(key, BLOCK)] * 2


def test_a_block_that_is_named_twice_in_one_put_is_there(pair: list[AgentProcess]) -> None:
    """``put``: True where the block is there afterwards."""
    cache = pair[0].open(LAYOUT)
    [key] = new_keys(1)
    assert cache.put([key, key], [block_of(key, BLOCK)] * 2) == [True, True]


def test_two_threads_that_put_the_same_block_write_it_once(pair: list[AgentProcess]) -> None:
    """Who finds it being written may be told False: it is not there yet."""
    layout = make_layout(4 << 20)
    caches = [pair[0].open(layout) for _ in range(2)]
    keys = new_keys(4)
    answers: list[list[bool]] = []
    threads = [
        threading.Thread(
            target=lambda c=cache: answers.append(c.put(keys, blocks_of(keys, 4 << 20), deadline_ms=10_000))
        )  # type: ignore[misc]
        for cache in caches
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [any(both) for both in zip(*answers, strict=True)] == [True] * 4
    out = [bytearray(4 << 20) for _ in keys]
    assert caches[0].get_into(keys, out) == [True] * 4
    assert out == blocks_of(keys, 4 << 20)


def test_more_local_blocks_than_one_engine_may_hold_at_once_are_still_no_misses(pair: list[AgentProcess]) -> None:
    """One get of more than half of the arena, all of it local."""
    layout = make_layout(1 << 20)
    cache = pair[0].open(layout)
    keys = new_keys(40)
    for first in range(0, 40, 10):
        assert all(cache.put(keys[first : first + 10], blocks_of(keys[first : first + 10], 1 << 20)))
    assert cache.match(keys).local == 40
    out = [bytearray(1 << 20) for _ in keys]
    statuses = cache.get_statuses(keys, out, 5_000)
    assert set(statuses) <= {Status.OK, Status.BUSY}, "what is here is no miss"
    for key, status, content in zip(keys, statuses, out, strict=True):
        assert status is not Status.OK or content == block_of(key, 1 << 20)


def test_an_impatient_get_costs_nobody_else_anything(pair: list[AgentProcess]) -> None:
    """That one caller's millisecond was too short says nothing about the peer."""
    reader, keys = shared(pair, 30)
    for first in range(0, 20, 2):
        reader.get_into(keys[first : first + 2], [bytearray(BLOCK) for _ in range(2)], deadline_ms=1)
    rest = keys[20:]
    out = [bytearray(BLOCK) for _ in rest]
    assert reader.get_into(rest, out, deadline_ms=5_000) == [True] * 10
    assert out == blocks_of(rest, BLOCK)


def test_a_get_that_was_given_up_keeps_nothing_held(pair: list[AgentProcess]) -> None:
    """Its answer comes late, with a lease; whoever reads it gives that back."""
    reader, keys = shared(pair, 200)
    for key in keys:
        reader.get_into([key], [bytearray(BLOCK)], deadline_ms=1)

    def nothing_held() -> bool:
        reader.match(keys[:1])
        return pair[1].metric("p2pkv_leases") == 0

    eventually(nothing_held, 4.0, why="leases are given back, not left to run out")


def test_both_agents_read_each_other_at_the_same_time(pair: list[AgentProcess]) -> None:
    a, b = (agent.open(LAYOUT) for agent in pair)
    of_a, of_b = new_keys(100), new_keys(100)
    assert all(a.put(of_a, blocks_of(of_a, BLOCK))) and all(b.put(of_b, blocks_of(of_b, BLOCK)))
    visible(a, of_b)
    visible(b, of_a)
    failures: list[str] = []

    def read(cache: Cache, keys: list[bytes]) -> None:
        out = [bytearray(BLOCK) for _ in keys]
        if not all(cache.get_into(keys, out, deadline_ms=10_000)) or out != blocks_of(keys, BLOCK):
            failures.append("a block is missing or wrong")

    threads = [threading.Thread(target=read, args=(a, of_b)), threading.Thread(target=read, args=(b, of_a))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failures


def test_leases_are_given_back(pair: list[AgentProcess]) -> None:
    for agent in pair:
        eventually(lambda a=agent: a.metric("p2pkv_leases") == 0, why="no lease is left")  # type: ignore[misc]
