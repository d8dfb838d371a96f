"""Whether pulling pays: plans of chains for engines that say what computing a block takes them, and for people who ask.

Two questions, both answered from this node's own index and estimates, without any network:

* Before: how far does it pay to pull? (:meth:`Worth.plan`) Blocks beyond that are answered as misses.
* Meanwhile: until when may the first block that is still missing come? (:func:`race_s`) A pull races against the
  prefill that it replaces. It may be as late as was planned, and half as late again; and it may lag behind the prefill
  by a twentieth of all of it. So an estimate that was wrong costs about that, and a good one is not given up early.

What was not worth it is looked at again: the estimates of sources that nothing comes from grow old, and a single block
is then pulled in the background, to see.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final

from p2pkv.transport.peers import Peers
from p2pkv.transport.plan import Estimate, Limit, Plan, Prefill, Source, plan
from p2pkv.types import Tier

HERE: Final = Source(0, Tier.DRAM)
HERE_ESTIMATE: Final = Estimate(first_byte_s=0.0003, bytes_per_s=5e9)
"""A copy within this host."""
LAG_SHARE: Final = 0.05
LATE_FACTOR: Final = 1.5
LATE_S: Final = 0.005
TRY_AGAIN_S: Final = 15.0
TRIED_MAX: Final = 8_192
PREPARE_MAX: Final = 8
"""Sources of one plan that are connected to ahead."""
PLAN_BLOCKS_MAX: Final = 4_096
"""Of one plan: some 5 ms of the event loop. Longer chains are planned as far as that."""


def race_s(planned: Plan, blocks: int, prefill: Prefill) -> list[float]:
    """Until when, from now, each of a chain's blocks may come."""
    lag_s = LAG_SHARE * prefill.of(0, blocks)
    last_s = planned.ends_s[-1] if planned.ends_s else 0.0
    out = []
    for position in range(blocks):
        expected_s = planned.ends_s[position] if position < len(planned.ends_s) else last_s
        out.append(max(prefill.of(0, position) + lag_s, LATE_FACTOR * expected_s + LATE_S))
    return out


class Worth:
    """See the module's docstring. On the event loop's thread.

    Args:
        try_one: pulls one block (namespace, hash) in the background.
        prepare: connects to a node in the background, if we are not.
    """

    def __init__(
        self,
        peers: Peers,
        *,
        link_bytes_per_s: float,
        salt: int,
        try_one: Callable[[int, bytes], None],
        prepare: Callable[[int], None] = lambda node: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peers = peers
        self._link_bytes_per_s = link_bytes_per_s
        self._salt = salt
        self._try_one = try_one
        self._prepare = prepare
        self._clock = clock
        self._tried: OrderedDict[Source, float] = OrderedDict()
        self.refused_blocks = 0
        """Blocks that a peer has and that were not worth pulling."""

    def estimate(self, source: Source) -> Estimate:
        """Of a peer, or of this node's own memory."""
        return HERE_ESTIMATE if source.node == 0 else self._peers.estimate(source)

    def plan(
        self, sources: Sequence[Sequence[Source]], *, block_bytes: int, prefill: Prefill | None, deadline_s: float
    ) -> Plan:
        """From whom each block of a chain would come, and how far that pays; peers that do not answer are left out."""
        usable = self._peers.usable
        some = [[s for s in each if s.node == 0 or usable(s.node)] for each in sources[:PLAN_BLOCKS_MAX]]
        return plan(
            some,
            self.estimate,
            block_bytes=max(1, block_bytes),
            deadline_s=deadline_s,
            prefill=prefill,
            link_bytes_per_s=self._link_bytes_per_s,
            salt=self._salt,
        )

    def promise(self, planned: Plan) -> None:
        """An engine is told that so much will be pulled, and is about to ask for it."""
        for run in planned.runs[:PREPARE_MAX]:
            if run.source.node:
                self._prepare(run.source.node)

    def refuse(
        self, planned: Plan, namespace: int, hashes: Sequence[bytes], sources: Sequence[Sequence[Source]]
    ) -> None:
        """The rest of a chain is computed though peers have it: count, and see whether that is still right."""
        if planned.limit is not Limit.RECOMPUTE:
            return
        self.refused_blocks += sum(any(source.node for source in each) for each in sources[planned.stop :])
        if any(run.source.node for run in planned.runs):
            return  # what is pulled shows how they are now
        first = planned.stop  # before it is what is here
        if first < len(sources) and sources[first]:
            best = min(sources[first], key=lambda source: 1.0 / self.estimate(source).bytes_per_s)
            if self._may_try(best):
                self._try_one(namespace, hashes[first])

    def _may_try(self, source: Source) -> bool:
        now = self._clock()
        if source.node == 0 or self._peers.age_s(source) < TRY_AGAIN_S:
            return False
        if now - self._tried.get(source, -TRY_AGAIN_S) < TRY_AGAIN_S:
            return False
        self._tried[source] = now
        self._tried.move_to_end(source)
        if len(self._tried) > TRIED_MAX:
            self._tried.popitem(last=False)
        return True
