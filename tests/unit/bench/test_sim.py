"""What ``p2pkv sim`` reports, and that a report can be run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from p2pkv.bench import sim
from p2pkv.bench.progress import Progress
from p2pkv.bench.sim_plot import cumulative, svg
from p2pkv.cli.sim import scenario_in, stalls
from p2pkv.errors import InvalidArgument

SMALL = sim.Scenario(
    nodes=12,
    load_s=1.0,
    pair_seconds=2_000,
    stall_nodes=2,
    stall_s=4.0,
    partition_s=15.0,
    restarts=1,
    changes_per_s=100.0,
)


@pytest.fixture(scope="module")
def outcome() -> sim.Outcome:
    return sim.run(SMALL, progress=Progress())


def test_a_small_cell_keeps_every_promise(outcome: sim.Outcome) -> None:
    claims = {claim.id: claim for claim in outcome.report.claims}
    assert set(claims) == {
        "sim.visible_p99", "sim.bytes_over_payload", "sim.crash_known", "sim.partition_heals", "sim.restart",
        "sim.pair_seconds", "sim.false_marks", "sim.violations",
    }  # fmt: skip
    # At 10 keys a frame, headers are most of the bytes: that promise is one of busy cells.
    assert [claim.id for claim in claims.values() if not claim.ok] == ["sim.bytes_over_payload"]


def test_a_report_can_be_run_again_and_gives_the_same(outcome: sim.Outcome, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(outcome.report.to_json())
    assert scenario_in(path) == SMALL
    again = sim.run(scenario_in(path), progress=Progress())
    assert trace_of(again) == trace_of(outcome)
    other = sim.run(sim.Scenario(nodes=12, seed=2, load_s=0.5), progress=Progress())
    assert trace_of(other) != trace_of(outcome)


def trace_of(outcome: sim.Outcome) -> str:
    rows = json.loads(outcome.report.to_json())["rows"]
    (trace,) = [row["case"] for row in rows if row["case"].startswith("trace ")]
    return str(trace)


def test_chaos_names_the_seeds_that_broke_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sim.run_chaos(20).ok
    monkeypatch.setattr(sim, "chaos", lambda seed: ("a rule" if seed == 3 else "", 10, 0))
    report = sim.run_chaos(5)
    assert not report.ok and report.claims[0].value == 1
    assert report.rows[0].case == "seed 3: a rule (again: p2pkv sim --chaos 1 --seed 3)"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "wrong", [{"nodes": 1}, {"nodes": 5_000}, {"loss": 1.0}, {"loss": -0.1}, {"stall_nodes": 1_000}]
)
def test_a_scenario_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidArgument):
        sim.build(sim.Scenario(**wrong))  # type: ignore[arg-type]


def test_what_is_no_report_or_no_stall_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"rows": []}')
    for path in (tmp_path / "x", tmp_path / "none"):
        with pytest.raises(InvalidArgument, match="no report"):
            scenario_in(path)
    assert stalls("") == (0, 16.0) and stalls("50:8") == (50, 8.0) and stalls("5") == (5, 16.0)
    with pytest.raises(InvalidArgument, match="NODES:SECONDS"):
        stalls("many")


def test_the_plot_has_both_curves() -> None:
    assert cumulative([]) == [] and cumulative([3.0, 1.0, 2.0])[-1] == (3.0, 1.0)
    picture = svg("<8> nodes", [1.0, 2.0], [(0.0, 1.0), (3.0, 0.0)])
    assert picture.count("<polyline") == 2 and "&lt;8&gt;" in picture
