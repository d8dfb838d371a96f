"""Writes docs/benchmarks.md from results/*.json, as `p2pkv bench NAME --json` printed them. Run by `make bench`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
INTRO = """# Benchmarks

Written by `make bench` from what `p2pkv bench NAME --json` printed. Every figure of a run is taken beside its limit
(memcpy, raw TCP, raw NIXL), **interleaved in that run**, because machines differ and shared machines differ from minute
to minute: compare ratios, and microseconds only within one table. What each bench does is in `benchmarks/README.md`.
"""


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def shown(value: Any) -> str:
    """A figure with three significant digits."""
    return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def cell(value: Any) -> str:
    """A figure, or several with their names."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items()) or "-"
    return shown(value) or "-"


def section(result: dict[str, Any]) -> str:
    """One bench: its claims, then its rows."""
    parts = [f"## {result['bench']}", f"p2pkv {result['version']}, {result['when']}, {result['cpu']}"]
    claims = [
        [
            f"`{c['id']}`",
            shown(c["value"]),
            f"{c.get('relation', '')} {shown(c['limit'])}",
            c["unit"],
            "yes" if c["ok"] else "**no**",
        ]
        for c in result["claims"]
    ]
    if claims:
        parts.append(table(["claim", "value", "limit", "unit", "holds"], claims))
    kinds: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        kinds.setdefault(tuple(row), []).append(row)
    for columns, rows in kinds.items():
        used = [name for name in columns if any(row[name] not in ("", {}, None) for row in rows)]
        parts.append(
            table([name.replace("_", " ") for name in used], [[cell(row[name]) for name in used] for row in rows])
        )
    return "\n\n".join(parts)


def main() -> int:
    """Write the page from the files that are there."""
    files = sorted((ROOT / "results").glob("*.json"))
    results = [json.loads(file.read_text()) for file in files if file.stat().st_size]
    if not results:
        print("error: no results/*.json; run `make bench`", file=sys.stderr)
        return 1
    PAGE.write_text("\n\n".join([INTRO.strip(), *map(section, results)]) + "\n")
    print(f"wrote {PAGE.relative_to(ROOT)} from {len(results)} result(s)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
