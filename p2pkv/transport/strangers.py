"""What to expect of a peer that nothing was pulled from yet, by where it is. Pure.

Only where a plan begins: one pull later the peer is known by what it did (:mod:`p2pkv.transport.estimates`).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from p2pkv.transport.estimates import STRANGER_SPREAD
from p2pkv.transport.plan import Estimate

SAME_HOST_BYTES_PER_S: Final = 3e9
"""Loopback TCP, or a one-sided read, of one processor."""
SAME_HOST_FIRST_BYTE_S: Final = 0.0003
SAME_RACK_FIRST_BYTE_S: Final = 0.0005
ELSEWHERE_FIRST_BYTE_S: Final = 0.001
OVERSUBSCRIBED: Final = 2.0
"""What leaves a rack shares its uplink, which is 2 to 4 times less than its ports together in many fabrics."""


class Place(NamedTuple):
    """Where a node is. ``rack`` "" and ``bytes_per_s`` 0 (of its link): it has not told."""

    host_id: str
    rack: str
    bytes_per_s: float


def expected(ours: Place, theirs: Place | None, *, rtt_s: float) -> Estimate:
    """Of a stranger. ``theirs`` None: it is not known at all. ``rtt_s`` 0: not measured. Our own link must be known."""
    if theirs is not None and theirs.host_id == ours.host_id:
        return Estimate(SAME_HOST_FIRST_BYTE_S, SAME_HOST_BYTES_PER_S, spread=STRANGER_SPREAD)
    bytes_per_s, first_byte_s = ours.bytes_per_s, ELSEWHERE_FIRST_BYTE_S
    if theirs is not None:
        bytes_per_s = min(bytes_per_s, theirs.bytes_per_s or bytes_per_s)
        if ours.rack and theirs.rack:
            if ours.rack == theirs.rack:
                first_byte_s = SAME_RACK_FIRST_BYTE_S
            else:
                bytes_per_s /= OVERSUBSCRIBED
    return Estimate(max(first_byte_s, 2.0 * rtt_s), bytes_per_s, spread=STRANGER_SPREAD)
