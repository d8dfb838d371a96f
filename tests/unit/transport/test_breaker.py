"""Who is asked, and who is left alone for a while."""

from __future__ import annotations

import random

import pytest

from p2pkv.transport import breaker
from p2pkv.transport.breaker import JITTER, PAUSE_MAX_S, PAUSE_S, PROBE_S, Breakers, Fault, State

NODE = 7


@pytest.fixture
def breakers() -> Breakers:
    return Breakers(random.Random(1))


def test_silence_opens_at_once_and_other_faults_when_they_repeat(breakers: Breakers) -> None:
    assert breakers.bad(1, Fault.SILENT, 0.0) and not breakers.allows(1, 0.0)
    assert [breakers.bad(2, Fault.FAILED, 0.0) for _ in range(3)] == [False, False, True]
    assert [breakers.bad(3, Fault.WRONG, 0.0) for _ in range(4)] == [False, False, False, True]
    assert all(breakers.state(node, 0.0) is State.OPEN for node in (1, 2, 3))
    assert breakers.allows(4, 0.0) and breakers.state(4, 0.0) is State.CLOSED


def test_what_goes_well_in_between_begins_the_count_anew(breakers: Breakers) -> None:
    for _ in range(10):
        breakers.bad(NODE, Fault.FAILED, 0.0)
        breakers.bad(NODE, Fault.FAILED, 0.0)
        breakers.good(NODE)
    assert breakers.allows(NODE, 0.0)


def test_after_the_pause_one_request_finds_out(breakers: Breakers) -> None:
    breakers.bad(NODE, Fault.SILENT, 0.0)
    later = PAUSE_S * (1 + JITTER)
    assert breakers.state(NODE, later) is State.HALF_OPEN
    assert [breakers.allows(NODE, later) for _ in range(3)] == [True, False, False]
    breakers.good(NODE)
    assert breakers.allows(NODE, later) and breakers.allows(NODE, later)


def test_a_probe_that_fails_doubles_the_pause_up_to_a_bound(breakers: Breakers) -> None:
    now = 0.0
    breakers.bad(NODE, Fault.SILENT, now)
    pauses = []
    for _ in range(12):
        began = now
        while not breakers.allows(NODE, now):
            now += 0.01
        pauses.append(now - began)
        assert breakers.bad(NODE, Fault.FAILED, now), "any fault of a probe"
    for count, pause in enumerate(pauses):
        assert pause == pytest.approx(min(PAUSE_MAX_S, PAUSE_S * 2**count), rel=JITTER + 0.03)


def test_requests_from_before_do_not_lengthen_the_pause(breakers: Breakers) -> None:
    breakers.bad(NODE, Fault.SILENT, 0.0)
    for _ in range(50):
        assert not breakers.bad(NODE, Fault.SILENT, 0.1)
    assert breakers.allows(NODE, PAUSE_S * (1 + JITTER))


def test_a_probe_that_never_ends_is_made_again(breakers: Breakers) -> None:
    breakers.bad(NODE, Fault.SILENT, 0.0)
    assert breakers.allows(NODE, 1.0)
    assert not breakers.allows(NODE, 1.0 + PROBE_S - 0.1)
    assert breakers.allows(NODE, 1.0 + PROBE_S)


def test_who_is_heard_again_is_worth_a_probe(breakers: Breakers) -> None:
    breakers.bad(NODE, Fault.SILENT, 10.0)
    breakers.heard(NODE, 9.9)
    assert not breakers.allows(NODE, 10.1), "that was before"
    breakers.heard(NODE, 10.1)
    assert [breakers.allows(NODE, 10.1) for _ in range(2)] == [True, False]


def test_nothing_is_kept_of_who_is_well_and_little_of_others(
    breakers: Breakers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(breaker, "NODES_MAX", 3)
    for node in range(10):
        breakers.bad(node, Fault.SILENT, 0.0)
    assert len(breakers._breakers) == 3
    for node in range(10):
        breakers.good(node)
    assert not breakers._breakers
    breakers.bad(NODE, Fault.SILENT, 0.0)
    breakers.forget(NODE)
    assert breakers.allows(NODE, 0.0)
