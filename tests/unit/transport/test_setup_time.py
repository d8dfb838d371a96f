"""What connecting is expected to take."""

from __future__ import annotations

import pytest

from p2pkv.transport.setup_time import SetupTime


def test_it_follows_what_was_seen() -> None:
    setup = SetupTime(0.05)
    setup.learn(0.01)
    assert 0.01 < setup.expected_s < 0.05
    for _ in range(30):
        setup.learn(0.2)
    assert setup.expected_s == pytest.approx(0.2, rel=0.01)


def test_an_hour_in_which_this_process_stood_still_is_soon_forgotten() -> None:
    setup = SetupTime(0.05)
    setup.learn(3_600.0)
    assert setup.expected_s < 0.2
    for _ in range(5):
        setup.learn(0.05)
    assert setup.expected_s < 0.1
