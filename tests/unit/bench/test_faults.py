"""What the report on bad holders says, without one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from p2pkv.bench import faults
from p2pkv.bench.faults import BAD_AFTER_BYTES, CASES, MIB, PART_BYTES, SLOW_BYTES, CrowdRow, Sample
from p2pkv.errors import P2PKVError

NET_DEV = """Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       2    0    0    0     0          0         0      200       2    0    0    0     0       0          0
  eth0: 4000000    3000    0    0    0     0          0         0 90000000    6000    0    0    0     0       0          0
"""  # noqa: E501
FAULTS = ("slow", "stopped", "killed")


def broken(**changes: Sequence[Sample]) -> set[str]:
    """Claims that do not hold of a run in which all is well but for these faults' samples."""
    rows = []
    for case in CASES:
        seconds = {1: 4.0, 3: 1.3, 4: 1.3 if case.fault else 1.0}[case.holders]
        given = SLOW_BYTES if case.fault == "slow" else BAD_AFTER_BYTES
        rows.append(faults.row_of(case, changes.get(case.fault) or [Sample(seconds, 0, PART_BYTES, given)] * 3))
    return {claim.id for claim in faults.claims_of(rows) if not claim.ok}


def test_all_claims_hold_where_the_bad_holder_was_a_source_and_cost_nothing() -> None:
    assert broken() == set()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_holder_that_nobody_asks_shows_nothing(fault: str) -> None:
    asked, not_asked = Sample(1.3, 0, PART_BYTES, BAD_AFTER_BYTES), Sample(1.3, 0, 0, 0)
    assert broken(**{fault: [asked, not_asked, asked]}) == {
        f"faults.{fault}.was_a_source",
        f"faults.{fault}.had_given",
    }


def test_a_get_that_was_over_before_the_fault_shows_nothing() -> None:
    assert broken(killed=[Sample(1.3, 0, PART_BYTES, 0)] * 3) == {"faults.killed.had_given"}


def test_what_takes_longer_or_does_not_come_shows() -> None:
    assert broken(stopped=[Sample(9.0, 1, PART_BYTES, BAD_AFTER_BYTES)] * 3) == {
        "faults.stopped.over_three",
        "faults.missing",
    }


@pytest.mark.parametrize(("sent", "ok"), [(64 * MIB, True), (128 * MIB, False)])
def test_a_crowd_is_charged_for_what_the_holders_sent(sent: int, ok: bool) -> None:
    row = CrowdRow(case="crowd", gets=64, prefix_bytes=64 * MIB, bytes_sent=sent, seconds=1.0)
    assert faults.claim_of(row).ok is ok


def test_what_a_link_has_sent_is_read_from_the_kernel() -> None:
    assert faults.sent_bytes(NET_DEV, "eth0") == 90_000_000
    with pytest.raises(P2PKVError, match="no such network device"):
        faults.sent_bytes(NET_DEV, "eth1")
