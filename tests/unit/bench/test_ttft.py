"""What the report on times to first token says, of made-up engines."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass

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

    def __init__(self, *, slower: float = 0.0, questions: int = 0, right: bool = True) -> None:
        self.rates: list[float] = []
        self._slower, self._questions, self._right = slower, questions, right
        self._asked = 0

    def set_rate(self, bits_per_s: float) -> None:
        self.rates.append(bits_per_s)

    def ask(self, tokens: int) -> Asked:
        pulled = tokens * 1e5 / self.rates[-1]
        computed = tokens / 1000
        if pulled < computed:
            return Asked(pulled, computed, tokens, self._right)
        return Asked(computed * (1.0 + self._slower), computed, 0, self._right)

    def ask_cold(self, tokens: int) -> Asked:
        self._asked += self._questions
        return Asked(tokens / 1000, tokens / 1000, 0)

    def questions_to_peers(self) -> int:
        return self._asked


def test_points_that_look_slow_are_asked_more_often_and_stay_slow_if_they_are() -> None:
    report = ttft.run(Scene(slower=0.2), progress=Progress())
    points = [p for p in msgspec.to_builtins(report)["rows"] if p["mbit_s"]]
    assert {p["repeats"] for p in points if p["ratio"] > 1.0} == {ttft.REPEATS + ttft.MORE}
    assert {p["repeats"] for p in points if p["ratio"] <= 1.0} == {ttft.REPEATS}
    assert {claim.id for claim in report.claims if not claim.ok} == {"ttft.never_slower"}


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
