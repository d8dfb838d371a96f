"""What the report on times to first token says, of made-up engines."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from p2pkv.bench import ttft
from p2pkv.bench.progress import Progress
from p2pkv.bench.ttft_plot import svg


@dataclass
class Asked:
    with_s: float
    without_s: float
    from_peer_tokens: int
    right: bool = True


class Scene:
    """Computing takes a millisecond for each token; pulling a bit for each token."""

    def __init__(
        self, *, slower: float = 0.0, slow_from: int = 0, first: float = 0.0, questions: int = 0, right: bool = True
    ) -> None:
        self.rates: list[float] = []
        self._slower, self._slow_from, self._first = slower, slow_from, first
        self._questions, self._right, self._changed = questions, right, False
        self._asked = 0

    def set_rate(self, bits_per_s: float) -> None:
        self.rates.append(bits_per_s)
        self._changed = True

    def ask(self, tokens: int) -> Asked:
        pulled = tokens * 1e5 / self.rates[-1]
        computed = tokens / 1000
        if self._changed and self._first:
            self._changed = False
            return Asked(computed * self._first, computed, 0, self._right)
        if pulled < computed:
            return Asked(pulled, computed, tokens, self._right)
        slower = self._slower if tokens >= self._slow_from else 0.0
        return Asked(computed * (1.0 + slower), computed, 0, self._right)

    def ask_cold(self, tokens: int) -> Asked:
        self._asked += self._questions
        return Asked(tokens / 1000, tokens / 1000, 0)

    def questions_to_peers(self) -> int:
        return self._asked


def points_of(scene: Scene, **options: bool) -> list[dict[str, Any]]:
    rows = msgspec.to_builtins(ttft.run(scene, progress=Progress(), **options))["rows"]
    return [row for row in rows if row["mbit_s"]]


@pytest.mark.parametrize("slower", [0.2, 0.0, -0.04])
def test_all_prompts_of_a_speed_near_the_limit_are_asked_more_often_the_quick_ones_too(slower: float) -> None:
    for rate in ttft.RATES:
        points = [p for p in points_of(Scene(slower=slower, slow_from=2048)) if p["mbit_s"] == rate / 1e6]
        near = any(p["ratio"] > ttft.DOUBT for p in points)
        assert near is (rate <= 1e8)
        more = {tokens: ttft.MORE_LONG.get(tokens, ttft.MORE) if near else 0 for tokens in ttft.TOKENS}
        assert {p["tokens"]: p["repeats"] for p in points} == {t: ttft.REPEATS + more[t] for t in ttft.TOKENS}


def test_a_point_that_is_slow_stays_slow_however_often_it_is_asked() -> None:
    report = ttft.run(Scene(slower=0.2), progress=Progress())
    assert {claim.id for claim in report.claims if not claim.ok} == {"ttft.never_slower"}


def test_the_first_prompt_after_each_change_of_the_link_is_shown_by_itself() -> None:
    scene = Scene(first=3.0)
    points = points_of(scene, quick=True)
    for rate in ttft.RATES_QUICK:
        first = [p["first"] for p in points if p["mbit_s"] == rate / 1e6 and p["first"] is not None]
        assert first == [pytest.approx(3.0)]
    assert max(p["worst"] for p in points) == pytest.approx(3.0)


def claims(scene: Scene) -> dict[str, bool]:
    return {claim.id: claim.ok for claim in ttft.run(scene, quick=True, progress=Progress()).claims}


def test_every_point_is_measured_and_its_medians_are_compared() -> None:
    scene = Scene()
    report = ttft.run(scene, quick=True, progress=Progress())
    assert scene.rates == [*ttft.RATES_QUICK, ttft.RATES_QUICK[0]]
    points = msgspec.to_builtins(report)["rows"]
    assert len(points) == len(ttft.TOKENS_QUICK) * len(ttft.RATES_QUICK) + 1
    fast, slow = ([p for p in points if p["mbit_s"] == rate / 1e6] for rate in ttft.RATES_QUICK)
    assert [p["ratio"] for p in fast] == pytest.approx([0.01] * len(fast)) and {p["pulled"] for p in fast} == {1.0}
    assert {p["ratio"] for p in slow} == {1.0} and {p["pulled"] for p in slow} == {0.0}
    assert report.ok


@pytest.mark.parametrize(
    ("scene", "broken"),
    [
        (Scene(slower=0.2), "ttft.never_slower"),
        (Scene(questions=1), "ttft.cold_miss_questions"),
        (Scene(right=False), "ttft.wrong_answers"),
    ],
)
def test_a_promise_that_is_broken_shows(scene: Scene, broken: str) -> None:
    assert [name for name, ok in claims(scene).items() if not ok] == [broken]


def test_the_plot_has_a_line_for_each_speed() -> None:
    rows = msgspec.to_builtins(ttft.run(Scene(), quick=True, progress=Progress()))["rows"]
    drawn = ElementTree.fromstring(svg(rows))
    lines = [each for each in drawn.iter() if each.tag.endswith("polyline")]
    assert len(lines) == len(ttft.RATES_QUICK)
    texts = [each.text for each in drawn.iter() if each.tag.endswith("text")]
    assert "10 Gb/s" in texts and "10 Mb/s" in texts and "256" in texts
