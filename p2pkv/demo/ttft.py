"""The engines of ``p2pkv bench ttft``: a holder behind a throttled link, a reader that can pull from it, one without.

The two agents are on hosts of their own (network namespaces); the engines talk to them by their Unix sockets.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from p2pkv import netns as namespaces
from p2pkv.demo.cluster import CHUNK_TOKENS, AgentNode, Cluster, Replica, find_vllm_python, make_model
from p2pkv.demo.measure import complete, prompt_of, scrape, total, wait_visible
from p2pkv.demo.progress import Progress
from p2pkv.demo.run import QUESTION_TOKENS, warm
from p2pkv.errors import Unavailable
from p2pkv.netns import Network

HOLDER = 0
READER = 1
ANSWER_TOKENS = 4
SETTLE_S = 0.6
THREADS = max(1, (os.cpu_count() or 2) // 2)
"""Of an engine: its core waits for its workers actively, and on as many processors as there are workers it gets into
their way, by a factor of five now and then."""


class Pair(NamedTuple):
    """One prompt asked of the engine with p2pkv and of the one without."""

    with_s: float
    without_s: float
    from_peer_tokens: int
    right: bool


@dataclass
class HostedCluster(Cluster):
    """Agents on hosts of a network."""

    network: Network = field(kw_only=True)

    def _host(self, i: int) -> str:
        return self.network.address(i)

    def _prefix(self, i: int) -> list[str]:
        return self.network.prefix(i)

    def wait_for_agent(self, agent: AgentNode) -> None:
        """Asked from the agent's own host."""
        with namespaces.inside(self.network.names[self.agents.index(agent)]):
            super().wait_for_agent(agent)


class Throttled:
    """See the module's docstring."""

    def __init__(self, cluster: Cluster, network: Network, model: Path) -> None:
        self._cluster = cluster
        self._network = network
        self._model = model.resolve().name
        self._holder: Replica
        self._reader: Replica
        self._plain: Replica
        self._rng = random.Random(time.time_ns())
        self._seeds = iter(range(self._rng.randrange(1 << 40), 1 << 62))

    def start(self, progress: Progress) -> None:
        """Everything up, and warm."""
        cluster = self._cluster
        progress("starting two agents, each on a host of its own")
        cluster.start_agents(2)
        progress("starting three vLLM engines (a minute or two on two cores)")
        self._holder = cluster.start_replica(cluster.agents[HOLDER], name="holder")
        self._reader = cluster.start_replica(cluster.agents[READER], name="reader")
        self._plain = cluster.start_replica(None, name="without p2pkv")
        cluster.wait_for(self._holder, self._reader, self._plain)
        warm(self._holder, self._reader, self._plain, progress=progress)
        for tokens in (256, 2048, 512, 1024, 4096):  # the reader learns how fast it computes
            prompt = self._new(tokens)
            for replica in (self._reader, self._plain):
                complete(replica.url, prompt, max_tokens=ANSWER_TOKENS)

    def _new(self, tokens: int) -> list[int]:
        return prompt_of(next(self._seeds), tokens + QUESTION_TOKENS)

    def _metrics(self, agent: int) -> dict[str, float]:
        with namespaces.inside(self._network.names[agent]):
            return scrape(self._cluster.agents[agent].http)

    def set_rate(self, bits_per_s: float) -> None:
        """What the holder's host can send."""
        self._network.rate(HOLDER, bits_per_s)

    def ask(self, tokens: int) -> Pair:
        """A prompt that the holder has."""
        prompt = self._new(tokens)
        complete(self._holder.url, prompt, max_tokens=1)
        with namespaces.inside(self._network.names[READER]):
            http = self._cluster.agents[READER].http
            wait_visible(http, self._model, prompt, tokens // CHUNK_TOKENS * CHUNK_TOKENS)
        return self._both(prompt)

    def ask_cold(self, tokens: int) -> Pair:
        """A prompt that nobody has."""
        return self._both(self._new(tokens))

    def _both(self, prompt: list[int]) -> Pair:
        before = self._metrics(READER)
        answers = {}
        for replica in self._rng.sample([self._reader, self._plain], 2):
            with self._alone(replica):
                answers[replica.url] = complete(replica.url, prompt, max_tokens=ANSWER_TOKENS)
        mine, plain = answers[self._reader.url], answers[self._plain.url]
        after = self._metrics(READER)
        name = "p2pkv_get_blocks_total"
        pulled = total(after, name, source="peer") - total(before, name, source="peer")
        return Pair(mine.ttft_s, plain.ttft_s, round(pulled) * CHUNK_TOKENS, mine.tokens == plain.tokens)

    @contextlib.contextmanager
    def _alone(self, replica: Replica) -> Iterator[None]:
        """The other engines stand still meanwhile: three of them on two cores would be measured by their noise."""
        others = [each for each in (self._holder, self._reader, self._plain) if each is not replica]
        for each in others:
            each.child.signal(signal.SIGSTOP)
        try:
            time.sleep(SETTLE_S)
            yield
        finally:
            for each in others:
                each.child.signal(signal.SIGCONT)

    def questions_to_peers(self) -> int:
        """Requests for blocks that the holder's agent has had of the reader's."""
        samples = self._metrics(HOLDER)
        return round(total(samples, "p2pkv_served_requests_total") + total(samples, "p2pkv_served_pins_total"))


@contextlib.contextmanager
def throttled(*, model_dir: Path, progress: Progress) -> Iterator[Throttled]:
    """The scene, up and warm; all of it is gone afterwards.

    Raises:
        ConfigError: vLLM's environment is not there. Unavailable: this host gives no network namespaces.
        ProcessFailed: something did not start.
    """
    if why := namespaces.missing(rates=True):
        raise Unavailable("hosts for this benchmark cannot be made", reason=why, hint="Run it as root, with iproute2.")
    python = find_vllm_python()
    model = make_model(python, model_dir, progress)
    with (
        Network(2) as network,
        HostedCluster(
            python=python,
            model=model,
            transport="tcp",
            threads=THREADS,
            progress=progress,
            network=network,
            engines_may_be_stopped=True,
        ) as cluster,
    ):
        scene = Throttled(cluster, network, model)
        scene.start(progress)
        yield scene
