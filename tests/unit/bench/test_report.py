"""What a report says: percentiles, ratios, claims that depend on value and limit alone, one JSON object."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.bench import report
from p2pkv.bench.report import (
    Claim,
    at_least,
    at_most,
    below,
    make_report,
    percentile,
    ratio,
    rounded,
    times,
    write_tables,
)


@given(st.floats(0, 1e9), st.floats(0, 1e9))
def test_a_claim_is_ok_by_the_value_and_the_limit_that_it_shows(value: float, limit: float) -> None:
    upper, strict, lower = (make("x", value, limit, "ms", "") for make in (at_most, below, at_least))
    assert upper.value is not None
    assert upper.ok is (upper.value <= limit)
    assert strict.ok is (upper.value < limit)
    assert lower.ok is (upper.value >= limit)


@pytest.mark.parametrize("make", [at_most, below, at_least])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_could_not_be_measured_is_not_ok(make: object, value: float) -> None:
    assert callable(make)
    claim = make("x", value, 1.0, "ms", "")
    assert claim.value is None
    assert not claim.ok


def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed() -> None:
    values = [float(n) for n in range(1000, 0, -1)]
    assert percentile(values, 50) == 500
    assert percentile(values, 99) == 990
    assert percentile(values, 100) == 1000
    assert percentile([7.0], 1) == percentile([7.0], 99) == 7.0
    assert math.isnan(percentile([], 50))


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(1, 100))
def test_enough_values_are_at_or_below_a_percentile(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= len(values) * percent / 100 - 1e-9


def test_a_ratio_of_nothing_is_not_a_number() -> None:
    assert ratio(3.0, 2.0) == 1.5
    assert math.isnan(ratio(None, 2.0))
    assert math.isnan(ratio(3.0, None))
    assert math.isnan(ratio(3.0, 0.0))


def test_figures_have_four_digits() -> None:
    assert rounded(1234.56) == 1235
    assert rounded(0.000123456) == 0.0001235
    assert rounded(math.nan) is None


def test_times_are_over_the_limits_of_the_same_case() -> None:
    row = times(
        [0.002, 0.004, 0.006],
        case="1MiB",
        way="get_into",
        blocks=1,
        block_bytes=1 << 20,
        failed=2,
        limits={"memcpy": [0.001] * 3, "raw_tcp": []},
    )
    assert (row.samples, row.failed, row.p50_us, row.p99_us) == (3, 2, 4000, 6000)
    assert row.gb_s == rounded((1 << 20) / 0.004 / 1e9)
    assert row.over == {"memcpy": 4.0, "raw_tcp": None}


def _report(*claims: Claim) -> report.Report:
    row = times([0.001], case="1MiB", way="memcpy", blocks=1, block_bytes=1 << 20)
    return make_report("fetch", [row], claims)


def test_json_has_the_fields_that_the_design_names() -> None:
    found = json.loads(_report(at_most("a.b", 1.0, 2.0, "x", "of what")).to_json())
    assert set(found) == {"bench", "version", "when", "cpu", "quick", "rows", "claims"}
    assert found["claims"][0].items() >= {"id": "a.b", "value": 1.0, "limit": 2.0, "unit": "x", "ok": True}.items()
    assert found["rows"][0]["p50_us"] == 1000


def test_a_quick_report_says_so() -> None:
    assert not _report().quick
    quick, out = make_report("fetch", [], [], quick=True), io.StringIO()
    assert json.loads(quick.to_json())["quick"] is True
    write_tables(quick, out)
    assert out.getvalue().startswith("p2pkv bench fetch (quick): ")


def test_a_report_is_ok_when_every_claim_is() -> None:
    good, bad = at_most("good", 1, 2, "x", ""), at_most("bad", 3, 2, "x", "")
    assert _report(good).ok
    assert not _report(good, bad).ok


def test_tables_show_what_is_missing_and_what_does_not_hold() -> None:
    out = io.StringIO()
    write_tables(_report(at_most("bad", math.nan, 2, "x", "of what")), out)
    (line,) = (line for line in out.getvalue().splitlines() if line.startswith("bad"))
    assert line.split() == ["bad", "-", "<=", "2", "x", "NOT", "OK", "of", "what"]
    assert "transport" not in out.getvalue()  # empty in every row


def test_the_host_is_described_by_its_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A Processor @ 2 GHz\nmodel name\t: another\n")
    assert report.describe_host(cpuinfo).startswith("A Processor @ 2 GHz, ")
    assert report.describe_host(tmp_path / "none").endswith(" cores")
