"""Quarantine of the bytes that ended NIXL reads may still write."""

from __future__ import annotations

from p2pkv.transport.nixl_quarantine import Quarantine


def test_it_counts_what_is_held_until_it_is_cleared() -> None:
    quarantine = Quarantine(100, 10.0)
    quarantine.hold(1, [(0, 30), (50, 20)], 0.0)
    quarantine.hold(2, [(90, 10)], 1.0)
    assert (quarantine.bytes, quarantine.ids) == (60, {1, 2})
    assert quarantine.clear(1)
    assert not quarantine.clear(1)
    assert (quarantine.bytes, len(quarantine)) == (10, 1)


def test_too_many_bytes_are_an_excess() -> None:
    quarantine = Quarantine(100, 10.0)
    quarantine.hold(1, [(0, 100)], 0.0)
    assert quarantine.excess(0.0) == ""
    quarantine.hold(2, [(100, 1)], 0.0)
    assert "101 bytes" in quarantine.excess(0.0)
    quarantine.clear(1)
    assert quarantine.excess(0.0) == ""


def test_too_long_is_an_excess_and_due_says_when() -> None:
    quarantine = Quarantine(100, 10.0)
    assert quarantine.due() is None
    quarantine.hold(1, [(0, 1)], 5.0)
    quarantine.hold(2, [(1, 1)], 8.0)
    assert quarantine.due() == 15.0
    assert quarantine.excess(14.9) == ""
    assert "more than 10.0 s" in quarantine.excess(15.0)
    quarantine.clear(1)
    assert (quarantine.due(), quarantine.excess(15.0)) == (18.0, "")
