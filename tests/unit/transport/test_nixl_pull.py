"""What a pull over NIXL says of the peer when it fails, against a child and an owner that say what the test says."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from p2pkv.errors import DeadlineExceeded
from p2pkv.transport import nixl_process
from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.base import CallOff, PullRequest, PullResult
from p2pkv.transport.nixl import NixlTransport
from p2pkv.transport.nixl_native import _Kind
from p2pkv.transport.nixl_process import Connection, NixlOptions
from p2pkv.transport.nixl_wire import ReadStatus
from p2pkv.types import Status
from p2pkv.wire.fields import Extent
from p2pkv.wire.peer import NixlConnect, NixlEndpointReply, Pin, Pinned, Release, Released
from tests.unit.transport.test_nixl_supervision import OWNER, Script, done

NODE = 10
LENGTH = 4096


class Owner:
    """A peer that has every block, of ``length`` bytes: the link to it, and the network in which it is reached."""

    def __init__(self) -> None:
        self.length = LENGTH
        self.stands_still = False
        self.asked_for_nothing = 0

    def on(self, message_type: type[msgspec.Struct], handler: Callable[[Any, Any], Any], /) -> None: ...

    def link(self, node_id: int, /) -> Owner:
        return self

    async def reach(self, node_id: int, deadline_s: float, /) -> Owner:
        return self

    async def request(
        self, message: msgspec.Struct, deadline_s: float, *, on_late: Callable[[msgspec.Struct], None] | None = None
    ) -> msgspec.Struct:
        match message:
            case NixlConnect():
                return NixlEndpointReply(OWNER)
            case Pin(hashes=[]):
                self.asked_for_nothing += 1
                if self.stands_still:
                    raise DeadlineExceeded("no answer")
                return Pinned(0, 0, b"", [], [], b"", OWNER.name)
            case Pin():
                return Pinned(1, 1000, bytes([Status.OK]), [Extent(0, self.length)], [1], b"c" * 16, OWNER.name)
            case Release():
                return Released(True)
        raise AssertionError(message)


class Native:
    """In the place of the native reads: what it is told of peers, and a mouth."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.bell = -1
        self.peers: dict[int, str] = {}
        self._events: list[tuple[int, int, int]] = []

    def say(self, kind: int, node: int) -> None:
        self._events.append((kind, node, 0))
        os.eventfd_write(self.fd, 1)

    def drain(self) -> list[tuple[int, int, int]]:
        os.eventfd_read(self.fd)
        events, self._events = self._events, []
        return events

    def attach(self, fd: int, process: int) -> None:
        os.close(fd)

    def detach(self) -> None:
        self.peers.clear()

    def set_peer(self, node: int, endpoint: str) -> None:
        self.peers[node] = endpoint

    def drop_peer(self, node: int) -> None:
        self.peers.pop(node, None)


class Reader:
    """A transport, and the child's end of its socket."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.native = Native()
        self.script = Script()
        monkeypatch.setattr(nixl_process, "spawn", self.script.spawn)
        monkeypatch.setattr(nixl_process, "STOP_S", 0.0)
        self.owner = Owner()
        self.memory = ctypes.create_string_buffer(1 << 20)
        self.transport = NixlTransport(
            arena=SimpleNamespace(fd=0, base_address=ctypes.addressof(self.memory), capacity_bytes=1 << 20),
            source=None,  # type: ignore[arg-type]
            network=self.owner,
            node=2,
            epoch=1,
            options=NixlOptions(backoff_s=60.0),
            lease_ttl_s=1.0,
            stall_s=0.02,
            on_clear=lambda token: None,
            on_endpoint=lambda: None,
            native=self.native,  # type: ignore[arg-type]
        )

    def pull(self, length: int = LENGTH) -> asyncio.Task[PullResult]:
        return asyncio.create_task(
            self.transport.pull(PullRequest(NODE, 7, [b"k" * 16], [Extent(0, length)], 5.0, lambda *_: None, CallOff()))
        )

    async def connect(self) -> None:
        """Answer what the first pull asks of the child."""
        message, request_id = await self.script.hear()
        assert isinstance(message, wire.AddPeer)
        self.script.say((wire.PeerAdded(OWNER.name, "", True, 5), request_id))

    async def read(self) -> int:
        """Until the child is asked to read; the number of that read."""
        message, read_id = await self.script.hear()
        assert isinstance(message, wire.Read)
        return read_id

    def die(self) -> None:
        self.script.sock.shutdown(socket.SHUT_RDWR)


@pytest.fixture
async def reader(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Reader]:
    made = Reader(monkeypatch)
    await made.transport.start()
    yield made
    await made.transport.stop()
    made.script.sock.close()
    os.close(made.native.fd)


async def test_the_death_of_our_own_process_in_a_read_is_not_the_peers_failure(reader: Reader) -> None:
    pull = reader.pull()
    await reader.connect()
    await reader.read()
    reader.die()
    result = await pull
    assert (result.statuses, result.unsafe) == ([Status.LOST], frozenset({0}))
    assert "the NIXL process died" in result.reason


async def test_nor_is_its_death_while_it_connects(reader: Reader) -> None:
    pull = reader.pull()
    await reader.script.hear()
    reader.die()
    assert (await pull).statuses == [Status.LOST]


async def test_nor_is_that_it_is_being_restarted(reader: Reader) -> None:
    pull = reader.pull()
    await reader.script.hear()
    reader.die()
    await pull
    assert not reader.transport.ready
    assert (await reader.pull()).statuses == [Status.LOST]


@pytest.mark.parametrize(
    ("how", "status"),
    [
        (ReadStatus.ERROR, Status.UNREACHABLE),
        (ReadStatus.DISCONNECTED, Status.UNREACHABLE),
        (ReadStatus.TIMEOUT, Status.TIMEOUT),
        (ReadStatus.BUSY, Status.BUSY),
    ],
)
async def test_a_read_that_fails_says_of_the_peer_what_it_did(reader: Reader, how: ReadStatus, status: Status) -> None:
    pull = reader.pull()
    await reader.connect()
    reader.script.say((done(how), await reader.read()))
    assert (await pull).statuses == [status]


async def test_a_peer_that_has_a_block_without_bytes_has_failed(reader: Reader) -> None:
    """A probe asks for such a block."""
    reader.owner.length = 0
    pull = reader.pull(0)
    await reader.connect()
    assert (await pull).statuses == [Status.UNREACHABLE]


async def test_a_read_that_does_not_go_on_is_called_off_when_the_owner_does_not_answer(reader: Reader) -> None:
    pull = reader.pull()
    await reader.connect()
    read_id = await reader.read()
    reader.owner.stands_still = True
    message, cancelled = await asyncio.wait_for(reader.script.hear(), 2.0)
    assert isinstance(message, wire.Cancel) and cancelled == read_id
    reader.script.say((done(ReadStatus.TIMEOUT), read_id))
    assert (await pull).statuses == [Status.TIMEOUT]


async def test_a_native_read_that_was_not_inline_costs_no_other_read_its_connection(reader: Reader) -> None:
    pull = reader.pull()
    await reader.connect()
    read_id = await reader.read()
    assert reader.native.peers == {NODE: OWNER.name}
    reader.native.drop_peer(NODE)  # as native code does by itself
    reader.native.say(_Kind.NOT_INLINE, NODE)
    async with asyncio.timeout(5):
        while reader.transport.process.connected(OWNER.name) != Connection(False, 5):
            await asyncio.sleep(0.001)
    assert not pull.done()
    reader.script.say((done(ReadStatus.BUSY), read_id))
    assert (await pull).statuses == [Status.BUSY]

    pull = reader.pull()
    read_id = await reader.read()  # and not RemovePeer, nor AddPeer
    assert not reader.native.peers
    reader.script.say((done(ReadStatus.OK, LENGTH, inline=True), read_id))
    await pull
    pull = reader.pull()
    reader.script.say((done(ReadStatus.BUSY), await reader.read()))
    await pull
    assert reader.native.peers == {NODE: OWNER.name}, "the read before was inline"


async def test_a_peer_that_native_code_has_lost_is_connected_to_again(reader: Reader) -> None:
    pull = reader.pull()
    await reader.connect()
    reader.script.say((done(ReadStatus.BUSY), await reader.read()))
    await pull
    reader.native.say(_Kind.LOST, NODE)
    message, _ = await reader.script.hear()
    assert isinstance(message, wire.RemovePeer)
    pull = reader.pull()
    await reader.connect()
    reader.script.say((done(ReadStatus.BUSY), await reader.read()))
    await pull


async def test_a_read_that_is_only_slow_is_not(reader: Reader) -> None:
    """One piece may take long; the owner answers meanwhile."""
    pull = reader.pull()
    await reader.connect()
    read_id = await reader.read()
    while reader.owner.asked_for_nothing < 3:
        await asyncio.sleep(0.005)
    assert not pull.done()
    reader.script.say((done(ReadStatus.BUSY), read_id))
    assert (await pull).statuses == [Status.BUSY]
