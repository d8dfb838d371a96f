"""An engine whose agent dies or hangs goes on answering, rightly, and shares again when the agent is back."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from p2pkv.demo.measure import ask_agent, complete
from tests.e2e.pair import Pair, say

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

BACK_S = 30.0
HUNG_S = 20.0
"""The lookup deadline is half a second; the rest is for computing a short prompt on a crowded core."""


def wait(what: Callable[[], object], why: str, within_s: float = BACK_S) -> None:
    """Poll until something is true."""
    deadline = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.05)


def engine_is_back(pair: Pair) -> bool:
    """Whether B's engine is connected to its agent; a request makes it try."""
    complete(pair.b.url, pair.prompt(256), max_tokens=1)
    return bool(ask_agent(pair.agent_b.http, "/v1/nodes")["self"]["engines"])


def pulls_again(pair: Pair, prompt: list[int], tokens: list[int]) -> None:
    """B gets a whole prompt that A computed from A's agent, with the right answer."""
    pair.known_to_b(prompt)
    answer, pulled = pair.pulled_to_b(prompt)
    assert (answer.tokens, pulled) == (tokens, len(prompt) // 256 * 256)


def test_an_agent_killed_beside_its_engine_costs_recomputing_until_it_is_back(pair: Pair) -> None:
    lost, later = pair.prompt(), pair.prompt()
    lost_tokens, later_tokens = pair.computed_on_a(lost), pair.computed_on_a(later)
    pair.agent_b.child.kill()
    recomputed = complete(pair.b.url, lost)
    assert (recomputed.tokens, recomputed.cached_tokens) == (lost_tokens, 0)
    again = complete(pair.b.url, lost)  # from the engine's own cache: it has not lost its head either
    assert again.tokens == lost_tokens
    pair.cluster.restart_agent(pair.agent_b)
    started = time.monotonic()
    wait(lambda: engine_is_back(pair), "the engine does not find the agent that was started again")
    say(f"agent killed: recomputed in {recomputed.ttft_s:.2f} s; engine back after {time.monotonic() - started:.2f} s")
    pulls_again(pair, later, later_tokens)


def test_an_agent_that_hangs_costs_no_more_than_the_lookup_deadline(pair: Pair) -> None:
    prompts = [pair.prompt() for _ in range(3)]
    tokens = [pair.computed_on_a(prompt) for prompt in prompts]
    pair.agent_b.child.signal(signal.SIGSTOP)
    try:
        hung = [complete(pair.b.url, prompt) for prompt in prompts[:2]]
    finally:
        pair.agent_b.child.signal(signal.SIGCONT)
    say(f"agent stopped: TTFT {', '.join(f'{answer.ttft_s:.2f} s' for answer in hung)}")
    assert [answer.tokens for answer in hung] == tokens[:2]
    assert [answer.cached_tokens for answer in hung] == [0, 0]
    assert max(answer.total_s for answer in hung) < HUNG_S
    wait(lambda: engine_is_back(pair), "the engine does not talk to the agent that goes on")
    pulls_again(pair, prompts[2], tokens[2])
