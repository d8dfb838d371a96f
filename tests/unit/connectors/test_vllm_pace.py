"""What an engine's blocks take, learnt from when requests are scheduled and when their blocks are offered."""

from __future__ import annotations

import random

import pytest

from p2pkv.connectors._vllm_pace import REQUESTS_MAX, PrefillPace
from p2pkv.wire.engine_types import Pace


class Engine:
    """Computes one request at a time: block ``i`` takes ``first_s + i * more_s``."""

    def __init__(self, first_s: float, more_s: float, noise: float = 0.0) -> None:
        self.pace = PrefillPace()
        self.now = 100.0
        self._first_s, self._more_s = first_s, more_s
        self._rng = random.Random(0)
        self._noise = noise
        self._requests = 0

    def takes(self, first: int, last: int) -> float:
        return sum(self._first_s + i * self._more_s for i in range(first, last))

    def prefill(self, blocks: int, chunk: int = 1000, first: int = 0) -> None:
        """In chunks of so many blocks, as schedulers do; each is offered in the step after it was computed."""
        self._requests += 1
        name = f"r{self._requests}"
        self.pace.stepped(self.now)
        self.pace.scheduled(name, self.now)
        for begin in range(first, blocks, chunk):
            end = min(blocks, begin + chunk)
            self.now += self.takes(begin, end) * (1.0 + self._noise * (2 * self._rng.random() - 1))
            self.pace.stepped(self.now)
            self.pace.computed(name, begin, end - begin, self.now + 0.004)
        self.now += 0.016
        self.pace.stepped(self.now)
        self.pace.finished(name)
        self.now += 1.0

    def says(self, first: int, last: int) -> float:
        pace = self.pace.of(first)
        return sum(pace.block_us / 1e6 + i * pace.more_ns / 1e9 for i in range(last - first))


def test_nothing_is_known_before_something_was_computed() -> None:
    engine = Engine(0.1, 0.0)
    assert engine.pace.of(0) == Pace()
    engine.prefill(4)
    assert engine.pace.of(0) == Pace(), "one sample is none"


@pytest.mark.parametrize("chunk", [1000, 8])
@pytest.mark.parametrize(("first_s", "more_s"), [(0.1, 0.0), (0.1, 0.01), (0.0005, 0.00001)])
def test_the_line_is_found(first_s: float, more_s: float, chunk: int) -> None:
    engine = Engine(first_s, more_s)
    for blocks in (1, 2, 4, 8, 16, 32, 3, 20):
        engine.prefill(blocks, chunk)
    for first, last in ((0, 1), (0, 8), (0, 32), (16, 32), (31, 32)):
        assert engine.says(first, last) == pytest.approx(engine.takes(first, last), rel=0.02, abs=1e-5)


def test_prompts_of_one_length_give_their_own_pace() -> None:
    engine = Engine(0.1, 0.01, noise=0.1)
    for _ in range(20):
        engine.prefill(8)
    assert engine.says(0, 8) == pytest.approx(engine.takes(0, 8), rel=0.1)


def test_what_was_cached_before_is_not_counted_as_computed() -> None:
    engine = Engine(0.1, 0.01)
    for blocks, first in ((8, 0), (32, 24), (16, 0), (20, 12)):
        engine.prefill(blocks, first=first)
    assert engine.says(0, 16) == pytest.approx(engine.takes(0, 16), rel=0.05)


def test_another_load_is_learnt_and_the_old_one_forgotten() -> None:
    engine = Engine(0.1, 0.0)
    for _ in range(30):
        engine.prefill(4)
    engine._first_s = 0.5
    for _ in range(30):
        engine.prefill(4)
    assert engine.says(0, 4) == pytest.approx(2.0, rel=0.1)


def test_the_slope_never_makes_a_block_free_or_cheaper_than_one_before_it() -> None:
    engine = Engine(0.1, 0.0, noise=0.9)
    for blocks in (1, 30, 2, 20, 5, 1, 30):
        engine.prefill(blocks)
        pace = engine.pace.of(0)
        assert pace == Pace() or (pace.block_us > 0 and pace.more_ns >= 0)


def test_what_passes_between_a_load_and_the_step_that_goes_on_is_overhead() -> None:
    engine = Engine(0.1, 0.0)
    for _ in range(40):
        engine.pace.loaded("x", engine.now)
        engine.now += 0.03
        engine.pace.scheduled("x", engine.now)
        engine.prefill(4)
    assert engine.pace.of(0).overhead_us == pytest.approx(30_000, rel=0.05)


def waited(engine: Engine, seconds: float) -> None:
    """A load is over, and its request goes on so much later."""
    engine.pace.loaded("x", engine.now)
    engine.now += seconds
    engine.pace.scheduled("x", engine.now)
    engine.prefill(4)


def test_a_request_that_waited_for_room_after_its_load_says_little_of_what_loads_cost() -> None:
    engine = Engine(0.1, 0.0)
    for _ in range(10):
        waited(engine, 0.02)
    waited(engine, 30.0)
    assert engine.pace.of(0).overhead_us < 50_000
    for _ in range(50):
        waited(engine, 30.0)
    assert engine.pace.of(0).overhead_us <= 500_000


def test_a_first_request_that_waited_for_room_does_not_keep_loads_away() -> None:
    engine = Engine(0.1, 0.0)
    waited(engine, 30.0)
    engine.prefill(4)
    assert engine.pace.of(0).overhead_us < 50_000


def test_what_loads_cost_is_forgotten_with_time_and_not_with_loads_only() -> None:
    engine = Engine(0.1, 0.0)
    for _ in range(50):
        waited(engine, 0.3)
    assert engine.pace.of(0).overhead_us == pytest.approx(300_000, rel=0.05)
    engine.now += 3_600.0
    engine.pace.stepped(engine.now)
    assert engine.pace.of(0).overhead_us == pytest.approx(5_000, rel=0.05), "no load was tried meanwhile"


def test_requests_that_never_end_are_forgotten() -> None:
    pace = PrefillPace()
    for i in range(2 * REQUESTS_MAX):
        pace.scheduled(f"r{i}", 0.0)
        pace.loaded(f"r{i}", 0.0)
    assert len(pace._begun) == len(pace._loaded) == REQUESTS_MAX
