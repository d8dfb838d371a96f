"""A source that comes and goes all the time: every read is right or a miss, soon, and each flap costs little."""

from __future__ import annotations

import time

import pytest

from tests.cluster.agents import Cluster, alive_peers, eventually, visible
from tests.cluster.blocks import block_of, new_keys
from tests.cluster.test_peer_faults import SLACK_S, SMALL, Read, owner_and_reader, put
from tests.cluster.transports import NIXL, NIXL_TCP, TCP, options

pytestmark = [pytest.mark.cluster]

FLAPS = 6
LIVES = 2
BATCH = 4
DEADLINE_S = 10.0
STALL_MS = 3_000


@pytest.mark.parametrize("kind", [TCP, NIXL_TCP])
def test_a_source_that_stops_and_goes_on_again_and_again_costs_little_each_time(cluster: Cluster, kind: str) -> None:
    """What is known of its answers keeps the wait short, and the breaker keeps it to one: else each of these reads
    would wait as long as a stranger is waited for."""
    owner, reader = owner_and_reader(cluster, kind, **{"transport.stall_ms": STALL_MS})
    all_keys = put(owner, SMALL, (3 * FLAPS + 2) * BATCH)
    keys = iter(all_keys)
    cache = reader.open(SMALL)

    def read() -> Read:
        return Read(cache, [next(keys) for _ in range(BATCH)], int(DEADLINE_S * 1000))

    visible(cache, all_keys)
    warm = read()
    assert warm.end() == BATCH
    for flap in range(FLAPS):
        owner.stop_tree()
        began = time.monotonic()
        for _ in range(2):
            assert read().end() == 0
        owner.continue_tree()
        read().end()  # it may not have been found out yet that the source is back
        assert time.monotonic() - began < DEADLINE_S / 4, f"flap {flap}"
        assert Read(cache, warm.keys, 1_000).end() == BATCH, "what is here stays here"
    eventually(lambda: owner.node in alive_peers(reader), 20.0, why="the source is heard again")
    last = [next(keys) for _ in range(BATCH)]
    visible(cache, last)
    eventually(lambda: Read(cache, last, 5_000).end() == BATCH, 30.0, why="the source is asked again")
    assert reader.metric("p2pkv_rejected_blocks_total") == 0


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_a_source_that_is_killed_and_restarted_again_and_again_is_found_each_time(cluster: Cluster, kind: str) -> None:
    """Each life's blocks are read from that life; what an earlier one had is a miss, at once."""
    [owner] = cluster.start(1, **options(kind, state_dir=cluster.directory / "state"))
    [reader] = cluster.start(1, seeds=(owner.address,), **options(kind))
    owner.arguments[owner.arguments.index("--peer-port") + 1] = str(owner.peer_port)  # it keeps its place in the cell
    cache = reader.open(SMALL)
    lost: list[bytes] = []
    for _ in range(LIVES):
        cluster.connected()
        keys = put(owner, SMALL, 2 * BATCH)
        visible(cache, keys)
        read = Read(cache, keys[:BATCH], 10_000)
        assert read.end() == BATCH, read.statuses
        node = owner.node
        owner.kill()
        lost += keys[BATCH:]
        began = time.monotonic()
        assert Read(cache, lost, 10_000).end() == 0
        assert time.monotonic() - began < 3 * SLACK_S
        owner.launch()
        assert Read(cache, lost, 10_000).end() == 0
        assert owner.ready().node == node
    cluster.connected()
    [key] = keys = new_keys(1)
    assert owner.open(SMALL).put(keys, [block_of(key, SMALL.block_bytes)]) == [True]
    visible(cache, keys)
    eventually(lambda: Read(cache, keys, 5_000).end() == 1, 10.0, why="the last life is asked")
