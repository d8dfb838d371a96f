"""The NIXL child and its supervision, on real processes. Needs the nixl extra; says so where it is missing."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from p2pkv.errors import Busy, DeadlineExceeded, InvalidArgument, PeerUnavailable, TransportUnavailable
from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_child import spawn
from p2pkv.transport.nixl_process import NixlOptions, NixlProcess, piece_bytes_for
from p2pkv.transport.nixl_wire import Run
from p2pkv.wire.frame import HEADER
from p2pkv.wire.peer import NixlEndpoint

HAVE_NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))
needs_nixl = pytest.mark.skipif(not HAVE_NIXL, reason="NIXL IS NOT INSTALLED (make nixl): its process is not tested")
pytestmark = [pytest.mark.nixl]

MIB = 1 << 20
ARENA = 96 * MIB
TCP = {"UCX_TLS": "tcp", "UCX_NET_DEVICES": "lo"}
"""No copy inside one system call: the owner's process has to take part, so it can be stopped in mid read."""


@functools.cache
def content() -> bytes:
    """Random, so that no two places of the owner's arena look alike."""
    return random.Random(7).randbytes(ARENA)


class Node:
    """An arena, its NIXL process, and what its callbacks said."""

    def __init__(self, node: int, **options: object) -> None:
        self.fd = os.memfd_create(f"test-arena-{node}")
        os.ftruncate(self.fd, ARENA)
        self.memory = mmap.mmap(self.fd, ARENA)
        self.events: list[tuple[str, int]] = []
        self.cleared: asyncio.Queue[int] = asyncio.Queue()
        self.endpoints: asyncio.Queue[NixlEndpoint] = asyncio.Queue()
        self.process = NixlProcess(
            self.fd,
            ARENA,
            node=node,
            epoch=1,
            options=msgspec.convert(options, NixlOptions),
            on_ready=self.endpoints.put_nowait,
            on_quarantine=lambda read_id, _: self.events.append(("quarantine", read_id)),
            on_clear=self._on_clear,
        )

    def _on_clear(self, read_id: int) -> None:
        self.events.append(("clear", read_id))
        self.cleared.put_nowait(read_id)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    async def next_endpoint(self) -> NixlEndpoint:
        async with asyncio.timeout(30):
            return await self.endpoints.get()

    async def next_clear(self) -> int:
        async with asyncio.timeout(10):
            return await self.cleared.get()


@asynccontextmanager
async def nodes(
    *, owner: dict[str, object] | None = None, reader: dict[str, object] | None = None
) -> AsyncIterator[tuple[Node, Node]]:
    """An owner whose arena is full of random bytes, and a reader connected to it."""
    owning, reading = Node(0xA, **(owner or {})), Node(0xB, **(reader or {}))
    owning.memory[:] = content()
    try:
        await asyncio.gather(owning.process.start(), reading.process.start())
        await connect(owning, reading)
        yield owning, reading
    finally:
        for node in (owning, reading):
            if node.process.pid is not None:
                os.kill(node.pid, signal.SIGCONT)
            await node.process.stop()
            node.memory.close()
            os.close(node.fd)


async def connect(owning: Node, reading: Node) -> str:
    endpoint = await owning.next_endpoint()
    owning.process.serve("test", time.monotonic() + 60)
    await reading.process.add_peer(endpoint, 10)
    return endpoint.name


def name_of(node: Node) -> str:
    assert node.process.ready is not None
    return node.process.ready.name


def assert_equal(owning: Node, reading: Node, runs: list[Run]) -> None:
    for run in runs:
        got = reading.memory[run.local_offset : run.local_offset + run.length]
        assert got == owning.memory[run.remote_offset : run.remote_offset + run.length], run


def scattered(count: int, length: int) -> list[Run]:
    return [Run((i * 7 % count) * length, (i * 5 % count) * length, length) for i in range(count)]


async def read_until_it_works(owning: Node, reading: Node, runs: list[Run]) -> None:
    """Connect and read as an agent does: again, under whatever name the owner's process has by then.

    UCX ends an owner's process now and then ("Fatal: unexpected error: Endpoint timeout") when a reader that it was
    sending to over tcp is gone: supervision makes that a matter of a second."""
    async with asyncio.timeout(30):
        while True:
            try:
                if owning.process.ready is None:
                    await owning.next_endpoint()
                    continue
                endpoint = owning.process.ready
                owning.process.serve("test", time.monotonic() + 60)
                await reading.process.add_peer(endpoint, 5)
                outcome = await reading.process.read(endpoint.name, runs, 10)
                if outcome.error is None:
                    return assert_equal(owning, reading, runs)
            except PeerUnavailable:
                pass


async def start_and_stall(owning: Node, reading: Node, runs: list[Run], deadline_s: float) -> asyncio.Task[object]:
    """Start a read and stop its owner's child when the first bytes have come."""
    stopped = asyncio.Event()

    def stop(_done_bytes: int) -> None:
        if not stopped.is_set():
            os.kill(owning.pid, signal.SIGSTOP)
            stopped.set()

    task = asyncio.create_task(reading.process.read(name_of(owning), runs, deadline_s, stop))
    async with asyncio.timeout(10):
        await stopped.wait()
    return task


@needs_nixl
@pytest.mark.parametrize("ucx", [{}, TCP], ids=["default", "tcp"])
async def test_a_read_brings_exactly_the_owners_bytes_and_touches_nothing_else(ucx: dict[str, str]) -> None:
    async with nodes(owner={"ucx": ucx}, reader={"ucx": ucx}) as (owning, reading):
        cases = [
            [Run(12_345, 67, 1)],
            [Run(0, 4096, 4096)],
            [Run(ARENA - 100, 0, 100), Run(0, ARENA - 100, 100)],
            [Run(3, 5, 9 * MIB + 1)],
            scattered(37, 64 << 10),
            scattered(32, MIB),
        ]
        for runs in cases:
            reading.memory[:] = bytes(ARENA)
            progress: list[int] = []
            outcome = await reading.process.read(name_of(owning), runs, 20, progress.append)
            total = sum(run.length for run in runs)
            assert (outcome.done_bytes, outcome.error, list(outcome.open)) == (total, None, [])
            expected = bytearray(ARENA)
            for run in runs:
                theirs = owning.memory[run.remote_offset : run.remote_offset + run.length]
                expected[run.local_offset : run.local_offset + run.length] = theirs
            assert reading.memory[:] == expected
            assert progress == sorted(set(progress))
            assert all(0 < done < total for done in progress)
        stats = await reading.process.stats()
        assert stats.reads_ok == len(cases)
        connection = reading.process.connected(name_of(owning))
        assert connection is not None
        assert not (connection.inline and ucx)  # over tcp the owner's process has to serve


@needs_nixl
async def test_progress_only_counts_bytes_that_are_there() -> None:
    async with nodes(owner={"ucx": TCP}, reader={"ucx": TCP}) as (owning, reading):
        wrong = []

        def check(done: int) -> None:
            if reading.memory[:done] != owning.memory[MIB : MIB + done]:
                wrong.append(done)

        outcome = await reading.process.read(name_of(owning), [Run(MIB, 0, 32 * MIB)], 20, check)
        assert outcome.error is None
        assert not wrong


@needs_nixl
async def test_many_reads_at_once_all_end_and_more_than_the_bound_are_refused() -> None:
    async with nodes(reader={"reads_max": 50}) as (owning, reading):
        reads = [
            asyncio.create_task(reading.process.read(name_of(owning), [Run(i * MIB, i * MIB, 300_001)], 20))
            for i in range(51)
        ]
        results = await asyncio.gather(*reads, return_exceptions=True)
        assert [type(r) for r in results].count(Busy) == 1
        assert_equal(owning, reading, [Run(i * MIB, i * MIB, 300_001) for i in range(50)])


@needs_nixl
async def test_a_run_that_leaves_an_arena_is_refused_before_anything_moves() -> None:
    async with nodes() as (owning, reading):
        peer = name_of(owning)
        for bad in (Run(0, ARENA - 1, 2), Run(0, 0, 0), Run(0, (1 << 64) - 1, 1), Run(0, -1, 1)):
            with pytest.raises(InvalidArgument):
                await reading.process.read(peer, [Run(0, 0, 64), bad], 5)
        for bad in (Run(ARENA - 1, 0, 2), Run((1 << 64) - 1, 0, 2), Run(1 << 63, 0, 1)):
            outcome = await reading.process.read(peer, [Run(0, 0, 64), bad], 5)
            assert isinstance(outcome.error, InvalidArgument)
        assert reading.memory[:64] == bytes(64)


@needs_nixl
async def test_a_read_from_a_peer_that_was_never_added_fails_at_once() -> None:
    async with nodes() as (_, reading):
        started = time.monotonic()
        outcome = await reading.process.read("c:1:1", [Run(0, 0, 64)], 5)
        assert isinstance(outcome.error, PeerUnavailable)
        assert time.monotonic() - started < 1


@needs_nixl
async def test_when_the_child_dies_reads_fail_at_once_and_a_new_incarnation_takes_over() -> None:
    async with nodes(owner={"ucx": TCP}, reader={"ucx": TCP}) as (owning, reading):
        first = await reading.next_endpoint()
        pid = reading.pid
        read = await start_and_stall(owning, reading, [Run(0, 0, 64 * MIB)], 60)
        started = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        outcome = await read
        assert time.monotonic() - started < 0.25
        assert isinstance(outcome.error, TransportUnavailable)
        assert outcome.open == [(0, 64 * MIB)]
        assert await reading.next_clear() == outcome.read_id
        assert not reading.process.quarantined
        assert not Path(f"/proc/{pid}").exists()  # cleared only after it was reaped
        second = await reading.next_endpoint()
        assert (first.name, second.name) == ("b:1:1", "b:1:2")

        os.kill(owning.pid, signal.SIGCONT)
        assert reading.process.connected(name_of(owning)) is None
        await read_until_it_works(owning, reading, [Run(0, MIB, MIB)])


@needs_nixl
@pytest.mark.parametrize("ucx", [{}, TCP], ids=["default", "tcp"])
async def test_a_restarted_owner_is_read_again_under_its_new_name(ucx: dict[str, str]) -> None:
    async with nodes(owner={"ucx": ucx}, reader={"ucx": ucx}) as (owning, reading):
        old = name_of(owning)
        os.kill(owning.pid, signal.SIGKILL)
        started = time.monotonic()
        outcome = await reading.process.read(old, [Run(0, 0, 8 * MIB)], 5)
        assert isinstance(outcome.error, PeerUnavailable)
        assert time.monotonic() - started < 2
        assert reading.process.connected(old) is None
        new = await connect(owning, reading)
        assert new != old
        outcome = await reading.process.read(new, [Run(0, 0, 8 * MIB)], 10)
        assert outcome.error is None
        assert_equal(owning, reading, [Run(0, 0, 8 * MIB)])
        outcome = await reading.process.read(old, [Run(0, 0, 64)], 5)
        assert isinstance(outcome.error, PeerUnavailable)


@needs_nixl
async def test_late_bytes_of_a_stopped_owner_only_land_in_quarantine_until_it_is_cleared() -> None:
    async with nodes(owner={"ucx": TCP}, reader={"ucx": TCP}) as (owning, reading):
        runs = scattered(64, MIB)
        started = time.monotonic()
        outcome = await (await start_and_stall(owning, reading, runs, 1.0))
        assert 0.9 < time.monotonic() - started < 1.5
        assert isinstance(outcome.error, DeadlineExceeded)
        assert 0 < outcome.done_bytes < 64 * MIB
        assert outcome.open, "nothing was in flight: the owner was not stopped in mid read"
        assert reading.process.quarantined == {outcome.read_id}

        # What is not open is ours again: reuse it, and let the owner run on.
        unsafe = bytearray(ARENA)
        for offset, length in outcome.open:
            unsafe[offset : offset + length] = b"\1" * length
        for offset in range(0, ARENA, 64 << 10):
            if not any(unsafe[offset : offset + (64 << 10)]):
                reading.memory[offset : offset + (64 << 10)] = b"\xee" * (64 << 10)
        before = reading.memory[:]
        os.kill(owning.pid, signal.SIGCONT)
        assert await reading.next_clear() == outcome.read_id
        assert not reading.process.quarantined
        after = reading.memory[:]
        landed = 0
        for offset in range(0, ARENA, 4096):
            if before[offset : offset + 4096] != after[offset : offset + 4096]:
                assert any(unsafe[offset : offset + 4096]), f"late bytes at {offset}, outside of quarantine"
                landed += 1
        assert landed, "no late byte came: this test has shown nothing"

        # And after it was cleared nothing lands anywhere.
        reading.memory[:] = b"\xdd" * ARENA
        assert (await reading.process.read(name_of(owning), [Run(0, 0, MIB)], 10)).error is None
        assert reading.memory[MIB:] == b"\xdd" * (ARENA - MIB)


@needs_nixl
async def test_a_cancelled_read_is_quarantined_until_its_transfers_have_ended() -> None:
    async with nodes(owner={"ucx": TCP}, reader={"ucx": TCP}) as (owning, reading):
        read = await start_and_stall(owning, reading, [Run(0, 0, 64 * MIB)], 60)
        read.cancel()
        with pytest.raises(asyncio.CancelledError):
            await read
        (read_id,) = reading.process.quarantined
        assert reading.process.quarantined_bytes == 64 * MIB
        os.kill(owning.pid, signal.SIGCONT)
        assert await reading.next_clear() == read_id
        assert reading.events == [("quarantine", read_id), ("clear", read_id)]


@needs_nixl
@pytest.mark.parametrize("bound", [{"quarantine_s": 0.2}, {"quarantine_bytes_max": MIB}], ids=["age", "bytes"])
async def test_quarantine_beyond_its_bound_is_ended_by_killing_the_child(bound: dict[str, object]) -> None:
    async with nodes(owner={"ucx": TCP}, reader={"ucx": TCP, **bound}) as (owning, reading):
        await reading.next_endpoint()
        pid = reading.pid
        outcome = await (await start_and_stall(owning, reading, [Run(0, 0, 64 * MIB)], 0.3))
        assert isinstance(outcome.error, DeadlineExceeded)
        assert await reading.next_clear() == outcome.read_id
        assert reading.process.kills_for_quarantine == 1
        assert not Path(f"/proc/{pid}").exists()
        assert (await reading.next_endpoint()).name == "b:1:2"


@needs_nixl
async def test_a_child_that_hangs_costs_no_reader_its_deadline_and_is_replaced() -> None:
    async with nodes(reader={"hang_s": 0.2}) as (owning, reading):
        await reading.next_endpoint()
        os.kill(reading.pid, signal.SIGSTOP)
        started = time.monotonic()
        outcome = await reading.process.read(name_of(owning), [Run(0, 0, MIB)], 0.3)
        assert time.monotonic() - started < 0.6
        assert isinstance(outcome.error, DeadlineExceeded)
        assert outcome.open == [(0, MIB)]
        assert await reading.next_clear() == outcome.read_id
        assert (await reading.next_endpoint()).name == "b:1:2"


@needs_nixl
async def test_a_peers_false_endpoint_is_refused_and_costs_nobody_else_the_connection() -> None:
    async with nodes() as (owning, reading):
        true = owning.process.ready
        assert true is not None
        liars = [
            NixlEndpoint("c:1:1", b"\0", 4096, ARENA),
            NixlEndpoint("c:1:1", random.Random(3).randbytes(400), 4096, ARENA),
            NixlEndpoint("c:1:1", true.metadata[:100], 4096, ARENA),
            NixlEndpoint("c:1:1", true.metadata, true.base, true.arena_bytes),
            NixlEndpoint("c:1:1", true.metadata, (1 << 64) - 4096, ARENA),
            NixlEndpoint("c:1:1", true.metadata, true.base, 0),
        ]
        for liar in liars:
            with pytest.raises(PeerUnavailable):
                await reading.process.add_peer(liar, 2)
        assert reading.process.incarnation == 1, "a peer's words have crashed the child"
        outcome = await reading.process.read(true.name, [Run(0, 0, MIB)], 10)
        assert outcome.error is None
        assert_equal(owning, reading, [Run(0, 0, MIB)])


@needs_nixl
async def test_adding_a_peer_twice_is_one_connection_and_removing_it_ends_its_reads() -> None:
    async with nodes(owner={"ucx": TCP}, reader={"ucx": TCP}) as (owning, reading):
        endpoint = owning.process.ready
        assert endpoint is not None
        again = await asyncio.gather(*(reading.process.add_peer(endpoint) for _ in range(3)))
        assert len(set(again)) == 1
        read = await start_and_stall(owning, reading, [Run(0, 0, 64 * MIB)], 60)
        reading.process.remove_peer(endpoint.name)
        outcome = await read
        assert isinstance(outcome.error, PeerUnavailable)
        assert outcome.open
        os.kill(owning.pid, signal.SIGCONT)
        assert await reading.next_clear() == outcome.read_id
        await reading.process.add_peer(endpoint, 10)
        assert (await reading.process.read(endpoint.name, [Run(0, 0, MIB)], 10)).error is None


@needs_nixl
@pytest.mark.parametrize(
    "garbage",
    [
        HEADER.pack(0, 9, wire.NixlType.STATS, 0, 1),
        HEADER.pack(1 << 31, 1, wire.NixlType.READ, 0, 1),
        HEADER.pack(1, 1, 99, 0, 1) + b"\x90",
        HEADER.pack(1, 1, wire.NixlType.READ, 0, 1) + b"\x90",
        HEADER.pack(4, 1, wire.NixlType.STATS, 0, 1) + b"\xff\xff\xff\xff",
        wire.CODEC.encode(wire.QuarantineClear()),
        os.urandom(4096),
    ],
    ids=["version", "oversized", "unknown-type", "short-body", "no-msgpack", "wrong-direction", "noise"],
)
async def test_a_malformed_frame_ends_the_child_and_only_the_child(garbage: bytes) -> None:
    fd = os.memfd_create("arena")
    os.ftruncate(fd, MIB)
    child = spawn(asyncio.get_running_loop(), "d:1:1", fd, MIB, {}, 100)
    try:
        child.watch(lambda message, _: child.ready.set_result(message))
        async with asyncio.timeout(30):
            await child.ready
        child._sock.send(garbage)
        async with asyncio.timeout(10):
            await child.dead
        assert await child.reap() in (wire.EXIT_PROTOCOL, -signal.SIGKILL)
    finally:
        child.give_up("the test is over")
        await child.reap()
        os.close(fd)


@needs_nixl
async def test_an_arena_smaller_than_announced_is_refused() -> None:
    fd = os.memfd_create("arena")
    os.ftruncate(fd, MIB)
    process = NixlProcess(fd, 2 * MIB, node=1, epoch=1)
    with pytest.raises(TransportUnavailable, match="ARENA"):
        await process.start()
    os.close(fd)


@needs_nixl
async def test_the_child_dies_with_its_agent() -> None:
    program = """
import asyncio, os, sys
from p2pkv.transport.nixl_process import NixlProcess
async def main():
    fd = os.memfd_create("arena"); os.ftruncate(fd, 1 << 20)
    process = NixlProcess(fd, 1 << 20, node=1, epoch=1)
    await process.start()
    print(process.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    root = str(Path(__file__).parents[3])
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    ) as agent:
        assert agent.stdout is not None
        child = int(await asyncio.to_thread(agent.stdout.readline))
        watch = os.pidfd_open(child)
        gone = asyncio.Event()
        asyncio.get_running_loop().add_reader(watch, gone.set)
        agent.kill()
        async with asyncio.timeout(5):
            await gone.wait()
        asyncio.get_running_loop().remove_reader(watch)
        os.close(watch)


@needs_nixl
async def test_idle_children_use_next_to_no_processor_time() -> None:
    async with nodes() as (owning, _):
        owning.process.serve_done("test")
        ticks = os.sysconf("SC_CLK_TCK")

        def used() -> float:
            fields = Path(f"/proc/{owning.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return (int(fields[11]) + int(fields[12])) / ticks

        await owning.process.stats()  # the SERVE before it has been ended
        before = used()
        await asyncio.sleep(2)  # not to wait for anything: this is the measurement
        assert used() - before <= 0.04


async def test_without_nixl_the_error_says_so_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("nixl_cu12", "nixl_cu13"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    fd = os.memfd_create("arena")
    os.ftruncate(fd, MIB)
    process = NixlProcess(fd, MIB, node=1, epoch=1)
    with pytest.raises(TransportUnavailable, match="not here") as caught:
        await process.start()
    assert "make nixl" in caught.value.hint
    assert process.pid is None
    outcome = await process.read("a:1:1", [Run(0, 0, 1)], 1)
    assert isinstance(outcome.error, TransportUnavailable)
    await process.stop()
    os.close(fd)


def test_progress_steps_fit_the_size() -> None:
    assert [piece_bytes_for(size * MIB) // MIB for size in (1, 4, 16, 64, 1024)] == [2, 2, 4, 8, 8]


@pytest.fixture(autouse=True)
def no_descriptor_is_left_open() -> Iterator[None]:
    before: Callable[[], int] = lambda: len(os.listdir("/proc/self/fd"))  # noqa: E731
    count = before()
    yield
    assert before() <= count + 3, "descriptors leak"  # the event loop's own come and go
