"""What is expected of a source, from what it has shown."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.transport import estimates as module
from p2pkv.transport.estimates import STALE_S, STRANGER_SPREAD, Estimates, Kept, Moved
from p2pkv.transport.plan import Estimate, Source
from p2pkv.types import Tier

MIB = 1 << 20
STRANGER = Estimate(0.001, 1e9, spread=STRANGER_SPREAD)
A = Source(1, Tier.DRAM)


def stranger(source: Source) -> Estimate:
    return STRANGER


def pull(
    known: Estimates, source: Source, size: int, bytes_per_s: float, now: float, first_byte_s: float = 0.002
) -> None:
    known.begin(source, size, now)
    known.end(source, size, Moved(first_byte_s, first_byte_s + size / bytes_per_s, size), now)


def test_a_stranger_is_what_the_agent_was_told_of_strangers() -> None:
    assert Estimates(stranger).of(A, 0.0) == STRANGER


def test_transfers_teach_the_pace_and_the_first_byte() -> None:
    known = Estimates(stranger)
    for _ in range(50):
        pull(known, A, 4 * MIB, 2e8, 1.0)
    found = known.of(A, 1.0)
    assert found.bytes_per_s == pytest.approx(2e8, rel=0.01)
    assert found.first_byte_s == pytest.approx(0.002, rel=0.01)
    assert found.spread < 0.05 and found.busy_s == 0.0


@pytest.mark.parametrize("apart_s", [0.0, 0.001, 0.1])
def test_transfers_side_by_side_teach_the_pace_of_all_of_them(apart_s: float) -> None:
    """Two of 100 MB through 1 GB/s take 0.2 s together, whether they end in the same moment or not."""
    known = Estimates(stranger)
    size, piece, now = 100_000_000, 1_000_000, 0.0
    for _ in range(10):
        known.begin(A, size, now)
        known.begin(A, size, now + apart_s)
        first, second, began, at = size, size, now, now
        while first or second:  # blocks of each in turn, at 1 GB/s
            at += piece / 1e9
            if first and (first >= second or not second):
                first -= piece
                known.landed(A, piece)
                if first == 0:
                    known.end(A, 0, Moved(0.0, at - began, size, size), at)
            else:
                second -= piece
                known.landed(A, piece)
                if second == 0:
                    known.end(A, 0, Moved(0.0, at - began - apart_s, size, size), at)
        now = at + 1.0
    found = known.of(A, now)
    assert found.bytes_per_s == pytest.approx(1e9, rel=0.1)
    assert found.busy_s == 0.0


def test_a_small_pull_of_somebody_else_beside_a_large_one_does_not_make_it_look_quick() -> None:
    """The lane's are told of when they have ended, with nothing of them told before."""
    known = Estimates(stranger)
    pull(known, A, 100_000_000, 1e9, 0.0)
    known.begin(A, 100_000_000, 1.0)
    known.landed(A, 98_000_000)
    known.begin(A, 0, 1.098)
    known.end(A, 0, Moved(0.0005, 0.001, 65_536), 1.098)
    known.landed(A, 2_000_000)
    known.end(A, 0, Moved(0.0, 0.1, 100_000_000, 100_000_000), 1.1)
    assert known.of(A, 1.1).bytes_per_s == pytest.approx(1e9, rel=0.1)


def test_failures_alone_are_not_written_down_as_something_known() -> None:
    known = Estimates(stranger)
    known.begin(A, MIB, 0.0)
    known.end(A, MIB, None, 1.0)
    assert known.kept(1.0) == []


def test_one_small_transfer_changes_little() -> None:
    known = Estimates(stranger)
    pull(known, A, 64 * MIB, 1e9, 0.0)
    pull(known, A, 64 << 10, 1e8, 0.0)
    assert known.of(A, 0.0).bytes_per_s > 8e8
    pull(known, A, 64 * MIB, 1e8, 0.0)
    assert known.of(A, 0.0).bytes_per_s == pytest.approx(1e8, rel=0.2)


def test_the_first_transfer_shows_more_than_what_is_thought_of_strangers() -> None:
    known = Estimates(stranger)
    pull(known, A, 256 << 10, 1e6, 0.0)
    assert known.of(A, 0.0).bytes_per_s < 2e6


def test_that_little_came_in_a_long_time_is_telling() -> None:
    known = Estimates(stranger)
    pull(known, A, 64 * MIB, 1e9, 0.0)
    for _ in range(3):
        pull(known, A, 256 << 10, 1e6, 0.0)
    assert known.of(A, 0.0).bytes_per_s < 2e6


def test_a_source_that_becomes_a_hundred_times_slower_is_known_after_two_transfers() -> None:
    known = Estimates(stranger)
    for _ in range(3):
        pull(known, A, 16 * MIB, 1e9, 0.0)
    pull(known, A, 16 * MIB, 1e7, 0.0)
    pull(known, A, 16 * MIB, 1e7, 0.0)
    assert known.of(A, 0.0).bytes_per_s < 3e7


def test_a_source_whose_pace_varies_is_unsure() -> None:
    rng = random.Random(2)
    steady, unsteady = Estimates(stranger), Estimates(stranger)
    for _ in range(100):
        pull(steady, A, MIB, 5e8, 0.0)
        pull(unsteady, A, MIB, 5e8 * 10 ** rng.uniform(-0.7, 0.7), 0.0)
    assert steady.of(A, 0.0).spread < 0.01 < 0.3 < unsteady.of(A, 0.0).spread


def test_what_is_asked_of_it_makes_it_busy_until_it_has_ended() -> None:
    known = Estimates(stranger)
    known.begin(A, 100 * MIB, 0.0)
    known.begin(A, 100 * MIB, 0.0)
    assert known.of(A, 0.0).busy_s == pytest.approx(200 * MIB / 1e9)
    known.end(A, 100 * MIB, None, 0.0)
    known.end(A, 100 * MIB, None, 0.0)
    found = known.of(A, 0.0)
    assert (found.busy_s, found.bytes_per_s) == (0.0, pytest.approx(1e9)), "a failure says nothing about the pace"


def test_an_old_opinion_is_less_sure() -> None:
    known = Estimates(stranger)
    for _ in range(50):
        pull(known, A, 4 * MIB, 2e8, 0.0)
    spreads = [known.of(A, age).spread for age in (0.0, STALE_S / 2, STALE_S, 10 * STALE_S)]
    assert spreads == sorted(spreads) and spreads[-1] == pytest.approx(STRANGER_SPREAD)
    assert known.of(A, STALE_S).bytes_per_s == pytest.approx(2e8, rel=0.01)


def test_it_survives_a_restart() -> None:
    known = Estimates(stranger)
    for node in range(1, 20):
        pull(known, Source(node, Tier.DRAM), 16 * MIB, 1e7 * node, 100.0)
    again = Estimates(stranger)
    assert again.restore(known.kept(130.0), 5.0) == 19
    for node in range(1, 20):
        source = Source(node, Tier.DRAM)
        assert again.of(source, 5.0) == pytest.approx(known.of(source, 130.0))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-1, 9), *[st.floats()] * 4), max_size=20))
def test_whatever_was_written_down_nothing_impossible_is_believed(
    rows: list[tuple[int, int, float, float, float, float]],
) -> None:
    known = Estimates(stranger)
    known.restore([Kept(*row) for row in rows], 0.0)
    for node in range(1, 10):
        for tier in Tier:
            found = known.of(Source(node, tier), 0.0)
            assert found.bytes_per_s > 0 and found.first_byte_s >= 0 and found.spread >= 0
            assert not any(math.isnan(number) for number in found)


@given(st.lists(st.tuples(st.integers(0, 1 << 27), st.floats(0, 100), st.floats(0, 100)), max_size=30))
def test_whatever_transfers_show_the_estimate_stays_one(shown: list[tuple[int, float, float]]) -> None:
    known = Estimates(stranger)
    for size, first_byte_s, seconds in shown:
        known.begin(A, size, 0.0)
        known.end(A, size, Moved(first_byte_s, seconds, size), 0.0)
    found = known.of(A, 0.0)
    assert found.bytes_per_s > 0 and found.busy_s == 0.0 and math.isfinite(found.spread) and found.spread >= 0


def test_sources_are_bounded_and_those_in_use_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOURCES_MAX", 4)
    known = Estimates(stranger)
    known.begin(A, MIB, 0.0)
    for node in range(2, 20):
        pull(known, Source(node, Tier.DRAM), MIB, 1e8, float(node))
    assert len(known._known) == 4 and known.of(A, 20.0).busy_s > 0
    known.forget(19)
    assert known.of(Source(19, Tier.DRAM), 20.0) == STRANGER


def test_how_often_a_source_fails_is_learnt_per_block_and_forgotten_with_time() -> None:
    known = Estimates(stranger)
    for _ in range(20):
        known.answered(A, 8, 2, 0.0)
    assert known.of(A, 0.0).failing == pytest.approx(0.25, rel=0.01)
    assert known.of(A, STALE_S / 2).failing == pytest.approx(0.125, rel=0.01)
    assert known.of(A, STALE_S).failing == 0.0
    known.answered(A, 64, 0, 0.0)
    assert known.of(A, 0.0).failing < 0.001


def test_one_block_of_many_that_fails_says_little_and_nothing_makes_a_source_infinitely_slow() -> None:
    known = Estimates(stranger)
    known.answered(A, 1, 1, 0.0)
    assert 0.0 < known.of(A, 0.0).failing < 0.2
    for _ in range(100):
        known.answered(A, 1_000, 1_000, 0.0)
    assert known.of(A, 0.0).failing == module.FAILING_MAX
    assert math.isfinite(known.of(A, 0.0).times)


def test_how_often_a_source_fails_is_kept_and_nonsense_about_it_is_not() -> None:
    known = Estimates(stranger)
    pull(known, A, 4 * MIB, 2e8, 0.0)
    known.answered(A, 8, 8, 0.0)
    [kept] = known.kept(STALE_S / 4)
    again = Estimates(stranger)
    assert again.restore([kept], 1e6) == 1
    assert again.of(A, 1e6).failing == pytest.approx(0.75 * known.of(A, 0.0).failing)
    for wrong in (-0.1, 1.1, math.nan, math.inf):
        assert Estimates(stranger).restore([kept._replace(failing=wrong)], 0.0) == 0
