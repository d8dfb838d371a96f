"""What scripts/write_benchmarks.py publishes of results."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from p2pkv.bench import ttft
from p2pkv.bench.progress import Progress
from p2pkv.bench.report import at_most, make_report
from tests.unit.bench.test_ttft import Scene

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "write_benchmarks.py"


@pytest.fixture
def script(tmp_path: Path) -> ModuleType:
    """The script, at work in a directory of its own."""
    spec = importlib.util.spec_from_file_location("write_benchmarks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("RESULTS", "PAGE", "INDEX_PAGE", "PULLS_PAGE", "TTFT_PLOT"):
        setattr(module, name, tmp_path / Path(getattr(module, name)).name)
    module.RESULTS.mkdir()
    return module


def put(script: ModuleType, name: str, bench: str, *, value: float = 1.0, quick: bool = False) -> None:
    report = make_report(bench, [], [at_most(f"{name}.claim", value, 2.0, "x", "")], quick=quick)
    (script.RESULTS / f"{name}.json").write_text(report.to_json())


def test_sections_without_a_file_are_kept(script: ModuleType) -> None:
    put(script, "fetch", "fetch")
    put(script, "idle", "idle")
    assert script.main() == 0
    (script.RESULTS / "idle.json").unlink()
    put(script, "fetch", "fetch", value=1.5)
    put(script, "gossip", "gossip")
    assert script.main() == 0
    page = script.PAGE.read_text()
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["## Beside others", "## fetch", "## gossip", "## idle"]
    assert "`idle.claim` | 1 |" in page and "`fetch.claim` | 1.5 |" in page and "`fetch.claim` | 1 |" not in page


def test_files_of_a_bench_by_transport_take_the_place_of_its_one_section(script: ModuleType) -> None:
    script.PAGE.write_text("# Benchmarks\n\n## stress\n\nstale text\n\n## stress\n\nstale text\n\n## sim\n\nkept\n")
    for transport in ("tcp", "nixl"):
        put(script, f"stress-{transport}", "stress")
    assert script.main() == 0
    headings = [line for line in script.PAGE.read_text().splitlines() if line.startswith("## ")]
    assert headings[1:] == ["## sim", "## stress-nixl", "## stress-tcp"]
    assert "stale text" not in script.PAGE.read_text()


def test_quick_runs_are_refused_and_nothing_is_written(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    put(script, "fetch", "fetch")
    put(script, "faults", "faults", quick=True)
    assert script.main() == 1
    assert "quick runs are not published: faults.json" in capsys.readouterr().err
    assert not script.PAGE.exists()


def test_the_table_of_times_to_first_token_shows_the_worst_and_the_first(script: ModuleType) -> None:
    script.PULLS_PAGE.write_text(f"before\n{script.MEASURED}\n{script.MEASURED_END}\nafter\n")
    report = ttft.run(Scene(first=3.0), progress=Progress())
    (script.RESULTS / "ttft.json").write_text(report.to_json())
    assert script.main() == 0
    page = script.PULLS_PAGE.read_text()
    assert "= **1.00** (3.00)" in page
    assert page.count("Mb/s 3.00") == len(ttft.RATES)
    assert page.startswith("before") and page.endswith("after\n")
