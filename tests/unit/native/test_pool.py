"""What the pool of data connections knows of a peer (``native/pool.hpp``)."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from p2pkv import _native

NODE = 7
NEAR_S, BEHIND_A_BATCH_S = 0.0001, 0.05


@pytest.fixture
def pool() -> Iterator[_native.Pool]:
    ours, theirs = socket.socketpair()
    made = _native.Pool(4, 1.0)
    made.give(NODE, 1, ours.detach())
    yield made
    made.clear()
    theirs.close()


def test_nobody_is_near_before_it_has_answered(pool: _native.Pool) -> None:
    assert not pool.is_near(NODE)
    pool.learn(NODE, 0.0)
    pool.learn(NODE + 1, NEAR_S)
    assert not pool.is_near(NODE) and not pool.is_near(NODE + 1)


def test_a_peer_stays_near_while_some_answers_wait_behind_large_ones(pool: _native.Pool) -> None:
    pool.learn(NODE, NEAR_S)
    for _ in range(30):
        pool.learn(NODE, BEHIND_A_BATCH_S)
    assert pool.is_near(NODE)


def test_a_peer_that_has_become_slow_is_seen_to_be_so_and_back(pool: _native.Pool) -> None:
    pool.learn(NODE, NEAR_S)
    for _ in range(100):
        pool.learn(NODE, BEHIND_A_BATCH_S)
    assert not pool.is_near(NODE)
    pool.learn(NODE, NEAR_S)
    assert pool.is_near(NODE)
