"""What is expected of peers that nothing was pulled from yet."""

from __future__ import annotations

from p2pkv.transport.strangers import OVERSUBSCRIBED, SAME_HOST_BYTES_PER_S, Place, expected

OURS = Place("here", "r1", 1.25e9)


def test_on_the_same_host_no_link_matters() -> None:
    assert expected(OURS, Place("here", "r2", 1e6), rtt_s=0.1).bytes_per_s == SAME_HOST_BYTES_PER_S


def test_the_slower_of_both_links_counts_and_one_that_is_not_told_is_taken_for_ours() -> None:
    assert expected(OURS, Place("a", "r1", 1.25e8), rtt_s=0.0).bytes_per_s == 1.25e8
    assert expected(OURS, Place("a", "r1", 1.25e10), rtt_s=0.0).bytes_per_s == 1.25e9
    assert expected(OURS, Place("a", "r1", 0.0), rtt_s=0.0).bytes_per_s == 1.25e9
    assert expected(OURS, None, rtt_s=0.0).bytes_per_s == 1.25e9


def test_another_rack_is_farther_than_the_same_one_and_what_is_not_told_says_nothing() -> None:
    near, far = (expected(OURS, Place("a", rack, 0.0), rtt_s=0.0) for rack in ("r1", "r2"))
    assert near.bytes_per_s == OVERSUBSCRIBED * far.bytes_per_s and near.first_byte_s < far.first_byte_s
    untold = expected(OURS, Place("a", "", 0.0), rtt_s=0.0)
    assert untold == expected(OURS._replace(rack=""), Place("a", "r2", 0.0), rtt_s=0.0)
    assert untold.bytes_per_s == near.bytes_per_s


def test_a_measured_round_trip_is_believed() -> None:
    assert expected(OURS, Place("a", "r1", 0.0), rtt_s=0.02).first_byte_s == 0.04
