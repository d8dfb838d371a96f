"""Bytes that the agent tells of before they are proven: copied early, and counted only when they are the block's."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from p2pkv import _native
from p2pkv.client import Layout, Status
from p2pkv.client.cache import Cache
from p2pkv.errors import P2PKVError
from p2pkv.wire.engine import CODEC, Ahead, Got
from p2pkv.wire.engine_types import EngineType
from p2pkv.wire.fields import Extent
from p2pkv.wire.frame import encode

BLOCK = 1024
LAYOUT = Layout(model="m", revision="r", kv_dtype="float32", block_tokens=16, block_bytes=BLOCK)
KEY = b"k" * 32
A, B = bytes([1]) * BLOCK, bytes([2]) * BLOCK


class Agent:
    """A client, a connection and an agent's arena in one; what the agent says is the test's."""

    def __init__(self) -> None:
        self.memory = bytearray(A + B + bytes(BLOCK))
        self.arena = memoryview(self.memory)
        ours, theirs = socket.socketpair()
        self.gets = _native.Gets(ours.detach(), self.memory)
        self.sock = theirs
        self.out = bytearray(BLOCK)

    def connection(self, deadline: float) -> Agent:
        return self

    def close(self, reason: str) -> None:
        pass

    def say(self, *messages: Ahead | Got) -> None:
        self.sock.sendall(b"".join(CODEC.encode(message, 1) for message in messages))

    def get(self, script: Callable[[], None]) -> list[Status]:
        cache = Cache(self, LAYOUT, LAYOUT.namespace)  # type: ignore[arg-type]

        def run() -> None:
            self.sock.recv(65_536)
            script()

        thread = threading.Thread(target=run)
        thread.start()
        try:
            return cache.get_statuses([KEY], [self.out], 10_000)
        finally:
            thread.join()

    def seen(self, beginning: bytes) -> None:
        """Wait until the client has copied this."""
        deadline = time.monotonic() + 10
        while self.out[: len(beginning)] != beginning:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent()
    yield made
    made.gets.close("the test is over")
    made.sock.close()


def got(offset: int, status: Status = Status.OK) -> Got:
    return Got(1, 10_000, [0], bytes([status]), b"\x02", [Extent(offset, BLOCK)], False)


def test_the_rest_is_copied_when_the_block_is_proven(agent: Agent) -> None:
    def script() -> None:
        agent.say(Ahead(0, BLOCK, 400))
        agent.seen(B[:400])
        agent.memory[BLOCK : BLOCK + 400] = bytes(400)  # that this part is not copied again can be seen
        agent.say(Ahead(0, BLOCK, 600), got(BLOCK))

    assert agent.get(script) == [Status.OK]
    assert agent.out == B


def test_what_was_copied_from_another_place_does_not_count(agent: Agent) -> None:
    assert agent.get(lambda: agent.say(Ahead(0, 0, 700), got(BLOCK))) == [Status.OK]
    assert agent.out == B


def test_parts_of_two_places_are_not_put_together(agent: Agent) -> None:
    assert agent.get(lambda: agent.say(Ahead(0, 0, 700), Ahead(0, BLOCK, 800), got(BLOCK))) == [Status.OK]
    assert agent.out == B


def test_what_was_taken_back_does_not_count_even_in_the_same_place(agent: Agent) -> None:
    """A second attempt, perhaps at another node, may land where the first one failed."""

    def script() -> None:
        agent.say(Ahead(0, 0, 700))
        agent.seen(A[:700])
        agent.memory[:BLOCK] = B
        agent.say(Ahead(0, 0, 0), got(0))

    assert agent.get(script) == [Status.OK]
    assert agent.out == B


def test_a_block_that_is_not_proven_after_all_is_not_ok(agent: Agent) -> None:
    assert agent.get(lambda: agent.say(Ahead(0, 0, 700), got(0, Status.REJECTED))) == [Status.REJECTED]


@pytest.mark.parametrize("part", [Ahead(1, 0, 10), Ahead(0, 0, BLOCK + 1)])
def test_bytes_that_nobody_asked_for_are_an_error(agent: Agent, part: Ahead) -> None:
    with pytest.raises(P2PKVError, match="nobody asked for"):
        agent.get(lambda: agent.say(part, got(0)))


def test_a_place_outside_of_the_arena_is_not_taken(agent: Agent) -> None:
    with pytest.raises(P2PKVError, match="nobody asked for"):
        agent.get(lambda: agent.say(Ahead(0, 1 << 40, 10), got(0)))


def answer(indices: list[int], statuses: bytes, extents: list[Extent], lease: int = 1) -> Got:
    return Got(lease, 10_000, indices, statuses, b"", extents, False)


HERE = Extent(0, BLOCK)
OK = bytes([Status.OK])


@pytest.mark.parametrize(
    ("lie", "complaint"),
    [
        (answer([0], b"", [HERE]), "differ in length"),
        (answer([0], OK, []), "differ in length"),
        (answer([], OK, [HERE]), "differ in length"),
        (answer([1], OK, [HERE]), "nobody asked for"),
        (answer([0], bytes([max(Status) + 1]), [HERE]), "nobody asked for"),
        (answer([0], OK, [Extent(0, BLOCK - 1)]), "where it cannot be"),
        (answer([0], OK, [Extent(2 * BLOCK + 1, BLOCK)]), "where it cannot be"),
        (answer([0], OK, [Extent((1 << 64) - 1, BLOCK)]), "where it cannot be"),
        (answer([0], OK, [HERE], lease=0), "does not hold it"),
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error_and_copies_nothing(agent: Agent, lie: Got, complaint: str) -> None:
    with pytest.raises(P2PKVError, match=complaint):
        agent.get(lambda: agent.say(lie))
    assert agent.out == bytes(BLOCK)


def test_a_miss_may_have_any_extent(agent: Agent) -> None:
    assert agent.get(lambda: agent.say(answer([0], bytes([Status.MISS]), [Extent(1 << 50, 7)]))) == [Status.MISS]


def test_an_error_that_is_malformed_is_a_loss_and_ends_the_connection(agent: Agent) -> None:
    closed: list[str] = []
    agent.close = closed.append  # type: ignore[method-assign]
    body = encode(EngineType.ERROR, b"\x91\x01", 1)
    assert agent.get(lambda: agent.sock.sendall(body)) == [Status.LOST]
    assert closed and "malformed" in closed[0]
