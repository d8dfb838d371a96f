"""Attaching to another agent of this host: to whom nothing is said, whom we do not take, and when it ends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from msgspec.structs import replace as change

from p2pkv.agent import neighbours
from p2pkv.agent.lane import EngineLane
from p2pkv.agent.neighbours import Neighbours, attach
from p2pkv.errors import Unavailable
from p2pkv.gossip.views import PeerView, State
from p2pkv.types import NodeId
from p2pkv.wire.engine import CODEC, EngineError
from p2pkv.wire.peer import Address, Card
from tests.unit.client.directories import Held, Silent

NODE = 1  # that a Silent says it is
HOST = "this-host"


@pytest.fixture
def held() -> Held:
    return Held(2, 4096)


@pytest.fixture
def agent(held: Held, tmp_path: Path) -> Iterator[Silent]:
    made = Silent(tmp_path / "agent.sock", held.arena.fd, held.arena.capacity_bytes, held.files.descriptors())
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_descriptor_is_left(held: Held, agent: Silent) -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    # what the agent's end of a connection holds is closed with the agent
    assert len(os.listdir("/proc/self/fd")) <= before + 2 * len(agent._ends)


class Lane:
    """What was done to it."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.fails: Exception | None = None
        self.changed = asyncio.Event()

    def set_neighbour(self, node: int, arena: tuple[int, int], directory: list[tuple[int, int]]) -> None:
        if self.fails is not None:
            raise self.fails
        assert all(os.fstat(fd).st_size >= size for fd, size in (arena, *directory))
        self.read.append(node)
        self.changed.set()

    def drop_neighbour(self, node: int) -> None:
        if node in self.read:
            self.read.remove(node)
        self.changed.set()

    async def until(self, read: list[int]) -> None:
        async with asyncio.timeout(10):
            while self.read != read:
                self.changed.clear()
                await self.changed.wait()


@pytest.fixture
async def lane(monkeypatch: pytest.MonkeyPatch) -> Lane:
    monkeypatch.setattr(neighbours, "RETRY_S", (0.01, 0.05))
    return Lane()


@pytest.fixture
async def ours(lane: Lane) -> AsyncIterator[Neighbours]:
    made = Neighbours(cast(EngineLane, lane), 99, HOST)
    yield made
    await made.stop()
    assert lane.read == [] and not made.attached


def peer(agent: Silent, **fields: Any) -> PeerView:
    card = Card(NODE, 1, Address("127.0.0.1", 1), "", HOST, [], ["tcp"], 7, socket=agent.path)
    return PeerView(
        node=NodeId(NODE), epoch=1, address=card.address, state=State.ALIVE, age_ms=0.0, seq=0, entries=0,
        card=change(card, **fields), rtt_ms=None, conflicts=(), slot=1, proven_ms=None,
    )  # fmt: skip


async def test_an_agent_of_this_host_is_read_until_it_goes_and_again_when_it_is_back(
    held: Held, agent: Silent, lane: Lane, ours: Neighbours
) -> None:
    ours.review(peer(agent))
    await lane.until([NODE])
    assert ours.attached == {NODE}
    for end in agent._ends:
        end.close()  # what an agent that dies does
    await lane.until([])
    await lane.until([NODE])


@pytest.mark.parametrize(
    "fields",
    [{"host_id": "another-host"}, {"socket": ""}, {"node": 99}],
    ids=["another-host", "no-socket", "ourselves"],
)
async def test_others_are_not_attached_to(agent: Silent, ours: Neighbours, fields: dict[str, Any]) -> None:
    view = peer(agent, **fields)
    ours.review(replace(view, node=NodeId(view.card.node)))
    assert not ours._tasks


@pytest.mark.parametrize("why", ["hidden", "left", "another-life", "elsewhere"])
async def test_who_is_not_there_any_more_is_let_go(agent: Silent, lane: Lane, ours: Neighbours, why: str) -> None:
    ours.review(peer(agent))
    await lane.until([NODE])
    if why in ("hidden", "left"):
        ours.review(replace(peer(agent), state=State.LEFT if why == "left" else State.UNREACHABLE))
        await lane.until([])
        assert not ours._tasks
    else:
        ours.review(peer(agent, instance=8) if why == "another-life" else peer(agent, socket=agent.path + ".gone"))
        await lane.until([])


async def test_what_cannot_be_mapped_is_not_read_and_tried_again(agent: Silent, lane: Lane, ours: Neighbours) -> None:
    lane.fails = ValueError("not a directory of this version")
    ours.review(peer(agent))
    async with asyncio.timeout(10):
        while len(agent._ends) < 4:
            await asyncio.sleep(0)
    assert not ours.attached
    lane.fails = None
    await lane.until([NODE])


async def test_a_directory_that_could_be_cut_off_is_not_read(held: Held, tmp_path: Path, lane: Lane) -> None:
    """Our process would end by it."""
    files = [os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for _ in range(2)]
    other = Silent(tmp_path / "other.sock", held.arena.fd, held.arena.capacity_bytes, files)
    ours = Neighbours(cast(EngineLane, lane), 99, HOST)
    try:
        ours.review(peer(other))
        async with asyncio.timeout(10):
            while len(other._ends) < 4:
                await asyncio.sleep(0)
        assert lane.read == []
    finally:
        await ours.stop()
        other.close()
        for fd in files:
            os.close(fd)


async def test_no_more_are_mapped_than_may_be(agent: Silent, ours: Neighbours, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "NEIGHBOURS_MAX", 2)
    for node in (3, 4, 5):
        ours.review(replace(peer(agent, node=node), node=NodeId(node)))
    assert set(ours._tasks) == {3, 4}


# ------------------------------------------------------------------------------------------------------- attaching


async def refused(path: str | Path, match: str, node: int = NODE) -> None:
    with pytest.raises(Unavailable, match=match):
        await attach(str(path), node, "test")


async def test_another_agent_is_not_taken_for_it(agent: Silent) -> None:
    await refused(agent.path, "another agent", node=2)


async def test_nothing_is_said_to_what_is_not_a_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    await refused(tmp_path / "file", "not a socket of this user")
    await refused(tmp_path / "nothing", "cannot be attached to")


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT ROOT: a socket of another user is not tested")
async def test_nothing_is_said_to_another_user(agent: Silent) -> None:
    os.chown(agent.path, 65534, 65534)
    await refused(agent.path, "not a socket of this user")
    assert not agent._ends


class Listener:
    """Says ``answer`` to the first thing that it hears, and closes after that if ``closes``."""

    def __init__(self, path: Path, answer: bytes, closes: bool) -> None:
        self.path, self.answer, self.closes = path, answer, closes
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Listener:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._serving = asyncio.current_task()
            await reader.read(4096)
            writer.write(self.answer)
            if not self.closes:
                await reader.read()
            writer.close()
            await writer.wait_closed()

        self._server = await asyncio.start_unix_server(serve, self.path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        assert self._serving is not None
        await self._serving


@pytest.mark.parametrize(
    ("answer", "closes", "match"),
    [
        (b"", True, "closed the connection at once"),
        (b"", False, "cannot be attached to"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", False, "cannot be attached to"),
        (CODEC.encode(EngineError("protocol", "too old", []), 1), False, "it refuses"),
    ],
    ids=["closes", "silent", "no-agent", "refuses"],
)
async def test_who_does_not_answer_as_an_agent_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, closes: bool, match: str
) -> None:
    monkeypatch.setattr(neighbours, "ATTACH_S", 0.2)
    async with Listener(tmp_path / "other.sock", answer, closes) as listener:
        await refused(listener.path, match)


async def test_an_agent_that_gives_no_directory_is_not_read(held: Held, tmp_path: Path) -> None:
    without = Silent(tmp_path / "without.sock", held.arena.fd, held.arena.capacity_bytes, ())
    try:
        await refused(without.path, "does not give its directory out")
    finally:
        without.close()
