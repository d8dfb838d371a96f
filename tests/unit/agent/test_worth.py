"""Whether pulling pays, and until when."""

from __future__ import annotations

import itertools

import pytest

from p2pkv.agent.worth import HERE, LAG_SHARE, TRY_AGAIN_S, Worth, race_s
from p2pkv.transport.estimates import Moved
from p2pkv.transport.peers import Peers
from p2pkv.transport.plan import Estimate, Limit, Prefill, Source
from p2pkv.types import Tier

MIB = 1 << 20
PEER = Source(7, Tier.DRAM)
PREFILL = Prefill(0.1)


class Scene:
    def __init__(self, bytes_per_s: float = 1e9) -> None:
        self.now = 0.0
        self.tried: list[tuple[int, bytes]] = []
        self.prepared: list[int] = []
        self.setup_s = 0.0
        self.peers = Peers(
            lambda source: Estimate(0.001, bytes_per_s, spread=0.5),
            heard_at=lambda node: float("-inf"),
            clock=lambda: self.now,
            setup_s=lambda node: self.setup_s,
        )
        self.worth = Worth(
            self.peers, link_bytes_per_s=1e10, salt=1,
            try_one=lambda namespace, key: self.tried.append((namespace, key)),
            prepare=self.prepared.append, clock=lambda: self.now,
        )  # fmt: skip

    def learn(self, bytes_per_s: float) -> None:
        for _ in range(10):
            self.peers.began(PEER, 16 * MIB)
            self.peers.ended(PEER, 16 * MIB, Moved(0.001, 0.001 + 16 * MIB / bytes_per_s, 16 * MIB))

    def plan(self, sources: list[list[Source]], prefill: Prefill | None = PREFILL) -> object:
        planned = self.worth.plan(sources, block_bytes=MIB, prefill=prefill, deadline_s=60.0)
        self.worth.refuse(planned, 3, [bytes([i]) * 16 for i in range(len(sources))], sources)
        return planned


def test_a_fast_peer_is_worth_it_and_a_slow_one_is_not() -> None:
    scene = Scene()
    scene.learn(1e9)
    assert scene.plan([[PEER]] * 8).stop == 8  # type: ignore[attr-defined]
    scene.learn(1e6)
    planned = scene.plan([[PEER]] * 8)
    assert (planned.stop, planned.limit) == (0, Limit.RECOMPUTE)  # type: ignore[attr-defined]
    assert scene.worth.refused_blocks == 8


def test_what_is_here_is_taken_even_where_the_peers_blocks_behind_it_are_not_worth_it() -> None:
    scene = Scene()
    scene.learn(1e6)
    planned = scene.plan([[HERE]] * 4 + [[PEER]] * 4)
    assert planned.stop == 4  # type: ignore[attr-defined]


def test_a_pull_that_costs_the_engine_more_than_it_saves_is_not_worth_it() -> None:
    scene = Scene()
    scene.learn(1e9)
    assert scene.plan([[PEER]], Prefill(0.010)).stop == 1  # type: ignore[attr-defined]
    assert scene.plan([[PEER]], Prefill(0.010, overhead_s=0.012)).stop == 0  # type: ignore[attr-defined]


def test_who_is_about_to_be_asked_is_connected_to_and_nobody_else() -> None:
    scene = Scene()
    other = Source(8, Tier.DRAM)
    planned = scene.plan([[HERE], [PEER], [PEER, other]])
    scene.worth.promise(planned)  # type: ignore[arg-type]
    assert set(scene.prepared) == {run.source.node for run in planned.runs} - {0}  # type: ignore[attr-defined]
    assert scene.prepared
    scene.prepared.clear()
    scene.learn(1e6)
    scene.worth.promise(scene.plan([[PEER]] * 8))  # type: ignore[arg-type]
    assert scene.prepared == []


def test_a_source_that_must_be_connected_to_first_has_to_be_worth_that_too() -> None:
    scene = Scene()
    scene.learn(1e9)
    assert scene.plan([[PEER]] * 4, Prefill(0.02)).stop == 4  # type: ignore[attr-defined]
    scene.setup_s = 0.1
    assert scene.plan([[PEER]] * 4, Prefill(0.02)).stop == 0  # type: ignore[attr-defined]
    planned = scene.plan([[PEER]] * 4, Prefill(0.3))
    assert planned.stop == 4  # type: ignore[attr-defined]
    assert race_s(planned, 4, Prefill(0.3))[0] > 1.2 * scene.setup_s, "it is given the time"  # type: ignore[arg-type]


def test_without_a_pace_everything_is_pulled() -> None:
    scene = Scene()
    scene.learn(1e6)
    assert scene.plan([[PEER]] * 8, None).stop == 8  # type: ignore[attr-defined]


def test_a_source_that_was_not_worth_it_is_tried_with_one_block_when_that_is_long_ago() -> None:
    scene = Scene()
    scene.learn(1e6)
    scene.plan([[PEER]] * 8)
    assert scene.tried == [], "it has just been seen to be slow"
    scene.now += TRY_AGAIN_S + 1
    for _ in range(5):
        scene.plan([[PEER]] * 8)
    assert scene.tried == [(3, bytes(16))], "once"
    scene.now += TRY_AGAIN_S + 1
    scene.plan([[PEER]] * 8)
    assert len(scene.tried) == 2


def test_a_source_is_tried_again_where_the_beginning_of_the_chain_is_here() -> None:
    """As the block is that was tried last: else one wrong estimate would stay for ever."""
    scene = Scene()
    scene.learn(1e6)
    scene.now += TRY_AGAIN_S + 1
    scene.plan([[HERE]] * 2 + [[PEER]] * 6)
    assert scene.tried == [(3, bytes([2]) * 16)]
    scene.now += TRY_AGAIN_S + 1
    scene.plan([[HERE]] * 8)
    assert len(scene.tried) == 1, "there is nothing to try"


def test_a_peer_that_does_not_answer_is_not_planned_with() -> None:
    scene = Scene()
    scene.learn(1e9)
    scene.peers.silent(PEER.node)
    assert scene.plan([[PEER]] * 8).stop == 0  # type: ignore[attr-defined]


def test_a_pull_may_lag_a_twentieth_behind_the_prefill_that_it_replaces() -> None:
    scene = Scene()
    planned = scene.worth.plan([[PEER]] * 10, block_bytes=MIB, prefill=Prefill(1.0), deadline_s=60.0)
    until = race_s(planned, 10, Prefill(1.0))
    assert until[0] == pytest.approx(LAG_SHARE * 10)
    assert [b - a for a, b in itertools.pairwise(until)] == pytest.approx([1.0] * 9)


def test_it_may_be_half_as_late_again_as_planned() -> None:
    scene = Scene()
    scene.learn(2e7)
    planned = scene.worth.plan([[PEER]] * 10, block_bytes=MIB, prefill=PREFILL, deadline_s=60.0)
    until = race_s(planned, 10, PREFILL)
    assert planned.stop == 10 and all(late > 1.4 * end for late, end in zip(until, planned.ends_s, strict=True))
