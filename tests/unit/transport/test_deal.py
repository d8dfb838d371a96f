"""A fetch over made-up links under virtual time: how long it takes beside what the links could do together."""

from __future__ import annotations

import heapq
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv.transport.deal import CALLED_OFF_MAX, TRIES_MAX, Deal, Piece
from p2pkv.transport.estimates import STRANGER_SPREAD, Estimates, Moved
from p2pkv.transport.plan import Estimate, Source
from p2pkv.types import Tier

MIB = 1 << 20
GIGABIT = 125e6
A, B, C, D = (Source(node, Tier.DRAM) for node in (1, 2, 3, 4))
FIRST_BYTE_S = 0.001
STRANGER = Estimate(0.001, 1.25e9, spread=STRANGER_SPREAD)  # ten times what the links here give


class Link:
    """One source's link: its speed, and when it stops for good, silently or not."""

    def __init__(self, bytes_per_s: float, *, stops_at: float = math.inf, noticed_s: float = 0.1) -> None:
        self.bytes_per_s = bytes_per_s
        self.stops_at = stops_at
        self.noticed_s = noticed_s


class Run:
    """Runs a deal to its end; ``asked`` names every piece, ``landed_at`` when each block came."""

    def __init__(self, links: dict[Source, Link], holders: list[list[Source]], block_bytes: int = MIB) -> None:
        self.links = links
        self.estimates = Estimates(lambda source: STRANGER)
        self.now = 0.0
        self.deal = Deal(
            lambda source: self.estimates.of(source, self.now),
            block_bytes=block_bytes,
            piece_bytes_max=lambda: 256 * MIB,
        )
        self.block_bytes = block_bytes
        self.holders = holders
        self.landed_at: dict[int, float] = {}
        self.hopeless: set[int] = set()
        self.asked: list[tuple[Source, list[int]]] = []
        self._events: list[tuple[float, int, str, Piece, int]] = []
        self._count = itertools.count()
        self._over: set[Piece] = set()
        for position, sources in enumerate(holders):
            self.deal.offer(position, sources)

    def _at(self, when: float, what: str, piece: Piece, position: int = -1) -> None:
        heapq.heappush(self._events, (when, next(self._count), what, piece, position))

    def _ask(self, piece: Piece) -> None:
        self.deal.asked(piece)
        self.asked.append((piece.source, list(piece.positions)))
        self.estimates.begin(piece.source, len(piece.positions) * self.block_bytes, self.now)
        link = self.links[piece.source]
        when = self.now + FIRST_BYTE_S
        for position in piece.positions:
            when += self.block_bytes / link.bytes_per_s
            if when > link.stops_at:
                self._at(max(self.now, link.stops_at) + link.noticed_s, "broke", piece)
                return
            self._at(when, "landed", piece, position)
        self._at(when, "ended", piece)

    def _end(self, piece: Piece, *, down: bool = False, called_off: bool = False) -> None:
        self._over.add(piece)
        moved = (len(piece.positions) - len(piece.left)) * self.block_bytes
        left = len(piece.left) * self.block_bytes
        for position in list(piece.left):
            (self.deal.called_off if called_off else self.deal.failed)(piece, position)
        self.deal.ended(piece)
        if down:
            self.deal.exclude(piece.source.node)
        took = self.now - piece.asked_at
        self.estimates.end(piece.source, left, Moved(FIRST_BYTE_S, took, moved or self.block_bytes // 2), self.now)

    def to_end(self) -> float:
        for _ in range(100_000):
            for position in self.deal.hopeless():
                self.hopeless.add(position)
                self.deal.withdraw(position)
            while (piece := self.deal.next(self.now)) is not None:
                self._ask(piece)
            for piece in self.deal.late(self.now):
                self._end(piece, called_off=True)
            while (piece := self.deal.next(self.now)) is not None:
                self._ask(piece)
            if len(self.landed_at) + len(self.hopeless) == len(self.holders):
                return max(self.landed_at.values(), default=0.0)
            while self._events and self._events[0][3] in self._over:
                heapq.heappop(self._events)
            wake = self.deal.wake_at(self.now)
            if self._events and self._events[0][0] <= wake:
                self.now, _, what, piece, position = heapq.heappop(self._events)
                if what == "landed":
                    assert position not in self.landed_at, "a block has one writer"
                    self.landed_at[position] = self.now
                    self.estimates.landed(piece.source, self.block_bytes)
                    self.deal.landed(piece, position, self.now)
                else:
                    self._end(piece, down=what == "broke")
            else:
                assert wake < math.inf, "nothing is under way, and something is missing"
                self.now = wake
        raise AssertionError("it does not end")


BLOCKS = 256
ONE_S = BLOCKS * MIB / GIGABIT


def run(links: dict[Source, Link], blocks: int = BLOCKS) -> Run:
    return Run(links, [list(links)] * blocks)


def test_four_equal_holders_are_almost_four_times_as_fast_as_one() -> None:
    one = run({A: Link(GIGABIT)}).to_end()
    four = run({source: Link(GIGABIT) for source in (A, B, C, D)}).to_end()
    assert one == pytest.approx(ONE_S, rel=0.02)
    assert one / four > 3.8


def test_what_comes_comes_in_about_the_order_of_the_chain() -> None:
    done = run({source: Link(GIGABIT) for source in (A, B, C, D)})
    took = done.to_end()
    early = max(done.landed_at[position] for position in range(BLOCKS // 4))
    assert early < 0.4 * took


@pytest.mark.parametrize(
    "bad",
    [
        Link(GIGABIT / 100),
        Link(GIGABIT, stops_at=0.0, noticed_s=0.1),
        Link(GIGABIT, stops_at=0.2, noticed_s=0.1),
        Link(GIGABIT, stops_at=0.2, noticed_s=0.5),
        Link(GIGABIT, stops_at=0.45, noticed_s=0.5),
    ],
    ids=["a hundredth of the speed", "dead before", "killed", "silent", "silent near the end"],
)
def test_one_bad_holder_of_four_costs_little_beside_the_other_three_alone(bad: Link) -> None:
    three = run({source: Link(GIGABIT) for source in (A, B, C)}).to_end()
    done = run({source: Link(GIGABIT) for source in (A, B, C)} | {D: bad})
    assert done.to_end() < 1.2 * three
    assert not done.hopeless


def test_unequal_links_give_what_they_can_together() -> None:
    speeds = {A: GIGABIT, B: GIGABIT / 2, C: GIGABIT / 4, D: GIGABIT / 8}
    took = run({source: Link(speed) for source, speed in speeds.items()}).to_end()
    assert took < 1.15 * BLOCKS * MIB / sum(speeds.values())


def test_a_single_slow_holder_is_not_given_up_for_its_slowness() -> None:
    done = run({A: Link(GIGABIT / 1000)}, blocks=8)
    done.to_end()
    assert len(done.asked) == 1 and len(done.landed_at) == 8


def test_a_small_request_is_one_question_however_many_have_it() -> None:
    done = Run({source: Link(1.25e9) for source in (A, B, C, D)}, [[A, B, C, D]] * 4, block_bytes=64 << 10)
    done.to_end()
    assert len(done.asked) == 1


def test_a_long_request_is_dealt_out_by_horizons() -> None:
    done = Run({A: Link(1.25e9), B: Link(1.25e9)}, [[A, B]] * 5000, block_bytes=64 << 10)
    took = done.to_end()
    assert len(done.landed_at) == 5000
    assert took < 1.15 * 5000 * (64 << 10) / 2.5e9


def test_blocks_that_only_the_slow_one_has_come_from_it_and_the_others_do_not() -> None:
    links = {A: Link(GIGABIT), B: Link(GIGABIT / 20)}
    done = Run(links, [[B]] * 4 + [[A, B]] * 60)
    took = done.to_end()
    alone = 4 * MIB / (GIGABIT / 20)
    assert took < 1.3 * max(alone, 60 * MIB / GIGABIT)


def test_being_slow_is_no_failure_and_whoever_is_slow_is_asked_again_when_nobody_is_left() -> None:
    """Three that are all slower than was thought take a block from each other, and the fourth is dead."""
    links = {source: Link(1e5) for source in (A, B, C)} | {D: Link(1e5, stops_at=0.0)}
    done = Run(links, [[D, A], [A, B, C, D]])
    done.to_end()
    assert set(done.landed_at) == {0, 1}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_links_do_every_block_lands_once_or_is_given_up_after_its_tries(data: st.DataObject) -> None:
    speeds = st.floats(1e5, 1e10)
    links = {
        source: Link(
            data.draw(speeds), stops_at=data.draw(st.one_of(st.just(math.inf), st.floats(0, 2))), noticed_s=0.1
        )
        for source in (A, B, C, D)[: data.draw(st.integers(1, 4))]
    }
    holders = data.draw(st.lists(st.lists(st.sampled_from(list(links)), unique=True), max_size=40))
    done = Run(links, holders)
    done.to_end()
    asked: dict[int, list[Source]] = {}
    for source, positions in done.asked:
        for position in positions:
            assert source in holders[position]
            asked.setdefault(position, []).append(source)
    for position, sources in enumerate(holders):
        assert (position in done.landed_at) != (position in done.hopeless)
        assert len(asked.get(position, [])) <= TRIES_MAX + CALLED_OFF_MAX
        if any(links[source].stops_at == math.inf for source in sources):
            assert position in done.landed_at
