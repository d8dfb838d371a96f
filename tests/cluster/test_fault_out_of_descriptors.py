"""An agent that is out of file descriptors: it answers whom it can, is a miss in time for the others, keeps nothing,
does not spin, and takes everybody again when it has some.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from p2pkv.client import AgentClient
from p2pkv.errors import AgentUnavailable, Busy, DeadlineExceeded
from tests.cluster.agents import AgentProcess, Cluster, eventually, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.test_peer_faults import SLACK_S, SMALL, Read, owner_and_reader, put
from tests.cluster.transports import NIXL, TCP

pytestmark = [pytest.mark.cluster]

DEADLINE_MS = 20_000
BATCH = 2
ATTACH_NEEDS = 7
"""The engine's connection, a lane, and what READY carries."""


def descriptors(pid: int) -> set[int]:
    """What a process has open."""
    return {int(name) for name in os.listdir(f"/proc/{pid}/fd")}


@contextmanager
def out_of_descriptors(agent: AgentProcess, left: int = 0) -> Iterator[None]:
    """The agent and its children can open ``left`` more, and then none."""
    before: dict[int, tuple[int, int]] = {}
    try:
        for pid in (agent.pid, *agent.children()):
            used = descriptors(pid)
            unused = [number for number in range(len(used) + left + 1) if number not in used]
            before[pid] = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (unused[left], before[pid][1]))
        yield
    finally:
        for pid, limits in before.items():
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_reads_are_misses_in_time_and_come_when_there_are_descriptors_again(cluster: Cluster, kind: str) -> None:
    """Whether it is the reader that has none or the owner. The two have not been connected for data, so each read needs
    one."""
    owner, reader = owner_and_reader(cluster, kind)
    keys, own = put(owner, SMALL, 5 * BATCH), put(reader, SMALL, BATCH)
    cache = reader.open(SMALL)
    visible(cache, keys)
    for victim in (reader, owner):
        with out_of_descriptors(victim):
            for first in range(0, 4 * BATCH, BATCH):
                read = Read(cache, keys[first : first + BATCH], DEADLINE_MS)
                read.end()
                assert read.seconds < 2 * SLACK_S, read.statuses
            assert read.seconds < SLACK_S / 2, "the fourth of them is not asked any more, or answers"
            assert Read(cache, own, DEADLINE_MS).end() == BATCH, "what is here needs none"
        assert victim.alive
    eventually(lambda: Read(cache, keys, 5_000).end() == len(keys), 20.0, why="everything comes in the end")
    assert reader.metric("p2pkv_rejected_blocks_total") == 0


def test_engines_that_come_meanwhile_wait_outside_and_cost_nothing(cluster: Cluster) -> None:
    """A listener is readable as long as somebody waits there: the agent once did nothing else than try to accept, and
    wrote 9 MB of log a second about it."""
    [agent] = cluster.start(1, http_on=False)
    old = agent.open(SMALL)
    with out_of_descriptors(agent):
        with AgentClient(agent.socket) as late, pytest.raises((AgentUnavailable, DeadlineExceeded)):
            late.open(SMALL, deadline_ms=700)
        assert old.match(new_keys(1)).anywhere == 0
        assert agent.log_path.read_text().count("cannot accept") < 50
    [key] = new_keys(1)
    assert agent.open(SMALL).put([key], [block_of(key, SMALL.block_bytes)]) == [True]


def test_an_engine_that_cannot_be_given_what_it_needs_is_sent_away_at_once_and_leaves_nothing(cluster: Cluster) -> None:
    """However far its welcome got. What each of them left behind, engines that try again would soon make a lot."""
    [agent] = cluster.start(1, http_on=False)
    agent.open(SMALL)
    before = descriptors(agent.pid)
    came = []
    for left in range(1, ATTACH_NEEDS + 1):
        with out_of_descriptors(agent, left), AgentClient(agent.socket) as client:
            try:
                client.open(SMALL, deadline_ms=20_000)
                came.append(left)
            except AgentUnavailable:
                pass
        eventually(lambda: descriptors(agent.pid) == before, 5.0, why="everything is closed again")
    assert came and came[0] > 2, "with few left nobody gets in, with more somebody does"


def test_a_region_whose_descriptor_is_lost_can_be_tried_again(cluster: Cluster) -> None:
    """Busy, not invalid: an engine's connector takes INVALID for a mistake of its own, and gives up for good."""
    [agent] = cluster.start(1, http_on=False)
    cache = agent.open(SMALL)
    keys = new_keys(1)
    blocks = blocks_of(keys, SMALL.block_bytes)
    for left in (0, 1):
        with out_of_descriptors(agent, left), pytest.raises(Busy):
            cache.put(keys, blocks)
    assert cache.put(keys, blocks) == [True]
