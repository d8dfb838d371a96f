"""The agent's side of the NIXL child against a child that says what the test says: no NIXL, no second process."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest

from p2pkv.errors import Busy, DeadlineExceeded, InvalidArgument, P2PKVError, PeerUnavailable, TransportUnavailable
from p2pkv.transport import nixl_process
from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_child import Child
from p2pkv.transport.nixl_process import NixlOptions, NixlProcess, ReadOutcome
from p2pkv.transport.nixl_wire import ReadStatus, Run
from p2pkv.wire.frame import FrameDecoder
from p2pkv.wire.peer import NixlEndpoint

MIB = 1 << 20
OWNER = NixlEndpoint("a:1:1", b"metadata", 4096, 64 * MIB)


class ScriptedProcess:
    """In the place of ``subprocess.Popen``."""

    pid = 4_000_000

    def kill(self) -> None: ...

    def wait(self) -> int:
        return -9


class Script:
    """The child's end of the socketpairs: what the agent said, and a mouth to answer with."""

    def __init__(self) -> None:
        self.sock = socket.socket()
        self.decoder = FrameDecoder()
        self.spawned = asyncio.Event()

    def spawn(self, loop: asyncio.AbstractEventLoop, name: str, arena_fd: int, arena_bytes: int, *_: object) -> Child:
        self.sock.close()
        ours, self.sock = socket.socketpair()
        ours.setblocking(False)
        self.sock.setblocking(False)
        self.decoder = FrameDecoder()
        lane, theirs = socket.socketpair()
        theirs.close()
        child = Child(ScriptedProcess(), ours, lane, loop)  # type: ignore[arg-type]
        self.say((wire.Ready(name, b"metadata", 1 << 40, arena_bytes, "nixl_fake", "0"), 0))
        self.spawned.set()
        return child

    def say(self, *messages: tuple[msgspec.Struct, int]) -> None:
        """In one send: the agent receives them together."""
        self.sock.send(b"".join(wire.CODEC.encode(message, request_id) for message, request_id in messages))

    async def hear(self) -> tuple[msgspec.Struct, int]:
        """The next command; commands come one by one in these tests."""
        async with asyncio.timeout(5):
            data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
        (frame,) = self.decoder.feed(data)
        return wire.CODEC.decode(frame), frame.request_id


class Agent:
    """A NixlProcess, the script behind it, and what happened in which order."""

    def __init__(self, process: NixlProcess, script: Script, events: list[str]) -> None:
        self.process, self.script, self.events = process, script, events

    async def begin(self, runs: list[Run], deadline_s: float = 60.0) -> tuple[asyncio.Task[ReadOutcome], int]:
        task = asyncio.create_task(self._read(runs, deadline_s))
        message, read_id = await self.script.hear()
        assert isinstance(message, wire.Read)
        return task, read_id

    async def _read(self, runs: list[Run], deadline_s: float) -> ReadOutcome:
        outcome = await self.process.read("a:1:1", runs, deadline_s)
        self.events.append("outcome")
        return outcome


@asynccontextmanager
async def agent(monkeypatch: pytest.MonkeyPatch, **options: object) -> AsyncIterator[Agent]:
    script, events = Script(), []
    monkeypatch.setattr(nixl_process, "spawn", script.spawn)
    monkeypatch.setattr(nixl_process, "STOP_S", 0.0)
    process = NixlProcess(
        0,
        64 * MIB,
        node=2,
        epoch=1,
        options=msgspec.convert(options, NixlOptions),
        on_quarantine=lambda _, extents: events.append(f"quarantine {list(extents)}"),
        on_clear=lambda _: events.append("clear"),
        on_down=lambda _: events.append("down"),
        on_ready=lambda endpoint: events.append(f"ready {endpoint.name}"),
    )
    await process.start()
    try:
        yield Agent(process, script, events)
    finally:
        await process.stop()
        script.sock.close()


async def until(agent: Agent, event: str) -> None:
    async with asyncio.timeout(5):
        while event not in agent.events:
            await asyncio.sleep(0.001)


def done(
    status: ReadStatus, done_bytes: int = 0, extents: list[tuple[int, int]] | None = None, *, inline: bool = False
) -> wire.ReadDone:
    return wire.ReadDone(status, done_bytes, wire.pack_extents(extents or []), inline, "because")


async def test_the_end_of_a_quarantine_is_never_heard_before_the_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    async with agent(monkeypatch) as it:
        read, read_id = await it.begin([Run(0, 0, MIB)])
        it.script.say((done(ReadStatus.TIMEOUT, 0, [(0, MIB)]), read_id), (wire.QuarantineClear(), read_id))
        outcome = await read
        assert (outcome.read_id, list(outcome.open)) == (read_id, [(0, MIB)])
        await until(it, "clear")
        assert it.events == ["ready 2:1:1", f"quarantine {[(0, MIB)]}", "outcome", "clear"]


async def test_a_dead_child_clears_only_after_its_readers_know(monkeypatch: pytest.MonkeyPatch) -> None:
    async with agent(monkeypatch) as it:
        read, _ = await it.begin([Run(0, 0, MIB)])
        it.script.sock.shutdown(socket.SHUT_RDWR)
        assert isinstance((await read).error, TransportUnavailable)
        await until(it, "ready 2:1:2")
        assert it.events.index("outcome") < it.events.index("clear") < it.events.index("ready 2:1:2")
        assert it.process.restarts == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (ReadStatus.ERROR, PeerUnavailable),
        (ReadStatus.TIMEOUT, DeadlineExceeded),
        (ReadStatus.NO_PEER, PeerUnavailable),
        (ReadStatus.DISCONNECTED, PeerUnavailable),
        (ReadStatus.INVALID, InvalidArgument),
        (ReadStatus.BUSY, Busy),
    ],
)
async def test_every_failure_has_its_type(
    monkeypatch: pytest.MonkeyPatch, status: ReadStatus, error: type[P2PKVError]
) -> None:
    async with agent(monkeypatch) as it:
        read, read_id = await it.begin([Run(0, 0, MIB)])
        it.script.say((wire.ReadProgress(77), read_id), (done(status, 99), read_id))
        outcome = await read
        assert (type(outcome.error), outcome.done_bytes, list(outcome.open)) == (error, 99, [])
        assert not it.process.quarantined


async def test_a_child_that_is_silent_at_the_deadline_is_answered_for_and_may_answer_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with agent(monkeypatch) as it:
        started = time.monotonic()
        read, read_id = await it.begin([Run(0, 0, MIB)], 0.05)
        outcome = await read
        assert time.monotonic() - started < 0.5
        assert (type(outcome.error), list(outcome.open)) == (DeadlineExceeded, [(0, MIB)])
        ping, _ = await it.script.hear()
        assert isinstance(ping, wire.Stats)
        it.script.say((done(ReadStatus.TIMEOUT), read_id))  # late, and nothing is open
        await until(it, "clear")
        assert it.process.incarnation == 1


async def test_what_is_still_open_after_a_late_answer_stays_in_quarantine(monkeypatch: pytest.MonkeyPatch) -> None:
    async with agent(monkeypatch) as it:
        read, read_id = await it.begin([Run(0, 0, MIB)], 0.05)
        await read
        await it.script.hear()
        it.script.say((done(ReadStatus.TIMEOUT, 0, [(0, 4096)]), read_id))
        again, other_id = await it.begin([Run(0, MIB, MIB)])
        it.script.say((done(ReadStatus.OK, MIB), other_id))
        await again
        assert it.process.quarantined == {read_id}
        it.script.say((wire.QuarantineClear(), read_id))
        await until(it, "clear")


async def test_serving_is_told_when_it_grows_and_when_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async with agent(monkeypatch) as it:
        now = time.monotonic()
        it.process.serve("one", now + 10)
        assert await it.script.hear() == (wire.Serve(int((now + 10) * 1e9)), 0)
        it.process.serve("two", now + 5)  # covered
        it.process.serve("three", now + 20)
        assert await it.script.hear() == (wire.Serve(int((now + 20) * 1e9)), 0)
        it.process.serve_done("three")
        assert await it.script.hear() == (wire.Serve(int((now + 10) * 1e9)), 0)
        it.process.serve_done("one")
        it.process.serve_done("two")
        it.process.serve_done("two")
        heard = b""
        async with asyncio.timeout(5):
            while wire.CODEC.encode(wire.Serve(0)) not in heard:
                heard += await asyncio.get_running_loop().sock_recv(it.script.sock, 1 << 16)


async def test_a_connection_counts_as_inline_if_the_latest_read_was(monkeypatch: pytest.MonkeyPatch) -> None:
    async with agent(monkeypatch) as it:
        adding = asyncio.create_task(it.process.add_peer(OWNER))
        _, request_id = await it.script.hear()
        it.script.say((wire.PeerAdded("a:1:1", "", True, 5), request_id))
        assert (await adding).inline
        read, read_id = await it.begin([Run(0, 0, MIB)])
        it.script.say((done(ReadStatus.OK, MIB), read_id))
        await read
        connection = it.process.connected("a:1:1")
        assert connection is not None
        assert not connection.inline
        for status, counts in ((ReadStatus.BUSY, False), (ReadStatus.OK, True), (ReadStatus.TIMEOUT, True)):
            read, read_id = await it.begin([Run(0, 0, MIB)])
            it.script.say((done(status, inline=True), read_id))
            await read
            connection = it.process.connected("a:1:1")
            assert connection is not None
            assert connection.inline == counts
        read, read_id = await it.begin([Run(0, 0, MIB)])
        it.script.say((done(ReadStatus.DISCONNECTED), read_id))
        await read
        assert it.process.connected("a:1:1") is None


@pytest.mark.parametrize(
    "nonsense",
    [b"\0" * 64, wire.CODEC.encode(wire.Shutdown()), wire.CODEC.encode(wire.Ready("x", b"x", 0, 0, "x", "x"))],
    ids=["no frame", "an agent's message", "ready twice"],
)
async def test_a_child_that_talks_nonsense_is_replaced(monkeypatch: pytest.MonkeyPatch, nonsense: bytes) -> None:
    async with agent(monkeypatch) as it:
        read, _ = await it.begin([Run(0, 0, MIB)])
        it.script.sock.send(nonsense)
        assert isinstance((await read).error, TransportUnavailable)
        await until(it, "ready 2:1:2")


async def test_a_failing_callback_costs_no_other_message(monkeypatch: pytest.MonkeyPatch) -> None:
    async with agent(monkeypatch) as it:
        complaints: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["exception"]))

        def broken(_done_bytes: int) -> None:
            raise RuntimeError("a caller's bug")

        read = asyncio.create_task(it.process.read("a:1:1", [Run(0, 0, MIB)], 60, broken))
        _, read_id = await it.script.hear()
        it.script.say((wire.ReadProgress(5), read_id), (done(ReadStatus.OK, MIB), read_id))
        assert (await read).error is None
        assert [str(complaint) for complaint in complaints] == ["a caller's bug"]


async def test_restarts_pause_longer_each_time_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    real_sleep = asyncio.sleep

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        await real_sleep(0)

    async with agent(monkeypatch, backoff_s=0.5, backoff_max_s=3.0) as it:
        monkeypatch.setattr(nixl_process.asyncio, "sleep", sleep)
        async with asyncio.timeout(5):
            for incarnation in range(2, 8):
                it.script.spawned.clear()
                it.script.sock.shutdown(socket.SHUT_RDWR)
                await it.script.spawned.wait()
                while it.process.ready is None or it.process.incarnation != incarnation:
                    await real_sleep(0.001)
        monkeypatch.undo()
    assert [pause for pause in pauses if pause >= 0.5] == [0.5, 1.0, 2.0, 3.0, 3.0, 3.0]
