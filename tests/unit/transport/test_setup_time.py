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
