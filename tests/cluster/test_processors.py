"""Where two agents of a host of two processors run what a get needs of them: the lane's thread beside the engine, and
the thread that sends on the other one; of a small get wherever the scheduler likes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from p2pkv.client.cache import Cache
from p2pkv.types import Layout
from tests.cluster.agents import AgentProcess, Cluster, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.transports import TCP, options

pytestmark = [pytest.mark.cluster]

HERE = sorted(os.sched_getaffinity(0))
SMALL = make_layout(65_536)
MIB = make_layout(1 << 20)
COUNT = 4


@contextmanager
def on(processors: list[int]) -> Iterator[None]:
    """The calling thread, and what it starts, runs there."""
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, HERE)


def allowed(agent: AgentProcess, name: str) -> set[int]:
    """Where a thread of the agent's may run."""
    for task in Path(f"/proc/{agent.pid}/task").iterdir():
        if (task / "comm").read_text().strip() == name:
            return os.sched_getaffinity(int(task.name))
    raise AssertionError(f"there is no {name}")


def put(owner: AgentProcess, cache: Cache, layout: Layout) -> list[bytes]:
    keys = new_keys(COUNT)
    assert all(owner.open(layout).put(keys, blocks_of(keys, layout.block_bytes)))
    visible(cache, keys)
    return keys


def get(cache: Cache, keys: list[bytes]) -> None:
    for key in keys:
        block = bytearray(cache.layout.block_bytes)
        assert cache.get_into([key], [block], 10_000) == [True] and block == block_of(key, len(block))


@pytest.mark.skipif(len(HERE) < 2, reason="this host lends one processor: nothing can be put anywhere")
def test_who_sends_has_the_processor_that_the_engine_and_its_lane_do_not_use(cluster: Cluster) -> None:
    two = HERE[:2]
    with on(two):
        owner, reader = cluster.start(2, capacity="64MiB", **options(TCP))
    cluster.connected()
    large, small = reader.open(MIB), reader.open(SMALL)
    get(large, put(owner, large, MIB))  # connections, and that the owner is near
    get(small, put(owner, small, SMALL))
    assert (allowed(reader, "p2pkv-lane"), allowed(owner, "p2pkv-serve")) == (set(two), set(two))
    keys = {processor: put(owner, large, MIB) for processor in two}
    for processor, other in (two, two[::-1]):
        with on([processor]):
            get(large, keys[processor])
            assert (allowed(reader, "p2pkv-lane"), allowed(owner, "p2pkv-serve")) == ({processor}, {other})
    get(small, put(owner, small, SMALL))
    assert (allowed(reader, "p2pkv-lane"), allowed(owner, "p2pkv-serve")) == (set(two), set(two))
