"""How what several peers used last becomes one list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pkv.agent.hot import rank

A, B, C, D = (bytes([i]) * 8 for i in range(4))


def test_what_more_peers_have_comes_first_then_what_they_used_later() -> None:
    assert rank([[A, B, C], [B, D]]) == [B, A, D, C]
    assert rank([]) == rank([[], []]) == []


def test_naming_a_block_twice_does_not_make_it_two_peers() -> None:
    assert rank([[A, A, B], [B]]) == [B, A]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_a_prefix_comes_before_what_follows_it(depths: list[int]) -> None:
    chain = [i.to_bytes(8, "little") for i in range(12)]
    ranked = rank([chain[:depth] for depth in depths])
    assert ranked == chain[: max(depths)]
