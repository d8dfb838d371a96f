"""B pulls from A's *agent*: what A's engine is doing, and whether it still lives, makes no difference.

The last tests of all: they kill A's engine. The exact claim is ``p2pkv bench busy``'s; a test on a machine that others
use too only tells 1 x from the 20 to 40 x of a tier that is served by the source's scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import pytest

from p2pkv.demo.busy import BusySource, pinning
from tests.e2e.pair import Pair, say

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PULLS = 3
PROMPT_TOKENS = 2048
RATIO_MAX = 3.0


@pytest.fixture(scope="module")
def source(_pair: Pair) -> Iterator[BusySource]:
    """The shared pair, with as many prompts computed on A as the tests below pull."""
    if not pinning().source:
        pytest.skip("ONE CORE ONLY: a busy source cannot be told from a busy processor")
    made = BusySource(
        _pair.a, _pair.b, _pair.agent_b,
        model=_pair.model, prompt_tokens=PROMPT_TOKENS, seed=20_000, progress=say,
    )  # fmt: skip
    made.fill(2 * PULLS + 2)
    yield made


def test_a_pull_does_not_wait_for_a_busy_source(source: BusySource, pair: Pair) -> None:
    idle = [source.pull() for _ in range(PULLS)]
    with source.busy():
        busy = [source.pull() for _ in range(PULLS)]
    ratio = median(pull.ttft_s for pull in busy) / median(pull.ttft_s for pull in idle)
    shown = {"idle": [round(pull.ttft_s, 3) for pull in idle], "busy": [round(pull.ttft_s, 3) for pull in busy]}
    say(f"busy source over {pair.transport}: TTFT in seconds {shown}, busy / idle = {ratio:.2f}")
    assert all(pull.right and pull.from_peer_tokens == PROMPT_TOKENS for pull in idle + busy), idle + busy
    assert ratio <= RATIO_MAX


def test_a_pull_needs_no_living_source(source: BusySource, pair: Pair) -> None:
    source.stop()
    stopped = source.pull()
    source.kill()
    dead = source.pull()
    say(f"A's engine stopped: TTFT {stopped.ttft_s:.3f} s; killed: {dead.ttft_s:.3f} s")
    for pull in (stopped, dead):
        assert pull.right and pull.from_peer_tokens == PROMPT_TOKENS, pull
