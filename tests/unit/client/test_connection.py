"""How a client connects where the agent's files cannot be used, and what a signal leaves of a wait."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pkv.client import connection as connection_module
from p2pkv.client.channel import Channel
from p2pkv.client.connection import Connection
from p2pkv.client.messages import Ok, UnmapRegion
from p2pkv.errors import AgentUnavailable
from p2pkv.wire import engine
from p2pkv.wire.engine import CODEC
from tests.unit.client.directories import Held, Silent

BLOCK = 4096


@pytest.fixture
def held() -> Held:
    return Held(2, BLOCK)


def attach(path: str) -> Connection:
    return Connection(path, name="test", deadline=time.monotonic() + 10)


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("test")
    yield fd
    os.close(fd)


@pytest.mark.parametrize("size", [0, 65_536], ids=["cannot be mapped", "of another version"])
def test_a_directory_that_cannot_be_used_is_not_used(
    held: Held, file: int, size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.ftruncate(file, size)
    connection_module._log_unusable.cache_clear()
    agent = Silent(tmp_path / "s", held.arena.fd, held.arena.capacity_bytes, [file, file])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            connection = attach(agent.path)
            assert connection.own_loads.fd == -1 and connection.broken is None and connection.gets.broken is None
            connection.close()
    agent.close()
    assert len(caplog.records) == 1 and "directory" in caplog.text


def test_a_directory_that_can_be_used_is(held: Held, tmp_path: Path) -> None:
    agent = Silent(tmp_path / "s", held.arena.fd, held.arena.capacity_bytes, held.files.descriptors())
    connection = attach(agent.path)
    assert connection.own_loads.fd >= 0
    connection.close()
    agent.close()


def test_an_arena_that_cannot_be_mapped_is_no_agent(held: Held, tmp_path: Path) -> None:
    agent = Silent(tmp_path / "s", held.arena.fd, 1 << 60, [])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AgentUnavailable, match="cannot be mapped"):
        attach(agent.path)
    agent.close()
    assert len(os.listdir("/proc/self/fd")) < before, "the listener's is closed, and nothing is left"


class Interrupted:
    """A poll where a signal's handler raises."""

    def register(self, *_: object) -> None:
        self.registered = True

    def unregister(self, *_: object) -> None:
        self.registered = False

    def poll(self, _: float) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("beside", [-1, 0])
def test_who_is_interrupted_while_it_waits_gives_up_the_lead(beside: int) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    good, bad = channel._poll, Interrupted()
    channel._poll = bad  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        channel.wait_readable(10.0, beside=beside)
    assert not getattr(bad, "registered", False)
    channel._poll = good
    theirs.sendall(CODEC.encode(engine.Ok(), 1))
    assert channel.request(UnmapRegion(1), deadline=time.monotonic() + 5) == Ok()
    channel.close()
    theirs.close()


def test_what_may_have_been_lost_in_the_middle_breaks_the_connection() -> None:
    class Lossy:
        """A socket whose bytes arrive together with a signal."""

        def __init__(self, sock: socket.socket) -> None:
            self.real = sock

        def recv(self, most: int) -> bytes:
            self.real.recv(most)
            raise KeyboardInterrupt

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    channel._sock = Lossy(ours)  # type: ignore[assignment]
    theirs.sendall(b"x")
    with pytest.raises(KeyboardInterrupt):
        channel.pump()
    assert channel.broken is not None and not channel._reading
    theirs.close()
