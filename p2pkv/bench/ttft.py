"""``p2pkv bench ttft``: time to first token with p2pkv against without it, over prompt lengths and link speeds.

Real engines: one computes each prompt first; then one beside an agent that can pull it, and one without p2pkv, are
asked for it, in random order. The holder's link is throttled. What nobody has is asked for, too.

Each prompt is new, so nothing is measured twice; what the agents have learnt of the link and the engine of itself stays
from point to point, as it does in life. So the first prompts after the link has changed are planned with what it was:
the very first is shown by itself, too.

Whether a point is asked more often is not up to its own luck: if one of a speed's points is near the limit, all of that
speed are asked again, slow or quick, and everything counts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, Protocol

from p2pkv.bench import report
from p2pkv.bench.progress import Progress
from p2pkv.bench.report import Claim, Report, Row, at_most, percentile, ratio, rounded

TOKENS: Final = (256, 512, 1024, 2048, 4096, 8192)
TOKENS_QUICK: Final = (256, 2048)
RATES: Final = (10e9, 1e9, 100e6, 30e6, 10e6)
RATES_QUICK: Final = (10e9, 10e6)
REPEATS: Final = 3
REPEATS_QUICK: Final = 2
DOUBT: Final = 0.95
MORE: Final = 4
MORE_LONG: Final = {4096: 2, 8192: 1}
"""A single pair differs by up to 5 % where nothing is pulled (14 pairs of one point: 0.97 to 1.06, medians 1.001),
so the worst of thirty medians of three says little. Where a speed of the link has a point above DOUBT, all its points
are asked MORE times more; those that take 17 and 45 s each, as often as half an hour for the whole run allows."""
COLD_TOKENS: Final = 1024
COLD: Final = 15
COLD_QUICK: Final = 3


class Asked(Protocol):
    """One prompt asked of both engines."""

    @property
    def with_s(self) -> float: ...
    @property
    def without_s(self) -> float: ...
    @property
    def from_peer_tokens(self) -> int: ...
    @property
    def right(self) -> bool: ...


class Scene(Protocol):
    """The engines. :class:`p2pkv.demo.ttft.Throttled` is one; this package knows no engine."""

    def set_rate(self, bits_per_s: float) -> None: ...
    def ask(self, tokens: int) -> Asked: ...
    def ask_cold(self, tokens: int) -> Asked: ...
    def questions_to_peers(self) -> int: ...


class Point(Row, frozen=True, kw_only=True):
    """One prompt length at one speed of the link (0: nobody has the prompts). Times are medians; ``pulled``: of the
    prompt's whole blocks, in all repeats together; ``worst``: of the repeats' own ratios; ``first``: the ratio of the
    first prompt after the link got this speed, at the point that it was of (it counts there, too)."""

    tokens: int
    mbit_s: float
    with_ms: float | None
    without_ms: float | None
    ratio: float | None
    worst: float | None
    first: float | None
    pulled: float
    repeats: int
    right: bool


def run(scene: Scene, *, quick: bool = False, progress: Progress | None = None) -> Report:
    """Measure all points: the link becomes slower step by step, and fast again at last."""
    progress = progress or Progress()
    lengths, rates = (TOKENS_QUICK, RATES_QUICK) if quick else (TOKENS, RATES)
    repeats = REPEATS_QUICK if quick else REPEATS
    rng = random.Random(0)
    asked: dict[tuple[int, float], list[Asked]] = {(tokens, rate): [] for rate in rates for tokens in lengths}
    first: dict[tuple[int, float], float] = {}
    done = 0
    for rate in rates:
        scene.set_rate(rate)
        for _ in range(repeats):
            for tokens in rng.sample(lengths, len(lengths)):
                pair = scene.ask(tokens)
                if not any(asked[each, rate] for each in lengths):
                    first[tokens, rate] = ratio(pair.with_s, pair.without_s)
                asked[tokens, rate].append(pair)
                done += 1
                progress.step("ttft", done, len(asked) * repeats)
        if not quick and any(in_doubt(asked[tokens, rate]) for tokens in lengths):
            progress.say(f"ttft: {rate / 1e6:.0f} Mb/s is near the limit: all of its prompts are asked more often")
            again = [tokens for tokens in lengths for _ in range(MORE_LONG.get(tokens, MORE))]
            for tokens in rng.sample(again, len(again)):
                asked[tokens, rate].append(scene.ask(tokens))
    scene.set_rate(rates[0])
    before = scene.questions_to_peers()
    cold = [scene.ask_cold(COLD_TOKENS) for _ in range(COLD_QUICK if quick else COLD)]
    questions = scene.questions_to_peers() - before
    points = [point(tokens, rate, some, first.get((tokens, rate))) for (tokens, rate), some in asked.items()]
    nobody = point(COLD_TOKENS, 0.0, cold)
    return report.make_report("ttft", [*points, nobody], claims_of(points, nobody, questions, rates[0]), quick=quick)


def in_doubt(asked: Sequence[Asked]) -> bool:
    """Whether a point may be on either side of the limit."""
    with_s, without_s = (percentile(times, 50) for times in zip(*((p.with_s, p.without_s) for p in asked), strict=True))
    return ratio(with_s, without_s) > DOUBT


def point(tokens: int, rate: float, asked: Sequence[Asked], first: float | None = None) -> Point:
    """One row."""
    with_s = percentile([each.with_s for each in asked], 50)
    without_s = percentile([each.without_s for each in asked], 50)
    return Point(
        tokens=tokens,
        mbit_s=rate / 1e6,
        with_ms=rounded(with_s * 1e3),
        without_ms=rounded(without_s * 1e3),
        ratio=rounded(ratio(with_s, without_s)),
        worst=rounded(max(ratio(each.with_s, each.without_s) for each in asked)),
        first=None if first is None else rounded(first),
        pulled=sum(each.from_peer_tokens for each in asked) / (tokens * len(asked)),
        repeats=len(asked),
        right=all(each.right for each in asked),
    )


def claims_of(points: Sequence[Point], nobody: Point, questions: int, fastest: float) -> list[Claim]:
    """Issue 5, done when 7 and 8."""
    slowest = max((point.ratio or float("nan") for point in points), default=float("nan"))
    corner = max((point for point in points if point.mbit_s == fastest / 1e6), key=lambda point: point.tokens)
    wrong = sum(not point.right for point in [*points, nobody])
    return [
        at_most("ttft.never_slower", slowest, 1.05, "x", "TTFT with p2pkv over without, medians, at the worst point"),
        at_most("ttft.fast_end", corner.ratio or float("nan"), 0.3, "x", "the same, longest prompt and fastest link"),
        at_most("ttft.cold_miss", nobody.ratio or float("nan"), 1.02, "x", "the same, where nobody has the prompt"),
        at_most("ttft.cold_miss_questions", questions, 0, "requests", "to peers, for prompts that nobody has"),
        at_most("ttft.wrong_answers", wrong, 0, "points", "at which an answer's tokens were not the same"),
    ]
