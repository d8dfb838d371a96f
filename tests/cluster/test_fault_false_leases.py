"""Owners that do not keep to the leases that they give, or lie about them: bytes are right or rejected, never wrong.
An honest holder of the same blocks is asked then.

An owner whose leases hold nothing at all, over either transport: ``test_slot_reuse.py``.
"""

from __future__ import annotations

import pytest

from p2pkv.types import Status
from tests.cluster.agents import AgentProcess, Cluster, all_have, eventually, visible
from tests.cluster.blocks import blocks_of, new_keys
from tests.cluster.proxy import Proxy
from tests.cluster.test_peer_faults import SMALL, Read, put
from tests.cluster.test_slot_reuse import MUTANT, WARM, held_up
from tests.cluster.transports import NIXL, TCP, options

pytestmark = [pytest.mark.cluster]

BLOCK = SMALL.block_bytes
COUNT = 256
WITHOUT_SHORT_WAY = {"engine.short_way": False}
"""Native code does not ask for leases over NIXL: the owner's server answers it, as over TCP."""


def overwrite(agent: AgentProcess) -> None:
    """More new blocks than the agent has room for."""
    cache = agent.open(SMALL)
    for _ in range(15):
        fresh = new_keys(64)
        cache.put(fresh, blocks_of(fresh, BLOCK), deadline_ms=10_000)


@pytest.mark.parametrize(("kind", "lie"), [(TCP, ""), (*NIXL.values, "boast")])
def test_a_lease_that_runs_out_in_mid_read_costs_the_blocks_and_no_wrong_byte(
    cluster: Cluster, kind: str, lie: str
) -> None:
    """The lease is over and the slots are filled anew while the bytes are on their way. Over NIXL the owner says that
    the lease would last an hour, and at the end that it has held: the checksum is what counts."""
    patient = {"transport.stall_ms": 20_000, "transport.streams": 1, "transport.in_flight": "64MiB"}
    patient |= WITHOUT_SHORT_WAY if kind == "nixl" else {}
    with Proxy() as proxy:
        advertised = {"peer.advertise": proxy.address} if kind == "tcp" else {}
        [owner] = cluster.start(
            1,
            capacity="40MiB",
            program=[MUTANT, lie] if lie else None,
            **options(kind, **{"store.lease_ttl_ms": 500}, **patient, **advertised),
        )
        proxy.target = owner.peer_port
        [reader] = cluster.start(1, capacity="40MiB", seeds=(proxy.address,), **options(kind, **patient))
        cluster.connected()
        cache = reader.open(SMALL)
        warm = put(owner, SMALL, WARM)
        visible(cache, warm)
        assert Read(cache, warm, 10_000).end() == WARM
        keys = put(owner, SMALL, COUNT)
        visible(cache, keys)
        with held_up(kind, reader, proxy):
            read = Read(cache, keys, 20_000)
            eventually(lambda: owner.metric("p2pkv_leases") > 0, why="the owner has pinned")
            eventually(lambda: owner.metric("p2pkv_leases") == 0, why="the lease is over")
            assert not read.over
            overwrite(owner)
        came = read.end()
        assert came < COUNT
        assert owner.metric("p2pkv_evictions_total") > COUNT


@pytest.mark.parametrize("kind", [NIXL])
def test_what_owners_say_about_places_is_not_believed(cluster: Cluster, kind: str) -> None:
    """One names the places of other blocks, one places beyond its arena: misses, and an honest holder's do come."""
    settings = options(kind, **WITHOUT_SHORT_WAY)
    [liar] = cluster.start(1, program=[MUTANT, "wrong-places"], **settings)
    another = cluster.launch(program=[MUTANT, "no-places"], seeds=(liar.address,), **settings)
    honest, reader = (cluster.launch(seeds=(liar.address,), **settings) for _ in range(2))
    for agent in (another, honest, reader):
        agent.ready()
    cluster.connected()
    cache = reader.open(SMALL)
    for holder in (liar, another):
        keys = put(holder, SMALL, 16)
        visible(cache, keys)
        read = Read(cache, keys, 5_000)
        assert read.end() == 0, "nothing of what came was the right block"
        assert Status.TIMEOUT not in read.statuses
    keys = new_keys(16)
    for holder in (liar, another, honest):
        assert all(holder.open(SMALL).put(keys, blocks_of(keys, BLOCK)))
    all_have(cache, keys, 3)
    assert Read(cache, keys, 20_000).end() == 16
    assert reader.metric("p2pkv_rejected_blocks_total") >= 16
