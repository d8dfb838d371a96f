"""The agent's end of the NIXL process's second socket: who can be read, and what ends a process that goes wrong."""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pkv import _native
from p2pkv.store.arena import Arena
from p2pkv.store.dram import DramStore
from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_wire import LANE_ID_MIN, NixlType
from tests.unit.native.nixl_socket import frame
from tests.unit.native.serving import PATIENCE_S, until

BROKEN = (4, 0, 0)
NODE = 0xB2
ENDPOINT = "b2:1:1"
ID = LANE_ID_MIN + 1
pack = msgspec.msgpack.encode


class Agent:
    """A :class:`NixlReads` over an arena that nobody reads into."""

    def __init__(self) -> None:
        self.arena = Arena.create(4 << 20)
        self.store = DramStore(self.arena.capacity_bytes)
        self.reads = _native.NixlReads(self.store.core, self.arena.base_address, 1 << 20)

    def close(self) -> None:
        self.reads.stop()
        self.arena.close()

    def attach(self) -> Process:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.reads.attach(ours.detach(), 0)
        return Process(theirs, self.reads.bell)

    def connected(self) -> Process:
        """A process that is taken up, and can read from :data:`NODE`."""
        process = self.attach()
        self.reads.set_peer(NODE, ENDPOINT)
        until(lambda: self.reads.reads_from(NODE))
        return process

    def check_broken(self) -> None:
        """The process is given up, once, and that is told."""
        until(lambda: not self.reads.reads_from(NODE))
        assert select.select([self.reads.fd], [], [], PATIENCE_S)[0], "and the event loop is woken"
        assert self.reads.drain() == [BROKEN]
        assert not select.select([self.reads.fd], [], [], 0)[0]


class Process:
    """The NIXL process's end. A context manager."""

    def __init__(self, sock: socket.socket, bell: int) -> None:
        self.sock, self.bell = sock, bell
        sock.settimeout(PATIENCE_S)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def say(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            pass  # given up already
        os.eventfd_write(self.bell, 1)

    def heard(self) -> None:
        """Wait until all that was said has been looked at: the thread comes for the second ring after that."""
        for _ in range(2):
            until(lambda: not select.select([self.bell], [], [], 0)[0])
            os.eventfd_write(self.bell, 1)
        until(lambda: not select.select([self.bell], [], [], 0)[0])

    def closed(self) -> bool:
        """Whether the agent closes its end."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True  # with something unread in it


@pytest.fixture
def agent() -> Iterator[Agent]:
    made = Agent()
    yield made
    made.close()


# ---- who can be read


def test_a_peer_can_be_read_when_it_and_a_process_are_there(agent: Agent) -> None:
    reads = agent.reads
    assert not reads.reads_from(NODE)
    reads.set_peer(NODE, ENDPOINT)
    assert not reads.reads_from(NODE), "there is no process"
    with agent.attach():
        until(lambda: reads.reads_from(NODE))
        assert not reads.reads_from(NODE + 1)
        reads.set_peer(NODE + 1, "b3:1:1")
        assert reads.reads_from(NODE + 1)
        reads.drop_peer(NODE)
        reads.drop_peer(77)
        assert not reads.reads_from(NODE) and reads.reads_from(NODE + 1)
        assert reads.drain() == [] and (reads.reads, reads.bytes_read) == (0, 0)


def test_a_process_that_closes_its_end_is_told_of(agent: Agent) -> None:
    agent.connected().sock.close()
    agent.check_broken()


def test_after_a_process_broke_another_can_be_attached(agent: Agent) -> None:
    agent.connected().sock.close()
    agent.check_broken()
    with agent.connected() as process:
        process.say(NONSENSE["HTTP"])
        agent.check_broken()
    with agent.connected():
        assert agent.reads.drain() == []


def test_a_process_that_was_reaped_takes_its_peers_along(agent: Agent) -> None:
    with agent.connected() as process:
        agent.reads.detach()
        assert not agent.reads.reads_from(NODE)
        assert process.closed()
        with agent.attach():
            agent.reads.set_peer(NODE + 1, ENDPOINT)
            until(lambda: agent.reads.reads_from(NODE + 1))
            assert not agent.reads.reads_from(NODE), "the next process is not connected to it"
            agent.reads.set_peer(NODE, ENDPOINT)
            assert agent.reads.reads_from(NODE)


def test_a_process_that_takes_over_replaces_the_one_before(agent: Agent) -> None:
    with agent.connected() as first, agent.attach() as second:
        assert first.closed()
        until(lambda: agent.reads.reads_from(NODE))
        agent.reads.drain()
        second.say(b"")
        second.heard()
        assert agent.reads.reads_from(NODE) and agent.reads.drain() == []
        second.sock.close()
        agent.check_broken()


def test_processes_attached_and_detached_in_a_hurry_leave_nothing_open(agent: Agent) -> None:
    before = len(os.listdir("/proc/self/fd"))
    processes = []
    for _ in range(30):
        processes += [agent.attach(), agent.attach()]
        agent.reads.detach()
    for process in processes:
        with process:
            assert process.closed()
    assert len(os.listdir("/proc/self/fd")) == before


# ---- what it says


DONE = frame(NixlType.READ_DONE, pack([0, 5, b"", True, ""]), ID)
NONSENSE = {
    "another version": frame(NixlType.READ_PROGRESS, pack([5]), ID, version=2),
    "too long": frame(NixlType.READ_PROGRESS, b"", ID, length=wire.BODY_BYTES_MAX + 1),
    "4 GiB": frame(NixlType.READ_PROGRESS, b"", ID, length=0xFFFF_FFFF),
    "an unknown type": frame(99, pack([5]), ID),
    "a request": frame(NixlType.READ, pack(["b:1:1", bytes(24), 0, 0]), ID),
    "something of the other socket": frame(NixlType.STATS_REPLY, pack([0] * 8), ID),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
    "progress of nothing": frame(NixlType.READ_PROGRESS, b"", ID),
    "progress without a number": frame(NixlType.READ_PROGRESS, pack([]), ID),
    "negative progress": frame(NixlType.READ_PROGRESS, pack([-1]), ID),
    "progress that is cut short": frame(NixlType.READ_PROGRESS, pack([70_000])[:-1], ID),
    "an end of nothing": frame(NixlType.READ_DONE, b"", ID),
    "an end with too few fields": frame(NixlType.READ_DONE, pack([0, 5, b"", True]), ID),
    "an end with text for extents": frame(NixlType.READ_DONE, pack([0, 5, "", True, ""]), ID),
    "an end with a number for a truth": frame(NixlType.READ_DONE, pack([0, 5, b"", 1, ""]), ID),
    "an end that is cut short": frame(NixlType.READ_DONE, pack([0, 5, b"", True, "why"])[:-1], ID),
    "nonsense behind what is lawful": DONE + frame(99, b"", ID),
}


@pytest.mark.parametrize("nonsense", NONSENSE)
def test_nonsense_breaks_the_process(agent: Agent, nonsense: str) -> None:
    with agent.connected() as process:
        process.say(NONSENSE[nonsense])
        agent.check_broken()
        assert process.closed()


LAWFUL = {
    "progress": frame(NixlType.READ_PROGRESS, pack([5]), ID),
    "an end": DONE,
    "an end with something open": frame(NixlType.READ_DONE, pack([2, 5, struct.pack("<QQ", 0, 99), False, "x"]), ID),
    "an end of a later version": frame(NixlType.READ_DONE, pack([0, 5, b"", True, "", "new"]), ID),
    "the end of a quarantine": frame(NixlType.QUARANTINE_CLEAR, b"\x90", ID),
}


@pytest.mark.parametrize("words", LAWFUL)
def test_words_on_a_read_that_was_given_up_are_no_nonsense(agent: Agent, words: str) -> None:
    with agent.connected() as process:
        for byte in LAWFUL[words]:
            process.say(bytes([byte]))
        process.say(LAWFUL[words] * 5_000)
        process.heard()
        assert agent.reads.reads_from(NODE) and agent.reads.drain() == []
        assert (agent.reads.reads, agent.reads.bytes_read) == (0, 0)
        process.say(NONSENSE["an unknown type"])
        agent.check_broken()


def test_a_bell_without_words_is_nothing(agent: Agent) -> None:
    os.eventfd_write(agent.reads.bell, 1 << 40)
    with agent.connected() as process:
        process.say(b"")
        process.heard()
        assert agent.reads.reads_from(NODE) and agent.reads.drain() == []


@pytest.fixture(scope="module")
def old_agent() -> Iterator[Agent]:
    """One that has seen much."""
    made = Agent()
    yield made
    made.close()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(list(LAWFUL.values())), max_size=4),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
    st.binary(max_size=60),
)
def test_anything_may_be_said(old_agent: Agent, words: list[bytes], changes: list[tuple[int, int]], end: bytes) -> None:
    said = bytearray(b"".join(words) + end)
    for at, byte in changes:
        if said:
            said[at % len(said)] = byte
    with old_agent.connected() as process:
        process.say(bytes(said))
        process.heard()
    old_agent.check_broken()


# ---- the end


def test_stop_closes_the_socket_and_may_be_called_again() -> None:
    agent = Agent()
    with agent.connected() as process:
        started = time.monotonic()
        agent.reads.stop()
        agent.reads.stop()
        assert time.monotonic() - started < 2.0
        assert process.closed() and not agent.reads.reads_from(NODE)
    agent.close()


def test_stop_does_not_wait_for_a_process_that_says_much() -> None:
    agent = Agent()
    with agent.connected() as process:
        process.sock.settimeout(0)
        try:
            while True:
                process.sock.send(DONE)
        except BlockingIOError:
            os.eventfd_write(process.bell, 1)
        started = time.monotonic()
        agent.reads.stop()
        assert time.monotonic() - started < 2.0
    agent.close()


def test_after_stop_nothing_happens() -> None:
    agent = Agent()
    with agent.connected() as process:
        agent.reads.stop()
        agent.reads.drain()
        os.eventfd_write(process.bell, 1)
        with agent.attach() as late, agent.attach() as later:
            agent.reads.set_peer(NODE, ENDPOINT)
            agent.reads.drop_peer(NODE + 1)
            assert not agent.reads.reads_from(NODE)
            assert late.closed()
            agent.reads.detach()
            assert later.closed()
        assert agent.reads.drain() == []
    agent.close()


def test_what_was_attached_after_stop_is_closed_at_the_end() -> None:
    agent = Agent()
    agent.reads.stop()
    with agent.attach() as late:
        del agent.reads
        assert late.closed()
    agent.arena.close()
