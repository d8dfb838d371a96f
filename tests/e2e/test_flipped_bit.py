"""Bytes that are not what they were when they were stored never reach an engine, and are counted."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator

import pytest
import xxhash

from p2pkv.agent.query import hashes_of_tokens
from p2pkv.client import AgentClient
from p2pkv.demo.cluster import CHUNK_TOKENS, AgentNode
from p2pkv.demo.measure import ask_agent, complete
from p2pkv.types import Layout
from tests.e2e.pair import Pair, agent_metric, engine_metric, say

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

WINDOW = 1 << 18


@contextlib.contextmanager
def arena_of(agent: AgentNode) -> Iterator[mmap.mmap]:
    """An agent's arena, mapped for writing: what only a test, or broken memory, does."""
    pid = agent.child.pid
    for entry in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{entry}"
        if os.readlink(path).startswith("/memfd:p2pkv-arena"):
            os.chmod(path, 0o600)  # the agent has made it read-only for whoever is not root
            fd = os.open(path, os.O_RDWR)
            try:
                memory = mmap.mmap(fd, os.fstat(fd).st_size)
            finally:
                os.close(fd)
            with memory:
                yield memory
            return
    raise AssertionError("the agent has no arena")


def prints_of(memory: mmap.mmap) -> list[int]:
    """A fingerprint of every window."""
    with memoryview(memory) as view:
        return [xxhash.xxh3_64_intdigest(view[at : at + WINDOW]) for at in range(0, len(view), WINDOW)]


def test_a_flipped_bit_is_rejected_counted_once_and_computed_anew(pair: Pair) -> None:
    """Which bytes belong to the prompt's blocks: those of A's arena that changed when A computed it."""
    prompt = pair.prompt()
    with arena_of(pair.agent_a) as memory:
        before = prints_of(memory)
        tokens = pair.computed_on_a(prompt)
        changed = [i for i, (old, new) in enumerate(zip(before, prints_of(memory), strict=True)) if old != new]
        assert changed, "the prompt's blocks are not in A's arena"
        memory[changed[len(changed) // 2] * WINDOW + WINDOW // 3] ^= 1 << 4
    rejected = agent_metric(pair.agent_b, "p2pkv_rejected_blocks_total")
    failures = engine_metric(pair.b, "vllm:p2pkv_load_failures_total")
    answer, pulled = pair.pulled_to_b(prompt)
    rejected = agent_metric(pair.agent_b, "p2pkv_rejected_blocks_total") - rejected
    failures = engine_metric(pair.b, "vllm:p2pkv_load_failures_total") - failures
    say(
        f"flipped bit: {len(changed) * WINDOW >> 20} MiB of A's arena are the prompt's; rejected {rejected}, pulled "
        f"{pulled} tokens, cached {answer.cached_tokens}, the engine's failed loads {failures:g}"
    )
    assert answer.tokens == tokens
    assert rejected == 1


def test_wrong_bytes_would_have_changed_the_answer(pair: Pair) -> None:
    """The control of the test above: zeros that were *stored* as a prompt's blocks prove true, and tokens differ."""
    prompt = pair.prompt()
    layout, known = layout_of(pair)
    hashes = hashes_of_tokens(layout, prompt, block_tokens=None, lora="", cache_salt="")
    assert len(hashes) == len(prompt) // CHUNK_TOKENS
    assert not set(hashes) & known
    with contextlib.closing(AgentClient(pair.agent_a.socket, name="test")) as client:
        cache = client.open(layout)
        assert cache.put(hashes, [bytes(layout.block_bytes)] * len(hashes)) == [True] * len(hashes)
    pair.known_to_b(prompt)
    misled, pulled = pair.pulled_to_b(prompt)
    right = complete(pair.b.url, prompt, salt="so that nothing is found")
    say(f"control: {pulled} tokens of zeros pulled; right {right.tokens[:8]}, misled {misled.tokens[:8]}")
    assert pulled == len(hashes) * CHUNK_TOKENS and right.cached_tokens == 0
    assert misled.tokens != right.tokens


def layout_of(pair: Pair) -> tuple[Layout, set[bytes]]:
    """The replicas' layout, as A's agent knows it, and the hashes of A's blocks."""
    (namespace,) = ask_agent(pair.agent_a.http, "/v1/blocks")["namespaces"]
    return Layout(**namespace["layout"]), {bytes.fromhex(text) for text in namespace["hashes"]}
