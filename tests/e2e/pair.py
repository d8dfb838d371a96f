"""Two agents and two replicas, as tests speak of them."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from p2pkv.demo.cluster import CHUNK_TOKENS, AgentNode, Cluster, Replica
from p2pkv.demo.measure import Completion, complete, prompt_of, scrape, total, wait_visible
from p2pkv.demo.processes import running, shared_memory
from p2pkv.demo.run import QUESTION_TOKENS

if TYPE_CHECKING:
    from _pytest.capture import CaptureManager

SHM = Path("/dev/shm")
SHORT_TOKENS = 4 * CHUNK_TOKENS
"""Of a prefix where its length does not matter: a second or two of one core."""


def has_nixl() -> bool:
    """Whether a NIXL build is installed beside the agent."""
    return any(importlib.util.find_spec(name) is not None for name in ("nixl_cu12", "nixl_cu13", "nixl"))


class _Voice:
    """Where :func:`say` speaks: past pytest's capture, which would hold a line back until the test has failed."""

    def __init__(self) -> None:
        self.capture: CaptureManager | None = None  # conftest's pytest_configure finds it
        self.lock = threading.Lock()  # who waits says so from a thread


voice = _Voice()


def say(text: str) -> None:
    """Show a line now: how far a long step is, or what was measured."""
    with voice.lock, voice.capture.global_and_fixture_disabled() if voice.capture else contextlib.nullcontext():
        print(text, file=sys.stderr, flush=True)


@dataclass
class Pair:
    """Agents and replicas A and B, pinned as :func:`p2pkv.demo.busy.pinning` says, one thread each."""

    cluster: Cluster
    transport: str
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(50_000))

    @property
    def a(self) -> Replica:
        return self.cluster.replicas[0]

    @property
    def b(self) -> Replica:
        return self.cluster.replicas[1]

    @property
    def agent_a(self) -> AgentNode:
        return self.cluster.agents[0]

    @property
    def agent_b(self) -> AgentNode:
        return self.cluster.agents[1]

    @property
    def model(self) -> str:
        """Name of the model, as layouts have it."""
        return self.cluster.model.resolve().name

    def prompt(self, tokens: int = SHORT_TOKENS) -> list[int]:
        """A prompt that nobody has seen, with a question behind its prefix of so many tokens."""
        return prompt_of(next(self.numbers), tokens + QUESTION_TOKENS)

    def computed_on_a(self, prompt: list[int]) -> list[int]:
        """Have A compute a prompt and wait until B's agent knows of all its blocks; A's answer."""
        tokens = complete(self.a.url, prompt).tokens
        self.known_to_b(prompt)
        return tokens

    def known_to_b(self, prompt: list[int]) -> None:
        """Wait until B's agent knows who has the whole prefix."""
        wait_visible(self.agent_b.http, self.model, prompt, len(prompt) // CHUNK_TOKENS * CHUNK_TOKENS)

    def pulled_to_b(self, prompt: list[int]) -> tuple[Completion, int]:
        """B's answer, and how many of its tokens came from another node's agent."""
        before = agent_metric(self.agent_b, "p2pkv_get_blocks_total", source="peer")
        answer = complete(self.b.url, prompt)
        return answer, CHUNK_TOKENS * (agent_metric(self.agent_b, "p2pkv_get_blocks_total", source="peer") - before)


def shm_files() -> set[Path]:
    """Everything in /dev/shm."""
    return set(SHM.iterdir())


def unused_shm_files() -> set[Path]:
    """Files in /dev/shm that no process has mapped: others than the tests may use it too."""
    return {path for path in shm_files() - shared_memory(running()) if path.exists()}


def agent_metric(agent: AgentNode, name: str, **labels: str) -> int:
    """One of an agent's counters."""
    return round(total(scrape(agent.http), name, **labels))


def engine_metric(replica: Replica, name: str, **labels: str) -> float:
    """One of a replica's counters."""
    return total(scrape(replica.url), name, **labels)
