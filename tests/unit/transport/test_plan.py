"""Plans of pulls: who is asked for what, and how far it pays."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.transport.plan import ASK_S, SOURCES_MAX, Estimate, Limit, Plan, Prefill, Source, plan
from p2pkv.types import Tier

MIB = 1 << 20
GIGABIT = 125e6
A, B, C, D = (Source(node, Tier.DRAM) for node in (1, 2, 3, 4))
HERE = Source(0, Tier.DRAM)


def planned(
    sources: list[list[Source]], estimates: dict[Source, Estimate] | Estimate, deadline_s: float = 60.0, **more: object
) -> Plan:
    known = estimates if isinstance(estimates, dict) else dict.fromkeys(itertools.chain(*sources), estimates)
    return plan(sources, known.__getitem__, block_bytes=MIB, deadline_s=deadline_s, **more)  # type: ignore[arg-type]


def test_of_four_equal_holders_each_gives_a_quarter_in_the_order_of_the_chain() -> None:
    one = planned([[A]] * 256, Estimate(0.001, GIGABIT))
    four = planned([[A, B, C, D]] * 256, Estimate(0.001, GIGABIT))
    assert [len(run.positions) for run in four.runs] == [64] * 4
    assert one.pull_s / four.pull_s > 3.9
    for run in four.runs:
        gaps = {b - a for a, b in itertools.pairwise(run.positions)}
        assert gaps == {4}, "what comes, comes in about the order in which it is needed"


def test_a_slow_holder_costs_nothing() -> None:
    estimates = {source: Estimate(0.001, GIGABIT) for source in (A, B, C)} | {D: Estimate(0.001, GIGABIT / 100)}
    three = planned([[A, B, C]] * 256, estimates)
    four = planned([[A, B, C, D]] * 256, estimates)
    assert four.pull_s <= three.pull_s
    assert sum(len(run.positions) for run in four.runs if run.source is D) <= 1


def test_who_is_busy_is_given_less() -> None:
    found = planned([[A, B]] * 20, {A: Estimate(0.0, 1e9), B: Estimate(0.0, 1e9, busy_s=10 * MIB / 1e9)})
    assert {run.source: len(run.positions) for run in found.runs} == {A: 15, B: 5}


def test_what_is_here_is_not_asked_for_elsewhere() -> None:
    found = planned([[HERE, A]] * 4 + [[A]] * 4, {A: Estimate(0.01, GIGABIT), HERE: Estimate(0.0, float("inf"))})
    assert {run.source: run.positions for run in found.runs} == {HERE: [0, 1, 2, 3], A: [4, 5, 6, 7]}


def test_the_first_block_that_nobody_has_ends_the_plan() -> None:
    found = planned([[A], [A], [], [A]], Estimate(0.0, GIGABIT))
    assert (found.stop, found.limit) == (2, Limit.NOBODY)


def test_what_would_be_late_is_not_begun() -> None:
    found = planned([[A]] * 100, Estimate(0.0, 100 * MIB), deadline_s=0.5)
    assert 49 <= found.stop <= 50 and found.limit is Limit.DEADLINE and found.pull_s <= 0.5
    assert planned([[A]], Estimate(0.0, 1e9), deadline_s=0.0).stop == 0


def test_without_a_rate_of_the_engine_all_that_can_come_is_pulled() -> None:
    found = planned([[A]] * 10, Estimate(1.0, 1e6))
    assert (found.stop, found.limit, found.without_s) == (10, Limit.COMPLETE, float("inf"))


@pytest.mark.parametrize(("megabits", "pulled"), [(10_000, 32), (1_000, 32), (10, 0)])
def test_a_link_slower_than_the_engine_is_not_used(megabits: int, pulled: int) -> None:
    found = planned([[A]] * 32, Estimate(0.001, megabits * 125e3), prefill=Prefill(0.02))
    assert found.stop == pulled
    assert found.limit is (Limit.COMPLETE if pulled else Limit.RECOMPUTE)
    assert found.pull_s + found.rest_s <= found.without_s


def test_a_prefix_is_pulled_as_far_as_its_holder_is_quicker_than_the_engine() -> None:
    slow = Source(9, Tier.SSD)
    found = planned(
        [[A]] * 10 + [[slow]] * 10, {A: Estimate(0.0, 1e9), slow: Estimate(0.0, 1e6)}, prefill=Prefill(0.05)
    )
    assert (found.stop, found.limit) == (10, Limit.RECOMPUTE)
    assert [run.source for run in found.runs] == [A]


def test_a_saving_that_is_smaller_than_its_risk_is_left() -> None:
    just = Estimate(0.0, MIB / 0.0099)
    assert planned([[A]] * 10, just, prefill=Prefill(0.01)).stop == 0
    assert planned([[A]] * 10, Estimate(0.0, MIB / 0.009), prefill=Prefill(0.01)).stop == 10


def test_an_uncertain_source_counts_as_slower() -> None:
    assert planned([[A]] * 10, Estimate(0.0, MIB / 0.009, spread=0.5), prefill=Prefill(0.01)).stop == 0
    sure, unsure = Estimate(0.0, 1e9), Estimate(0.0, 1.2e9, spread=0.9)
    found = planned([[A, B]], {A: sure, B: unsure})
    assert found.runs[0].source is A


def test_what_this_node_can_receive_is_a_bound_of_all_sources_together() -> None:
    found = planned([[A, B, C, D]] * 100, Estimate(0.0, 1e9), link_bytes_per_s=1e9)
    assert found.pull_s == pytest.approx(100 * MIB / 1e9)


def test_many_equal_holders_are_not_all_asked_nor_the_same_ones_by_everybody() -> None:
    sources = [[Source(node, Tier.DRAM) for node in range(1, 101)]] * 64
    asked = [{run.source for run in planned(sources, Estimate(0.0, 1e9), salt=salt).runs} for salt in range(1, 20)]
    assert {len(one) for one in asked} == {SOURCES_MAX}
    assert len(set.union(*asked)) > 60


def test_each_source_is_estimated_once_however_long_the_chain_is() -> None:
    asked: list[Source] = []

    def estimate(source: Source) -> Estimate:
        asked.append(source)
        return Estimate(0.0, 1e9)

    plan([[Source(node, Tier.DRAM) for node in range(1, 101)]] * 512, estimate, block_bytes=MIB, deadline_s=60.0)
    assert len(asked) == len(set(asked)) == 100


SOURCES = st.lists(st.lists(st.sampled_from([A, B, C, D]), max_size=3, unique=True), max_size=7)
PACES = st.fixed_dictionaries(
    {
        source: st.builds(
            Estimate,
            st.floats(0, 0.01),
            st.floats(1e6, 1e9),
            st.floats(0, 0.01),
            st.floats(0, 1.0),
            st.floats(0, 0.1),
            st.floats(0, 0.9),
        )
        for source in (A, B, C, D)
    }
)


@given(SOURCES, PACES, st.floats(0.0001, 1.0), st.floats(0.001, 2.0))
def test_what_a_plan_says_follows_from_its_runs(
    sources: list[list[Source]], paces: dict[Source, Estimate], block_s: float, deadline_s: float
) -> None:
    found = planned(sources, paces, deadline_s, prefill=Prefill(block_s))
    dealt = sorted(position for run in found.runs for position in run.positions)
    assert dealt == list(range(found.stop))
    for i, run in enumerate(found.runs):
        assert run.positions == sorted(run.positions)
        assert all(run.source in sources[position] for position in run.positions)
        pace = paces[run.source]
        ends_s = (pace.start_s + len(run.positions) * MIB / pace.bytes_per_s) * pace.times
        assert run.ends_s == pytest.approx(ends_s + (ASK_S if i else 0.0))
    assert found.pull_s == pytest.approx(max((run.ends_s for run in found.runs), default=0.0))
    assert found.pull_s <= deadline_s
    assert found.pull_s + found.rest_s <= found.without_s + 1e-9, "never slower than computing it all"


@given(SOURCES, PACES, st.floats(0.0001, 1.0))
def test_no_other_length_of_the_same_dealing_is_clearly_better(
    sources: list[list[Source]], paces: dict[Source, Estimate], block_s: float
) -> None:
    found = planned(sources, paces, prefill=Prefill(block_s))
    for k in range(len(sources) + 1):
        other = planned(sources[:k], paces)
        if other.stop == k:
            with_s = other.pull_s + (len(sources) - k) * block_s
            assert found.pull_s + found.rest_s <= with_s + 0.05 * found.without_s + 1e-9


def test_a_source_that_fails_every_other_time_gets_half_of_what_it_would() -> None:
    found = planned([[A, B]] * 90, {A: Estimate(0.0, 1e9), B: Estimate(0.0, 1e9, failing=0.5)})
    assert {run.source: len(run.positions) for run in found.runs} == {A: 60, B: 30}


def test_what_only_a_failing_source_has_is_computed_sooner() -> None:
    chain, prefill = [[A]] * 10, Prefill(0.01)
    assert planned(chain, Estimate(0.0, MIB / 0.006), prefill=prefill).stop == 10
    assert planned(chain, Estimate(0.0, MIB / 0.006, failing=0.5), prefill=prefill).stop == 0
