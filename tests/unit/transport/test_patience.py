"""How long a peer's first byte is waited for."""

from __future__ import annotations

from p2pkv.transport.patience import FACTOR, FLOOR_S, NODES_MAX, Patience


def test_an_unknown_peer_gets_the_ceiling() -> None:
    assert Patience(0.5).of(1) == 0.5


def test_a_fast_peer_gets_the_floor() -> None:
    patience = Patience(0.5)
    patience.learn(1, 0.0005)
    assert patience.of(1) == FLOOR_S


def test_a_slow_peer_gets_a_multiple_of_its_slowest_answer_up_to_the_ceiling() -> None:
    patience = Patience(0.5)
    patience.learn(1, 0.05)
    patience.learn(1, 0.001)
    assert 0.9 * FACTOR * 0.05 <= patience.of(1) <= FACTOR * 0.05
    patience.learn(1, 3.0)
    assert patience.of(1) == 0.5


def test_no_answer_teaches_nothing_and_a_slow_one_is_forgotten_in_time() -> None:
    patience = Patience(0.5)
    patience.learn(1, 0.0)
    assert patience.of(1) == 0.5
    patience.learn(1, 0.1)
    for _ in range(200):
        patience.learn(1, 0.001)
    assert patience.of(1) == FLOOR_S


def test_a_peer_that_has_gone_is_unknown_again_and_the_table_is_bounded() -> None:
    patience = Patience(0.5)
    patience.learn(1, 0.001)
    patience.forget(1)
    assert patience.of(1) == 0.5
    for node in range(NODES_MAX + 10):
        patience.learn(node, 0.001)
    assert patience.of(0) == 0.5
    assert patience.of(NODES_MAX + 9) == FLOOR_S
