"""What is expected of peers survives a restart, and nothing else does harm."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from p2pkv.agent.kept_estimates import AGE_MAX_S, BYTES_MAX, FILE, SAVE_S, KeptEstimates
from p2pkv.transport.estimates import STRANGER_SPREAD, Moved
from p2pkv.transport.peers import Peers
from p2pkv.transport.plan import Estimate, Source
from p2pkv.types import Tier

MIB = 1 << 20
A = Source(1, Tier.DRAM)
STRANGER = Estimate(0.001, 1e9, spread=STRANGER_SPREAD)


def make_peers() -> Peers:
    return Peers(lambda source: STRANGER, heard_at=lambda node: float("-inf"), clock=lambda: 50.0)


class Agent:
    """``now``: of the wall clock; ``monotonic`` of the other."""

    def __init__(self, directory: Path | None, now: float = 1000.0) -> None:
        self.now = now
        self.monotonic = 7.0
        self.peers = make_peers()
        self.kept = KeptEstimates(directory, self.peers, clock=lambda: self.monotonic, wall=lambda: self.now)

    def learn(self, bytes_per_s: float) -> None:
        for _ in range(20):
            self.peers.began(A, 8 * MIB)
            self.peers.ended(A, 8 * MIB, Moved(0.002, 0.002 + 8 * MIB / bytes_per_s, 8 * MIB))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.001)


async def test_what_was_learnt_is_there_after_a_restart(tmp_path: Path) -> None:
    before = Agent(tmp_path)
    before.learn(2e8)
    await before.kept.stop(5.0)
    after = Agent(tmp_path, now=1030.0)
    assert after.kept.load() == 1
    assert after.peers.estimate(A).bytes_per_s == pytest.approx(2e8, rel=0.02)
    assert after.peers.age_s(A) == pytest.approx(30.0)


async def test_it_is_written_now_and_then(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    agent.learn(2e8)
    agent.monotonic += SAVE_S - 1
    agent.kept.tick()
    assert threads() == []
    agent.monotonic += 1
    agent.kept.tick()
    await until((tmp_path / FILE).exists)
    assert not list(tmp_path.glob("*.new"))


async def test_a_wall_clock_that_is_set_back_delays_nothing(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    agent.learn(2e8)
    agent.now -= 3600.0
    agent.monotonic += SAVE_S
    agent.kept.tick()
    await until((tmp_path / FILE).exists)
    assert Agent(tmp_path, now=agent.now).kept.load() == 1


async def test_a_disk_that_hangs_holds_nobody_up_and_is_written_to_by_one_thread(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    agent.learn(2e8)
    hanging = (tmp_path / FILE).with_suffix(".new")
    os.mkfifo(hanging)  # whoever opens it for writing waits for a reader
    try:
        for _ in range(3):
            agent.monotonic += SAVE_S
            agent.kept.tick()
        assert len(threads()) == 1
        async with asyncio.timeout(5):
            await agent.kept.stop(0.05)
        assert len(threads()) == 1
    finally:
        reader = os.open(hanging, os.O_RDONLY | os.O_NONBLOCK)
        await until(lambda: not threads())
        os.close(reader)


async def test_after_its_stop_nothing_is_written(tmp_path: Path) -> None:
    agent = Agent(tmp_path)
    agent.learn(2e8)
    await agent.kept.stop(5.0)
    (tmp_path / FILE).unlink()
    agent.monotonic += SAVE_S
    agent.kept.tick()
    assert threads() == [] and not (tmp_path / FILE).exists()


def threads() -> list[threading.Thread]:
    """That write now."""
    return [thread for thread in threading.enumerate() if thread.name == "p2pkv-estimates"]


async def test_without_a_directory_nothing_is_kept() -> None:
    agent = Agent(None)
    agent.learn(2e8)
    await agent.kept.stop(5.0)
    assert agent.kept.load() == 0


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'{"version":2,"written_at":1000,"sources":[]}',
        b'{"version":1}',
        b"\xff" * 100,
        b" " * (BYTES_MAX + 2),
    ],
    ids=["empty", "cut off", "a list", "another version", "incomplete", "binary", "too long"],
)
def test_a_file_that_makes_no_sense_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert Agent(tmp_path).kept.load() == 0


@pytest.mark.parametrize("later_s", [-1.0, AGE_MAX_S + 1])
async def test_a_file_from_the_future_or_long_ago_is_not_believed(tmp_path: Path, later_s: float) -> None:
    before = Agent(tmp_path)
    before.learn(2e8)
    await before.kept.stop(5.0)
    assert Agent(tmp_path, now=1000.0 + later_s).kept.load() == 0


async def test_a_disk_that_cannot_be_written_to_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    agent = Agent(tmp_path / "not there")
    agent.learn(2e8)
    await agent.kept.stop(5.0)
    assert "cannot be written down" in caplog.text
