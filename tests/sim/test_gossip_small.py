"""Small cells under chaos: after it ends, every replica equals the owner's set. The seed is printed on failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from p2pkv.config import Peer
from p2pkv.gossip.membership import State
from p2pkv.types import Tier

QUIET_S = 30.0
"""Longer than purge, the longest backoff, two silences and TCP_USER_TIMEOUT."""


@pytest.mark.parametrize("seed", range(30))
def test_after_chaos_every_replica_equals_its_owner(make_cell: Callable[..., Any], seed: int) -> None:
    cell = make_cell(seed, nodes=2 + seed % 5)
    for node in cell.nodes:
        cell.at(cell.now + cell.rng.uniform(0.0, 2.0), node.start)
    cell.run(2.0)
    for _ in range(120):
        cell.disturb()
        cell.run(cell.rng.choice((0.001, 0.02, 0.3)))
    cell.run(QUIET_S)
    cell.check()
    cell.assert_converged()


def test_all_nodes_start_at_the_same_moment(make_cell: Callable[..., Any]) -> None:
    cell = make_cell(7, nodes=8)
    for node in cell.nodes:
        node.start()
        node.log.record(range(node.id * 100, node.id * 100 + 50), Tier.DRAM, cell.now, urgent=True)
    cell.run(5.0)
    cell.assert_converged()


def test_a_crash_is_hidden_within_three_seconds_everywhere(make_cell: Callable[..., Any]) -> None:
    cell = make_cell(3, nodes=5)
    for node in cell.nodes:
        node.start()
    cell.run(5.0)
    cell.assert_converged()
    dead = cell.nodes[2]
    dead.up = False
    for pipe, _ in dead.pipes.values():
        pipe.silent = True  # not a word, not even a reset
    cell.run(2.9)
    for node in cell.nodes:
        if node is not dead:
            assert node.core.table.get(dead.id).state is State.UNREACHABLE
            assert node.core.counters["hidden"] == 1


def test_a_stalled_node_marks_no_healthy_one(make_cell: Callable[..., Any]) -> None:
    cell = make_cell(5, nodes=4)
    for node in cell.nodes:
        node.start()
    cell.run(5.0)
    stalled = cell.nodes[1]
    stalled.stalled_until = cell.now + 4.0
    cell.run(10.0)
    assert stalled.core.counters["stalls"] == 1
    assert stalled.core.counters["hidden"] == 0
    cell.assert_converged()


def test_a_partition_longer_than_purge_heals(make_cell: Callable[..., Any]) -> None:
    cell = make_cell(11, nodes=6, settings=Peer(members_max=16, purge_s=5.0))
    for node in cell.nodes:
        node.start()
        node.log.record(range(node.id, node.id + 9), Tier.SSD, cell.now)
    cell.run(5.0)
    left = set(cell.nodes[:3])
    plain = cell.dial

    def dial(node: Any, conn: int, address: Any) -> None:
        there = next(n for n in cell.nodes if n.address == address)
        if (node in left) == (there in left):
            plain(node, conn, address)  # otherwise: no answer at all, until the handshake's deadline

    cell.dial = dial
    for node in cell.nodes:
        for pipe, _ in node.pipes.values():
            if len({end in left for end, _ in pipe.ends}) == 2:
                pipe.silent = True
    cell.run(30.0)
    for node in cell.nodes:
        assert set(node.core.table.rows) == {
            n.id for n in cell.nodes if n is not node and (n in left) == (node in left)
        }
    cell.dial = plain
    cell.run(10.0)
    cell.assert_converged()


def test_digests_bring_together_two_that_could_not_reach_each_other_when_they_were_introduced(
    make_cell: Callable[..., Any],
) -> None:
    cell = make_cell(2, nodes=3, settings=Peer(members_max=16, purge_s=3.0))
    plain = cell.dial
    apart = set(cell.nodes[1:])

    def dial(node: Any, conn: int, address: Any) -> None:
        there = next(n for n in cell.nodes if n.address == address)
        if {node, there} != apart:
            plain(node, conn, address)

    cell.dial = dial
    for node in cell.nodes:
        node.seeds = [cell.nodes[0].address] if node is not cell.nodes[0] else []
        node.start()
    cell.run(20.0)
    assert len(cell.nodes[1].core.table.rows) == 1
    cell.dial = plain
    cell.run(15.0)
    cell.assert_converged()
