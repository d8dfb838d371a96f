"""One workload of the index benchmark in a process of its own, so that its memory is nobody else's.

Its arguments: way, workload, nodes, blocks per node, blocks per event. It stores the workload, looks chains up, and
answers with one line of JSON.
"""

from __future__ import annotations

import gc
import random
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from p2pkv.bench.child import answer
from p2pkv.bench.index_workloads import cut, make, queries
from p2pkv.index.hashing import token_chain, unpack_keys
from p2pkv.index.prefix import PrefixIndex
from p2pkv.index.reference import ReferenceIndex
from p2pkv.types import Tier

KINDS: Final = ("full", "half", "miss")
TOKENS: Final = 8_192
BLOCK_TOKENS: Final = 16
SAMPLES: Final = 4_000
SAMPLES_SLOW: Final = 40


class Measured(msgspec.Struct, frozen=True):
    """``keys``: in all events; ``entries``: distinct (node, key) pairs. ``store_s``: CPU seconds to store all.
    ``asked``: per kind of query the seconds of each call; ``rows``: nodes in the last answer. ``tokens``: seconds of
    each call that hashes :data:`TOKENS` tokens, and of each that looks them up as well."""

    keys: int
    entries: int
    events: int
    store_s: float
    rss_bytes: int
    memory_bytes: int
    asked: dict[str, list[float]]
    rows: dict[str, int]
    tokens: dict[str, list[float]]


class DictIndex:
    """A dict of bit masks of nodes: what one writes down in an afternoon."""

    def __init__(self) -> None:
        self.nodes_of: dict[int, int] = {}

    def apply(self, node: int, keys: bytes, tier: int) -> None:
        """The node has these keys."""
        bit, nodes_of = 1 << node, self.nodes_of
        for key in unpack_keys(keys):
            nodes_of[key] = nodes_of.get(key, 0) | bit

    def match(self, keys: Any) -> list[tuple[int, int]]:
        """(node, depth), of those that hold the first key."""
        rows: list[tuple[int, int]] = []
        nodes_of, live, depth = self.nodes_of, -1, 0
        for key in unpack_keys(keys):
            here = nodes_of.get(key, 0)
            left = live & here if depth else here
            if left != live and depth:
                rows += [(node, depth) for node in bits(live & ~here)]
            live = left
            if not live:
                return rows
            depth += 1
        return rows + [(node, depth) for node in bits(live)]


class DynamoIndex:
    """NVIDIA Dynamo's radix tree (the wheel ai-dynamo-runtime). It takes events as JSON; making that is not timed."""

    def __init__(self) -> None:
        from dynamo._core import RadixTree  # its own wheel: see p2pkv.bench.index

        self._tree = RadixTree()
        self.apply = self._tree.apply_event

    @staticmethod
    def event(keys: bytes) -> bytes:
        """A stored event of a whole chain."""
        blocks = [{"block_hash": key, "tokens_hash": key} for key in unpack_keys(keys)]
        return msgspec.json.encode(
            {"event_id": 0, "data": {"stored": {"parent_hash": None, "blocks": blocks}}, "dp_rank": 0}
        )

    def match(self, keys: Any) -> Any:
        """Scores by worker."""
        return self._tree.find_matches(keys).scores


def bits(mask: int) -> list[int]:
    """Numbers of the ones."""
    out = []
    while mask:
        low = mask & -mask
        out.append(low.bit_length() - 1)
        mask ^= low
    return out


WAYS: Final[dict[str, Callable[[], Any]]] = {
    "core": PrefixIndex,
    "dict": DictIndex,
    "reference": ReferenceIndex,
    "dynamo": DynamoIndex,
}
FAST: Final = frozenset({"core", "dynamo"})


def rss() -> int:
    """Resident bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def numbers(keys: bytes) -> Any:
    """As callers have them: numpy where it is installed."""
    try:
        import numpy as np
    except ImportError:
        return array("Q", keys)
    return np.frombuffer(keys, dtype=np.uint64).copy()


def measure(way: str, workload_name: str, nodes: int, blocks: int, event: int) -> Measured:
    """Store and ask. ``way``: core, dict, reference or dynamo."""
    workload = make(workload_name, nodes, blocks)
    asked = {kind: [numbers(keys) for keys in queries(workload, kind, SAMPLES)] for kind in KINDS}
    events = list(cut(workload.events, event))
    numbers(events[0][1])
    calls: list[tuple[Any, ...]] = [(node, keys, Tier.DRAM) for node, keys in events]
    if way == "dynamo":
        calls = [(node, DynamoIndex.event(keys)) for node, keys in events]
        asked = {kind: [keys.tolist() for keys in chains] for kind, chains in asked.items()}
    gc.collect()
    before = rss()
    index: Any = WAYS[way]()
    apply = index.apply
    started = time.process_time()
    for call in calls:
        apply(*call)
    index.match(asked["miss"][0])  # until all of it is stored
    store_s = time.process_time() - started
    grown = rss() - before
    match: Callable[[Any], Any] = index.match
    times: dict[str, list[float]] = {}
    rows: dict[str, int] = {}
    clock = time.perf_counter
    for kind in KINDS:
        samples = asked[kind][: SAMPLES if way in FAST else SAMPLES_SLOW]
        taken = times[kind] = []
        for keys in samples:
            began = clock()
            found = match(keys)
            taken.append(clock() - began)
        rows[kind] = len(found)
    tokens = measure_tokens(index) if way == "core" else {}
    size = index.stats().memory_bytes if way == "core" else 0
    keys_stored = sum(len(keys) for _, keys in events) // 8
    return Measured(keys_stored, workload.entries, len(events), store_s, grown, size, times, rows, tokens)


def measure_tokens(index: PrefixIndex) -> dict[str, list[float]]:
    """A prompt that one node has, from its token ids."""
    prompt = array("I", random.Random(3).choices(range(128_000), k=TOKENS))
    index.apply(1, token_chain(prompt, BLOCK_TOKENS), Tier.DRAM)
    calls: dict[str, Callable[[], Any]] = {
        "hash": lambda: token_chain(prompt, BLOCK_TOKENS),
        "hash_and_match": lambda: index.match_tokens(prompt, BLOCK_TOKENS, namespace=0),
    }
    times: dict[str, list[float]] = {}
    for name, call in calls.items():
        taken = times[name] = []
        for _ in range(SAMPLES):
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    way, name, nodes, blocks, event = sys.argv[1:6]
    answer(msgspec.json.encode(measure(way, name, int(nodes), int(blocks), int(event))).decode())
