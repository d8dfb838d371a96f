"""``p2pkv bench busy``: what a pull costs when the engine that computed the blocks is busy, stopped or dead.

Two real engines, each beside an agent. The first computes prompts; the second is asked for them, and pulls them from
the first one's agent: while that engine is idle, while it is inside one long prefill, when it stands still, and when it
is gone. Idle is measured before and after busy, so that a drift of the machine shows up as noise, not as a result.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final, Protocol

from p2pkv.bench import report
from p2pkv.bench.progress import Progress
from p2pkv.bench.report import Claim, Report, Row, at_least, at_most, percentile, ratio

PROMPT_TOKENS: Final = 4_096
PULLS: Final = 6
PULLS_QUICK: Final = 2
TTFT_RATIO_MAX: Final = 1.5
SHARE_MIN: Final = 0.95
PHASES: Final = ("idle", "busy", "stopped", "dead")


class Pulled(Protocol):
    """One prompt of the source's, asked of the reader."""

    @property
    def ttft_s(self) -> float: ...
    @property
    def prompt_tokens(self) -> int: ...
    @property
    def from_peer_tokens(self) -> int: ...
    @property
    def right(self) -> bool: ...


class Scene(Protocol):
    """The engines. :class:`p2pkv.demo.busy.BusySource` is one; this package knows no engine."""

    def fill(self, prompts: int) -> None: ...
    def pull(self) -> Pulled: ...
    def busy(self) -> AbstractContextManager[None]: ...
    def rest(self) -> None: ...
    def stop(self) -> None: ...
    def kill(self) -> None: ...


class BusyPull(Row, frozen=True, kw_only=True):
    """One pull. ``source``: what the engine that had computed the blocks was doing."""

    source: str
    prompt_tokens: int
    ttft_ms: float | None
    from_peer_tokens: int
    tokens_right: bool


def run(scene: Scene, *, quick: bool = False, progress: Progress | None = None) -> Report:
    """Measure; the scene's source is dead afterwards."""
    progress = progress or Progress()
    count = PULLS_QUICK if quick else PULLS
    half = count // 2
    scene.fill(2 * count + 2)
    rows: list[BusyPull] = []

    def pull(source: str, times: int) -> None:
        for _ in range(times):
            rows.append(row_of(source, scene.pull()))
            progress.step("pulls", len(rows), 2 * count + 2)

    pull("idle", half)
    with scene.busy():
        pull("busy", count)
    scene.rest()
    pull("idle", count - half)
    scene.stop()
    pull("stopped", 1)
    scene.kill()
    pull("dead", 1)
    return report.make_report("busy", rows, claims_of(rows), quick=quick)


def row_of(source: str, pulled: Pulled) -> BusyPull:
    """One pull, as it is reported."""
    return BusyPull(
        source=source,
        prompt_tokens=pulled.prompt_tokens,
        ttft_ms=report.rounded(pulled.ttft_s * 1e3),
        from_peer_tokens=pulled.from_peer_tokens,
        tokens_right=pulled.right,
    )


def claims_of(rows: list[BusyPull]) -> list[Claim]:
    """Issue 2, point 7."""
    ttft = {
        source: percentile([row.ttft_ms or float("nan") for row in rows if row.source == source], 50)
        for source in PHASES
    }
    share = {
        source: min((row.from_peer_tokens / row.prompt_tokens for row in rows if row.source == source), default=0.0)
        for source in PHASES
    }
    what = "TTFT of a pull while the source's engine prefills, over that while it is idle; medians"
    return [
        at_most("busy.ttft_over_idle", ratio(ttft["busy"], ttft["idle"]), TTFT_RATIO_MAX, "x", what),
        *(
            at_least(
                f"busy.{source}.pulled", share[source], SHARE_MIN, "of the prefix", "what came from the peer, least"
            )
            for source in PHASES
        ),
        at_most("busy.wrong_answers", sum(not row.tokens_right for row in rows), 0, "answers", "of all pulls"),
    ]
