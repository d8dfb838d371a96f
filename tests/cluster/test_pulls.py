"""Several holders, bad copies, and the question why: on real agents."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from p2pkv.client import AgentClient
from p2pkv.client.cache import Cache
from p2pkv.types import Status
from p2pkv.wire.engine_types import Pace
from tests.cluster.agents import AgentProcess, Cluster, all_have, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.proxy import Proxy
from tests.cluster.test_questions import ask
from tests.cluster.test_short_way_nixl import flip_a_bit
from tests.cluster.transports import TCP, options

MIB = make_layout(1 << 20)
SMALL = make_layout(65_536)
PULLED = "p2pkv_pulled_bytes_total"


def holders(cluster: Cluster, count: int, blocks: int) -> tuple[AgentProcess, Cache, list[bytes], list[AgentProcess]]:
    """A reader, and agents that all have the same chain."""
    agents = cluster.start(count + 1, capacity="192MiB", **options(TCP))
    cluster.connected()
    reader, *owners = agents
    keys = new_keys(blocks)
    for owner in owners:
        assert all(owner.open(MIB).put(keys, blocks_of(keys, MIB.block_bytes), deadline_ms=20_000))
    cache = reader.open(MIB)
    all_have(cache, keys, count)
    return reader, cache, keys, owners


def test_a_long_prefix_comes_from_several_holders_at_once(cluster: Cluster) -> None:
    reader, cache, keys, owners = holders(cluster, 3, 48)
    out = [bytearray(MIB.block_bytes) for _ in keys]
    assert cache.get_into(keys, out, deadline_ms=20_000) == [True] * 48
    assert out == blocks_of(keys, MIB.block_bytes)

    def served() -> list[float]:
        return [owner.metric("p2pkv_served_blocks_total") for owner in owners]

    eventually(lambda: sum(served()) >= 48, why="an owner counts what it has sent after the last byte has left")
    assert sum(served()) == 48 and sum(count > 0 for count in served()) > 1
    assert reader.metric(PULLED) == 48 << 20


def test_a_crowd_that_wants_the_same_prefix_has_it_pulled_once(cluster: Cluster) -> None:
    reader, _, keys, _ = holders(cluster, 2, 16)
    clients = [AgentClient(reader.socket) for _ in range(16)]
    try:
        caches = [client.open(MIB) for client in clients]
        out = [bytearray(MIB.block_bytes) for _ in keys]
        with ThreadPoolExecutor(len(caches)) as threads:
            results = list(threads.map(lambda cache: cache.get_into(keys, out, deadline_ms=20_000), caches))
        assert results == [[True] * 16] * 16
        assert out == blocks_of(keys, MIB.block_bytes)
        assert reader.metric(PULLED) == 16 << 20
    finally:
        for client in clients:
            client.close()


def test_a_holder_that_is_killed_in_mid_prefix_costs_nothing_but_time(cluster: Cluster) -> None:
    """Links of 32 MB/s between them: by when the first one dies some of its blocks are here, and most are not."""
    with Proxy() as first, Proxy() as second:
        [dying] = cluster.start(1, capacity="192MiB", **options(TCP, **{"peer.advertise": first.address}))
        first.target = dying.peer_port
        settings = options(TCP, **{"peer.advertise": second.address})
        [lasting] = cluster.start(1, capacity="192MiB", seeds=(first.address,), **settings)
        second.target = lasting.peer_port
        [reader] = cluster.start(1, capacity="192MiB", seeds=(first.address,), **options(TCP))
        cluster.connected()
        keys = new_keys(64)
        for owner in (dying, lasting):
            assert all(owner.open(MIB).put(keys, blocks_of(keys, MIB.block_bytes), deadline_ms=20_000))
        cache = reader.open(MIB)
        all_have(cache, keys, 2)
        first.rate = second.rate = 32_000_000
        out = [bytearray(MIB.block_bytes) for _ in keys]
        with ThreadPoolExecutor(1) as thread:
            getting = thread.submit(cache.get_into, keys, out, 20_000)
            eventually(lambda: getting.done() or first.passed > 4 << 20, why="blocks of the first one's have come")
            assert not getting.done() and reader.metric("p2pkv_pulls_in_flight_blocks") > 0, "it is not in mid prefix"
            dying.kill()
            assert getting.result(timeout=30) == [True] * 64
        assert out == blocks_of(keys, MIB.block_bytes)
        assert 0 < lasting.metric("p2pkv_served_blocks_total") < 64, "what had come of the first one's was kept"


def test_an_owner_that_sends_as_much_as_it_may_says_busy_and_others_are_asked(cluster: Cluster) -> None:
    [limited] = cluster.start(1, **options(TCP, **{"transport.serve_max": "1MiB"}))
    other, reader = cluster.start(2, seeds=(f"127.0.0.1:{limited.peer_port}",))
    cluster.connected()
    keys = new_keys(40)
    for owner in (limited, other):
        assert all(owner.open(SMALL).put(keys, blocks_of(keys, SMALL.block_bytes)))
    cache = reader.open(SMALL)
    all_have(cache, keys, 2)
    out = bytearray(SMALL.block_bytes)
    for key in keys:
        assert cache.get_into([key], [out], deadline_ms=5_000) == [True] and out == block_of(key, SMALL.block_bytes)

    def served() -> list[float]:
        return [owner.metric("p2pkv_served_blocks_total") for owner in (limited, other)]

    eventually(lambda: sum(served()) >= 40, why="an owner counts what it has sent after the last byte has left")
    assert sum(served()) == 40 and served()[1] > 0
    only = new_keys(64)
    assert all(limited.open(SMALL).put(only, blocks_of(only, SMALL.block_bytes)))
    visible(cache, only)
    statuses = {status for key in only for status in cache.get_statuses([key], [out], 5_000)}
    assert statuses <= {Status.OK, Status.BUSY} and limited.metric("p2pkv_served_busy_total") > 0


def test_a_block_that_went_bad_at_its_owner_is_dropped_there_and_everybody_hears_of_it(cluster: Cluster) -> None:
    owner, reader = cluster.start(2, **options(TCP))
    cluster.connected()
    bad, good = keys = new_keys(2)
    assert all(owner.open(SMALL).put(keys, blocks_of(keys, SMALL.block_bytes)))
    cache = reader.open(SMALL)
    visible(cache, keys)
    flip_a_bit(owner, bad, SMALL, 1000)
    out = [bytearray(SMALL.block_bytes) for _ in keys]
    assert cache.get_statuses(keys, out, 5_000) == [Status.REJECTED, Status.OK]
    assert out[1] == block_of(good, SMALL.block_bytes)
    eventually(lambda: cache.match([bad]).anywhere == 0, 5.0, why="the owner has looked, and dropped it")
    assert owner.open(SMALL).match([bad]).local == 0 and owner.open(SMALL).match([good]).local == 1
    assert "gone bad" in owner.log()


def test_blocks_that_are_sooner_computed_than_pulled_are_not_named(pair: list[AgentProcess]) -> None:
    keys = new_keys(8)
    assert all(pair[0].open(MIB).put(keys, blocks_of(keys, MIB.block_bytes), deadline_ms=20_000))
    with AgentClient(pair[1].socket) as client:
        cache = client.open(MIB)
        visible(cache, keys)

        def named(pace: Pace) -> int:
            cache.submit_match(keys, pace=pace)
            [result] = client.poll(5_000)
            return result.ok.count(True)

        assert named(Pace()) == 8
        assert named(Pace(block_us=10_000_000)) == 8, "an engine that takes ten seconds for a block"
        assert named(Pace(block_us=1)) == 0, "one that takes a microsecond"
        assert named(Pace(block_us=20_000, overhead_us=10_000_000)) == 0
        assert cache.match(keys).anywhere == 8, "who only asks is told everything"


def test_an_agent_says_how_it_would_get_a_prompt_and_why(pair: list[AgentProcess]) -> None:
    layout = make_layout(1 << 20, model="plans")
    caches = [agent.open(layout) for agent in pair]
    keys = new_keys(6)
    assert all(caches[0].put(keys[:5], blocks_of(keys[:5], 1 << 20), deadline_ms=20_000))
    assert all(caches[1].put(keys[:1], blocks_of(keys[:1], 1 << 20), deadline_ms=20_000))
    visible(caches[1], keys[:5])
    hashes = [key.hex() for key in keys]
    [plan] = ask(pair[1], "/v1/plan", model="plans", hashes=hashes)
    assert (plan["blocks"], plan["stop"], plan["why"]) == (6, 5, "nobody has the next block")
    assert plan["without_ms"] is None
    assert [(run["node"], run["self"], run["first"], run["blocks"]) for run in plan["runs"]] == [
        (pair[1].node, True, 0, 1),
        (pair[0].node, False, 1, 4),
    ]
    [source] = [source for source in plan["sources"] if source["node"] == pair[0].node]
    assert source["answers"] and source["bytes_per_s"] > 0 and source["blocks"] == 4
    [refused] = ask(pair[1], "/v1/plan", model="plans", hashes=hashes, prefill_ms=0.0001)
    assert refused["why"] == "computing the rest is quicker" and refused["stop"] <= 1
    [pulled] = ask(pair[1], "/v1/plan", model="plans", hashes=hashes, prefill_ms=1000)
    assert pulled["stop"] == 5 and pulled["without_ms"] == 6000 and pulled["rest_ms"] == 1000
    assert ask(pair[1], "/v1/plan", model="nobody's", hashes=hashes) == []


def test_explain_shows_the_plan_to_people_and_programs(pair: list[AgentProcess]) -> None:
    layout = make_layout(65_536, model="explained")
    keys = new_keys(3)
    assert all(pair[0].open(layout).put(keys, blocks_of(keys, 65_536)))
    cache = pair[1].open(layout)
    visible(cache, keys)
    command = [
        sys.executable,
        "-m",
        "p2pkv.cli",
        "explain",
        "--model",
        "explained",
        "--agent",
        f"127.0.0.1:{pair[1].http_port}",
    ]
    command += ["--hashes", ",".join(key.hex() for key in keys), "--prefill-ms", "500"]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "get 3 of them" in told and "no further: all blocks are in it" in told and pair[0].node in told
    [plan] = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True, timeout=60).stdout)
    assert plan["stop"] == 3
