"""A pair of replicas whose source can be kept busy, stopped or killed, while the other one pulls from its agent.

The engines are pinned to different cores, one thread each, and both agents to the reader's cores, so that whatever the
source's engine does, nobody waits for its processor: what is left is what the *design* makes the reader wait for.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from p2pkv.demo.cluster import CHUNK_TOKENS, AgentNode, Cluster, Replica, find_vllm_python, make_model
from p2pkv.demo.measure import complete, prompt_of, wait_visible
from p2pkv.demo.processes import ProcessFailed, cpu_seconds
from p2pkv.demo.progress import Progress, working
from p2pkv.demo.run import ANSWER_TOKENS, QUESTION_TOKENS, measure_run, warm
from p2pkv.errors import ConfigError

LONG_TOKENS: Final = 14_000
"""More than a minute of one core, in one step of the scheduler."""
CAPACITY: Final = "3GiB"
"""Of each agent. 14 prompts of 4,096 tokens are 0.9 GiB with the demo's model, and each long prefill stores 0.2 more:
with less, they push out the prompts that were computed first and have not been pulled yet."""
INSIDE_CPU_S: Final = 1.0
"""After so much CPU time the source is past tokenizing and queueing, and in the step."""
INSIDE_WITHIN_S: Final = 60.0
AFTER_S: Final = 300.0


class Pinning(NamedTuple):
    """CPU lists for taskset; empty = no pinning."""

    source: str = ""
    others: str = ""


class Pull(NamedTuple):
    """One prompt of the source's, asked of the reader. ``right``: it gave the tokens that the source gave."""

    ttft_s: float
    prompt_tokens: int
    from_peer_tokens: int
    right: bool


def pinning() -> Pinning:
    """The first core for the source's engine, all others for the rest; nothing on a host with one core."""
    first, *others = sorted(os.sched_getaffinity(0))
    return Pinning(str(first), ",".join(map(str, others))) if others else Pinning()


class BusySource:
    """Fills the source with prompts, keeps it busy, and pulls them from elsewhere.

    Args:
        agent: the reader's.
        prompt_tokens: of each prefix; whole blocks.
        seed: where the prompts' numbers begin; what they stand for must be new to the cluster.
    """

    def __init__(
        self,
        source: Replica,
        reader: Replica,
        agent: AgentNode,
        *,
        model: str,
        prompt_tokens: int,
        seed: int,
        progress: Progress = lambda _: None,
    ) -> None:
        self._source, self._reader, self._agent, self._model = source, reader, agent, model
        self._prompt_tokens = prompt_tokens // CHUNK_TOKENS * CHUNK_TOKENS
        self._seed = seed
        self._progress = progress
        self._filled: list[tuple[list[int], list[int]]] = []  # prompts not pulled yet, with their answers
        self._long: threading.Thread | None = None

    def fill(self, prompts: int) -> None:
        """Have the source compute so many new prompts, and wait until the reader's agent knows of them."""
        with working(self._progress, f"computing {prompts} prompts of {self._prompt_tokens} tokens on the source"):
            for _ in range(prompts):
                self._seed += 1
                prompt = prompt_of(self._seed, self._prompt_tokens + QUESTION_TOKENS)
                answer = complete(self._source.url, prompt, max_tokens=ANSWER_TOKENS).tokens
                wait_visible(self._agent.http, self._model, prompt, self._prompt_tokens)
                self._filled.append((prompt, answer))

    def pull(self) -> Pull:
        """Ask the reader for the next prompt that the source was filled with."""
        prompt, answer = self._filled.pop(0)
        run = measure_run(0, "pulled", "B", self._reader, self._agent, prompt)
        return Pull(run.ttft_s, self._prompt_tokens, run.from_peer_tokens, run.tokens == answer)

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """While this lasts, the source's engine is inside one long prefill. It is left there: see :meth:`rest`.

        Raises:
            ProcessFailed: the prefill did not begin, or ended before the body did: nothing was measured.
        """
        self._seed += 1
        prompt = prompt_of(self._seed, LONG_TOKENS)
        pid = self._source.child.pid
        before = cpu_seconds(pid)
        self._long = threading.Thread(target=_ask, args=(self._source.url, prompt), name="long prefill", daemon=True)
        self._long.start()
        deadline = time.monotonic() + INSIDE_WITHIN_S
        while cpu_seconds(pid) - before < INSIDE_CPU_S:
            if time.monotonic() > deadline:
                raise ProcessFailed("the long prefill does not begin")
            time.sleep(0.02)
        yield
        if not self._long.is_alive():
            raise ProcessFailed("the long prefill was over too early: nothing was measured while it lasted")

    def rest(self) -> None:
        """Wait until the source's engine has nothing to do any more."""
        if self._long is not None:
            with working(self._progress, "waiting for the long prefill"):
                self._long.join(AFTER_S)

    def stop(self) -> None:
        """SIGSTOP the source's engine, all of its processes."""
        self._source.child.signal(signal.SIGSTOP)

    def kill(self) -> None:
        """SIGKILL the source's engine, all of its processes."""
        self._source.child.kill()


def _ask(url: str, prompt: list[int]) -> None:
    # It may well be killed under the question.
    with contextlib.suppress(OSError, http.client.HTTPException, ProcessFailed):
        complete(url, prompt, max_tokens=1)


@contextlib.contextmanager
def busy_source(*, transport: str, prompt_tokens: int, model_dir: Path, progress: Progress) -> Iterator[BusySource]:
    """A new pair of agents and engines, pinned and warm.

    Raises:
        ConfigError: this host has one core only, or no environment of vLLM.
        ProcessFailed: something did not start.
    """
    cores = pinning()
    if not cores.source:
        raise ConfigError("two cores or more are needed: one for the source's engine, one for the rest")
    python = find_vllm_python()
    model = make_model(python, model_dir, progress)
    with Cluster(
        python=python,
        model=model,
        transport=transport,
        capacity=CAPACITY,
        threads=1,
        progress=progress,
        engines_may_be_stopped=True,
    ) as cluster:
        progress("starting two agents and two vLLM replicas")
        cluster.start_agents(2, cores=cores.others)
        source = cluster.start_replica(cluster.agents[0], name="replica A", cores=cores.source)
        reader = cluster.start_replica(cluster.agents[1], name="replica B", cores=cores.others)
        cluster.wait_for(source, reader)
        warm(source, reader, progress=progress)
        yield BusySource(
            source, reader, cluster.agents[1],
            model=model.resolve().name, prompt_tokens=prompt_tokens, seed=20_000, progress=progress,
        )  # fmt: skip
