"""What to expect of each source: its first byte, its pace, how sure that is, and how often it fails. Learnt from real
transfers. Pure.

Mean and variance are exponentially weighted (West, 1979, "Updating mean and variance estimates"); a transfer weighs by
its bytes, because the pace of a small one is mostly noise. What is not renewed becomes less sure: its spread grows with
its age, back to that of a stranger, so that an old opinion is checked before much depends on it.

``now`` is in seconds, monotonic. Not thread-safe.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from p2pkv.transport.plan import Estimate, Source
from p2pkv.types import Tier

SOURCES_MAX: Final = 8_192
WEIGHT_BYTES: Final = 4 << 20
"""A transfer of so many bytes moves an estimate by ``1 - 1/e`` of the way."""
FIRST_BYTE_WEIGHT: Final = 0.2
STRANGER_SPREAD: Final = 0.5
"""Of a source that nothing was pulled from for long, or ever."""
STALE_S: Final = 300.0
"""After so long without a transfer an estimate is as unsure as a stranger's."""
WEIGHT_S: Final = 0.1
"""So does one that took so long: that little came in all that time is as telling as that much came."""
SURPRISE_MAX: Final = 32.0
"""One transfer counts as at most so many times slower or faster than was expected: it may have met a pause of ours."""
SECONDS_MIN: Final = 1e-6
WEIGHT_BLOCKS: Final = 8.0
"""What so many blocks show moves the share of those that fail by ``1 - 1/e`` of the way."""
FAILING_MAX: Final = 0.9
"""A source that fails more often than this is its circuit breaker's affair."""


class Moved(NamedTuple):
    """One transfer from one source that went through."""

    first_byte_s: float
    seconds: float  # from asking until the last byte
    bytes_moved: int
    landed: int = 0  # of these bytes; they were told of by :meth:`Estimates.landed`


class Kept(NamedTuple):
    """One source's estimate as it is written down. ``age_s``: of its last transfer."""

    node: int
    tier: int
    first_byte_s: float
    pace_s: float
    variance: float
    age_s: float
    failing: float = 0.0  # when that ended


class _Known:
    """Of one source. The pace is in seconds per byte: a mean of times is what a plan adds up."""

    __slots__ = (
        "answered_at", "at", "came", "failing", "first_byte_s", "in_flight", "pace", "shared", "since", "since_begin",
        "stranger", "transfers", "variance",
    )  # fmt: skip

    def __init__(self, first_byte_s: float, pace: float, at: float) -> None:
        self.first_byte_s = first_byte_s
        self.pace = pace
        self.variance = (STRANGER_SPREAD * pace) ** 2
        self.at = at
        self.failing = 0.0  # of the blocks asked of it, at `answered_at`
        self.answered_at = at
        self.since = at  # the last end of a transfer from it, or the first begin after all had ended
        self.since_begin = True  # that was a begin
        self.came = 0  # bytes that have landed since
        self.stranger = True  # nothing has come from it yet
        self.in_flight = 0  # bytes
        self.transfers = 0
        self.shared = False  # whether some of them have been side by side

    def failing_at(self, now: float) -> float:
        """The share of its blocks that fail, forgotten with time."""
        return self.failing * max(0.0, 1.0 - max(0.0, now - self.answered_at) / STALE_S)


class Estimates:
    """One per agent.

    Args:
        stranger: what is expected of a source that nothing is known of: this node's own link or what the two have in
            common (same host, same rack), and a first byte that a network of this kind gives.
    """

    def __init__(self, stranger: Callable[[Source], Estimate]) -> None:
        self._stranger = stranger
        self._known: OrderedDict[Source, _Known] = OrderedDict()  # the one longest without a transfer first

    def of(self, source: Source, now: float) -> Estimate:
        """What is expected of it now."""
        known = self._known.get(source)
        if known is None:
            return self._stranger(source)
        sure = math.sqrt(known.variance) / known.pace
        stale = min(1.0, max(0.0, now - known.at) / STALE_S)
        return Estimate(
            first_byte_s=known.first_byte_s,
            bytes_per_s=1.0 / known.pace,
            busy_s=known.in_flight * known.pace,
            spread=sure + stale * max(0.0, STRANGER_SPREAD - sure),
            failing=min(FAILING_MAX, known.failing_at(now)),
        )

    def age_s(self, source: Source, now: float) -> float:
        """Since the last transfer that showed something; infinite: there was none."""
        known = self._known.get(source)
        return math.inf if known is None or known.stranger else max(0.0, now - known.at)

    def begin(self, source: Source, size: int, now: float) -> None:
        """So many bytes are asked of it. Every call is followed by one of :meth:`end`."""
        known = self._of(source, now)
        if known.transfers == 0:
            known.since, known.since_begin, known.came = now, True, 0
        known.in_flight += size
        known.shared |= known.transfers > 0
        known.transfers += 1

    def landed(self, source: Source, size: int) -> None:
        """So many of the bytes that are asked for have come."""
        known = self._known.get(source)
        if known is not None:
            known.in_flight = max(0, known.in_flight - size)
            known.came += size

    def end(self, source: Source, size: int, moved: Moved | None, now: float) -> None:
        """The last ``size`` of them have come, or will not. ``moved``: what the whole transfer, that ended now, shows
        of the source's pace; None: nothing.

        Of transfers side by side each counts from the end of the one before, with all bytes that have come since,
        whosever they are: what is learnt is the pace of the source.
        """
        known = self._of(source, now)
        known.in_flight = max(0, known.in_flight - size)
        known.transfers = max(0, known.transfers - 1)
        shared, known.shared = known.shared, known.shared and known.transfers > 0
        if moved is None or moved.bytes_moved <= 0:
            return
        known.first_byte_s += FIRST_BYTE_WEIGHT * (moved.first_byte_s - known.first_byte_s)
        seconds, size = moved.seconds - moved.first_byte_s, moved.bytes_moved
        if shared:
            seconds, size = self._since(known, moved, now)
            if size == 0:
                return  # it belongs to what comes next
        known.since, known.since_begin, known.came = now, False, 0
        pace = max(SECONDS_MIN, seconds) / size
        weight = 1.0 - math.exp(-max(size / WEIGHT_BYTES, seconds / WEIGHT_S))
        if known.stranger:  # anything is better than what is thought of strangers
            known.stranger = False
            weight = max(weight, 0.5)
        else:
            pace = min(max(pace, known.pace / SURPRISE_MAX), known.pace * SURPRISE_MAX)
        off = pace - known.pace
        known.pace += weight * off
        known.variance = (1.0 - weight) * (known.variance + weight * off * off)
        known.at = now
        self._known.move_to_end(source)

    def answered(self, source: Source, asked: int, failed: int, now: float) -> None:
        """Of so many blocks asked of it, at least one, so many did not come for a reason that is the source's."""
        known = self._of(source, now)
        was = known.failing_at(now)
        known.failing = was + (1.0 - math.exp(-asked / WEIGHT_BLOCKS)) * (failed / asked - was)
        known.answered_at = now

    @staticmethod
    def _since(known: _Known, moved: Moved, now: float) -> tuple[float, int]:
        """Seconds since the end before, and what has come in them."""
        seconds = now - known.since
        untold = moved.bytes_moved - moved.landed  # that came while it took: of that, the part since then
        size = known.came + int(untold * min(1.0, seconds / max(SECONDS_MIN, moved.seconds)))
        waited_s = min(moved.first_byte_s, seconds / 2) if known.since_begin else 0.0
        return seconds - waited_s, size

    def forget(self, node: int) -> None:
        """The node has gone; what comes back under its name may be another machine."""
        for source in [source for source in self._known if source.node == node]:
            del self._known[source]

    def kept(self, now: float) -> list[Kept]:
        """What is worth writing down."""
        return [
            Kept(
                source.node,
                source.tier,
                known.first_byte_s,
                known.pace,
                known.variance,
                max(0.0, now - known.at),
                known.failing,
            )
            for source, known in self._known.items()
            if not known.stranger
        ]

    def restore(self, kept: Iterable[Kept], now: float) -> int:
        """Take over what was written down; what makes no sense is left out. Returns how many."""
        count = 0
        for one in kept:
            numbers = (one.first_byte_s, one.pace_s, one.variance, one.age_s)
            if not all(math.isfinite(number) and number >= 0 for number in numbers) or one.pace_s == 0:
                continue
            if not 0 <= one.failing <= 1:
                continue
            try:
                tier = Tier(one.tier)
            except ValueError:
                continue
            known = self._of(Source(one.node, tier), now)
            known.first_byte_s, known.pace, known.variance = one.first_byte_s, one.pace_s, one.variance
            known.at = now - one.age_s
            known.failing, known.answered_at = one.failing, known.at
            known.stranger = False
            count += 1
        return count

    def _of(self, source: Source, now: float) -> _Known:
        known = self._known.get(source)
        if known is None:
            self._make_room()
            stranger = self._stranger(source)
            known = self._known[source] = _Known(stranger.first_byte_s, 1.0 / stranger.bytes_per_s, now)
        return known

    def _make_room(self) -> None:
        """The one longest without a transfer gives way; one that is being pulled from stays."""
        while len(self._known) >= SOURCES_MAX:
            idle = next((source for source, known in self._known.items() if known.in_flight == 0), None)
            if idle is None:
                return  # as many pulls as that are bounded elsewhere
            del self._known[idle]
