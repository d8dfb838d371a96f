"""The demo itself: the same prompts cold on A, pulled to the others, and recomputed there without p2pkv."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from p2pkv.demo.cluster import CHUNK_TOKENS, AgentNode, Cluster, Progress, Replica, find_vllm_python, make_model
from p2pkv.demo.measure import ask_agent, complete, prompt_of, scrape, total, wait_visible
from p2pkv.demo.report import Outcome, Run, promises
from p2pkv.errors import ConfigError

QUESTION_TOKENS: Final = 16
"""Behind the shared prefix, so that its last block is reusable too: an engine always computes at least one token."""
WARM_TOKENS: Final = 512


def run_demo(
    *,
    replicas: int,
    prompts: int,
    prompt_tokens: int,
    transport: str,
    model_dir: Path,
    progress: Progress,
    keep: Callable[[Cluster], None] | None = None,
) -> Outcome:
    """Start everything, measure, end everything.

    Args:
        replicas: engines with p2pkv, each with an agent; the first one computes, the others pull.
        prompts, prompt_tokens: how many prefixes, and how long each is.
        keep: called with the running cluster when all has been measured; it ends when that returns.

    Raises:
        ConfigError: vLLM's environment is not there, or the arguments make no sense.
        ProcessFailed: something did not start, or ended; with the end of its log.
    """
    if replicas < 2 or prompts < 1 or not CHUNK_TOKENS <= prompt_tokens <= 15_000:
        raise ConfigError(
            "the demo needs two replicas or more, one prompt or more, and prompts of 256 to 15,000 tokens",
            replicas=replicas, prompts=prompts, prompt_tokens=prompt_tokens,
        )  # fmt: skip
    python = find_vllm_python()
    progress("making a small random-weight model")
    model = make_model(python, model_dir)
    with Cluster(python=python, model=model, transport=transport, progress=progress) as cluster:
        progress(f"starting {replicas} agents")
        cluster.start_agents(replicas)
        progress(f"starting {replicas} vLLM replicas (a minute or two on two cores)")
        engines = [cluster.start_replica(agent, name=f"replica {i}") for i, agent in enumerate(cluster.agents)]
        _wait(cluster, engines, progress)
        texts = [prompt_of(1_000 + i, prompt_tokens + QUESTION_TOKENS) for i in range(prompts)]
        for engine in engines:
            complete(engine.url, prompt_of(7, WARM_TOKENS))  # the first forward pass of an engine is not typical
        runs = []
        for number, text in enumerate(texts):
            progress(f"prompt {number}: cold on A")
            runs.append(_measure(number, "cold", "A", engines[0], cluster.agents[0], text))
            for i in range(1, replicas):
                name = chr(ord("A") + i)
                wait_visible(
                    cluster.agents[i].http, model.resolve().name, text, prompt_tokens // CHUNK_TOKENS * CHUNK_TOKENS
                )
                progress(f"prompt {number}: pulled to {name}")
                runs.append(_measure(number, "pulled", name, engines[i], cluster.agents[i], text))
        used = ask_agent(cluster.agents[1].http, "/v1/nodes")["peers"][0]["transport"]
        progress("starting B again, without p2pkv")
        cluster.stop_replica(engines[1])
        plain = cluster.start_replica(None, name="replica without p2pkv")
        _wait(cluster, [plain], progress)
        complete(plain.url, prompt_of(7, WARM_TOKENS))
        for number, text in enumerate(texts):
            progress(f"prompt {number}: recomputed on B")
            runs.append(_measure(number, "recomputed", "B", plain, None, text))
        full_blocks = prompt_tokens // CHUNK_TOKENS
        outcome = Outcome(
            model_bytes_per_token=runs[1].bytes_moved // max(1, runs[1].from_peer_tokens),
            prompt_tokens=prompt_tokens + QUESTION_TOKENS,
            full_blocks=full_blocks,
            block_tokens=CHUNK_TOKENS,
            transport=str(used),
            runs=sorted(runs, key=lambda run: run.prompt),
            promises=promises(runs, full_blocks=full_blocks, block_tokens=CHUNK_TOKENS),
        )
        if keep is not None:
            keep(cluster)
    return outcome


def _wait(cluster: Cluster, engines: list[Replica], progress: Progress) -> None:
    started = time.monotonic()
    said = 0.0

    def tick() -> None:
        nonlocal said
        now = time.monotonic() - started
        if now - said >= 10:
            said = now
            progress(f"  vLLM is starting ... {now:.0f} s")

    for engine in engines:
        cluster.wait_for(engine, tick)


def _measure(number: int, how: str, name: str, engine: Replica, agent: AgentNode | None, prompt: list[int]) -> Run:
    """One completion, with what its agent and its engine counted meanwhile."""
    agent_before = scrape(agent.http) if agent else {}
    engine_before = scrape(engine.url) if agent else {}
    answer = complete(engine.url, prompt)
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
