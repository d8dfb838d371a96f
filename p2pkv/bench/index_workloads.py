"""What the index benchmark stores and asks: chains of random keys, by owner. Pure but for its seed's generator.

* ``disjoint``: every node has chains of its own.
* ``shared``: chains begin with one of a few long prefixes that all nodes have, as system prompts do.
* ``replicated``: all nodes have the same chains.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Final, NamedTuple

WORKLOADS: Final = ("disjoint", "shared", "replicated")
CHAIN: Final = 512
PREFIX: Final = 256
PREFIXES: Final = 8


class Workload(NamedTuple):
    """``events``: (node, packed keys of a chain) in the order of storing. ``entries``: distinct (node, key) pairs.
    ``chains``: those a query may ask for."""

    name: str
    events: list[tuple[int, bytes]]
    entries: int
    chains: list[bytes]


def make(name: str, nodes: int, blocks: int, seed: int = 1) -> Workload:
    """``blocks``: keys per node, in whole chains of :data:`CHAIN` and a shorter one, at least a prefix long."""
    rng = random.Random(seed)
    lengths = [CHAIN] * (blocks // CHAIN) + ([blocks % CHAIN] if blocks % CHAIN else [])

    def chain(length: int) -> bytes:
        return rng.randbytes(8 * length)

    numbers = range(1, nodes + 1)
    entries = nodes * blocks
    if name == "replicated":
        common = [chain(length) for length in lengths]
        events = [(node, keys) for keys in common for node in numbers]
    elif name == "shared":
        prefixes = [chain(PREFIX) for _ in range(PREFIXES)]
        events, known = [], set[tuple[int, int]]()
        for length, node in itertools.product(lengths, numbers):
            prefix = rng.randrange(PREFIXES)
            if (node, prefix) in known:
                entries -= PREFIX
            known.add((node, prefix))
            events.append((node, prefixes[prefix] + chain(length - PREFIX)))
    else:
        events = [(node, chain(length)) for length in lengths for node in numbers]
    whole = [keys for _, keys in events if len(keys) == 8 * CHAIN]
    return Workload(name, events, entries, list(dict.fromkeys(whole)))


def cut(events: list[tuple[int, bytes]], blocks: int) -> Iterator[tuple[int, bytes]]:
    """The same, in events of at most so many blocks."""
    for node, keys in events:
        for at in range(0, len(keys), 8 * blocks):
            yield node, keys[at : at + 8 * blocks]


def queries(workload: Workload, kind: str, count: int, seed: int = 2) -> list[bytes]:
    """Chains of :data:`CHAIN` keys: ``full`` is stored whole, ``half`` to its middle, of ``miss`` nothing is."""
    rng = random.Random(seed)
    half = 4 * CHAIN
    if kind == "full":
        return [rng.choice(workload.chains) for _ in range(count)]
    if kind == "half":
        return [rng.choice(workload.chains)[:half] + rng.randbytes(half) for _ in range(count)]
    return [rng.randbytes(2 * half) for _ in range(count)]
