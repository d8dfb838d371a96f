"""Gets that native code answers over NIXL: PIN on an idle data connection, READ by the own NIXL process.

The first get of a peer connects the two NIXL processes and goes through the event loop; :func:`warm` makes it. What
goes the short way over NIXL is told from what does not by three counters: the reader's ``short_way_blocks`` grow, its
``short_way_handed_over`` do not, and nor do the bytes that the owner has sent over TCP.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from p2pkv.client.cache import Cache
from p2pkv.types import Layout, Status
from p2pkv.wire import engine
from tests.cluster.agents import AgentProcess, Cluster, alive_peers, eventually, make_layout, state_of, visible
from tests.cluster.blocks import UNIT_BYTES, block_of, blocks_of, new_keys
from tests.cluster.raw import RawConnection, lane_connection
from tests.cluster.transports import NIXL, options

pytestmark = [pytest.mark.cluster, *NIXL.marks]

SMALL = make_layout(65_536)
BATCHED = make_layout(256 << 10)
MIB = make_layout(1 << 20)
LARGE = make_layout((5 << 20) + 4096)
"""Read in parts, of which engines are told ahead; the last one is no whole part."""
SLACK_S = 0.7
"""What a get may take beyond its deadline on a machine whose cores are all busy."""

LOCAL = 'p2pkv_short_way_blocks_total{source="local"}'
PEER = 'p2pkv_short_way_blocks_total{source="peer"}'
HANDED_OVER = "p2pkv_short_way_handed_over_total"
OVER_TCP = 'p2pkv_served_bytes_total{transport="tcp"}'
REJECTED = "p2pkv_rejected_blocks_total"
PULLED = "p2pkv_pulled_blocks_total"
PARKED = 'p2pkv_arena_used_bytes{use="quarantined"}'
QUARANTINED = "p2pkv_nixl_quarantined_bytes"


class Pair(NamedTuple):
    """Who has the blocks, and who gets them."""

    owner: AgentProcess
    reader: AgentProcess

    def counters(self) -> tuple[float, float, float]:
        """Blocks that came the short way, gets that were handed over, bytes over TCP."""
        return self.reader.metric(PEER), self.reader.metric(HANDED_OVER), self.owner.metric(OVER_TCP)


def start(cluster: Cluster, *, owner: str = "192MiB", reader: str = "192MiB", flush_ms: int = 5) -> Pair:
    """Two connected agents with arenas of these sizes. ``flush_ms``: the owner tells of what changed so late."""
    [first] = cluster.start(1, capacity=owner, **options("nixl", **{"peer.flush_ms": flush_ms}))
    # All of a large read may be parked at once; beyond the bound the process would be killed.
    [second] = cluster.start(
        1, capacity=reader, seeds=(first.address,), **options("nixl", **{"transport.quarantine": "90%"})
    )
    cluster.connected()
    return Pair(first, second)


@pytest.fixture(scope="module")
def _warm_pair() -> Iterator[tuple[Cluster, Pair]]:
    with Cluster() as made:
        pair = start(made)
        warm(pair)
        yield made, pair


@pytest.fixture
def pair(_warm_pair: tuple[Cluster, Pair], request: pytest.FixtureRequest) -> Pair:
    """Connected, and connected over NIXL; the module's tests share it: a test must leave it alive and in order."""
    request.node.clusters = [*getattr(request.node, "clusters", []), _warm_pair[0]]
    return _warm_pair[1]


def put(agent: AgentProcess, layout: Layout, count: int) -> list[bytes]:
    keys = new_keys(count)
    assert all(agent.open(layout).put(keys, blocks_of(keys, layout.block_bytes), deadline_ms=10_000))
    return keys


def read(cache: Cache, keys: list[bytes], deadline_ms: int = 10_000) -> list[Status]:
    """A get; every byte of what came is looked at."""
    out = [bytearray(cache.layout.block_bytes) for _ in keys]
    statuses = cache.get_statuses(keys, out, deadline_ms)
    for key, block, status in zip(keys, out, statuses, strict=True):
        assert status is not Status.OK or block == block_of(key, len(block)), "WRONG BYTES"
    return statuses


def warm(pair: Pair, deadline_s: float = 20.0) -> None:
    """Get small blocks until one comes the short way over NIXL."""
    source, cache = pair.owner.open(SMALL), pair.reader.open(SMALL)
    last: list[tuple[list[Status], tuple[float, float, float], tuple[float, float, float]]] = []

    def one() -> bool:
        keys = new_keys(1)
        if not all(source.put(keys, blocks_of(keys, SMALL.block_bytes))):
            return False
        visible(cache, keys)
        peer, handed_over, over_tcp = before = pair.counters()
        statuses = read(cache, keys, 2_000)
        after = pair.counters()
        last[:] = [(statuses, before, after)]
        return statuses == [Status.OK] and after == (peer + 1, handed_over, over_tcp)

    try:
        eventually(one, deadline_s, why="a get goes the short way over NIXL")
    except AssertionError as error:
        raise AssertionError(f"{error}; its last get (answer, counters before, after): {last}") from None


class Answer(NamedTuple):
    """Of one get. ``at``: when it was asked (``time.monotonic()``)."""

    at: float
    seconds: float
    statuses: list[Status]
    wrong: int


class Gets:
    """Gets of the next few keys, round and round, in a thread of its own. A context manager."""

    def __init__(self, cache: Cache, keys: list[bytes], count: int, deadline_ms: int) -> None:
        self.answers: list[Answer] = []
        self._deadline_ms = deadline_ms
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(cache, keys, count))

    def _run(self, cache: Cache, keys: list[bytes], count: int) -> None:
        expected = {key: block_of(key, cache.layout.block_bytes) for key in keys}
        around = itertools.cycle(keys)
        out = [bytearray(cache.layout.block_bytes) for _ in range(count)]
        while not self._over.is_set():
            wanted = list(itertools.islice(around, count))
            at = time.monotonic()
            statuses = cache.get_statuses(wanted, out, self._deadline_ms)
            seconds = time.monotonic() - at
            came = [(key, block) for key, block, s in zip(wanted, out, statuses, strict=True) if s is Status.OK]
            self.answers.append(Answer(at, seconds, statuses, sum(block != expected[key] for key, block in came)))

    def more(self, count: int = 5) -> None:
        """Wait until that many more gets are over."""
        target = len(self.answers) + count
        eventually(lambda: len(self.answers) >= target, 30.0, why="gets go on")

    def end(self) -> list[Answer]:
        """All answers: none wrong, none late."""
        self._over.set()
        self._thread.join(60.0)
        assert not self._thread.is_alive()
        assert sum(answer.wrong for answer in self.answers) == 0, "WRONG BYTES"
        late = [answer for answer in self.answers if answer.seconds > self._deadline_ms / 1e3 + SLACK_S]
        assert not late
        return self.answers

    def __enter__(self) -> Gets:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(60.0)


def came(answers: list[Answer]) -> int:
    return sum(answer.statuses.count(Status.OK) for answer in answers)


def rounds(pair: Pair, count: int = 8, deadline_ms: int = 3_000) -> Gets:
    """Gets of more blocks than the reader has room for, so that (nearly) each is a pull."""
    keys = put(pair.owner, MIB, 96)
    cache = pair.reader.open(MIB)
    visible(cache, keys)
    return Gets(cache, keys, count, deadline_ms)


def nixl_of(agent: AgentProcess) -> int:
    """The pid of its NIXL process."""
    [pid] = agent.children()
    return pid


def stand_still(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state_of(pid) in "TtZ", why=f"pid {pid} stops")


def fill(agent: AgentProcess, layout: Layout) -> list[bytes]:
    """Blocks of its own in every slot that the agent may use now; those that stayed."""
    cache = agent.open(layout)
    evicted = agent.metric("p2pkv_evictions_total")
    keys: list[bytes] = []
    while agent.metric("p2pkv_evictions_total") < evicted + 20 and len(keys) < 400:
        more = new_keys(10)
        stored = cache.put(more, blocks_of(more, layout.block_bytes), deadline_ms=10_000)
        keys += [key for key, there in zip(more, stored, strict=True) if there]
    return [key for key, source in zip(keys, cache.match(keys).present, strict=True) if source == "local"]


# --- as it should be


@pytest.mark.parametrize(
    ("layout", "count"), [(SMALL, 1), (MIB, 1), (LARGE, 1), (BATCHED, 64)], ids=["64K", "1M", "5M", "64x256K"]
)
def test_what_a_peer_has_is_read_without_the_event_loop_and_not_over_tcp(
    pair: Pair, layout: Layout, count: int
) -> None:
    keys = put(pair.owner, layout, count)
    cache = pair.reader.open(layout)
    visible(cache, keys)
    peer, handed_over, over_tcp = pair.counters()
    pulled = pair.reader.metric(PULLED)
    assert read(cache, keys) == [Status.OK] * count
    assert pair.counters() == (peer + count, handed_over, over_tcp)
    assert over_tcp == 0
    eventually(lambda: pair.reader.metric(PULLED) == pulled + count, why="all are counted")
    assert cache.match(keys).local == count, "and is ours now"


def answer_to(
    lane: RawConnection, layout: Layout, keys: list[bytes], deadline_ms: int
) -> list[engine.Ahead | engine.Got]:
    """What comes for a get, to the last part."""
    lane.send(engine.CODEC.encode(engine.Get(layout.namespace, keys, deadline_ms), 1))
    parts: list[engine.Ahead | engine.Got] = []
    while not parts or not isinstance(parts[-1], engine.Got) or parts[-1].more:
        parts.append(next_part(lane))
    return parts


def next_part(lane: RawConnection) -> engine.Ahead | engine.Got:
    frame = lane.receive()
    assert frame is not None
    part = engine.CODEC.decode(frame)
    assert isinstance(part, engine.Ahead | engine.Got)
    return part


def test_a_large_block_is_told_of_while_it_comes(pair: Pair) -> None:
    [key] = put(pair.owner, LARGE, 1)
    cache = pair.reader.open(LARGE)
    visible(cache, [key])
    peer, handed_over, over_tcp = pair.counters()
    with lane_connection(pair.reader, layout=LARGE) as lane:
        *ahead, got = answer_to(lane, LARGE, [key], 10_000)
    assert pair.counters() == (peer + 1, handed_over, over_tcp)
    assert ahead and isinstance(got, engine.Got) and bytes(got.statuses) == bytes([Status.OK])
    assert {part.offset for part in ahead if isinstance(part, engine.Ahead)} == {got.extents[0].offset}
    lengths = [part.length for part in ahead if isinstance(part, engine.Ahead)]
    assert lengths == sorted(set(lengths)) and lengths[0] > 0 and lengths[-1] < LARGE.block_bytes
    assert read(cache, [key]) == [Status.OK]


def test_two_engines_that_want_the_same_block_read_it_once(pair: Pair) -> None:
    caches = [pair.reader.open(SMALL) for _ in range(2)]
    keys = put(pair.owner, SMALL, 200)
    visible(caches[0], keys)
    before = pair.reader.metric(PULLED)
    together = threading.Barrier(2)
    answers: list[list[Status]] = []

    def one(cache: Cache) -> None:
        mine = []
        for key in keys:
            together.wait(30.0)
            mine += read(cache, [key])
        answers.append(mine)

    threads = [threading.Thread(target=one, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[Status.OK] * 200] * 2
    eventually(lambda: pair.reader.metric(PULLED) >= before + 200, why="all are counted")
    assert pair.reader.metric(PULLED) == before + 200
    assert pair.reader.metric("p2pkv_pulls_in_flight_blocks") == 0
    assert pair.owner.metric(OVER_TCP) == 0


@pytest.mark.parametrize(("layout", "count"), [(SMALL, 50), (MIB, 8)], ids=["64K", "1M"])
def test_more_gets_at_once_than_connections_are_idle_all_arrive(pair: Pair, layout: Layout, count: int) -> None:
    caches = [pair.reader.open(layout) for _ in range(4)]
    keys = [put(pair.owner, layout, count) for _ in caches]
    visible(caches[0], list(itertools.chain(*keys)))
    before = pair.reader.metric(PULLED)
    together = threading.Barrier(4)
    answers: list[Status] = []

    def one(cache: Cache, mine: list[bytes]) -> None:
        for key in mine:
            together.wait(30.0)
            answers.extend(read(cache, [key]))

    threads = [threading.Thread(target=one, args=(c, k)) for c, k in zip(caches, keys, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [Status.OK] * 4 * count
    eventually(lambda: pair.reader.metric(PULLED) == before + 4 * count, why="all are counted, once")
    assert pair.owner.metric(OVER_TCP) == 0
    warm(pair)


def test_what_the_owner_has_evicted_is_a_miss_and_the_rest_arrives(cluster: Cluster) -> None:
    """The owner tells of an eviction a second later, so the reader asks it for blocks that it no longer has."""
    pair = start(cluster, owner="24MiB", flush_ms=1_500)
    warm(pair, 60.0)
    mine, cache = pair.owner.open(MIB), pair.reader.open(MIB)
    for _ in range(5):
        keys = put(pair.owner, MIB, 8)
        visible(cache, keys)
        while all(source == "local" for source in mine.match(keys).present):
            put(pair.owner, MIB, 1)
        there = [source == "local" for source in mine.match(keys).present]
        if any(there) and cache.match(keys).anywhere == len(keys):
            break
    else:
        raise AssertionError("the reader heard of every eviction at once")
    peer = pair.reader.metric(PEER)
    assert read(cache, keys) == [Status.OK if here else Status.MISS for here in there]
    assert pair.reader.metric(PEER) == peer + sum(there)
    missing = len(keys) - sum(there)
    eventually(lambda: pair.reader.metric("p2pkv_pull_missing_blocks_total") == missing, why="misses are counted")
    assert pair.owner.metric(OVER_TCP) == 0
    warm(pair, 60.0)


# --- bytes that are not what they were


@contextlib.contextmanager
def arena_of(agent: AgentProcess) -> Iterator[mmap.mmap]:
    """An agent's arena, mapped for writing: what only a test, or broken memory, does."""
    for entry in os.listdir(f"/proc/{agent.pid}/fd"):
        path = f"/proc/{agent.pid}/fd/{entry}"
        if os.readlink(path).startswith("/memfd:p2pkv-arena"):
            os.chmod(path, 0o600)  # the agent has made it read-only for whoever is not root
            fd = os.open(path, os.O_RDWR)
            try:
                memory = mmap.mmap(fd, os.fstat(fd).st_size)
            finally:
                os.close(fd)
            with memory:
                yield memory
            return
    raise AssertionError("the agent has no arena")


def flip_a_bit(agent: AgentProcess, key: bytes, layout: Layout, at: int) -> None:
    """In the only copy of this block that the agent has, ``at`` bytes into it."""
    with arena_of(agent) as memory:
        first = block_of(key, UNIT_BYTES)
        start = memory.find(first)
        assert start >= 0 and memory[start : start + layout.block_bytes] == block_of(key, layout.block_bytes)
        assert memory.find(first, start + layout.block_bytes) < 0
        memory[start + at] ^= 1 << 4


@pytest.mark.parametrize("layout", [SMALL, MIB, LARGE], ids=["64K", "1M", "5M"])
def test_a_flipped_bit_is_rejected_and_counted_once(pair: Pair, layout: Layout) -> None:
    bad, good = put(pair.owner, layout, 2)
    cache = pair.reader.open(layout)
    visible(cache, [bad, good])
    flip_a_bit(pair.owner, bad, layout, layout.block_bytes - 1000)
    rejected = pair.reader.metric(REJECTED)
    peer, handed_over, over_tcp = pair.counters()
    assert read(cache, [bad]) == [Status.REJECTED]
    eventually(lambda: pair.reader.metric(REJECTED) > rejected, why="it is counted")
    assert pair.reader.metric(REJECTED) == rejected + 1
    assert pair.counters() == (peer, handed_over + 1, over_tcp), "the event loop looks for another holder"
    assert cache.match([bad]).local == 0
    out = bytearray(layout.block_bytes)
    assert cache.get_into([bad], [out], deadline_ms=5_000) == [False]
    assert read(cache, [good]) == [Status.OK]
    assert pair.counters()[0] == peer + 1
    warm(pair)


def test_a_flipped_bit_in_a_batch_costs_one_block(pair: Pair) -> None:
    keys = put(pair.owner, BATCHED, 16)
    cache = pair.reader.open(BATCHED)
    visible(cache, keys)
    flip_a_bit(pair.owner, keys[9], BATCHED, 1000)
    rejected = pair.reader.metric(REJECTED)
    statuses = read(cache, keys)
    assert statuses == [Status.REJECTED if i == 9 else Status.OK for i in range(16)]
    eventually(lambda: pair.reader.metric(REJECTED) > rejected, why="it is counted")
    assert pair.reader.metric(REJECTED) == rejected + 1
    warm(pair)


def test_what_was_told_ahead_is_taken_back_when_the_block_is_rejected(pair: Pair) -> None:
    [key] = put(pair.owner, LARGE, 1)
    visible(pair.reader.open(LARGE), [key])
    flip_a_bit(pair.owner, key, LARGE, 3 << 20)
    with lane_connection(pair.reader, layout=LARGE) as lane:
        *ahead, got = answer_to(lane, LARGE, [key], 10_000)
    assert isinstance(got, engine.Got) and bytes(got.statuses) == bytes([Status.REJECTED])
    assert len(ahead) > 1 and ahead[-1] == engine.Ahead(0, 0, 0)


# --- NIXL processes that go


def replaced(agent: AgentProcess, count: float) -> None:
    """Wait until its NIXL process has been started so many times again, and is ready."""
    eventually(lambda: agent.metric("p2pkv_nixl_restarts_total") == count, 20.0, why="another one starts")
    eventually(lambda: agent.metric("p2pkv_nixl_ready") == 1, 20.0, why="and is ready")


@pytest.mark.parametrize("whose", ["reader", "owner"])
def test_gets_survive_the_end_of_a_nixl_process(cluster: Cluster, whose: str) -> None:
    pair = start(cluster, reader="32MiB")
    warm(pair)
    victim: AgentProcess = getattr(pair, whose)
    with rounds(pair) as gets:
        gets.more()
        os.kill(nixl_of(victim), signal.SIGKILL)
        gets.more()
        replaced(victim, 1)
        again = len(gets.answers) + 1
        gets.more(20)
        assert came(gets.end()[again:]) > 0
    assert pair.reader.metric("p2pkv_nixl_restarts_total") == (whose == "reader")
    eventually(lambda: pair.reader.metric(PARKED) == pair.reader.metric(QUARANTINED) == 0, 2.0, why="it is dead")
    cache, keys = pair.reader.open(MIB), put(pair.owner, MIB, 4)
    visible(cache, keys)
    assert read(cache, keys) == [Status.OK] * 4


@pytest.mark.parametrize("whose", ["reader", "owner"])
@pytest.mark.parametrize("meanwhile", ["idle", "gets"])
def test_gets_go_the_short_way_over_nixl_again_once_a_nixl_process_is_replaced(
    cluster: Cluster, whose: str, meanwhile: str
) -> None:
    """Whether gets were served over TCP in between, or there were none.

    Small ones, by three engines: some come after the owner's new process answers PIN and before its card offers NIXL.
    """
    pair = start(cluster, reader="8MiB")
    warm(pair)
    victim: AgentProcess = getattr(pair, whose)
    if meanwhile == "gets":
        keys = [put(pair.owner, SMALL, 200) for _ in range(3)]
        visible(pair.reader.open(SMALL), list(itertools.chain(*keys)))
        with contextlib.ExitStack() as stack:
            engines = [stack.enter_context(Gets(pair.reader.open(SMALL), mine, 1, 3_000)) for mine in keys]
            os.kill(nixl_of(victim), signal.SIGKILL)
            replaced(victim, 1)
            for gets in engines:
                gets.more(20)
                gets.end()
    else:
        os.kill(nixl_of(victim), signal.SIGKILL)
        replaced(victim, 1)
    warm(pair, 8.0)


def test_a_get_ends_in_time_when_the_readers_nixl_process_stands_still(cluster: Cluster) -> None:
    pair = start(cluster)
    warm(pair)
    keys = put(pair.owner, MIB, 4)
    cache = pair.reader.open(MIB)
    visible(cache, keys)
    local = put(pair.reader, SMALL, 4)
    small = pair.reader.open(SMALL)
    nixl = nixl_of(pair.reader)
    stand_still(nixl)
    try:
        started = time.monotonic()
        statuses = read(cache, keys, 500)
        assert time.monotonic() - started < 0.5 + SLACK_S
        assert statuses == [Status.TIMEOUT] * 4
        assert read(small, local, 500) == [Status.OK] * 4, "a local hit has nothing to do with it"
        eventually(lambda: pair.reader.metric(PARKED) >= 4 * MIB.block_bytes, 1.0, why="the slots are parked")
        eventually(lambda: pair.reader.metric(QUARANTINED) >= 4 * MIB.block_bytes, why="its supervisor hears of it")
    finally:
        os.kill(nixl, signal.SIGCONT)
    eventually(lambda: pair.reader.metric(PARKED) == pair.reader.metric(QUARANTINED) == 0, why="quarantine ends")
    assert pair.reader.metric("p2pkv_nixl_restarts_total") == 0
    assert read(cache, keys) == [Status.OK] * 4
    warm(pair)


def test_a_nixl_process_that_stops_in_mid_read_and_goes_on_later_writes_into_nothing_reused(cluster: Cluster) -> None:
    """It is stopped at the first news of a read of 100 MiB; what it may still write to is used by nobody meanwhile."""
    pair = start(cluster)
    warm(pair)
    nixl = nixl_of(pair.reader)
    cache = pair.reader.open(LARGE)
    for _ in range(5):
        keys = put(pair.owner, LARGE, 20)
        visible(cache, keys)
        with lane_connection(pair.reader, layout=LARGE) as lane:
            lane.send(engine.CODEC.encode(engine.Get(LARGE.namespace, keys, 700), 1))
            part = next_part(lane)
            stand_still(nixl)
            started = time.monotonic()
            statuses: dict[int, int] = {}
            while len(statuses) < len(keys):
                if isinstance(part, engine.Got):
                    statuses.update(zip(part.indices, part.statuses, strict=True))
                if len(statuses) < len(keys):
                    part = next_part(lane)
        if any(status != Status.OK for status in statuses.values()):
            break
        os.kill(nixl, signal.SIGCONT)
    else:
        pytest.skip("5 reads were over before the process could be stopped")
    try:
        assert time.monotonic() - started < 0.7 + SLACK_S
        late = [keys[i] for i, status in statuses.items() if status != Status.OK]
        assert {status for status in statuses.values() if status != Status.OK} == {Status.TIMEOUT}
        eventually(lambda: pair.reader.metric(PARKED) >= len(late) * LARGE.block_bytes, 1.0, why="slots are parked")
        own = fill(pair.reader, LARGE)
        assert len(own) > 5
    finally:
        os.kill(nixl, signal.SIGCONT)
    eventually(lambda: pair.reader.metric(PARKED) == pair.reader.metric(QUARANTINED) == 0, why="quarantine ends")
    assert read(cache, own) == [Status.OK] * len(own)
    for key in late:  # one by one: all together are more than a peer may hold of an owner's arena
        assert read(cache, [key]) == [Status.OK]
    warm(pair)


def test_a_nixl_process_that_never_goes_on_is_replaced(cluster: Cluster) -> None:
    pair = start(cluster)
    warm(pair)
    keys = put(pair.owner, MIB, 4)
    cache = pair.reader.open(MIB)
    visible(cache, keys)
    stand_still(nixl_of(pair.reader))
    assert Status.OK not in read(cache, keys, 300)
    eventually(lambda: pair.reader.metric(PARKED) > 0, 1.0, why="the slots are parked")
    replaced(pair.reader, 1)
    eventually(lambda: pair.reader.metric(PARKED) == pair.reader.metric(QUARANTINED) == 0, 2.0, why="it is dead")
    assert read(cache, keys) == [Status.OK] * 4


# --- owners that go


def test_an_owner_that_is_killed_costs_well_under_a_second_and_no_local_hit(cluster: Cluster) -> None:
    pair = start(cluster, reader="64MiB")
    warm(pair)
    local = put(pair.reader, SMALL, 4)
    with lane_connection(pair.reader, layout=SMALL) as holder:
        answer_to(holder, SMALL, local, 1_000)  # and its lease is kept: what is pulled must not push them out
        with (
            rounds(pair, deadline_ms=5_000) as gets,
            Gets(pair.reader.open(SMALL), local, 4, 500) as hits,
        ):
            gets.more()
            before = len(gets.answers)
            pair.owner.kill()
            gets.more()
            eventually(lambda: pair.owner.node not in alive_peers(pair.reader), why="its death is noticed")
            gets.more()
            answers = gets.end()
            hit = hits.end()
    assert max(answer.seconds for answer in answers[before:]) < 0.8
    assert not [answer for answer in hit if answer.statuses != [Status.OK] * 4]
    assert max(answer.seconds for answer in hit) < 0.5
    assert pair.reader.metric("p2pkv_pulls_in_flight_blocks") == 0
    eventually(lambda: pair.reader.metric(PARKED) == 0, why="nothing stays parked")


@pytest.mark.parametrize("whole", [False, True], ids=["agent", "agent-and-nixl-process"])
def test_an_owner_that_stands_still_is_a_miss_in_time_and_comes_back(cluster: Cluster, whole: bool) -> None:
    pair = start(cluster, reader="32MiB")
    warm(pair)
    with rounds(pair, deadline_ms=1_500) as gets:
        gets.more()
        if whole:
            pair.owner.stop_tree()
        else:
            stand_still(pair.owner.pid)
        try:
            stopped = time.monotonic()
            gets.more(10)
        finally:
            pair.owner.continue_tree()
        eventually(lambda: pair.owner.node in alive_peers(pair.reader), 20.0, why="the peer is heard again")
        eventually(lambda: gets.answers[-1].statuses == [Status.OK] * 8, 20.0, why="everything comes again")
        answers = gets.end()
    assert any(Status.OK not in answer.statuses for answer in answers if answer.at > stopped)
    warm(pair)
    eventually(lambda: pair.reader.metric(PARKED) == pair.reader.metric(QUARANTINED) == 0, why="nothing stays parked")


@pytest.mark.skipif(
    len(os.sched_getaffinity(0)) < 2, reason="this host lends one processor: nothing can be put anywhere"
)
def test_with_two_processors_the_nixl_process_reads_on_the_one_that_the_engine_does_not_use() -> None:
    before = os.sched_getaffinity(0)
    first, second = sorted(before)[:2]
    try:
        os.sched_setaffinity(0, (first, second))  # whoever is started now may use these two
        with Cluster() as cluster:
            pair = start(cluster)
            for engine, other in ((first, second), (second, first)):
                os.sched_setaffinity(0, (engine,))
                warm(pair)
                [child] = pair.reader.children()
                assert os.sched_getaffinity(child) == {other}
    finally:
        os.sched_setaffinity(0, before)
