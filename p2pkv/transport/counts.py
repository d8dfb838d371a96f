"""What became of pulls, counted."""

from __future__ import annotations

from typing import NamedTuple

import msgspec


class PullCounts(NamedTuple):
    """How a pull ended, in blocks; ``rejected`` and ``missed`` are part of ``failed``."""

    pulled: int
    bytes_moved: int
    failed: int
    rejected: int
    missed: int


class FetchStats(msgspec.Struct):
    """Counters since the start."""

    blocks_pulled: int = 0
    bytes_pulled: int = 0
    blocks_rejected: int = 0
    blocks_missed_at_holder: int = 0
    blocks_failed: int = 0
    pulls: int = 0
    pulls_failed: int = 0
    pulls_taken_over: int = 0
    blocks_overtaken: int = 0
    flights_joined: int = 0
