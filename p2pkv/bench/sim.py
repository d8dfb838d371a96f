"""``p2pkv sim``: a cell of any size under virtual time, in the protocol core that ships.

The scenario is a value (:class:`Scenario`), so that the report carries it and ``--replay`` runs it again: the same
scenario gives the same bytes, which ``trace`` proves. A large cell keeps the checksum of every set instead of the set
(a wrong view shows in it all the same), and no replay windows; whole sets and windows are for small ones, and for the
chaos (:func:`run_chaos`).
"""

from __future__ import annotations

import random
import time
from typing import Final

import msgspec

from p2pkv.bench import report
from p2pkv.bench.progress import Progress
from p2pkv.bench.report import Claim, Report, Row, at_least, at_most, percentile
from p2pkv.errors import InvalidArgument
from p2pkv.gossip._gossip import Simulation, chaos

WHOLE_SETS_MOST: Final = 64
"""Nodes; beyond it, a thousand nodes would keep a thousand sets each."""
STEP_S: Final = 0.25
JOIN_MOST_S: Final = 60.0
CRASH_EVERY_S: Final = 10.0
STALL_EVERY_S: Final = 30.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens to the cell. Times are simulated seconds."""

    nodes: int = 1_000
    seed: int = 1
    loss: float = 0.1  # of frames
    doubled: float = 0.0
    corrupt: float = 0.0
    latency_ms: float = 0.5  # one way, typical; one frame in a hundred takes ten times as long
    flush_ms: float = 100.0
    frames_per_s: float = 5_000.0  # that a node sends at most: flush and heartbeat stretch beyond it
    changes_per_s: float = 780.0  # of each node, while visibility is measured
    load_s: float = 5.0
    pair_seconds: float = 0.0  # of healthy pairs, watched for false marks, with a crash every ten seconds
    stall_nodes: int = 0  # every thirty seconds so many others stand still
    stall_s: float = 16.0
    partition_s: float = 0.0  # half against half
    restarts: int = 0  # of all nodes at once


class Sample(Row, frozen=True, kw_only=True):
    """One measured thing."""

    case: str
    value: float | None
    unit: str


class Outcome(msgspec.Struct):
    """What a scenario gave, and the curves of its plot."""

    report: Report
    visible_ms: list[float]
    detection: list[tuple[float, float]]  # seconds after a crash, share of the others that still show the dead


def build(scenario: Scenario) -> Simulation:
    """The cell of a scenario, with nobody in it yet.

    Raises:
        InvalidArgument: a scenario that cannot be.
    """
    if not 2 <= scenario.nodes <= 4_000:
        raise InvalidArgument("a simulated cell has 2 to 4,000 nodes", nodes=scenario.nodes)
    for name in ("loss", "doubled", "corrupt"):
        if not 0 <= getattr(scenario, name) < 1:
            raise InvalidArgument(f"{name} is a share: 0 or more, and less than 1", value=getattr(scenario, name))
    if scenario.stall_nodes >= scenario.nodes:
        raise InvalidArgument("not all nodes can stand still", nodes=scenario.nodes, stall_nodes=scenario.stall_nodes)
    small = scenario.nodes <= WHOLE_SETS_MOST
    settings = {
        "flush_s": scenario.flush_ms / 1e3,
        "frames_per_s": scenario.frames_per_s,
        "members_max": max(16, scenario.nodes + 8),
    }
    return Simulation(
        scenario.nodes, scenario.seed, loss=scenario.loss, doubled=scenario.doubled, corrupt=scenario.corrupt,
        latency_s=scenario.latency_ms / 1e3, whole_sets=small, windows=small, settings=settings,
    )  # fmt: skip


class Run:
    """A scenario on its way."""

    def __init__(self, scenario: Scenario, progress: Progress) -> None:
        self.scenario = scenario
        self.rows: list[Sample] = []
        self.claims: list[Claim] = []
        self.detection: list[tuple[float, float]] = []
        self.visible_ms: list[float] = []
        self._progress = progress
        self._cell = build(scenario)
        self._rng = random.Random(scenario.seed)
        self._began = time.monotonic()
        self._start = self._cell.now

    def row(self, case: str, value: float | None, unit: str) -> None:
        """Note a figure."""
        self.rows.append(
            Sample(case=case, value=report.rounded(value if value is not None else float("nan")), unit=unit)
        )

    def say(self, what: str) -> None:
        """Progress, with both clocks."""
        wall = time.monotonic() - self._began
        self._progress.say(f"{what}: {self._cell.now - self._start:.1f} s simulated in {wall:.0f} s")

    def until_right(self, most_s: float, what: str) -> float:
        """Seconds until every node shows every other as it is; infinite when that takes longer than ``most_s``."""
        waited = 0.0
        why = ""
        while waited < most_s:
            self._cell.run(STEP_S)
            waited += STEP_S
            right, why = self._cell.converged()
            if right:
                return waited
            self.say(f"{what}: {why}")
        return float("inf")

    def join(self) -> None:
        """All nodes start at the same moment, and three addresses are all that they know."""
        for node in range(self.scenario.nodes):
            self._cell.start(node)
        self.row("all nodes started at once: every view right after", self.until_right(JOIN_MOST_S, "joining"), "s")

    def load(self) -> None:
        """Every node's set changes; when is each change visible at all nodes, and what does that cost?"""
        if not self.scenario.load_s:
            return
        cell, scenario = self._cell, self.scenario
        cell.set_changes_per_s(scenario.changes_per_s)
        cell.run(1.0)
        cell.measure(True)
        before = cell.results
        waited = 0.0
        while waited < scenario.load_s:
            cell.run(STEP_S)
            waited += STEP_S
            self.say("changes")
        cell.measure(False)
        cell.set_changes_per_s(0.0)
        after = cell.results
        cell.run(3.0)
        seconds = scenario.load_s * scenario.nodes
        received = {
            name: (after[name] - before[name]) / seconds
            for name in ("frames", "frame_bytes", "letter_bytes", "useful_bytes")
        }
        self.visible_ms = cell.visible_ms
        p99 = percentile(self.visible_ms, 99)
        over = (received["frame_bytes"] + received["letter_bytes"]) / max(received["useful_bytes"], 1e-9)
        self.row("changes of all nodes", scenario.changes_per_s * scenario.nodes, "1/s")
        self.row("a change is visible at all nodes, p50", percentile(self.visible_ms, 50), "ms")
        self.row("a change is visible at all nodes, p99", p99, "ms")
        self.row("a change is visible at all nodes, slowest", max(self.visible_ms, default=float("nan")), "ms")
        self.row("frames received by a node", received["frames"], "1/s")
        self.row("bytes received by a node", received["frame_bytes"] + received["letter_bytes"], "B/s")
        self.claims += [
            at_most("sim.visible_p99", p99, 500, "ms", "a change is visible at all nodes, p99"),
            at_most("sim.bytes_over_payload", over, 1.2, "x", "bytes received, seals and repairs included, over keys"),
        ]

    def crash(self) -> None:
        """One node after another dies without a word."""
        worst = 0.0
        for victim in (5 % self.scenario.nodes, self.scenario.nodes - 1):
            self._cell.crash(victim)
            waited = 0.0
            while waited < 8.0:
                self._cell.run(0.05)
                waited += 0.05
                self.detection.append((waited, self._cell.shown_by(victim) / (self.scenario.nodes - 1)))
                if self._cell.shown_by(victim) == 0:
                    break
            known = self._cell.known_after(victim)
            worst = max(worst, known if known >= 0 else float("inf"))
            self._cell.run(1.0)
            self._cell.start(victim)
            self.until_right(20.0, "back")
        self.claims.append(at_most("sim.crash_known", worst, 3.2, "s", "a crash is known everywhere"))

    def watch(self) -> None:
        """Nobody who is well is marked by anybody, whatever happens to others."""
        scenario, cell = self.scenario, self._cell
        began = cell.results["pair_seconds"]
        crash_at, stall_at = cell.now + CRASH_EVERY_S, cell.now + 2.0
        down: int | None = None
        while cell.results["pair_seconds"] - began < scenario.pair_seconds:
            if cell.now >= crash_at:
                crash_at += CRASH_EVERY_S
                if down is None:
                    down = self._rng.randrange(scenario.nodes)
                    cell.crash(down)
                else:
                    cell.start(down)
                    down = None
            if scenario.stall_nodes and cell.now >= stall_at:
                stall_at += STALL_EVERY_S
                for node in self._rng.sample(range(scenario.nodes), scenario.stall_nodes):
                    cell.stall(node, scenario.stall_s)
            cell.run(1.0)
            self.say(f"watching, {cell.results['pair_seconds'] - began:.2g} pair-seconds")
        if down is not None:
            cell.start(down)
        if scenario.stall_nodes:
            cell.run(scenario.stall_s)
        self.until_right(30.0, "settling")

    def partition(self) -> None:
        """Half of the nodes cannot reach the other half, for longer than anybody remembers entries."""
        scenario, cell = self.scenario, self._cell
        if not scenario.partition_s:
            return
        half = scenario.nodes // 2
        for a in range(half):
            for b in range(half, scenario.nodes):
                cell.cut(a, b)
                cell.cut(b, a)
        waited = 0.0
        while waited < scenario.partition_s:
            cell.run(1.0)
            waited += 1.0
            self.say("apart")
        self.row(
            "of the other half, shown after the partition",
            float(max(cell.alive_by_node) - (scenario.nodes - half - 1)),
            "nodes",
        )
        cell.heal()
        healed = self.until_right(60.0, "healing")
        self.claims.append(at_most("sim.partition_heals", healed, 10, "s", "all views right after a partition"))

    def restart(self) -> None:
        """All nodes die and come back in the same moment, as new lives with new sets."""
        if not self.scenario.restarts:
            return
        worst = 0.0
        for turn in range(self.scenario.restarts):
            for node in range(self.scenario.nodes):
                self._cell.crash(node)
            for node in range(self.scenario.nodes):
                self._cell.start(node)
                self._cell.write(node, 50)
            took = self.until_right(60.0, f"restart {turn + 1}")
            self.row(f"restart {turn + 1} of all nodes: every view right after", took, "s")
            worst = max(worst, took)
        self.claims.append(at_most("sim.restart", worst, 5, "s", "all views right after all nodes restarted at once"))

    def finish(self) -> Outcome:
        """The report."""
        results = self._cell.results
        for violation in results["violations"]:
            self.rows.append(Sample(case=violation, value=None, unit=""))
        self.row("healthy pairs watched", results["pair_seconds"], "pair-seconds")
        self.row("marks of nodes that were not well", results["marks"] - results["false_marks"], "")
        self.row("looks at a view", results["checks"], "")
        self.row("events", results["events"], "")
        self.row("simulated", self._cell.now - self._start, "s")
        self.row("took", time.monotonic() - self._began, "s")
        if self.scenario.pair_seconds:
            self.claims.append(
                at_least(
                    "sim.pair_seconds", results["pair_seconds"], self.scenario.pair_seconds, "", "healthy pairs watched"
                )
            )
        self.claims += [
            at_most("sim.false_marks", results["false_marks"], 0, "", "healthy nodes that somebody marked"),
            at_most("sim.violations", len(results["violations"]), 0, "", "rules broken"),
        ]
        made = report.make_report("sim", self.rows, self.claims)
        return Outcome(made, self.visible_ms, self.detection)

    @property
    def trace(self) -> int:
        """Of all that happened."""
        return self._cell.trace


def run(scenario: Scenario, *, progress: Progress | None = None) -> Outcome:
    """Run a scenario from its beginning to its end."""
    on = Run(scenario, progress or Progress())
    on.join()
    on.load()
    on.crash()
    on.watch()
    on.partition()
    on.restart()
    on.rows.append(Sample(case=f"scenario {msgspec.json.encode(scenario).decode()}", value=None, unit=""))
    on.rows.append(Sample(case=f"trace {on.trace:016x}", value=None, unit=""))
    return on.finish()


def run_chaos(seeds: int, *, first: int = 1, progress: Progress | None = None) -> Report:
    """Small cells under everything that can go wrong; the first seed that breaks a rule is named."""
    progress = progress or Progress()
    broken: list[Sample] = []
    checks = 0
    for seed in range(first, first + seeds):
        what, looks, _ = chaos(seed)
        checks += looks
        if what:
            broken.append(
                Sample(case=f"seed {seed}: {what} (again: p2pkv sim --chaos 1 --seed {seed})", value=None, unit="")
            )
        if seed % 100 == 0:
            progress.say(f"chaos: {seed - first + 1} seeds, {len(broken)} broke a rule")
    rows = [
        *broken,
        Sample(case="seeds", value=float(seeds), unit=""),
        Sample(case="looks at a view", value=float(checks), unit=""),
    ]
    return report.make_report("sim", rows, [at_most("sim.chaos", len(broken), 0, "", "seeds that broke a rule")])
