"""Small gets need no lease: what has come is read by the arena's directory, and asked for again where it has gone."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec
import pytest

from p2pkv import _native
from p2pkv.client.cache import End
from p2pkv.store.base import Reservation
from p2pkv.types import Status
from p2pkv.wire.engine import CODEC, Get, Got, ReleaseLease
from p2pkv.wire.fields import Extent
from p2pkv.wire.frame import FrameDecoder
from tests.unit.client.directories import Held

BLOCK = 4096
LARGE = 2 << 20
NEW, OTHER = b"n" * 16, b"o" * 16
LONG_S = 30.0

Answer = tuple[int, bytes, bytes]


class Agent:
    """The agent's end of a socket, and its arena with four blocks."""

    def __init__(self, block_bytes: int = BLOCK) -> None:
        self.held = Held(4, block_bytes)
        self.block_bytes = block_bytes
        ours, self.sock = socket.socketpair()
        self.sock.settimeout(LONG_S)
        self.gets = self.held.gets(ours.detach())
        self.pool = ThreadPoolExecutor(1)
        self._frames = FrameDecoder()

    def close(self) -> None:
        self.gets.close("the test is over")
        self.pool.shutdown()
        self.sock.close()
        self.held.files.close()

    def content(self, key: bytes) -> bytes:
        return key * (self.block_bytes // len(key))

    def land(self, key: bytes) -> None:
        """As if it had been pulled."""
        place = self.held.store.reserve(self.held.namespace, key, 1.0)
        assert isinstance(place, Reservation)
        assert _native.copy(self.held.arena.view(place.offset, place.length), self.content(key))
        self.held.store.commit(place, bytes(16), 1.0)

    def ask(self, *keys: bytes) -> tuple[Future[Answer], list[bytearray]]:
        out = [bytearray(self.block_bytes) for _ in keys]
        args = (self.held.namespace, list(keys), out, self.block_bytes, 30_000, time.monotonic() + LONG_S)
        return self.pool.submit(self.gets.get, *args), out

    def hear(self) -> tuple[int, msgspec.Struct]:
        while True:
            frames = self._frames.feed(self.sock.recv(1 << 16))
            for frame in frames:  # the engine says one thing at a time
                return frame.request_id, CODEC.decode(frame)

    def asked(self) -> tuple[int, Get]:
        request_id, get = self.hear()
        assert isinstance(get, Get)
        return request_id, get

    def say(self, request_id: int, lease: int, *statuses: Status) -> None:
        extents = [Extent(0, self.block_bytes) for _ in statuses]  # of no interest without a lease
        got = Got(lease, 10_000, list(range(len(statuses))), bytes(statuses), bytes(len(statuses)), extents, False)
        self.sock.sendall(CODEC.encode(got, request_id))

    def hears_no_more(self) -> bool:
        self.sock.setblocking(False)
        try:
            return not self.sock.recv(1)
        except BlockingIOError:
            return True


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent()
    yield made
    made.close()


def test_what_has_come_is_read_by_the_directory_and_nothing_is_given_back(agent: Agent) -> None:
    asked, out = agent.ask(NEW, OTHER)
    request_id, get = agent.asked()
    assert get.unleased and get.keys == [NEW, OTHER]
    agent.land(NEW)
    agent.land(OTHER)
    agent.say(request_id, 0, Status.OK, Status.OK)
    assert asked.result() == (End.DONE, bytes(2), b"")
    assert out == [agent.content(NEW), agent.content(OTHER)]
    assert agent.hears_no_more()


def test_what_has_gone_by_then_is_asked_for_again_and_held(agent: Agent) -> None:
    asked, out = agent.ask(NEW, OTHER)
    request_id, _ = agent.asked()
    agent.land(NEW)
    agent.say(request_id, 0, Status.OK, Status.OK)
    request_id, again = agent.asked()
    assert again.keys == [OTHER] and not again.unleased
    agent.say(request_id, 0, Status.MISS)
    assert asked.result() == (End.DONE, bytes([Status.OK, Status.MISS]), b"")
    assert out[0] == agent.content(NEW)


def test_the_agent_may_hold_it_all_the_same(agent: Agent) -> None:
    asked, out = agent.ask(NEW)
    request_id, get = agent.asked()
    assert get.unleased
    expected = bytes(agent.held.arena.view(0, BLOCK))
    agent.say(request_id, 5, Status.OK)
    assert agent.hear() == (0, ReleaseLease(5))
    assert asked.result() == (End.DONE, bytes(1), b"") and out == [expected]


def test_what_takes_long_to_copy_is_to_be_held() -> None:
    agent = Agent(LARGE)
    asked, _ = agent.ask(NEW)
    request_id, get = agent.asked()
    assert not get.unleased
    agent.say(request_id, 0, Status.MISS)
    assert asked.result()[1] == bytes([Status.MISS])
    agent.close()


def test_a_block_that_nobody_holds_for_who_asked_for_a_lease_is_nonsense() -> None:
    agent = Agent(LARGE)
    asked, out = agent.ask(NEW)
    request_id, _ = agent.asked()
    agent.say(request_id, 0, Status.OK)
    end, _, why = asked.result()
    assert end == End.NONSENSE and b"does not hold it" in why
    assert out == [bytes(LARGE)]
    agent.close()
