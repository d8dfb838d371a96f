"""How long this engine takes to compute a block, learnt from what the tier sees anyway; and what a load costs besides.

A request's prefill begins when it is scheduled, and ends at the last step before its blocks are offered to the tier.
What a block takes grows with the blocks before it (attention), so the pace is a line: time per block over the position,
fitted by least squares in which old samples fade. For the scheduler's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from p2pkv.wire.engine_types import Pace

FADE: Final = 0.9
"""Per sample: what an engine does under today's load counts, not last week's."""
REQUESTS_MAX: Final = 4_096
SAMPLES_MIN: Final = 2
SPREAD_MIN: Final = 0.5
"""In blocks squared: without some variance of positions there is no slope to be seen."""
US_MAX: Final = 0xFFFFFFFF
OVERHEAD_WEIGHT: Final = 0.2
OVERHEAD_FIRST_S: Final = 0.005
"""Until a load has shown it: a scheduler's step or two."""
OVERHEAD_FREELY_S: Final = 0.1
OVERHEAD_TIMES: Final = 4.0
OVERHEAD_MAX_S: Final = 0.5
"""A load counts for as much as it took up to the first, or so many times what they took so far, and never for more than
the last, which is more than copies to the accelerator and a step take. A request that goes on later has waited for room
(in the batch, in KV memory), as it would have had to if its blocks had been computed."""
OVERHEAD_HALF_LIFE_S: Final = 300.0
"""In which what loads have shown counts half. Too large a value keeps loads away, and would stay for ever."""


class PrefillPace:
    """One per engine."""

    def __init__(self) -> None:
        self._begun: OrderedDict[str, float] = OrderedDict()  # request -> since when its next blocks are computed
        self._loaded: OrderedDict[str, float] = OrderedDict()  # request -> when its load was over
        self._step_at = 0.0
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)  # of weight, position, position squared, seconds, position times seconds
        self._samples = 0
        self._overhead_s = OVERHEAD_FIRST_S  # as of the time
        self._overhead_at = 0.0

    def stepped(self, now: float) -> None:
        """A scheduler's step is over."""
        self._step_at = now

    def scheduled(self, request_id: str, now: float) -> None:
        """A request begins to be computed in the step that follows."""
        _keep(self._begun, request_id, now)
        loaded_at = self._loaded.pop(request_id, None)
        if loaded_at is not None:
            known_s = self._overhead(now)
            most_s = min(max(OVERHEAD_FREELY_S, OVERHEAD_TIMES * known_s), OVERHEAD_MAX_S)
            self._overhead_s = known_s + OVERHEAD_WEIGHT * (min(now - loaded_at, most_s) - known_s)
            self._overhead_at = now

    def loaded(self, request_id: str, now: float) -> None:
        """A load that the request waits for is over: what passes from now on until it is scheduled is overhead."""
        _keep(self._loaded, request_id, now)

    def computed(self, request_id: str, position: int, blocks: int, now: float) -> None:
        """So many new blocks of a request have been computed; the first of them is at ``position`` of its chain."""
        since = self._begun.get(request_id)
        if since is None or blocks < 1:
            return
        until = self._step_at if self._step_at > since else now
        self._begun[request_id] = until
        seconds = (until - since) / blocks
        if seconds <= 0.0:
            return
        x = position + (blocks - 1) / 2
        added = (1.0, x, x * x, seconds, x * seconds)
        self._sums = tuple(FADE * old + new for old, new in zip(self._sums, added, strict=True))  # type: ignore[assignment]
        self._samples += 1

    def finished(self, request_id: str) -> None:
        """The request is over, or preempted."""
        self._begun.pop(request_id, None)
        self._loaded.pop(request_id, None)

    def _overhead(self, now: float) -> float:
        fade: float = 0.5 ** (max(0.0, now - self._overhead_at) / OVERHEAD_HALF_LIFE_S)
        return OVERHEAD_FIRST_S + fade * (self._overhead_s - OVERHEAD_FIRST_S)

    def of(self, position: int) -> Pace:
        """The pace from the block at ``position`` of a chain on, in the step after the last one."""
        weight, sum_x, sum_xx, sum_y, sum_xy = self._sums
        if self._samples < SAMPLES_MIN:
            return Pace()
        mean_x, mean_y = sum_x / weight, sum_y / weight
        variance = sum_xx / weight - mean_x * mean_x
        slope = (sum_xy / weight - mean_x * mean_y) / variance if variance > SPREAD_MIN else 0.0
        slope = min(max(0.0, slope), mean_y / mean_x if mean_x > 0 else 0.0)  # at position 0 it takes some time, too
        first_s = mean_y + slope * (position - mean_x)
        return Pace(
            block_us=min(max(1, round(first_s * 1e6)), US_MAX),
            more_ns=min(round(slope * 1e9), US_MAX),
            overhead_us=min(round(self._overhead(self._step_at) * 1e6), US_MAX),
        )


def _keep(times: OrderedDict[str, float], request_id: str, now: float) -> None:
    times[request_id] = now
    times.move_to_end(request_id)
    if len(times) > REQUESTS_MAX:
        times.popitem(last=False)
