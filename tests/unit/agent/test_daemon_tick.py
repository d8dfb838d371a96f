"""The agent's housekeeping goes on, whatever breaks in a part of it."""

from __future__ import annotations

import asyncio

import pytest

from p2pkv.agent import daemon
from p2pkv.agent.daemon import Agent
from p2pkv.config import Config

PARTS = ["service", "suspicion", "kept_estimates", "remembered"]


class Part:
    def __init__(self, broken: bool) -> None:
        self.ticks = 0
        self.broken = broken

    def tick(self) -> None:
        self.ticks += 1
        if self.broken:
            raise RuntimeError("a bug")


@pytest.mark.parametrize("broken", PARTS)
async def test_a_part_that_breaks_is_logged_and_costs_the_others_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    monkeypatch.setattr(daemon, "TICK_S", 0.0)
    agent = Agent(Config())
    parts = [Part(name == broken) for name in PARTS]
    for name, part in zip(PARTS, parts, strict=True):
        setattr(agent, name, part)
    ticking = asyncio.create_task(agent._tick())
    async with asyncio.timeout(5):
        while not ticking.done() and min(part.ticks for part in parts) < 3:
            await asyncio.sleep(0)
    assert not ticking.done()
    ticking.cancel()
    assert "Part.tick failed" in caplog.text and "RuntimeError: a bug" in caplog.text
