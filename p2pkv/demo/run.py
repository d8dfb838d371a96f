"""The demo itself: the same prompts cold on A, recomputed on B without p2pkv, and pulled to B (and C, ...)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from p2pkv.client import AgentClient
from p2pkv.demo.cluster import (
    CHUNK_TOKENS,
    MODEL_TOKENS_MAX,
    AgentNode,
    Cluster,
    Replica,
    find_vllm_python,
    make_model,
)
from p2pkv.demo.measure import ask_agent, complete, prompt_of, scrape, total, wait_visible
from p2pkv.demo.progress import Progress, working
from p2pkv.demo.report import Outcome, Run, promises
from p2pkv.errors import ConfigError

QUESTION_TOKENS: Final = 16
"""Behind the shared prefix, so that its last block is reusable too: an engine always computes at least one token."""
ANSWER_TOKENS: Final = 16
PROMPT_TOKENS_MAX: Final = MODEL_TOKENS_MAX - QUESTION_TOKENS - ANSWER_TOKENS
WARM_TOKENS: Final = 512
WARM_BYTES: Final = 1 << 30


def run_demo(
    *,
    replicas: int,
    prompts: int,
    prompt_tokens: int,
    transport: str,
    model_dir: Path,
    progress: Progress,
    scale_out: bool = False,
    keep: Callable[[Cluster, Outcome], None] | None = None,
) -> Outcome:
    """Start everything, measure, end everything.

    B is first started without p2pkv, which gives the times to compare with, and then with it: at the end every replica
    has p2pkv, and that is what ``keep`` is shown.

    Args:
        replicas: engines with p2pkv, each with an agent; the first one computes, the others pull.
        prompts, prompt_tokens: how many prefixes, and how long each is.
        scale_out: at the end a node joins; its agent warms up from the others while its engine still starts.
        keep: called with the running cluster when all has been measured; everything ends when that returns.

    Raises:
        ConfigError: vLLM's environment is not there, or the arguments make no sense.
        ProcessFailed: something did not start, or ended; with the end of its log.
    """
    if replicas < 2 or prompts < 1 or not CHUNK_TOKENS <= prompt_tokens <= PROMPT_TOKENS_MAX:
        raise ConfigError(
            f"the demo needs two replicas or more, a prompt or more, and {CHUNK_TOKENS} to {PROMPT_TOKENS_MAX} tokens",
            replicas=replicas, prompts=prompts, prompt_tokens=prompt_tokens,
        )  # fmt: skip
    if transport not in ("auto", "tcp", "nixl"):
        raise ConfigError("the transport is auto, tcp or nixl", transport=transport)
    python = find_vllm_python()
    model = make_model(python, model_dir, progress)
    texts = [prompt_of(1_000 + i, prompt_tokens + QUESTION_TOKENS) for i in range(prompts)]
    full_tokens = prompt_tokens // CHUNK_TOKENS * CHUNK_TOKENS
    runs = []
    with Cluster(python=python, model=model, transport=transport, progress=progress) as cluster:
        progress(f"starting {replicas} agents")
        cluster.start_agents(replicas)
        agents = cluster.agents
        progress(f"starting {replicas} vLLM replicas (a minute or two on two cores); B without p2pkv at first")
        with_p2pkv = {
            i: cluster.start_replica(agents[i], name=f"replica {name_of(i)}") for i in range(replicas) if i != 1
        }
        plain = cluster.start_replica(None, name="replica B without p2pkv")
        cluster.wait_for(*with_p2pkv.values(), plain)
        warm(*with_p2pkv.values(), plain, progress=progress)
        for number, text in enumerate(texts):
            with working(progress, f"prompt {number}: cold on A"):
                runs.append(measure_run(number, "cold", "A", with_p2pkv[0], agents[0], text))
            with working(progress, f"prompt {number}: recomputed on B without p2pkv"):
                runs.append(measure_run(number, "recomputed", "B", plain, None, text))
        progress("starting B again, with p2pkv")
        cluster.stop_replica(plain)
        with_p2pkv[1] = cluster.start_replica(agents[1], name="replica B")
        cluster.wait_for(with_p2pkv[1])
        warm(with_p2pkv[1], progress=progress)
        for number, text in enumerate(texts):
            for i in range(1, replicas):
                wait_visible(agents[i].http, model.resolve().name, text, full_tokens)
                with working(progress, f"prompt {number}: pulled to {name_of(i)}"):
                    runs.append(measure_run(number, "pulled", name_of(i), with_p2pkv[i], agents[i], text))
        if scale_out:
            runs += join(cluster, texts, progress)
        outcome = judge(runs, prompt_tokens, asked=transport, used=transport_used(agents[1]))
        if not outcome.ok:  # the logs go away with the cluster
            for name, tail in cluster.logs():
                progress(f"the end of the log of {name}:\n{tail}")
        if keep is not None:
            keep(cluster, outcome)
    return outcome


def join(cluster: Cluster, texts: Sequence[list[int]], progress: Progress) -> list[Run]:
    """A node joins: its agent pulls what the others used last, while its engine loads its weights. Then the prompts."""
    name = name_of(len(cluster.agents))
    progress(f"scaling out: starting agent and replica {name}")
    cluster.start_agents(1)
    agent = cluster.agents[-1]
    engine = cluster.start_replica(agent, name=f"replica {name}")
    with AgentClient(agent.socket, name="demo") as client:
        client.warm(WARM_BYTES)
        with working(progress, f"agent {name} warms up from its peers"):
            while (state := client.warm()).running:
                time.sleep(0.05)
    progress(f"agent {name} has pulled {state.blocks_pulled} blocks in {state.took_ms} ms ({state.why})")
    cluster.wait_for(engine)
    warm(engine, progress=progress)
    runs = []
    for number, text in enumerate(texts):
        with working(progress, f"prompt {number}: on {name}, which was warm before its first request"):
            runs.append(measure_run(number, "warmed", name, engine, agent, text))
    return runs


def judge(runs: Sequence[Run], prompt_tokens: int, *, asked: str, used: str) -> Outcome:
    """What was measured, and whether it is as promised; ``prompt_tokens``: of each prefix."""
    full_blocks = prompt_tokens // CHUNK_TOKENS
    return Outcome(
        prompt_tokens=prompt_tokens + QUESTION_TOKENS,
        full_blocks=full_blocks,
        block_tokens=CHUNK_TOKENS,
        transport=used,
        runs=sorted(runs, key=lambda run: run.prompt),
        promises=promises(runs, full_blocks=full_blocks, block_tokens=CHUNK_TOKENS, asked=asked, used=used),
    )


def name_of(replica: int) -> str:
    """A, B, C, ..."""
    return chr(ord("A") + replica)


def transport_used(agent: AgentNode) -> str:
    """What an agent uses towards its first live peer."""
    peers = ask_agent(agent.http, "/v1/nodes")["peers"]
    return next((str(peer["transport"]) for peer in peers if peer["state"] == "alive"), "none")


def warm(*engines: Replica, progress: Progress = lambda _: None) -> None:
    """One short request each, which nothing measured shares a prefix with: an engine's first is not typical."""
    with working(progress, "warming up"):
        for engine in engines:
            complete(engine.url, prompt_of(7, WARM_TOKENS))


def measure_run(
    number: int,
    how: str,
    name: str,
    engine: Replica,
    agent: AgentNode | None,
    prompt: list[int],
    *,
    salt: str | None = None,
) -> Run:
    """One completion, with what its agent and its engine counted meanwhile.

    Args:
        salt: makes the engine take the prompt for another one, so that it finds nothing of it and computes it all.
    """
    agent_before = scrape(agent.http) if agent else {}
    engine_before = scrape(engine.url) if agent else {}
    answer = complete(engine.url, prompt, max_tokens=ANSWER_TOKENS, salt=salt)
    agent_after = scrape(agent.http) if agent else {}
    engine_after = scrape(engine.url) if agent else {}

    def grew(metric: str, **labels: str) -> int:
        return round(total(agent_after, metric, **labels) - total(agent_before, metric, **labels))

    load = "vllm:p2pkv_load_seconds_sum"
    return Run(
        prompt=number,
        how=how,
        replica=name,
        ttft_s=answer.ttft_s,
        cached_tokens=answer.cached_tokens,
        from_local_tokens=grew("p2pkv_get_blocks_total", source="local") * CHUNK_TOKENS,
        from_peer_tokens=grew("p2pkv_get_blocks_total", source="peer") * CHUNK_TOKENS,
        bytes_moved=grew("p2pkv_get_bytes_total", source="peer"),
        pull_s=total(engine_after, load) - total(engine_before, load),
        tokens=answer.tokens,
    )


def wait_for_interrupt(cluster: Cluster, say: Progress) -> None:
    """Name what is running, and wait until Ctrl-C."""
    for i, agent in enumerate(cluster.agents):
        say(f"agent {i}:   {agent.http}/v1/nodes  {agent.http}/metrics  socket {agent.socket}")
    for replica in cluster.replicas:
        say(f"{replica.child.name}: {replica.url}/v1/models  {replica.url}/metrics")
    say(f"logs: {cluster.directory}. Ctrl-C ends everything.")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(3600)
