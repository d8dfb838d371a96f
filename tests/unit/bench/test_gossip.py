"""The gossip benchmark in small: a joiner gets everything; claims are of a thousand nodes only."""

from __future__ import annotations

from p2pkv.bench import gossip
from p2pkv.bench.gossip_join import Joining


def test_a_joiner_has_every_entry_that_the_members_have() -> None:
    joined = Joining(30, 20_000).run()
    assert joined.entries == 29 * 20_000 and joined.received_bytes >= 8 * joined.entries
    assert 0 < joined.working_s <= joined.seconds < 10 and joined.wants >= 4


def test_a_small_cell_claims_nothing() -> None:
    join = gossip.Join(case="join", nodes=10, entries=1, seconds=1.0, working_s=1.0, received_mb=1.0, wants=1)
    assert gossip.claims_of([], join) == []
