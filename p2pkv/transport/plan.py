"""From whom each block of a chain comes, how far it pays to pull, and why. Pure.

Blocks are dealt out in the order of the chain, each to the source that is expected to have it here first (list
scheduling, Graham 1966): four equal holders get every fourth block, one of a hundredth of their speed gets none, and
whatever arrives, arrives in about the order in which the engine can use it. A source is asked once, for all of its
blocks; what it takes until its first byte counts once.

How far: a request that pulls the first ``k`` blocks waits for them and computes the rest. The ``k`` with the least of
both is taken, if that is clearly less than computing everything. Estimates of uncertain sources count with their
spread, because a pull that is late costs the engine more than a prefill that was not needed; a block of a source that
fails one time in two is asked for twice.
"""

from __future__ import annotations

import enum
import heapq
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from p2pkv.types import Tier, mix64

SOURCES_MAX: Final = 8
"""Sources of one block that are considered, the quickest first: more add requests, not speed."""
ASK_S: Final = 0.0005
"""What one more request costs this node: a source that saves less than this is left in peace."""
SAVING_MIN: Final = 0.05
"""Of the time that computing takes: what pulling must save to be worth its risk."""


class Source(NamedTuple):
    """A place where a block can be had. ``node`` 0: this node's own tier."""

    node: int
    tier: Tier


class Prefill(NamedTuple):
    """What computing blocks takes the engine: the first of the chain ``block_s``, each further one ``more_s`` more than
    the one before it, because there is more to attend to. ``overhead_s``: what a pull costs it besides waiting."""

    block_s: float
    more_s: float = 0.0
    overhead_s: float = 0.0

    def of(self, first: int, last: int) -> float:
        """Seconds for the blocks from position ``first`` to before ``last``."""
        return (last - first) * self.block_s + self.more_s * (last * (last - 1) - first * (first - 1)) / 2


class Estimate(NamedTuple):
    """What is expected of a source now.

    ``busy_s``: until it gets to us, because of what it sends already. ``spread``: the standard deviation of its pace,
    as a fraction of it. ``setup_s``: until it can be asked at all, where we are not connected to it. ``failing``: the
    share of the blocks asked of it that it does not give, or gives wrong; less than 1.
    """

    first_byte_s: float
    bytes_per_s: float
    busy_s: float = 0.0
    spread: float = 0.0
    setup_s: float = 0.0
    failing: float = 0.0

    @property
    def times(self) -> float:
        """How much longer than expected it is to be reckoned with."""
        return (1.0 + self.spread) / (1.0 - self.failing)

    @property
    def start_s(self) -> float:
        """Until its first byte."""
        return self.setup_s + self.busy_s + self.first_byte_s


class Limit(enum.Enum):
    """Why a plan goes no further."""

    COMPLETE = "all blocks are in it"
    NOBODY = "nobody has the next block"
    RECOMPUTE = "computing the rest is quicker"
    DEADLINE = "the rest would be late"


class Run(NamedTuple):
    """Blocks that one source is asked for, ascending, and when the last of them is expected, in seconds from now."""

    source: Source
    positions: list[int]
    ends_s: float


class Plan(NamedTuple):
    """Pull the first ``stop`` blocks by these runs; compute the others.

    Seconds: until all of the runs are here; of computing what is left then (0 where that is not known); of computing
    everything instead (infinite where not known). ``ends_s``: per block, until it and all before it are here.
    """

    runs: list[Run]
    stop: int
    limit: Limit
    pull_s: float
    rest_s: float
    without_s: float
    ends_s: list[float]


def plan(
    sources: Sequence[Sequence[Source]],
    estimate: Callable[[Source], Estimate],
    *,
    block_bytes: int,
    deadline_s: float,
    prefill: Prefill | None = None,
    link_bytes_per_s: float = float("inf"),
    salt: int = 0,
) -> Plan:
    """Plan one chain.

    Args:
        sources: by block, who has it. The first block that nobody has ends the plan.
        estimate: of a source; asked once of each.
        deadline_s: from now; nothing is planned that would come later.
        prefill: what computing takes the engine; None: not known, so whatever can come is pulled.
        link_bytes_per_s: what this node can receive, of all sources together.
        salt: of this node, so that not all nodes ask the same few of many equal holders.
    """
    dealt = _deal(sources, _Sources(estimate, block_bytes, salt), block_bytes / link_bytes_per_s, deadline_s)
    stop, limit = len(dealt.ends_s), dealt.limit
    blocks = len(sources)
    without_s = float("inf")
    if prefill is not None:
        without_s = prefill.of(0, blocks)

        def with_s(k: int) -> float:
            return prefill.of(k, blocks) + (prefill.overhead_s + dealt.ends_s[k - 1] if k else 0.0)

        best = min(range(stop + 1), key=lambda k: (with_s(k), -k))
        if best and with_s(best) > without_s * (1.0 - SAVING_MIN):
            best = 0
        if best < stop:
            stop, limit = best, Limit.RECOMPUTE
    runs: dict[Source, list[int]] = {}
    for position in range(stop):
        runs.setdefault(dealt.chosen[position], []).append(position)
    return Plan(
        runs=[Run(source, positions, dealt.own_end_s[positions[-1]]) for source, positions in runs.items()],
        stop=stop,
        limit=limit,
        pull_s=dealt.ends_s[stop - 1] if stop else 0.0,
        rest_s=prefill.of(stop, blocks) if prefill is not None else 0.0,
        without_s=without_s,
        ends_s=dealt.ends_s[:stop],
    )


class _Sources:
    """Estimates as the dealing needs them, each asked once."""

    def __init__(self, estimate: Callable[[Source], Estimate], block_bytes: int, salt: int) -> None:
        self._estimate = estimate
        self._block_bytes = block_bytes
        self._salt = salt
        self._paces: dict[Source, tuple[float, float]] = {}
        self._sets: dict[tuple[Source, ...], list[Source]] = {}

    def pace(self, source: Source) -> tuple[float, float]:
        """Seconds before its first block begins, and of each block."""
        pace = self._paces.get(source)
        if pace is None:
            known = self._estimate(source)
            pace = known.start_s * known.times, self._block_bytes / known.bytes_per_s * known.times
            self._paces[source] = pace
        return pace

    def _order(self, source: Source) -> tuple[float, int, Tier]:
        return sum(self.pace(source)), mix64(source.node ^ self._salt), source.tier

    def best(self, sources: Sequence[Source]) -> list[Source]:
        """The quickest few of them; which ones they are is worked out once for all blocks that have the same."""
        name = tuple(sources)
        best = self._sets.get(name)
        if best is None:
            best = heapq.nsmallest(SOURCES_MAX, name, key=self._order)
            self._sets[name] = best
        return best


class _Dealt(NamedTuple):
    chosen: list[Source]
    own_end_s: list[float]  # when this block is here
    ends_s: list[float]  # when it and all before it are
    limit: Limit


def _deal(sources: Sequence[Sequence[Source]], known: _Sources, link_block_s: float, deadline_s: float) -> _Dealt:
    dealt = _Dealt([], [], [], Limit.COMPLETE)
    free_at: dict[Source, float] = {}
    latest = received = 0.0
    for holders in sources:
        if not holders:
            return dealt._replace(limit=Limit.NOBODY)
        end_s, chosen = float("inf"), None
        ask_s = ASK_S if free_at else 0.0
        for source in known.best(holders):
            start_s, block_s = known.pace(source)
            at = free_at.get(source, start_s + ask_s) + block_s
            if at < end_s:
                end_s, chosen = at, source
        if chosen is None:
            return dealt._replace(limit=Limit.DEADLINE)
        if chosen.node != 0:
            received += link_block_s
        if max(latest, end_s, received) > deadline_s:
            return dealt._replace(limit=Limit.DEADLINE)
        latest = max(latest, end_s, received)
        free_at[chosen] = end_s
        dealt.chosen.append(chosen)
        dealt.own_end_s.append(max(end_s, received))
        dealt.ends_s.append(latest)
    return dealt
