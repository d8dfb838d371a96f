"""Gets on their own channel: answered without the event loop where that is possible, and right where it is not."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import pytest

from p2pkv.client import AgentClient
from p2pkv.client.cache import Cache
from p2pkv.types import Layout, Status
from p2pkv.wire import engine
from p2pkv.wire.frame import encode
from p2pkv.wire.limits import NO_PROCESSOR
from tests.cluster.agents import AgentProcess, Cluster, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.proxy import Proxy
from tests.cluster.raw import RawConnection, lane_connection
from tests.cluster.transports import TCP, options

pytestmark = [pytest.mark.cluster]

BLOCK = 65_536
LAYOUT = make_layout(BLOCK)
MUTANT = str(Path(__file__).with_name("mutant_agent.py"))
LOCAL = 'p2pkv_short_way_blocks_total{source="local"}'
PEER = 'p2pkv_short_way_blocks_total{source="peer"}'
MISSES = 'p2pkv_short_way_blocks_total{source="miss"}'
ALL_MISSES = 'p2pkv_get_blocks_total{source="miss"}'
HITS = 'p2pkv_get_blocks_total{source="local"}'
HANDED_OVER = "p2pkv_short_way_handed_over_total"


def put(agent: AgentProcess, count: int) -> list[bytes]:
    keys = new_keys(count)
    assert all(agent.open(LAYOUT).put(keys, blocks_of(keys, BLOCK)))
    return keys


def read(cache: Cache, keys: list[bytes], deadline_ms: int = 10_000) -> list[Status]:
    out = [bytearray(BLOCK) for _ in keys]
    statuses = cache.get_statuses(keys, out, deadline_ms)
    for key, block, status in zip(keys, out, statuses, strict=True):
        assert status is not Status.OK or block == block_of(key, BLOCK)
    return statuses


def warm(pair: list[AgentProcess]) -> Cache:
    """The second agent's cache, with a data connection to the first agent in its pool."""
    cache = pair[1].open(LAYOUT)
    keys = put(pair[0], 1)
    visible(cache, keys)
    assert read(cache, keys) == [Status.OK]
    return cache


def test_what_is_here_is_answered_without_the_event_loop(pair: list[AgentProcess]) -> None:
    keys = put(pair[0], 20)
    local, handed_over, hits = pair[0].metric(LOCAL), pair[0].metric(HANDED_OVER), pair[0].metric(HITS)
    with lane_connection(pair[0], layout=LAYOUT) as lane:
        lane.send(engine.CODEC.encode(engine.Get(LAYOUT.namespace, keys, 10_000), 1))
        frame = lane.receive()
        assert frame is not None
        got = engine.CODEC.decode(frame)
    assert isinstance(got, engine.Got) and bytes(got.statuses) == bytes(20) and not got.more
    assert pair[0].metric(LOCAL) == local + 20
    assert pair[0].metric(HANDED_OVER) == handed_over
    assert pair[0].metric(HITS) == hits + 20


def test_what_is_here_is_read_without_the_agent_and_counted(pair: list[AgentProcess]) -> None:
    keys = put(pair[0], 20)
    cache = pair[0].open(LAYOUT)
    local, hits = pair[0].metric(LOCAL), pair[0].metric(HITS)
    assert read(cache, keys) == [Status.OK] * 20
    assert pair[0].metric(LOCAL) == local and pair[0].metric(HITS) == hits + 20


def test_what_is_here_is_asked_for_where_the_directory_is_not_given_out(cluster: Cluster) -> None:
    [agent] = cluster.start(1, settings={"engine.directory": False})
    keys = put(agent, 20)
    assert read(agent.open(LAYOUT), keys) == [Status.OK] * 20
    assert agent.metric(LOCAL) == 20


def test_of_what_is_here_in_part_the_rest_is_asked_for(pair: list[AgentProcess]) -> None:
    cache = warm(pair)
    mine, theirs, nobodys = put(pair[1], 3), put(pair[0], 3), new_keys(2)
    visible(cache, theirs)
    keys = [mine[0], theirs[0], nobodys[0], mine[1], theirs[1], nobodys[1], mine[2], theirs[2]]
    expected = [Status.MISS if key in nobodys else Status.OK for key in keys]
    assert read(cache, keys) == expected


def test_what_one_peer_has_is_pulled_without_the_event_loop(pair: list[AgentProcess]) -> None:
    cache = warm(pair)
    keys = put(pair[0], 20)
    visible(cache, keys)
    peer, handed_over = pair[1].metric(PEER), pair[1].metric(HANDED_OVER)
    pulled, hits = pair[1].metric("p2pkv_pulled_blocks_total"), pair[1].metric(HITS)
    for key in keys:
        assert read(cache, [key]) == [Status.OK]
    assert pair[1].metric(PEER) == peer + 20
    assert pair[1].metric(HANDED_OVER) == handed_over
    eventually(lambda: pair[1].metric("p2pkv_pulled_blocks_total") == pulled + 20, why="all are counted")
    assert pair[1].metric('p2pkv_get_blocks_total{source="peer"}') >= 20
    assert pair[1].metric(HITS) == hits, "what came is no local hit, although the engine read it by the directory"
    assert cache.match(keys).local == 20, "and is ours now"
    eventually(lambda: pair[0].open(LAYOUT).match(keys).anywhere == 20, why="and the first agent hears so")


def test_what_is_pulled_for_who_needs_no_lease_is_not_held(pair: list[AgentProcess]) -> None:
    cache = warm(pair)
    keys = put(pair[0], 2)
    visible(cache, keys)
    before = pair[1].metric("p2pkv_leases")
    with lane_connection(pair[1], layout=LAYOUT) as lane:
        for key in keys:
            got = lane.ask(engine.Get(LAYOUT.namespace, [key], 10_000, NO_PROCESSOR, unleased=True))
            assert isinstance(got, engine.Got) and (got.lease, bytes(got.statuses)) == (0, bytes([Status.OK]))
        assert pair[1].metric("p2pkv_leases") == before
        got = lane.ask(engine.Get(LAYOUT.namespace, keys, 10_000, NO_PROCESSOR, unleased=True))
        assert isinstance(got, engine.Got) and got.lease != 0, "who asks for what is here could not read it: it is held"
    eventually(lambda: pair[0].metric("p2pkv_served_leases") == 0, 3.0, why="the owner need not hold what has come")


def test_an_agent_without_it_gives_the_same(cluster: Cluster) -> None:
    pair = cluster.start(2, **options(TCP, **{"engine.short_way": "false"}))
    cluster.connected()
    keys = put(pair[0], 5)
    cache = pair[1].open(LAYOUT)
    visible(cache, keys)
    assert read(cache, [*keys, *new_keys(1)]) == [Status.OK] * 5 + [Status.MISS]
    assert pair[1].metric(PEER) == 0


def test_a_key_that_is_named_twice_comes_twice(pair: list[AgentProcess]) -> None:
    cache = warm(pair)
    [key, other] = put(pair[0], 2)
    visible(cache, [key, other])
    assert read(cache, [key, other, key]) == [Status.OK] * 3


def test_a_block_that_arrives_with_a_flipped_bit_is_rejected_once(cluster: Cluster) -> None:
    """By the lane, which hands the get over; the node that sent it is not asked again."""
    with Proxy() as proxy:
        [owner] = cluster.start(1, settings={"peer.advertise": proxy.address})
        proxy.target = owner.peer_port
        [reader] = cluster.start(1, seeds=(proxy.address,))
        cluster.connected()
        cache = warm([owner, reader])
        [bad, good] = put(owner, 2)
        visible(cache, [bad, good])
        proxy.flip_at = BLOCK + BLOCK // 2  # of what this connection carries: the block of the get before comes first
        assert read(cache, [bad]) == [Status.REJECTED]
        assert proxy.flipped == 1
        assert read(cache, [good]) == [Status.OK]
        assert reader.metric("p2pkv_rejected_blocks_total") == 1
        assert reader.metric(PEER) == 1 and reader.metric(HANDED_OVER) == 2, "the first get of all, and this one"
        eventually(lambda: read(cache, [bad]) == [Status.OK], why="the owner has looked: its block is good")


def test_two_engines_that_want_the_same_block_pull_it_once(pair: list[AgentProcess]) -> None:
    """One of them by a get, the other by a load, which takes the way through the event loop."""
    cache = warm(pair)
    other = pair[1].open(LAYOUT)
    keys = put(pair[0], 200)
    visible(cache, keys)
    before = pair[1].metric("p2pkv_pulled_blocks_total")
    answers: list[list[Status]] = []

    def one(mine: Cache, order: list[bytes]) -> None:
        answers.append([read(mine, [key])[0] for key in order])

    threads = [threading.Thread(target=one, args=(c, o)) for c in (cache, other) for o in (keys, keys[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[Status.OK] * 200] * 4
    eventually(lambda: pair[1].metric("p2pkv_pulled_blocks_total") >= before + 200, why="all are counted")
    assert pair[1].metric("p2pkv_pulled_blocks_total") == before + 200


def test_a_lease_holds_until_it_is_given_back(pair: list[AgentProcess]) -> None:
    keys = put(pair[0], 3)
    before = pair[0].metric("p2pkv_leases")
    with lane_connection(pair[0], layout=LAYOUT) as lane:
        got = lane.ask(engine.Get(LAYOUT.namespace, keys, 1_000))
        assert isinstance(got, engine.Got) and got.lease and not got.more
        assert bytes(got.statuses) == bytes([Status.OK] * 3) and got.indices == [0, 1, 2]
        assert pair[0].metric("p2pkv_leases") == before + 1
        lane.send(engine.CODEC.encode(engine.ReleaseLease(got.lease)))
        eventually(lambda: pair[0].metric("p2pkv_leases") == before, why="it is given back")


def test_nobody_gives_back_what_another_holds(pair: list[AgentProcess]) -> None:
    keys = put(pair[0], 1)
    with lane_connection(pair[0], layout=LAYOUT) as lane, lane_connection(pair[0], layout=LAYOUT) as thief:
        got = lane.ask(engine.Get(LAYOUT.namespace, keys, 1_000))
        assert isinstance(got, engine.Got)
        held = pair[0].metric("p2pkv_leases")
        thief.send(engine.CODEC.encode(engine.ReleaseLease(got.lease)))
        assert isinstance(thief.ask(engine.Get(LAYOUT.namespace, new_keys(1), 1)), engine.Got)
        assert pair[0].metric("p2pkv_leases") == held


def test_a_lease_that_is_given_back_with_the_last_breath_is_given_back(pair: list[AgentProcess]) -> None:
    """The agent may hear of the end of the connection before it reads the RELEASE on the other one."""
    keys = put(pair[0], 1)
    before = pair[0].metric("p2pkv_leases")
    for _ in range(50):
        with lane_connection(pair[0], layout=LAYOUT) as lane:
            got = lane.ask(engine.Get(LAYOUT.namespace, keys, 1_000))
            assert isinstance(got, engine.Got) and lane.control is not None
            lane.send(engine.CODEC.encode(engine.ReleaseLease(got.lease)))
            lane.control.sock.close()
    eventually(lambda: pair[0].metric("p2pkv_leases") == before, 3.0, why="all are given back")


def test_a_namespace_that_was_not_opened_is_refused(pair: list[AgentProcess]) -> None:
    with lane_connection(pair[0], layout=LAYOUT) as lane:
        answer = lane.ask(engine.Get(LAYOUT.namespace ^ 1, new_keys(1), 1_000))
        assert isinstance(answer, engine.EngineError) and answer.code == "invalid"
        assert isinstance(lane.ask(engine.Get(LAYOUT.namespace, new_keys(1), 10)), engine.Got), "and it goes on"


@pytest.mark.parametrize("rest", [[], [NO_PROCESSOR], [0], [0, False], [1, True, "what later versions may say", [2]]])
def test_an_engine_may_say_where_it_waits(pair: list[AgentProcess], rest: list[object]) -> None:
    keys = put(pair[0], 1)
    body = msgspec.msgpack.encode([LAYOUT.namespace, keys, 1_000, *rest])
    with lane_connection(pair[0], layout=LAYOUT) as lane:
        lane.send(encode(engine.EngineType.GET, body, 7))
        frame = lane.receive()
        assert frame is not None and frame.request_id == 7
        got = engine.CODEC.decode(frame)
        assert isinstance(got, engine.Got) and bytes(got.statuses) == bytes([Status.OK])


@pytest.mark.parametrize("processor", [NO_PROCESSOR + 1, -1, (1 << 64) - 1, "0", None])
def test_a_processor_that_cannot_be_is_against_the_protocol(pair: list[AgentProcess], processor: object) -> None:
    body = msgspec.msgpack.encode([LAYOUT.namespace, put(pair[0], 1), 1_000, processor])
    with lane_connection(pair[0], layout=LAYOUT) as lane:
        lane.send(encode(engine.EngineType.GET, body, 7))
        lane.closed_by_the_agent()


@pytest.mark.parametrize("unleased", [1, "yes", None])
def test_a_wish_that_is_neither_yes_nor_no_is_against_the_protocol(pair: list[AgentProcess], unleased: object) -> None:
    body = msgspec.msgpack.encode([LAYOUT.namespace, put(pair[0], 1), 1_000, NO_PROCESSOR, unleased])
    with lane_connection(pair[0], layout=LAYOUT) as lane:
        lane.send(encode(engine.EngineType.GET, body, 7))
        lane.closed_by_the_agent()


def test_a_get_byte_by_byte_is_a_get(pair: list[AgentProcess]) -> None:
    keys = put(pair[0], 1)
    with lane_connection(pair[0], layout=LAYOUT) as lane:
        for byte in engine.CODEC.encode(engine.Get(LAYOUT.namespace, keys, 1_000), 7):
            lane.send(bytes([byte]))
        frame = lane.receive()
        assert frame is not None and frame.request_id == 7


def test_many_gets_sent_ahead_are_all_answered(pair: list[AgentProcess]) -> None:
    keys = put(pair[0], 4)
    with lane_connection(pair[0], layout=LAYOUT) as lane:
        frames = [engine.CODEC.encode(engine.Get(LAYOUT.namespace, keys, 1_000), i + 1) for i in range(200)]
        lane.send(b"".join(frames))
        assert sorted(f.request_id for f in (lane.receive() for _ in range(200)) if f is not None) == list(
            range(1, 201)
        )


def test_an_engine_that_asks_without_end_is_disconnected(pair: list[AgentProcess]) -> None:
    """What the event loop has to look at is bounded, however fast it comes."""
    get = engine.CODEC.encode(engine.Get(LAYOUT.namespace ^ 1, new_keys(1), 1_000), 1)
    with lane_connection(pair[0], layout=LAYOUT) as lane:
        try:
            for _ in range(100):
                lane.send(get * 500)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass
        lane.closed_by_the_agent()
    keys = put(pair[0], 1)
    assert read(pair[0].open(LAYOUT), keys) == [Status.OK]


def test_an_engine_that_goes_away_in_mid_get_leaves_nothing_behind(pair: list[AgentProcess]) -> None:
    cache = warm(pair)
    keys = put(pair[0], 40)
    visible(cache, keys)
    for key in keys:
        with lane_connection(pair[1], layout=LAYOUT) as lane:
            lane.send(engine.CODEC.encode(engine.Get(LAYOUT.namespace, [key], 1_000), 1))
    eventually(lambda: pair[1].metric("p2pkv_pulls_in_flight_blocks") == 0, why="the pulls end")
    assert read(cache, keys) == [Status.OK] * 40, "no slot is still being written"


def test_a_peer_that_stands_still_is_a_miss_in_time(cluster: Cluster) -> None:
    pair = cluster.start(2)
    cluster.connected()
    cache = warm(pair)
    keys = put(pair[0], 2)
    visible(cache, keys)
    pair[0].stop_tree()
    try:
        started = time.monotonic()
        assert Status.OK not in read(cache, keys[:1], 10_000)
        first_s = time.monotonic() - started
        assert first_s < 2.0
        assert Status.OK not in read(cache, keys[1:], 10_000)
        assert time.monotonic() - started - first_s < 0.5, "it is not asked again before it has been heard from"
    finally:
        pair[0].continue_tree()
    eventually(lambda: read(cache, keys) == [Status.OK] * 2, why="it is back")


def test_what_nobody_has_is_a_miss_without_the_event_loop(pair: list[AgentProcess]) -> None:
    """Behind what is here, too."""
    cache, keys = pair[0].open(LAYOUT), put(pair[0], 3)
    before = {name: pair[0].metric(name) for name in (MISSES, ALL_MISSES, HANDED_OVER)}
    assert read(cache, new_keys(2)) == [Status.MISS] * 2
    assert read(cache, keys + new_keys(4)) == [Status.OK] * 3 + [Status.MISS] * 4
    assert pair[0].metric(MISSES) == before[MISSES] + 6 and pair[0].metric(ALL_MISSES) == before[ALL_MISSES] + 6
    assert pair[0].metric(HANDED_OVER) == before[HANDED_OVER]


def test_so_many_keys_that_looking_them_up_would_hold_up_others_are_the_event_loops(pair: list[AgentProcess]) -> None:
    handed_over = pair[0].metric(HANDED_OVER)
    with lane_connection(pair[0], layout=LAYOUT) as lane:
        got = lane.ask(engine.Get(LAYOUT.namespace, new_keys(1025), 10_000))
    assert isinstance(got, engine.Got) and set(got.statuses) == {Status.MISS} and len(got.statuses) == 1025
    assert pair[0].metric(HANDED_OVER) == handed_over + 1


def test_what_only_a_peer_has_that_is_not_asked_now_is_a_miss_without_the_event_loop(cluster: Cluster) -> None:
    pair = cluster.start(2)
    cluster.connected()
    cache = warm(pair)
    keys = put(pair[0], 6)
    visible(cache, keys)
    pair[0].stop_tree()
    try:
        assert Status.OK not in read(cache, keys[:1], 10_000)
        eventually(lambda: pair[1].metric("p2pkv_peers_not_asked") == 1, why="its breaker opens")
        misses, handed_over = pair[1].metric(MISSES), pair[1].metric(HANDED_OVER)
        for key in keys[1:]:
            assert read(cache, [key], 10_000) == [Status.MISS]
        assert pair[1].metric(MISSES) == misses + 5
        assert pair[1].metric(HANDED_OVER) == handed_over
    finally:
        pair[0].continue_tree()
    eventually(lambda: read(cache, keys) == [Status.OK] * 6, why="it is back")


def test_who_may_hold_no_more_is_told_so_and_not_that_nobody_has_it(cluster: Cluster) -> None:
    [agent] = cluster.start(1, capacity="8MiB", settings={"engine.directory": False})
    keys = put(agent, 100)
    with lane_connection(agent, layout=LAYOUT) as lane:
        statuses: list[int] = []
        for key in keys:
            got = lane.ask(engine.Get(LAYOUT.namespace, [key], 10_000))
            assert isinstance(got, engine.Got)
            statuses += got.statuses
    assert set(statuses) == {Status.OK, Status.BUSY}
    assert agent.metric(MISSES) == 0


def test_the_second_holder_is_asked_when_the_first_one_dies(cluster: Cluster) -> None:
    agents = cluster.start(3)
    cluster.connected()
    keys = new_keys(30)
    for owner in agents[:2]:
        assert all(owner.open(LAYOUT).put(keys, blocks_of(keys, BLOCK)))
    cache = agents[2].open(LAYOUT)
    visible(cache, keys)
    eventually(lambda: all(len(cache.match([key]).nodes) >= 2 for key in keys), why="both holders are known")
    assert read(cache, keys[:10]) == [Status.OK] * 10
    agents[0].kill()
    assert read(cache, keys[10:]) == [Status.OK] * 20


def test_gets_of_a_closed_client_end_at_once(pair: list[AgentProcess]) -> None:
    client = AgentClient(pair[0].socket, name="test")
    cache = client.open(LAYOUT)
    client.close()
    assert read(cache, new_keys(2), 5_000) == [Status.LOST] * 2


LARGE = make_layout(4 << 20)
MIDDLE = make_layout(1 << 20)


def first_large(pair: list[AgentProcess]) -> tuple[Cache, bytes]:
    """A large block at the first agent that the second one can pull by itself."""
    warm(pair)
    [key] = new_keys(1)
    assert pair[0].open(LARGE).put([key], [block_of(key, LARGE.block_bytes)], deadline_ms=10_000) == [True]
    cache = pair[1].open(LARGE)
    visible(cache, [key])
    return cache, key


def answer_to(lane: RawConnection, key: bytes, layout: Layout = LARGE) -> list[engine.Ahead | engine.Got]:
    lane.send(engine.CODEC.encode(engine.Get(layout.namespace, [key], 10_000), 1))
    parts: list[engine.Ahead | engine.Got] = []
    while not parts or not isinstance(parts[-1], engine.Got) or parts[-1].more:
        frame = lane.receive()
        assert frame is not None
        part = engine.CODEC.decode(frame)
        assert isinstance(part, engine.Ahead | engine.Got)
        parts.append(part)
    return parts


def test_a_large_block_is_told_of_while_it_comes(pair: list[AgentProcess]) -> None:
    cache, key = first_large(pair)
    with lane_connection(pair[1], layout=LARGE) as lane:
        *ahead, got = answer_to(lane, key)
    assert ahead and isinstance(got, engine.Got)
    assert {part.offset for part in ahead if isinstance(part, engine.Ahead)} == {got.extents[0].offset}
    lengths = [part.length for part in ahead if isinstance(part, engine.Ahead)]
    assert lengths == sorted(set(lengths)) and lengths[0] > 0 and lengths[-1] < LARGE.block_bytes
    out = bytearray(LARGE.block_bytes)
    assert cache.get_into([key], [out]) == [True] and out == block_of(key, LARGE.block_bytes)


def test_what_was_told_ahead_is_taken_back_when_the_block_is_rejected(cluster: Cluster) -> None:
    with Proxy() as proxy:
        [owner] = cluster.start(1, settings={"peer.advertise": proxy.address})
        proxy.target = owner.peer_port
        [reader] = cluster.start(1, seeds=(proxy.address,))
        cluster.connected()
        cache, key = first_large([owner, reader])
        proxy.flip_at = 3 << 20
        with lane_connection(reader, layout=LARGE) as lane:
            *ahead, got = answer_to(lane, key)
        assert proxy.flipped == 1
        assert isinstance(got, engine.Got) and bytes(got.statuses) == bytes([Status.REJECTED])
        assert len(ahead) > 1 and ahead[-1] == engine.Ahead(0, 0, 0)
        out = bytearray(LARGE.block_bytes)
        eventually(lambda: cache.get_into([key], [out], deadline_ms=10_000) == [True], why="its block is good")
        assert out == block_of(key, LARGE.block_bytes)


@pytest.mark.parametrize("flip_at", [None, BLOCK + 5 * (1 << 20) + 700_000], ids=["good", "last-one-wrong"])
def test_in_small_parts_a_block_is_told_of_that_the_lane_receives_by_itself(
    cluster: Cluster, flip_at: int | None
) -> None:
    """As on a host of many processors; the first block makes the owner known as one that answers quickly."""
    with Proxy() as proxy:
        [owner] = cluster.start(1, settings={"peer.advertise": proxy.address})
        proxy.target = owner.peer_port
        [reader] = cluster.start(1, seeds=(proxy.address,), program=[MUTANT, "small-parts"])
        cluster.connected()
        warm([owner, reader])
        cache, keys = reader.open(MIDDLE), new_keys(6)
        blocks = blocks_of(keys, MIDDLE.block_bytes)
        assert all(owner.open(MIDDLE).put(keys, blocks, deadline_ms=10_000))
        visible(cache, keys)
        with lane_connection(reader, layout=MIDDLE) as lane:
            for key in keys[:-1]:
                *ahead, got = answer_to(lane, key, MIDDLE)
                assert isinstance(got, engine.Got) and bytes(got.statuses) == bytes([Status.OK])
                assert ahead and {part.offset for part in ahead} == {got.extents[0].offset}  # type: ignore[union-attr]
            proxy.flip_at = flip_at
            *ahead, got = answer_to(lane, keys[-1], MIDDLE)
        assert isinstance(got, engine.Got)
        assert bytes(got.statuses) == bytes([Status.OK if flip_at is None else Status.REJECTED])
        assert (ahead[-1] == engine.Ahead(0, 0, 0)) == (flip_at is not None)
        out = [bytearray(MIDDLE.block_bytes) for _ in keys]
        good = len(keys) - (flip_at is not None)
        assert cache.get_into(keys[:good], out[:good]) == [True] * good
        assert out[:good] == blocks[:good]
