"""Blocks ahead of need: prefetched, replicated, and for a node that has just started, what its peers used last."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from p2pkv.client.messages import Warming
from p2pkv.errors import Busy
from p2pkv.types import Status
from tests.cluster.agents import AgentProcess, Cluster, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.transports import NIXL, TCP, options

pytestmark = [pytest.mark.cluster]

LAYOUT = make_layout(1 << 20)
SIZE = LAYOUT.block_bytes


def fill(agent: AgentProcess, keys: list[bytes]) -> None:
    """Put a chain; its first block counts as used last."""
    cache = agent.open(LAYOUT)
    for first in range(0, len(keys), 16):
        part = keys[first : first + 16]
        assert all(cache.put(part, blocks_of(part, SIZE), deadline_ms=10_000))


def warmed(agent: AgentProcess, size: int) -> Warming:
    """Have it warm up, and wait for the end."""
    client = agent.client()
    client.warm(size)
    state = client.warm()
    while state.running:
        state = eventually(lambda: client.warm())
    return state


def here(agent: AgentProcess, keys: list[bytes]) -> list[bytes]:
    """Those that are in its own store."""
    present = agent.open(LAYOUT).match(keys).present
    return [key for key, where in zip(keys, present, strict=True) if where == "local"]


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_a_cold_node_gets_what_its_peers_used_last_before_it_has_an_engine(cluster: Cluster, kind: str) -> None:
    first, second, cold = cluster.start(3, **options(kind))
    cluster.connected()
    both, old, used = new_keys(8), new_keys(8), new_keys(8)
    fill(first, both + old + used)
    fill(second, both)
    buffers = [bytearray(SIZE) for _ in used]
    assert all(first.open(LAYOUT).get_into(used, buffers))
    visible(second.open(LAYOUT), used)
    eventually(lambda: cold.metric("p2pkv_index_entries") >= 32)

    state = warmed(cold, 16 * SIZE)
    assert (state.complete, state.peers, state.blocks_pulled, state.blocks_failed) == (True, 2, 16, 0), state
    assert (state.seen_bytes, state.bytes_pulled) == (16 * SIZE, 16 * SIZE)
    assert here(cold, both) == both, "what most peers have comes first"
    assert here(cold, used) == used and here(cold, old) == [], "then what was used last"
    assert all(cold.open(LAYOUT).get_into(used, buffers))
    assert [bytes(buffer) for buffer in buffers] == [block_of(key, SIZE) for key in used]

    state = warmed(cold, 1 << 30)
    assert (state.complete, state.blocks_here, state.blocks_pulled) == (True, 16, 8), state
    assert state.why == "that is all that peers have" and here(cold, old) == old


def test_warming_up_pushes_nothing_out(cluster: Cluster) -> None:
    owner, full = cluster.start(2)
    cluster.connected()
    fill(owner, new_keys(48))
    mine = new_keys(56)
    fill(full, mine)
    state = warmed(full, 1 << 30)
    assert state.complete and state.why == "there is no free memory left"
    assert 0 < state.blocks_pulled < 8
    assert here(full, mine) == mine


def test_the_command_waits_and_says_what_came(cluster: Cluster) -> None:
    owner, cold = cluster.start(2)
    cluster.connected()
    keys = new_keys(8)
    fill(owner, keys)
    eventually(lambda: cold.metric("p2pkv_index_entries") >= 8)
    command = [sys.executable, "-m", "p2pkv.cli", "warm", "--socket", cold.socket]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60, check=False)

    done = run("--from-peers", "--top", "1GiB", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["complete"], said["blocks_pulled"], said["bytes_pulled"]) == (True, 8, 8 * SIZE)
    assert here(cold, keys) == keys
    assert "8 blocks pulled" in run().stdout, "without anything to do it tells of the last one"
    wrong = run("--from-peers")
    assert wrong.returncode == 2 and "--top" in wrong.stderr


def test_one_warm_up_at_a_time_and_it_can_be_stopped(cluster: Cluster) -> None:
    owner, cold = cluster.start(2)
    cluster.connected()
    fill(owner, new_keys(8))
    eventually(lambda: cold.metric("p2pkv_index_entries") >= 8)
    owner.stop_tree()  # its answers never come
    client = cold.client()
    assert client.warm(1 << 30).running
    with pytest.raises(Busy):
        client.warm(1 << 30)
    assert not client.warm(stop=True).running
    state = client.warm()
    assert (state.complete, state.why) == (False, "it was stopped")


def test_a_peer_that_does_not_answer_costs_a_warm_up_one_wait(cluster: Cluster) -> None:
    still, owner, cold = cluster.start(3)
    cluster.connected()
    fill(still, new_keys(4))
    keys = new_keys(8)
    fill(owner, keys)
    eventually(lambda: cold.metric("p2pkv_index_entries") >= 12)
    still.stop_tree()
    state = warmed(cold, 1 << 30)
    assert state.complete and state.blocks_pulled == 8 and here(cold, keys) == keys


def test_prefetched_blocks_are_here_and_what_nobody_has_is_told(cluster: Cluster) -> None:
    owner, reader = cluster.start(2)
    cluster.connected()
    keys, nowhere = new_keys(8), new_keys(2)
    fill(owner, keys)
    cache = reader.open(LAYOUT)
    visible(cache, keys)
    assert cache.prefetch(keys + nowhere, deadline_ms=10_000) == [True] * 8 + [False] * 2
    assert here(reader, keys) == keys
    assert cache.prefetch(keys) == [True] * 8, "again costs nothing"
    assert reader.metric('p2pkv_ahead_blocks_total{result="prefetched"}') == 8


def test_other_nodes_pull_what_they_are_told_to_as_far_as_memory_is_free(cluster: Cluster) -> None:
    owner, other = cluster.start(2)
    full = cluster.launch(seeds=(owner.address,)).ready()
    cluster.connected()
    keys, mine = new_keys(16), new_keys(62)
    fill(full, mine)
    fill(owner, keys)
    eventually(lambda: other.metric("p2pkv_index_entries") >= 16 + 62)
    cache = owner.open(LAYOUT)
    nodes = [other.node, full.node, owner.node, "00000000000000ff"]
    told = cache.replicate(keys, nodes)
    assert told[other.node] == (0, 16, ""), "a node that has no engine of this layout yet"
    assert told[full.node].begun < 2 and not told[full.node].reason
    assert "itself" in told[owner.node].reason and "unknown" in told["00000000000000ff"].reason
    eventually(lambda: here(other, keys) == keys)
    assert cache.replicate(keys, [other.node])[other.node] == (16, 0, "")
    assert here(full, mine) == mine
    buffer = bytearray(SIZE)
    assert other.open(LAYOUT).get_statuses([keys[0]], [buffer]) == [Status.OK] and buffer == block_of(keys[0], SIZE)
