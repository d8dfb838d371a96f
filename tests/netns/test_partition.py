"""The network between a reader and the owner of what it reads goes, and comes back: over NIXL's own connections, too.

``tests/cluster/test_fault_partition.py`` parts the control connection only; here nothing at all gets through.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from p2pkv.client.cache import Cache
from p2pkv.netns import missing
from tests.cluster.agents import eventually, make_layout
from tests.cluster.blocks import blocks_of, new_keys
from tests.cluster.test_peer_faults import SLACK_S, Read
from tests.cluster.transports import NIXL, TCP
from tests.netns.hosts import Hosts

pytestmark = [pytest.mark.root, pytest.mark.cluster, pytest.mark.timeout(120)]

MIB = make_layout(1 << 20)
COUNT = 24
RATE = 200e6
"""Bits per second: all of it takes a second, so that it is cut in the middle."""
DEADLINE_MS = 20_000
STALL_MS = 1_000
OWNER, READER = 0, 1


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    if why := missing():
        pytest.skip(f"NO NETWORK NAMESPACES ({why}): a partition of everything is not tested")


@pytest.fixture(params=[TCP, NIXL])
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """An owner behind a link that takes a second for everything, and a reader."""
    # UCX must not take shared memory: these hosts are none.
    settings = {"transport.nixl_tls": "tcp", "transport.nixl_devices": "eth0"} if request.param == "nixl" else {}
    with Hosts(2, request.param, **{"transport.stall_ms": STALL_MS, **settings}) as made:
        request.node.clusters = [made.cluster]
        made.start_all()
        made.all_right()
        assert request.param in made.agent(READER).transports
        yield made


def caches(hosts: Hosts) -> tuple[Cache, Cache]:
    """The owner's and the reader's, of blocks of 1 MiB."""
    return hosts.agent(OWNER).open(MIB), hosts.agent(READER).open(MIB)


def test_a_partition_in_mid_read_costs_one_wait_and_what_had_not_come(hosts: Hosts) -> None:
    """The bytes that came are right, the lack of progress ends the read, later ones wait no more; and it heals."""
    at_owner, at_reader = caches(hosts)
    keys = new_keys(COUNT)
    assert all(at_owner.put(keys, blocks_of(keys, MIB.block_bytes), deadline_ms=10_000))
    eventually(lambda: at_reader.match(keys).anywhere == COUNT, why="the owner is known")
    assert Read(at_reader, keys[:2], DEADLINE_MS).end() == 2
    own = new_keys(2)
    assert all(at_reader.put(own, blocks_of(own, MIB.block_bytes)))
    hosts.network.rate(OWNER, RATE)

    read = Read(at_reader, keys, DEADLINE_MS)
    eventually(lambda: hosts.agent(READER).metric("p2pkv_pulls_in_flight_blocks") > 0, why="the pull begins")
    hosts.network.apart([OWNER], [READER])
    came = read.end()
    assert 2 <= came < COUNT, "it was cut in the middle"
    assert read.seconds < STALL_MS / 1000 * 2 + SLACK_S
    again = Read(at_reader, keys, DEADLINE_MS)
    assert again.end() >= came and again.seconds < STALL_MS / 1000 + SLACK_S, "it had sent something: one more try"
    third = Read(at_reader, [*keys, *own], DEADLINE_MS)
    assert third.end() >= came + len(own) and third.seconds < SLACK_S

    hosts.network.heal()
    hosts.network.rate(OWNER, None)
    owner = hosts.agent(OWNER).node
    eventually(lambda: hosts.others(READER).get(owner, {}).get("state") == "alive", 20.0, why="it is heard again")
    eventually(lambda: Read(at_reader, keys, 5_000).end() == COUNT, 30.0, why="everything comes in the end")
    assert hosts.agent(READER).metric("p2pkv_rejected_blocks_total") == 0
