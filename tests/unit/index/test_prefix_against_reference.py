"""Core and reference side by side: whatever is done to both, every answer is the same."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from p2pkv.index.hashing import pack_keys
from p2pkv.index.prefix import Index, PrefixIndex
from p2pkv.index.reference import ReferenceIndex
from p2pkv.types import MASK64, Tier

pytestmark = pytest.mark.deep

NODES = st.sampled_from([0, 1, 2, 3, 4, 5, 255, 65_535])
# Few keys, so that nodes meet; the two that a careless table would use as markers among them.
KEY_POOL = [0, MASK64, *range(1, 30)]
FEW = st.lists(st.sampled_from(KEY_POOL), max_size=24)
# Runs of one long chain: they fill pages of 64 keys, make holes in them, and leave too little of them to keep.
LONG = [n << 32 for n in range(1, 401)]
RUNS = st.builds(lambda at, length: LONG[at : at + length], st.integers(0, 399), st.integers(1, 150))
KEYS = st.one_of(FEW, RUNS, st.lists(RUNS, max_size=3).map(lambda runs: [key for run in runs for key in run]))
TIERS = st.sampled_from(list(Tier))
PLACES = st.sampled_from([tier for tier in Tier if tier is not Tier.GONE])


def sets(index: Index, node: int) -> dict[Tier, bytes]:
    return {tier: np.sort(np.frombuffer(keys, np.uint64)).tobytes() for tier, keys in index.snapshot(node)}


class SideBySide(RuleBasedStateMachine):
    """Every rule does one thing to both; every answer must agree, whenever it is asked for."""

    operations = 0
    """Of all machines so far: benchmarks/index_operations.py does a million."""

    def __init__(self) -> None:
        super().__init__()
        self.core: Index = PrefixIndex()
        self.oracle: Index = ReferenceIndex()
        self.nodes: set[int] = set()

    @rule(node=NODES, keys=KEYS, tier=TIERS)
    def apply(self, node: int, keys: list[int], tier: Tier) -> None:
        self.nodes.add(node)
        packed = pack_keys(keys)
        assert self.core.apply(node, packed, tier) == self.oracle.apply(node, packed, tier)

    @rule(node=NODES, groups=st.lists(st.tuples(PLACES, KEYS), max_size=3))
    def replace(self, node: int, groups: list[tuple[Tier, list[int]]]) -> None:
        self.nodes.add(node)
        packed = [(tier, pack_keys(keys)) for tier, keys in groups]
        assert self.core.replace(node, packed) == self.oracle.replace(node, packed)

    @rule(node=NODES)
    def remove(self, node: int) -> None:
        assert self.core.remove_node(node) == self.oracle.remove_node(node)

    @rule(node=NODES, hidden=st.booleans())
    def hide(self, node: int, hidden: bool) -> None:
        self.core.hide(node, hidden)
        self.oracle.hide(node, hidden)

    @rule(chain=KEYS, beyond=st.booleans(), limit=st.integers(1, 6), start=NODES)
    def ask(self, chain: list[int], beyond: bool, limit: int, start: int) -> None:
        packed = pack_keys(chain)
        assert self.core.match(packed, beyond=beyond) == self.oracle.match(packed, beyond=beyond)
        assert self.core.holders(packed, limit=limit, start=start) == self.oracle.holders(
            packed, limit=limit, start=start
        )
        assert self.core.contains_any(packed) == self.oracle.contains_any(packed)
        assert self.core.reach(packed) == self.oracle.reach(packed)

    @invariant()
    def same_sets(self) -> None:
        SideBySide.operations += 1
        for node in self.nodes:
            assert self.core.count(node) == self.oracle.count(node)
            assert self.core.checksum(node) == self.oracle.checksum(node)
            assert sets(self.core, node) == sets(self.oracle, node)

    @invariant()
    def same_answer_about_everything(self) -> None:
        for chain in (pack_keys(KEY_POOL), pack_keys(LONG)):
            assert self.core.match(chain, beyond=True) == self.oracle.match(chain, beyond=True)


TestSideBySide = SideBySide.TestCase
TestSideBySide.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_chains_that_come_go_and_change_tiers_through_growth_and_shrinking(seed: int) -> None:
    """Buckets that are split and joined, pages that are filled, emptied, gathered from and used again."""
    rng = random.Random(seed)
    core, oracle = PrefixIndex(), ReferenceIndex()
    chains = [[rng.getrandbits(64) for _ in range(200)] for _ in range(12)]
    for phase in range(3):
        for _ in range(120):
            node = rng.randrange(12)
            chain = rng.choice(chains)
            at = rng.randrange(200)
            run = pack_keys(chain[at : at + rng.choice((1, 16, 200))] if rng.random() < 0.5 else chain[: at + 1])
            # Phases 0 and 2 mostly store, phase 1 mostly drops: the table grows, shrinks and grows again.
            tier = Tier.GONE if rng.random() < (0.8 if phase == 1 else 0.2) else Tier(rng.randint(1, 4))
            assert core.apply(node, run, tier) == oracle.apply(node, run, tier)
            if rng.random() < 0.05:
                gone = rng.randrange(12)
                assert core.remove_node(gone) == oracle.remove_node(gone)
            if rng.random() < 0.1:
                asked = pack_keys(rng.choice(chains)[: rng.choice((1, 50, 200))])
                assert core.match(asked) == oracle.match(asked)
        for chain in chains:
            packed = pack_keys(chain)
            assert core.match(packed, beyond=True) == oracle.match(packed, beyond=True)
            assert core.holders(packed, start=5) == oracle.holders(packed, start=5)
            assert core.reach(packed) == oracle.reach(packed)
        for node in range(12):
            assert sets(core, node) == sets(oracle, node)
            assert core.checksum(node) == oracle.checksum(node)
