"""What an engine with p2pkv's tier, and an agent with NIXL, cost while nobody asks them for anything."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from p2pkv.bench.idle import descendants, process_seconds
from p2pkv.demo.measure import complete
from tests.e2e.pair import Pair, say

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SETTLE_S = 4.0
"""vLLM's worker spins for a second after a request, and an agent sends what it still holds back."""
IDLE_S = 30.0
LIMIT_PERCENT = 2.0


def used_by(pid: int) -> dict[str, float]:
    """CPU seconds so far of a process and each of its descendants, by pid and name."""
    pids = [pid, *descendants(pid)]
    return {f"{Path(f'/proc/{each}/comm').read_text().strip()} {each}": process_seconds(each) for each in pids}


def test_an_idle_engine_and_an_idle_agent_use_less_than_two_percent_of_a_core(pair: Pair) -> None:
    prompt = pair.prompt()
    pair.computed_on_a(prompt)
    pair.pulled_to_b(prompt)  # every connection and endpoint is there
    complete(pair.a.url, pair.prompt(512))
    trees = {
        "engine A": pair.a.child.pid,
        "engine B": pair.b.child.pid,
        "agent A": pair.agent_a.child.pid,
        "agent B": pair.agent_b.child.pid,
    }
    time.sleep(SETTLE_S)  # what is measured is the absence of work: there is nothing to wait for
    started = time.monotonic()
    before = {name: used_by(pid) for name, pid in trees.items()}
    time.sleep(IDLE_S)
    after = {name: used_by(pid) for name, pid in trees.items()}
    passed = time.monotonic() - started
    percent = {}
    for name in trees:
        grown = {each: 100 * (used - before[name].get(each, 0.0)) / passed for each, used in after[name].items()}
        percent[name] = sum(grown.values())
        parts = ", ".join(f"{each}: {share:.2f}" for each, share in grown.items())
        say(f"idle {name}: {percent[name]:.2f} % of a core ({parts})")
    if pair.transport == "nixl":
        assert len(after["agent A"]) >= 2, "the agent's NIXL process is not among its children"
    assert {name: used for name, used in percent.items() if used >= LIMIT_PERCENT} == {}
