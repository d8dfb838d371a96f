"""A source that has evicted what its peers still believe it has: misses at once, and no reason not to ask it for more.

Over NIXL: ``test_short_way_nixl.py``.
"""

from __future__ import annotations

import pytest

from p2pkv.types import Status
from tests.cluster.agents import Cluster, visible
from tests.cluster.test_peer_faults import MIB, SLACK_S, Read, put
from tests.cluster.transports import TCP, options

pytestmark = [pytest.mark.cluster]

IN_A_ROW = 3
"""So many failures in a row open a breaker (p2pkv/transport/breaker.py)."""
ROUNDS = 20
MISSES = "p2pkv_pull_missing_blocks_total"


def test_what_was_promised_and_evicted_is_a_miss_and_the_peer_is_asked_again(cluster: Cluster) -> None:
    """The owner tells of changes half a second late. Were a miss a failure, three such reads would open its breaker.
    No other answer comes between them."""
    [owner] = cluster.start(1, capacity="24MiB", **options(TCP, **{"peer.flush_ms": 600}))
    [reader] = cluster.start(1, seeds=(owner.address,), **options(TCP))
    cluster.connected()
    mine, cache = owner.open(MIB), reader.open(MIB)
    missed = 0
    for _ in range(ROUNDS):
        keys = put(owner, MIB, 8)
        visible(cache, keys)
        while "local" in mine.match(keys).present:
            put(owner, MIB, 4)
        before = reader.metric(MISSES)
        read = Read(cache, keys, 10_000)
        assert read.end() == 0 and set(read.statuses) == {Status.MISS}
        assert read.seconds < SLACK_S
        missed += reader.metric(MISSES) > before
        assert reader.metric("p2pkv_peers_not_asked") == 0, f"its breaker has opened after {missed} misses"
        if missed == IN_A_ROW:
            break
    assert missed == IN_A_ROW, f"the reader heard of most evictions at once: {missed} misses in {ROUNDS} reads"
    last = put(owner, MIB, 4)
    visible(cache, last)
    assert Read(cache, last, 10_000).end() == 4
