"""The TCP transport's own arithmetic; what it does on a wire is in ``tests/contract``."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pkv.transport.tcp import split


@given(st.lists(st.integers(0, 1 << 24), min_size=1, max_size=60), st.integers(1, 1 << 24), st.integers(1, 8))
def test_a_batch_is_cut_into_runs_that_cover_it_in_order(lengths: list[int], part_bytes: int, parts_max: int) -> None:
    runs = split(lengths, part_bytes, parts_max)
    assert 1 <= len(runs) <= min(parts_max, len(lengths))
    assert [i for first, last in runs for i in range(first, last)] == list(range(len(lengths)))
    assert all(first < last for first, last in runs)
    if sum(lengths) < 2 * part_bytes:
        assert len(runs) == 1


def test_equal_blocks_are_shared_out_evenly() -> None:
    assert split([1 << 20] * 64, 8 << 20, 4) == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert split([1 << 20] * 15, 8 << 20, 4) == [(0, 15)]
    assert split([1 << 20] * 16, 8 << 20, 4) == [(0, 8), (8, 16)]
