"""Peers are judged by fractions of a millisecond, which an event loop's own clock does not show."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import uvloop

import p2pkv

ROOT = Path(p2pkv.__file__).parent
MEASURING = sorted([*ROOT.glob("transport/*.py"), *ROOT.glob("agent/*.py")])


@pytest.mark.parametrize("path", MEASURING, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_nothing_that_judges_peers_reads_the_clock_of_the_loop(path: Path) -> None:
    """An answer after 0.4 ms, told as 0, once meant that a known peer was waited for like a stranger."""
    assert not re.search(r"loop\(?\)?\.time\(\)", path.read_text())


def test_the_clock_of_uvloop_counts_whole_milliseconds_from_the_same_start() -> None:
    """Why; and why a deadline by :func:`time.monotonic` may be given to ``call_at``."""

    async def both() -> tuple[float, float]:
        return uvloop_time(), time.monotonic()

    loop = uvloop.new_event_loop()
    uvloop_time = loop.time
    try:
        of_loop, exact = loop.run_until_complete(both())
    finally:
        loop.close()
    assert of_loop * 1000 == pytest.approx(round(of_loop * 1000), abs=1e-6)
    assert abs(exact - of_loop) < 1.0
