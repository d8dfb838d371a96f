"""An agent's HTTP endpoint over an index of a hundred owners, in a process of its own and on one processor.

The endpoint, its server and the index are the agent's; who the owners are is made up. Arguments: owners, chains. It
prints one line of JSON (:class:`Served`) and serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from types import SimpleNamespace
from typing import Any, Final

import msgspec
import uvloop

from p2pkv.agent import query
from p2pkv.agent.http import HttpServer
from p2pkv.agent.remembered import Remembered
from p2pkv.bench.child import answer, requests
from p2pkv.bench.index_workloads import CHAIN
from p2pkv.config import Http
from p2pkv.index.hashing import salted
from p2pkv.index.prefix import PrefixIndex
from p2pkv.index.reference import ReferenceIndex
from p2pkv.types import Layout, NodeId, Tier

LAYOUT: Final = Layout(model="bench", revision="1", kv_dtype="bf16", block_tokens=16, block_bytes=1 << 20)


class Served(msgspec.Struct, frozen=True):
    """Where it is served; bodies to send, and what the reference answers to each."""

    port: int
    bodies: list[str]
    expected: list[dict[str, Any]]


def agent_with(index: Any, owners: int) -> Any:
    """What the endpoint needs of an agent, with that many peers."""
    names = {slot: NodeId(0xABCDEF << 32 | slot) for slot in range(owners + 1)}
    return SimpleNamespace(
        index=index,
        node=int(names[0]),
        service=SimpleNamespace(layouts=[LAYOUT]),
        network=SimpleNamespace(slot_node=names.get, peers=tuple),
        remembered=Remembered("", purge_s=0.0),
        config=SimpleNamespace(http=Http(port=0)),
    )


def filled(owners: int, chains: list[bytes]) -> tuple[PrefixIndex, ReferenceIndex]:
    """Every owner has every chain, to a depth of its own."""
    rng = random.Random(3)
    both = PrefixIndex(), ReferenceIndex()
    for chain in chains:
        for owner in range(1, owners + 1):
            keys = salted(chain, LAYOUT.namespace)[: 8 * rng.randint(CHAIN // 2, CHAIN)]
            tier = rng.choice((Tier.HBM, Tier.DRAM))
            for index in both:
                index.apply(owner, keys, tier)
    return both


async def serve(owners: int, count: int) -> None:
    """Serve until standard input ends."""
    rng = random.Random(1)
    chains = [rng.randbytes(8 * CHAIN) for _ in range(count)]
    index, reference = filled(owners, chains)
    oracle = agent_with(reference, owners)
    server = HttpServer(agent_with(index, owners))
    await server.start()
    bodies = [
        msgspec.json.encode(
            {"model": LAYOUT.model, "seq_hashes": [chain[i : i + 8].hex() for i in range(0, len(chain), 8)]}
        ).decode()
        for chain in chains
    ]
    expected = [query.query_layouts(oracle, [(LAYOUT, salted(chain, LAYOUT.namespace))])[0] for chain in chains]
    answer(msgspec.json.encode(Served(server.port, bodies, expected)).decode())
    await asyncio.to_thread(lambda: list(requests()))
    await server.stop()


if __name__ == "__main__":
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
