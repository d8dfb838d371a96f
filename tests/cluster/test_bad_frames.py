"""Nonsense on every socket of an agent: that connection ends, and nobody else notices."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest

from p2pkv.client import AgentClient
from p2pkv.types import Status
from p2pkv.wire import engine, peer
from tests.cluster.agents import AgentProcess, alive_peers, eventually, make_layout, visible
from tests.cluster.blocks import blocks_of, new_keys
from tests.cluster.raw import RawConnection, engine_connection, header, lane_connection, peer_connection

pytestmark = [pytest.mark.cluster]

LAYOUT = make_layout(65_536)
NESTED = b"\x91" * 100_000 + b"\xc0"
"""Arrays within arrays, deeper than any decoder should follow."""


@pytest.fixture(autouse=True)
def _nobody_else_notices(pair: list[AgentProcess]) -> Iterator[None]:
    """Before and after: both agents serve, know each other, and a block goes from one to the other."""
    yield
    a, b = pair
    assert a.alive and b.alive
    eventually(lambda: alive_peers(a) >= {b.node} and alive_peers(b) >= {a.node}, why="the agents see each other")
    keys = new_keys(2)
    with AgentClient(a.socket) as one, AgentClient(b.socket) as other:
        assert one.open(LAYOUT).put(keys, blocks_of(keys, LAYOUT.block_bytes)) == [True, True]
        there = other.open(LAYOUT)
        visible(there, keys)
        out = [bytearray(LAYOUT.block_bytes) for _ in keys]
        eventually(lambda: there.get_into(keys, out) == [True, True], why="the blocks are read")
    assert out == blocks_of(keys, LAYOUT.block_bytes)


def wrong_version(lawful_type: int) -> bytes:
    return header(3, lawful_type, version=77) + b"\x91\x01\x02"


def oversized(lawful_type: int) -> bytes:
    return header(0xFFFF_FFFF, lawful_type) + bytes(1000)


def just_too_large(lawful_type: int) -> bytes:
    return header((4 << 20) + 1, lawful_type)


def garbage_body(lawful_type: int) -> bytes:
    return header(64, lawful_type) + b"\xc1" * 64


def empty_body(lawful_type: int) -> bytes:
    return header(0, lawful_type)


def too_few_fields(lawful_type: int) -> bytes:
    return header(1, lawful_type) + b"\x90"


def wrong_types(lawful_type: int) -> bytes:
    body = msgspec.msgpack.encode(["x", {"y": 1}, None, -1, [[]], 2.5])
    return header(len(body), lawful_type) + body


def nested(lawful_type: int) -> bytes:
    return header(len(NESTED), lawful_type) + NESTED


def unknown_type(_: int) -> bytes:
    return header(1, 250) + b"\x90"


def not_frames_at_all(_: int) -> bytes:
    return b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def random_bytes(_: int) -> bytes:
    return b"\xff" + os.urandom(4095)


NONSENSE = [
    wrong_version,
    oversized,
    just_too_large,
    garbage_body,
    empty_body,
    too_few_fields,
    wrong_types,
    nested,
    unknown_type,
    not_frames_at_all,
    random_bytes,
]

PLACES: dict[str, tuple[Callable[[AgentProcess], RawConnection], int]] = {
    "peer port": (peer_connection, peer.PeerType.HELLO),
    "control connection": (lambda agent: peer_connection(agent, "control"), peer.PeerType.PIN),
    "data connection": (lambda agent: peer_connection(agent, "data"), peer.PeerType.GET),
    "engine socket": (lambda agent: engine_connection(agent, attach=False), engine.EngineType.ATTACH),
    "attached engine": (engine_connection, engine.EngineType.GET),
    "engine's short way": (lane_connection, engine.EngineType.GET),
}


@pytest.mark.parametrize("nonsense", NONSENSE, ids=lambda f: f.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_nonsense_ends_the_connection_it_came_on(
    pair: list[AgentProcess], place: str, nonsense: Callable[[int], bytes]
) -> None:
    connect, lawful_type = PLACES[place]
    with connect(pair[0]) as connection:
        try:
            connection.send(nonsense(lawful_type))
        except (BrokenPipeError, ConnectionResetError):
            return
        last_words = connection.closed_by_the_agent()
    said = [m for m in last_words if isinstance(m, peer.PeerError | engine.EngineError)]
    assert all(m.code == "protocol" for m in said), said


@pytest.mark.parametrize("place", PLACES)
def test_a_frame_that_ends_in_the_middle_is_no_frame(pair: list[AgentProcess], place: str) -> None:
    connect, lawful_type = PLACES[place]
    with connect(pair[0]) as connection:
        connection.send(header(100, lawful_type) + bytes(40))
        connection.sock.shutdown(socket.SHUT_WR)
        connection.closed_by_the_agent()


@pytest.mark.parametrize("place", ["peer port"])
def test_a_stranger_that_says_nothing_is_shown_out(pair: list[AgentProcess], place: str) -> None:
    with PLACES[place][0](pair[0]) as connection:
        started = time.monotonic()
        connection.closed_by_the_agent()
        assert time.monotonic() - started < 4.0


def test_a_hello_drop_by_drop_is_not_waited_for_for_ever(pair: list[AgentProcess]) -> None:
    with peer_connection(pair[0]) as connection:
        connection.send(header(1000, peer.PeerType.HELLO))
        connection.closed_by_the_agent()


ANSWERS_ARE_NO_REQUESTS = [
    ("control connection", peer.PeerType.GOT, b"\x90"),
    ("control connection", peer.PeerType.PINNED, msgspec.msgpack.encode(peer.Pinned(0, 0, b"", [], [], b"", ""))),
    ("control connection", peer.PeerType.GET, msgspec.msgpack.encode(peer.Get(1, [], 1))),
    ("control connection", peer.PeerType.RELEASED, msgspec.msgpack.encode(peer.Released(True))),
    ("data connection", peer.PeerType.PIN, msgspec.msgpack.encode([1, [], 1])),  # without "serve"
    ("data connection", peer.PeerType.PINNED, msgspec.msgpack.encode(peer.Pinned(0, 0, b"", [], [], b"", ""))),
    ("data connection", peer.PeerType.RELEASED, msgspec.msgpack.encode(peer.Released(True))),
    ("peer port", peer.PeerType.GET, msgspec.msgpack.encode(peer.Get(1, [], 1))),
    ("engine socket", engine.EngineType.GET, msgspec.msgpack.encode(engine.Get(1, [], 1))),
    ("attached engine", engine.EngineType.DONE, msgspec.msgpack.encode(engine.Done(b"", b"", 0, 0))),
    ("attached engine", engine.EngineType.ATTACH, msgspec.msgpack.encode(engine.Attach(1, 1, "again", 1))),
]


@pytest.mark.parametrize(("place", "message_type", "body"), ANSWERS_ARE_NO_REQUESTS)
def test_a_message_that_does_not_belong_there_ends_the_connection(
    pair: list[AgentProcess], place: str, message_type: int, body: bytes
) -> None:
    with PLACES[place][0](pair[0]) as connection:
        connection.send(header(len(body), message_type) + body)
        connection.closed_by_the_agent()


def test_an_engine_of_another_protocol_version_is_told_so(pair: list[AgentProcess]) -> None:
    with engine_connection(pair[0], attach=False) as connection:
        connection.send(engine.CODEC.encode(engine.Attach(90, 99, "from the future", 1), 1))
        [error] = connection.closed_by_the_agent()
    assert isinstance(error, engine.EngineError) and "version" in error.message


def test_a_peer_of_another_protocol_version_is_told_so(pair: list[AgentProcess]) -> None:
    card = peer.Card(99, 1, peer.Address("127.0.0.1", 9), "", "elsewhere", [], ["tcp"], 7)
    with peer_connection(pair[0]) as connection:
        connection.send(peer.CODEC.encode(peer.Hello(90, 99, "default", "control", card)))
        words = connection.closed_by_the_agent()
    assert any(isinstance(m, peer.PeerError) for m in words)


def test_a_data_connection_with_requests_heaped_up_is_closed(pair: list[AgentProcess]) -> None:
    """One request at a time; what is sent ahead is bounded, in number and in bytes."""
    keys = new_keys(8)
    a = pair[0]
    assert all(a.open(LAYOUT).put(keys, blocks_of(keys, LAYOUT.block_bytes)))
    get = peer.CODEC.encode(peer.Get(LAYOUT.namespace, keys, 10_000), 1)
    with peer_connection(a, "data") as connection:
        connection.sock.setblocking(False)
        sent = 0
        deadline = time.monotonic() + 5.0
        ended = False
        while time.monotonic() < deadline and not ended:
            try:
                sent += connection.sock.send(get * 64)
                assert sent < 64 << 20, "the agent takes in requests without bound"
            except BlockingIOError:
                break  # it stopped reading: as good as closing
            except OSError:
                ended = True


def test_a_peer_that_asks_and_never_reads_costs_a_lease_and_no_more(pair: list[AgentProcess]) -> None:
    """Its blocks are let go when its lease is over or its connection ends."""
    a = pair[0]
    keys = new_keys(32)
    assert all(a.open(LAYOUT).put(keys, blocks_of(keys, LAYOUT.block_bytes)))
    with peer_connection(a, "data") as connection:
        connection.send(peer.CODEC.encode(peer.Get(LAYOUT.namespace, keys, 10_000), 1))
        eventually(lambda: a.metric("p2pkv_leases") >= 1, why="the lease is there")
    eventually(lambda: a.metric("p2pkv_leases") == 0, 5.0, why="the lease ends with the connection")


def test_requests_of_an_engine_that_can_never_work_are_refused_one_by_one(pair: list[AgentProcess]) -> None:
    """And the connection goes on: this is a bug of an engine, not of its protocol."""
    namespace = LAYOUT.namespace
    keys = new_keys(2)
    with engine_connection(pair[0], layout=LAYOUT) as connection:
        refusals = {
            "namespace": connection.ask(engine.Get(namespace ^ 1, keys, 100)),
            "no such region": connection.ask(engine.Store(namespace, keys, 5, [0, 1], 100)),
            "descriptor": connection.ask(engine.MapRegion(1, 0, 65_536, 4)),
        }
        for words, answer in refusals.items():
            assert isinstance(answer, engine.EngineError) and answer.code == "invalid", answer
            assert words in answer.message
        got = connection.ask(engine.Get(namespace, keys, 100))
        assert isinstance(got, engine.Got) and set(got.statuses) == {Status.MISS}


def test_a_lease_of_somebody_else_cannot_be_given_back(pair: list[AgentProcess]) -> None:
    a = pair[0]
    [key] = new_keys(1)
    assert all(a.open(LAYOUT).put([key], blocks_of([key], LAYOUT.block_bytes)))
    with engine_connection(a, layout=LAYOUT) as holder, engine_connection(a, layout=LAYOUT) as other:
        got = holder.ask(engine.Get(LAYOUT.namespace, [key], 100))
        assert isinstance(got, engine.Got) and got.lease
        other.send(engine.CODEC.encode(engine.ReleaseLease(got.lease)))
        assert isinstance(other.ask(engine.MatchKeys(LAYOUT.namespace, [key], False)), engine.Matched)
        assert a.metric("p2pkv_leases") >= 1
        holder.send(engine.CODEC.encode(engine.ReleaseLease(got.lease)))
        eventually(lambda: a.metric("p2pkv_leases") == 0, why="the holder's own word counts")


def test_requests_sent_ahead_are_all_answered(pair: list[AgentProcess]) -> None:
    """Every one is answered, within its deadline or at once, however many were sent ahead."""
    with engine_connection(pair[0], layout=LAYOUT) as connection:
        for request_id in range(1, 400):
            message = engine.Get(LAYOUT.namespace, new_keys(1), 50)
            connection.send(engine.CODEC.encode(message, request_id))
        answered: set[int] = set()
        while len(answered) < 399:
            frame = connection.receive()
            assert frame is not None
            answer = engine.CODEC.decode(frame)
            assert isinstance(answer, engine.Got) or (isinstance(answer, engine.EngineError) and answer.code == "busy")
            answered.add(frame.request_id)
