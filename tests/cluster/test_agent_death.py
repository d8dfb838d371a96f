"""The agent dies, stands still or is restarted under its engine: typed answers in time, nothing wrong, and on
it goes.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Iterator

import pytest

from p2pkv.client import AgentClient, JobResult
from p2pkv.errors import AgentUnavailable, DeadlineExceeded, P2PKVError
from p2pkv.types import Status
from tests.cluster.agents import Cluster, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys

pytestmark = [pytest.mark.cluster]

BLOCK = 256 << 10
LAYOUT = make_layout(BLOCK)
SLOTS = 32
LOADS_ARE_THE_AGENTS = {"engine.directory": False}
"""An engine would otherwise copy what is in the arena by itself (test_own_loads)."""


class Memory:
    """Shared memory of an engine, in slots."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("test-engine")
        os.ftruncate(self.fd, SLOTS * BLOCK)
        self.map = mmap.mmap(self.fd, SLOTS * BLOCK)

    def __getitem__(self, slot: int) -> bytes:
        return self.map[slot * BLOCK : (slot + 1) * BLOCK]

    def __setitem__(self, slot: int, content: bytes) -> None:
        self.map[slot * BLOCK : (slot + 1) * BLOCK] = content

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)


@pytest.fixture
def memory() -> Iterator[Memory]:
    made = Memory()
    yield made
    made.close()


def results(client: AgentClient, jobs: set[int], deadline_s: float = 10.0) -> dict[int, JobResult]:
    """Poll until every one of these jobs has ended."""
    found: dict[int, JobResult] = {}

    def all_here() -> bool:
        found.update({result.job_id: result for result in client.poll(50)})
        return jobs <= found.keys()

    eventually(all_here, deadline_s, why="every job ends")
    return found


def submitted(client: AgentClient, submit: object) -> int:
    """Submit a job, again while the client is connecting."""

    def attempt() -> int:
        try:
            return submit()  # type: ignore[operator, no-any-return]
        except AgentUnavailable:
            client.poll()
            return 0

    return eventually(attempt, 20.0, why="the client reconnects")


def test_jobs_in_flight_are_lost_and_the_next_agent_gets_layouts_and_regions_again(
    cluster: Cluster, memory: Memory
) -> None:
    """The agent is stopped first, so that the jobs are in flight for sure when it is killed."""
    [agent] = cluster.start(1, http_on=False, settings=LOADS_ARE_THE_AGENTS)
    client = agent.client()
    cache = client.open(LAYOUT)
    region = cache.map_region(memory.fd, slots=SLOTS)
    keys = new_keys(8)
    for slot, key in enumerate(keys):
        memory[slot] = block_of(key, BLOCK)
    done = results(client, {cache.store(keys, region, list(range(8)))})
    assert [r.ok for r in done.values()] == [[True] * 8]

    agent.stop_tree()
    jobs = {
        cache.store(new_keys(2), region, [8, 9]),
        cache.load(keys, region, list(range(16, 24))),
        cache.submit_match(keys),
    }
    assert client.poll() == []
    agent.kill()
    started = time.monotonic()
    lost = results(client, jobs, 5.0)
    assert time.monotonic() - started < 2.0
    assert all(result.lost and not any(result.ok) for result in lost.values())
    assert {result.statuses[0] for result in lost.values()} == {Status.LOST}
    assert memory[16] == bytes(BLOCK), "a load that was never worked on has written"
    assert client.jobs_running == 0

    agent.launch()
    agent.ready()
    job = submitted(client, lambda: cache.store(keys, region, list(range(8))))
    assert results(client, {job})[job].ok == [True] * 8
    job = submitted(client, lambda: cache.load(keys, region, list(range(16, 24))))
    assert results(client, {job})[job].ok == [True] * 8
    assert [memory[16 + i] for i in range(8)] == blocks_of(keys, BLOCK)


def test_blocking_calls_survive_a_restart(cluster: Cluster) -> None:
    [agent] = cluster.start(1, http_on=False)
    cache = agent.open(LAYOUT)
    keys = new_keys(4)
    out = [bytearray(BLOCK) for _ in keys]
    assert all(cache.put(keys, blocks_of(keys, BLOCK)))
    agent.kill()
    eventually(lambda: not any(cache.get_into(keys, out, deadline_ms=500)), 2.0, why="it is known to be gone")
    started = time.monotonic()
    with pytest.raises((AgentUnavailable, DeadlineExceeded)):
        cache.put(keys, blocks_of(keys, BLOCK), deadline_ms=500)
    with pytest.raises((AgentUnavailable, DeadlineExceeded)):
        cache.match(keys, deadline_ms=500)
    assert time.monotonic() - started < 3.0
    agent.launch()
    agent.ready()
    eventually(lambda: put_quietly(cache, keys), why="the client reconnects by itself")
    assert cache.get_into(keys, out) == [True] * 4
    assert out == blocks_of(keys, BLOCK)


def put_quietly(cache: object, keys: list[bytes]) -> bool:
    try:
        return all(cache.put(keys, blocks_of(keys, BLOCK)))  # type: ignore[attr-defined]
    except AgentUnavailable:
        return False


def test_a_get_that_waits_when_the_agent_dies_ends_at_once(cluster: Cluster) -> None:
    [agent] = cluster.start(1, http_on=False)
    cache = agent.open(LAYOUT)
    [key] = new_keys(1)  # nobody has it
    agent.stop_tree()
    answer: list[object] = []
    thread = threading.Thread(target=lambda: answer.append(cache.get_statuses([key], [bytearray(BLOCK)], 20_000)))
    thread.start()
    eventually(lambda: waits_in_poll(thread), why="the call waits for its answer")
    started = time.monotonic()
    agent.kill()
    thread.join(10.0)
    assert time.monotonic() - started < 5.0
    assert answer == [[Status.LOST]]


def waits_in_poll(thread: threading.Thread) -> bool:
    try:
        with open(f"/proc/self/task/{thread.native_id}/wchan") as file:
            return "poll" in file.read()
    except OSError:
        return True


def test_an_agent_that_stands_still_costs_no_call_more_than_its_deadline(cluster: Cluster, memory: Memory) -> None:
    [agent] = cluster.start(1, http_on=False)
    client = agent.client()
    cache = client.open(LAYOUT)
    region = cache.map_region(memory.fd, slots=SLOTS)
    keys = new_keys(4)
    assert all(cache.put(keys, blocks_of(keys, BLOCK)))
    agent.stop_tree()
    out = [bytearray(BLOCK) for _ in keys]
    assert cache.get_into(keys, out, deadline_ms=200) == [True] * 4 and out == blocks_of(keys, BLOCK), "here it is"
    calls = [
        lambda: cache.get_into(new_keys(4), [bytearray(BLOCK) for _ in keys], deadline_ms=200),
        lambda: cache.put(new_keys(4), blocks_of(keys, BLOCK), deadline_ms=200),
        lambda: cache.match(keys, deadline_ms=200),
        lambda: client.open(make_layout(4096), deadline_ms=200),
        lambda: cache.map_region(memory.fd, slots=1, deadline_ms=200),
        lambda: region.unmap(deadline_ms=200),
        lambda: AgentClient(agent.socket).open(LAYOUT, deadline_ms=200),
    ]
    for number, call in enumerate(calls):
        started = time.monotonic()
        try:
            answer = call()
        except P2PKVError as error:
            assert isinstance(error, AgentUnavailable | DeadlineExceeded), repr(error)
        else:
            assert answer == [False] * 4
        assert time.monotonic() - started < 0.2 + 0.5, f"call {number}"
    started = time.monotonic()
    for _ in range(10):
        cache.load(keys, region, [0, 1, 2, 3], deadline_ms=200)
        client.poll()
    assert time.monotonic() - started < 0.5, "submitting waited"
    agent.continue_tree()
    assert all(eventually(lambda: cache.get_into(keys, [bytearray(BLOCK) for _ in keys], deadline_ms=500)))


def test_a_load_is_the_agents_until_it_answers_or_is_gone(cluster: Cluster, memory: Memory) -> None:
    """An agent that stands still may go on writing when it wakes up: no result before, no byte after."""
    [agent] = cluster.start(1, http_on=False, settings=LOADS_ARE_THE_AGENTS)
    client = agent.client()
    cache = client.open(LAYOUT)
    region = cache.map_region(memory.fd, slots=SLOTS)
    keys = new_keys(SLOTS)
    assert all(cache.put(keys, blocks_of(keys, BLOCK)))
    agent.stop_tree()
    job = cache.load(keys, region, list(range(SLOTS)), deadline_ms=50)
    started = time.monotonic()
    while time.monotonic() < started + 0.5:
        assert client.poll(20) == []
    agent.continue_tree()
    [late] = results(client, {job}).values()
    assert not late.lost
    for slot, (good, key) in enumerate(zip(late.ok, keys, strict=True)):
        assert not good or memory[slot] == block_of(key, BLOCK)
        memory[slot] = b"\x55" * BLOCK
    assert cache.get_into(keys, [bytearray(BLOCK) for _ in keys]) == [True] * SLOTS
    assert all(memory[slot] == b"\x55" * BLOCK for slot in range(SLOTS)), "written to after its result"

    agent.stop_tree()
    job = cache.load(keys, region, list(range(SLOTS)), deadline_ms=50)
    agent.kill()
    [gone] = results(client, {job}).values()
    assert gone.lost and not any(gone.ok)


def test_a_store_that_is_given_up_is_never_published(cluster: Cluster, memory: Memory) -> None:
    """Its slots are the engine's again, whatever the agent reads from them when it wakes up."""
    [agent] = cluster.start(1, http_on=False)
    client = agent.client()
    cache = client.open(LAYOUT)
    region = cache.map_region(memory.fd, slots=SLOTS)
    keys = new_keys(4)
    agent.stop_tree()
    jobs = {cache.store(keys, region, [0, 1, 2, 3], deadline_ms=50), cache.submit_match(keys, deadline_ms=50)}
    given_up = results(client, jobs, 12.0)
    assert all(result.lost and not any(result.ok) for result in given_up.values())
    for slot in range(4):
        memory[slot] = b"\x55" * BLOCK
    agent.continue_tree()
    fresh = agent.open(LAYOUT)  # another client: by now the agent has taken in everything that came before it
    assert fresh.get_into(keys, [bytearray(BLOCK) for _ in keys], deadline_ms=200) == [False] * 4
    assert fresh.match(keys).local == 0


def test_a_region_that_was_cut_off_does_not_keep_the_client_from_the_next_agent(
    cluster: Cluster, memory: Memory
) -> None:
    """What an engine did to one region must not cost it every other call after a restart."""
    [agent] = cluster.start(1, http_on=False)
    client = agent.client()
    cache = client.open(LAYOUT)
    cache.map_region(memory.fd, slots=SLOTS)
    os.ftruncate(memory.fd, BLOCK)
    agent.kill()
    agent.launch()
    agent.ready()
    [key] = new_keys(1)
    eventually(lambda: put_quietly(cache, [key]), 5.0, why="put works again")


def test_a_restarted_agent_of_the_same_identity_replaces_the_dead_one_at_its_peers(cluster: Cluster) -> None:
    """A new epoch of the same node: its old entries are gone, its new ones are found."""
    state = cluster.directory / "state"
    [owner] = cluster.start(1, settings={"state_dir": state})
    [reader] = cluster.start(1, seeds=(owner.address,))
    cluster.connected()
    old, new = new_keys(2)
    assert owner.open(LAYOUT).put([old], [block_of(old, BLOCK)]) == [True]
    there = reader.open(LAYOUT)
    visible(there, [old])
    node, port = owner.node, owner.peer_port
    owner.kill()
    owner.arguments[owner.arguments.index("--peer-port") + 1] = str(port)
    owner.launch()
    owner.ready()
    assert owner.node == node
    cluster.connected()
    assert owner.open(LAYOUT).put([new], [block_of(new, BLOCK)]) == [True]
    visible(there, [new])
    out = bytearray(BLOCK)
    assert there.get_into([new], [out]) == [True] and out == block_of(new, BLOCK)
    assert there.match([old]).anywhere == 0
    assert there.get_into([old], [out]) == [False]
