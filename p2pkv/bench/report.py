"""What a benchmark says: measured rows, claims with their limits, and both as one JSON object or as tables.

Pure: no clock, process or socket but in :func:`describe_host`. A claim's ``ok`` comes from its value and its limit and
from nothing else, and from the value as it is printed, so that whoever reads the report can check it.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TextIO

import msgspec

import p2pkv

SIGNIFICANT_DIGITS: Final = 4
"""More would suggest that a second run gives the same."""


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an issue's "Done when". Made by :func:`at_most` and :func:`at_least` only.

    ``value`` is None when it could not be measured, and then the claim is not ok.
    """

    id: str
    value: float | None
    limit: float
    unit: str
    ok: bool
    relation: Literal["<=", "<", ">="]
    what: str


def at_most(id_: str, value: float, limit: float, unit: str, what: str) -> Claim:
    """The value may be as large as the limit."""
    shown = rounded(value)
    return Claim(
        id=id_, value=shown, limit=limit, unit=unit, ok=shown is not None and shown <= limit, relation="<=", what=what
    )


def below(id_: str, value: float, limit: float, unit: str, what: str) -> Claim:
    """The value must be smaller than the limit."""
    shown = rounded(value)
    return Claim(
        id=id_, value=shown, limit=limit, unit=unit, ok=shown is not None and shown < limit, relation="<", what=what
    )


def at_least(id_: str, value: float, limit: float, unit: str, what: str) -> Claim:
    """The value may be as small as the limit."""
    shown = rounded(value)
    return Claim(
        id=id_, value=shown, limit=limit, unit=unit, ok=shown is not None and shown >= limit, relation=">=", what=what
    )


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Base of the rows; each benchmark has its own. A field's name ends with its unit."""


class Times(Row, frozen=True, kw_only=True):
    """A call that was timed many times.

    ``over``: this p50 divided by that of each limit of the same case, from the same run. ``failed``: calls that did not
    give every block; they are in no percentile. ``p10_us`` is what the call takes when nobody else wants the processor.
    """

    case: str
    way: str
    transport: str
    blocks: int
    block_bytes: int
    samples: int
    failed: int
    p10_us: float | None
    p50_us: float | None
    p90_us: float | None
    p99_us: float | None
    gb_s: float | None
    over: dict[str, float | None] = {}


def times(
    seconds: Sequence[float],
    *,
    case: str,
    way: str,
    transport: str = "",
    blocks: int,
    block_bytes: int,
    failed: int = 0,
    limits: Mapping[str, Sequence[float]] = {},
) -> Times:
    """Sum samples up. ``gb_s`` is bytes per p50, in 10^9 bytes per second; ``limits``: samples that ``over`` is of."""
    middle = percentile(seconds, 50)
    return Times(
        case=case,
        way=way,
        transport=transport,
        blocks=blocks,
        block_bytes=block_bytes,
        samples=len(seconds),
        failed=failed,
        p10_us=rounded(percentile(seconds, 10) * 1e6),
        p50_us=rounded(middle * 1e6),
        p90_us=rounded(percentile(seconds, 90) * 1e6),
        p99_us=rounded(percentile(seconds, 99) * 1e6),
        gb_s=rounded(blocks * block_bytes / middle / 1e9),
        over={name: rounded(ratio(middle, percentile(samples, 50))) for name, samples in limits.items()},
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` of all do not exceed (nearest rank); NaN of nothing."""
    if not values:
        return math.nan
    rank = max(1, math.ceil(len(values) * percent / 100))
    return sorted(values)[rank - 1]


def ratio(a: float | None, b: float | None) -> float:
    """``a / b``, NaN where either is missing or ``b`` is 0."""
    return math.nan if a is None or not b else a / b


def rounded(value: float) -> float | None:
    """To :data:`SIGNIFICANT_DIGITS`; None for what is not a number, which JSON has no word for."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The one object that ``--json`` prints. ``quick``: of fewer samples than what is published."""

    bench: str
    version: str
    when: str
    cpu: str
    quick: bool = False
    rows: Sequence[Row]
    claims: Sequence[Claim]

    @property
    def ok(self) -> bool:
        """Whether every claim holds."""
        return all(claim.ok for claim in self.claims)

    def to_json(self) -> str:
        """One line."""
        return msgspec.json.encode(self).decode()


def make_report(bench: str, rows: Sequence[Row], claims: Sequence[Claim], *, quick: bool = False) -> Report:
    """Put the time, the version and the processor beside what was measured."""
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    cpu = describe_host()
    return Report(bench=bench, version=p2pkv.__version__, when=when, cpu=cpu, quick=quick, rows=rows, claims=claims)


def describe_host(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model and how many of its cores this process may use. Never a host's name."""
    model = platform.machine()
    try:
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
                break
    except OSError:
        pass
    return f"{model}, {len(os.sched_getaffinity(0))} cores"


def write_tables(report: Report, out: TextIO) -> None:
    """The report for people: the rows, then the claims."""
    quick = " (quick)" if report.quick else ""
    out.write(f"p2pkv bench {report.bench}{quick}: version {report.version}, {report.when}, {report.cpu}\n")
    for kind in dict.fromkeys(type(row) for row in report.rows):
        rows = [row for row in report.rows if type(row) is kind]
        names = [name for name in kind.__struct_fields__ if any(getattr(row, name) not in ("", {}) for row in rows)]
        out.write("\n")
        _write_table([names] + [[_shown(getattr(row, name)) for name in names] for row in rows], out)
    if report.claims:
        out.write("\n")
        table = [["claim", "value", "", "limit", "unit", "", "of"]]
        for claim in report.claims:
            verdict = "ok" if claim.ok else "NOT OK"
            table.append(
                [claim.id, _shown(claim.value), claim.relation, _shown(claim.limit), claim.unit, verdict, claim.what]
            )
        _write_table(table, out)


def _write_table(table: Sequence[Sequence[str]], out: TextIO) -> None:
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        out.write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n")


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(_pairs(value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _pairs(values: dict[str, float | None]) -> Iterator[str]:
    for name, value in values.items():
        yield f"{'-' if value is None else f'{value:.3g}'} x {name}"
