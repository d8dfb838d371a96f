"""Why a prompt would be pulled from where, and how far: the plan of ``/v1/plan`` and ``p2pkv explain``, in words and
figures. The same plan that is made for engines; nothing is pulled for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from p2pkv.agent.http_types import PlanAnswer, PlanRun, PlanSource
from p2pkv.agent.worth import PLAN_BLOCKS_MAX
from p2pkv.transport.plan import Limit, Plan, Prefill, Source
from p2pkv.types import Layout, NodeId

if TYPE_CHECKING:
    from p2pkv.agent.daemon import Agent


def explain(agent: Agent, asked: Iterable[tuple[Layout, list[bytes]]], *, prefill_ms: float | None) -> list[PlanAnswer]:
    """One plan per layout that a prompt can have here."""
    service = agent.service
    answers = []
    for layout, hashes in asked:
        prefill = service.paces.get(layout.namespace) if prefill_ms is None else Prefill(prefill_ms / 1e3)
        sources = service.sources(layout.namespace, hashes[:PLAN_BLOCKS_MAX])
        assert service.worth is not None
        planned = service.worth.plan(sources, block_bytes=layout.block_bytes, prefill=prefill, deadline_s=math.inf)
        answers.append(_answer(agent, layout, len(hashes), sources, planned, prefill))
    return answers


def _answer(
    agent: Agent,
    layout: Layout,
    blocks: int,
    sources: Sequence[Sequence[Source]],
    planned: Plan,
    prefill: Prefill | None,
) -> PlanAnswer:
    return PlanAnswer(
        namespace=f"{layout.namespace:016x}",
        blocks=blocks,
        block_bytes=layout.block_bytes,
        block_tokens=layout.block_tokens,
        stop=planned.stop,
        why=_why(planned, blocks, sources, prefill),
        pull_ms=planned.pull_s * 1e3,
        rest_ms=None if prefill is None else planned.rest_s * 1e3,
        without_ms=None if prefill is None else planned.without_s * 1e3,
        runs=[
            PlanRun(
                node=_name(agent, run.source),
                me=run.source.node == 0,
                tier=run.source.tier.name.lower(),
                first=run.positions[0],
                blocks=len(run.positions),
                ends_ms=run.ends_s * 1e3,
            )
            for run in sorted(planned.runs, key=lambda run: run.positions[0])
        ],
        sources=[_source(agent, source, blocks) for source, blocks in _counted(sources)],
    )


def _counted(sources: Sequence[Sequence[Source]]) -> list[tuple[Source, int]]:
    """Everybody who has some of it, whoever has most first."""
    return Counter(source for each in sources for source in each).most_common()


def _source(agent: Agent, source: Source, blocks: int) -> PlanSource:
    peers, worth = agent.sources.peers, agent.service.worth
    assert worth is not None
    known = worth.estimate(source)
    age_s = 0.0 if source.node == 0 else peers.age_s(source)
    return PlanSource(
        node=_name(agent, source),
        tier=source.tier.name.lower(),
        blocks=blocks,
        bytes_per_s=known.bytes_per_s,
        first_byte_ms=known.first_byte_s * 1e3,
        busy_ms=known.busy_s * 1e3,
        setup_ms=known.setup_s * 1e3,
        spread=known.spread,
        failing=known.failing,
        age_s=None if math.isinf(age_s) else age_s,
        answers=source.node == 0 or peers.usable(source.node),
    )


def _why(planned: Plan, blocks: int, sources: Sequence[Sequence[Source]], prefill: Prefill | None) -> str:
    if planned.limit is Limit.NOBODY and planned.stop < len(sources) and sources[planned.stop]:
        return "who has the next block does not answer now"
    if planned.limit is Limit.COMPLETE and blocks > len(sources):
        return f"the first {len(sources)} blocks are in it; a plan looks no further, and what is behind them comes, too"
    if planned.limit is Limit.COMPLETE and prefill is None:
        return "all blocks are in it; what computing them would take is not known"
    return planned.limit.value


def _name(agent: Agent, source: Source) -> str:
    return str(NodeId(source.node or agent.node))
