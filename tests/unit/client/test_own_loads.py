"""Loads by an engine's own threads: how they end, with the connection, with a region, and when they cannot begin."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from p2pkv.client import AgentClient
from p2pkv.client.cache import Cache, Region
from p2pkv.client.jobs import JobResult, Jobs
from p2pkv.client.messages import Load
from p2pkv.client.own_loads import OwnLoads
from tests.unit.client.directories import Held, Silent

MIB = 1 << 20
BIG = 64 * MIB


class Engine:
    def __init__(self, block_bytes: int) -> None:
        self.held = Held(2, block_bytes)
        ours, self.agent = socket.socketpair()
        self.gets = self.held.gets(ours.detach())
        self.loads = OwnLoads(self.gets)
        self.memory = memoryview(bytearray(block_bytes))
        self.done: list[bytes] = []

    def begin(self, times: int) -> bool:
        """Both blocks, into the same slot, again and again."""
        import ctypes

        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        size = self.held.layout.block_bytes
        keys = self.held.keys * times
        return self.loads.begin(self.held.namespace, keys, self.memory, [address] * len(keys), size, self.done.append)


@pytest.fixture
def small() -> Iterator[Engine]:
    engine = Engine(64 << 10)
    yield engine
    engine.loads.end()
    engine.agent.close()


@pytest.fixture
def big() -> Iterator[Engine]:
    engine = Engine(BIG)
    yield engine
    engine.loads.end()
    engine.agent.close()


@pytest.mark.parametrize("times", [1, 100], ids=["at once", "by threads"])
def test_after_the_end_nothing_begins(small: Engine, times: int) -> None:
    assert small.begin(times)
    small.loads.end()
    assert len(small.done) == 1 and small.loads.running == 0
    small.memory[:] = bytes(len(small.memory))
    assert not small.begin(times), "the connection broke after it was looked at"
    assert len(small.done) == 1 and small.loads.running == 0
    here = Jobs().loads_here(small.gets, small.memory, 0, 65_536, 1)
    assert here(small.held.namespace, 65_536, small.held.keys[:1], [0]) is None
    assert not any(small.memory)


def test_what_was_called_off_can_begin_again(small: Engine) -> None:
    for times in (1, 100, 1):
        small.loads.call_off()
        assert small.begin(times)


@pytest.fixture
def eager() -> Iterator[None]:
    """Threads that hold the GIL give it up soon."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager")
def test_calling_off_waits_for_what_was_there_and_not_for_what_begins_meanwhile(big: Engine) -> None:
    """No one can be told to be waiting already, so this is tried until it clearly was when the second load began."""
    for _ in range(50):
        after: list[tuple[float, int]] = []

        def call_off(after: list[tuple[float, int]] = after) -> None:
            big.loads.call_off()
            after.append((time.monotonic(), big.loads.running))

        assert big.begin(1)
        other = threading.Thread(target=call_off)
        other.start()
        time.sleep(0.0005)
        assert big.begin(20), "a third of a second of it"
        begun_at = time.monotonic()
        other.join(20)
        [(returned_at, running)] = after
        if running == 1 and returned_at - begun_at > 0.002:
            return
        big.loads.call_off()
    pytest.fail("what began later was waited for")


NO_THREAD = """
import resource, socket, sys
from tests.unit.client.test_own_loads import Engine
engine = Engine(64 << 10)
size = int(open("/proc/self/statm").read().split()[0]) * 4096
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (size + (1 << 20), hard))
begun = engine.begin(100)
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
assert begun is False and engine.loads.running == 0 and engine.done == [], begun
assert engine.begin(100) is True
engine.loads.end()
engine.agent.close()
assert len(engine.done) == 1
"""


def test_without_a_thread_to_be_had_the_agent_is_asked() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", NO_THREAD], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


class Interrupted:
    """A client's connection where something raises while a load begins."""

    broken = None
    copied_fd = 0

    def __init__(self, error: BaseException) -> None:
        self.own_loads = OwnLoads(self)  # type: ignore[arg-type]
        self.error = error
        self.called_off = 0

    def copy_here(self, *_: object) -> None:
        raise self.error

    def call_off_copies(self) -> None:
        self.called_off += 1

    end_copies = call_off_copies

    def copied(self) -> list[tuple[int, bytes]]:
        return [(1, b"\x01")] if self.called_off == 1 else []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_a_load_that_could_not_begin_leaves_nothing_behind(tmp_path: Path, error: BaseException) -> None:
    connection = Interrupted(error)
    client = AgentClient(tmp_path / "s")
    client._connection = connection  # type: ignore[assignment]
    region = SimpleNamespace(memory=lambda: SimpleNamespace(address=0), offset=0, slot_bytes=64)
    with pytest.raises(type(error)):
        client.load_here(Load(1, [b"k" * 8], 1, [0], 0), region, 64)  # type: ignore[arg-type]
    assert client.jobs_running == 0 and connection.own_loads.running == 0
    assert connection.called_off == 1, "it may have begun: nobody writes any more"
    connection.own_loads.pump()
    assert client.jobs_running == 0 and client.jobs.take() == []


@pytest.fixture
def attached(tmp_path: Path) -> Iterator[tuple[Cache, Region]]:
    """With an agent that never answers."""
    held = Held(8, MIB)
    directory = held.files.descriptors()
    agent = Silent(tmp_path / "s", held.arena.fd, held.arena.capacity_bytes, directory)
    fd = os.memfd_create("test")
    os.ftruncate(fd, 8 * MIB)
    with AgentClient(agent.path) as client:
        client.connection(time.monotonic() + 10)
        yield Cache(client, held.layout, held.namespace), Region(client, fd, 0, MIB, 8)
    agent.close()
    for descriptor in directory:
        os.close(descriptor)


@pytest.mark.parametrize("count", [1, 8], ids=["at once", "by threads"])
def test_who_polls_already_hears_of_a_load_that_another_thread_begins(
    attached: tuple[Cache, Region], count: int
) -> None:
    cache, region = attached
    client = cache._client
    keys = [bytes([i + 1]) * 16 for i in range(count)]
    cache.submit_match(keys)
    results: list[JobResult] = []
    poller = threading.Thread(target=lambda: results.extend(client.poll(20_000)))
    poller.start()
    started = time.monotonic()
    while not client.jobs.sleepers:
        assert time.monotonic() - started < 10.0
    job = cache.load(keys, region, list(range(count)))
    poller.join(30)
    assert [result.job_id for result in results] == [job] and all(results[0].ok)
    assert time.monotonic() - started < 5.0


def test_a_region_that_is_given_up_is_not_mapped_again(attached: tuple[Cache, Region]) -> None:
    cache, region = attached
    assert region.memory() is not None
    with pytest.raises(Exception, match="in time"):
        region.unmap(deadline_ms=1)
    assert region.memory() is None, "only the agent writes to it, and says when it does no more"
    assert cache._client.jobs_running == 0
