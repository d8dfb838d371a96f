"""Writes docs/benchmarks.md, tables of docs/index.md and docs/pulls.md, and a plot, from results/*.json (`make bench`).

The files are what `p2pkv bench NAME --json` printed. A section for which there is no file stays as it is. Quick runs
are refused: their figures are of too few samples.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from p2pkv.bench.ttft_plot import svg

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
INDEX_PAGE = ROOT / "docs" / "index.md"
PULLS_PAGE = ROOT / "docs" / "pulls.md"
TTFT_PLOT = ROOT / "docs" / "ttft.svg"
MEASURED = "<!-- measured: written by scripts/write_benchmarks.py -->"
MEASURED_END = "<!-- /measured -->"
INTRO = """# Benchmarks

Written by `make bench` from what `p2pkv bench NAME --json` printed. Every figure of a run is taken beside its limit
(memcpy, raw TCP, raw NIXL), **interleaved in that run**, because machines differ and shared machines differ from minute
to minute: compare ratios, and microseconds only within one table. What each bench does is in `benchmarks/README.md`.
`nixl` is as shipped: between agents of one host a get of up to `transport.neighbour_max` (4 MiB) is read out of the
owner's memory by the agent itself, as NIXL's own processes do there (both are one copy by the reader, and no work of
the owner's). So up to 16 x 256 KiB our side of `fetch.nixl` is that, and from 16 x 1 MiB on it is NIXL. With it turned
off 256 KiB has 0.38 to 0.44 of raw NIXL's rate.

## Beside others

`fetch` can run another system's get in the same rounds, where its wheel is installed:

```console
$ make rivals                                        # into .venv: the versions of requirements/rivals.txt
$ sudo apt-get install libibverbs1                   # Mooncake's wheel loads it, for tcp too
$ p2pkv bench fetch --transport tcp --rival mooncake
$ p2pkv bench fetch --transport nixl --rival kvcr    # or both transports, and --rival mooncake,kvcr
```

A rival is a holder and a reader, in processes of their own, with the same blocks in the same ring, checked the same
way; its row is named after it, and our rows say in `over` what they are of it. Each get of a rival that counts follows
one that does not, which ours do not have. `mooncake` is Mooncake Store's `get_into` over TCP (several blocks:
`batch_get_into`), as its wheel comes; over it there are claims, of single gets. `kvcr` is KVCR's `deliver` from a
holder's DRAM tier over NIXL, its router's hint given before. KVCR's processes keep a core busy while they wait, so
they stand still between their turns. What follows a rival's turn finds colder caches: for ours against the limits, take
a run without rivals. Both listen on every interface while they run: not for a host that strangers can reach.
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


def section(name: str, result: dict[str, Any]) -> str:
    """One file: its claims, then its rows."""
    parts = [f"## {name}", f"p2pkv {result['version']}, {result['when']}, {result['cpu']}"]
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


def index_table(result: dict[str, Any]) -> str:
    """What the index costs, in one table: a row per workload and way."""
    shape = ("workload", "way")
    lines: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in result["rows"]:
        if not all(name in row for name in shape):
            continue
        line = lines.setdefault(tuple(row[name] for name in shape), {})
        line["nodes"] = row["nodes"]
        if "ns_per_key" in row:
            line[f"store {row['event_blocks']}"] = shown(row["ns_per_key"])
            if row["event_blocks"] == 512:
                line["bytes"] = shown(row["rss_bytes_per_entry"])
        else:
            line[row["query"]] = f"{shown(row['p50_us'])} ({shown(row['p99_us'])})"
    columns = ("nodes", "full", "half", "miss", "store 512", "store 16", "store 1", "bytes")
    head = [
        "workload", "index", "nodes", "whole, us (p99)", "half, us (p99)", "miss, us (p99)",
        "stored, ns a key, events of 512", "of 16", "of 1", "bytes an entry (RSS)",
    ]  # fmt: skip
    table_ = table(head, [[*key, *(str(line.get(name, "")) for name in columns)] for key, line in lines.items()])
    logs = [row for row in result["rows"] if "wire_bytes" in row]
    log = table(
        ["an event of", "owner, ns a block", "reader, ns a block", "bytes a block on the wire"],
        [[shown(row[name]) for name in ("event_blocks", "owner_ns", "reader_ns", "wire_bytes")] for row in logs],
    )
    large = [row for row in result["rows"] if "rss_bytes" in row]
    words = [
        f"{row['entries'] / 1e6:.0f} M different entries take {row['rss_bytes'] / 1e9:.2f} GB of resident memory; "
        f"a lookup in them {shown(row['p50_us'])} us (p99 {shown(row['p99_us'])})."
        for row in large
    ]
    cases = [row for row in result["rows"] if "case" in row]
    beside = table(
        ["lookups of whole chains, a small index", "entries/s written", "p50, us", "p99, us", "p99.99, us"],
        [[row["case"], *(shown(row[n]) for n in ("entries_per_s", "p50_us", "p99_us", "p99_99_us"))] for row in cases],
    )
    loads = [
        f"A dump of {row['entries'] / 1e6:.0f} M entries ({row['file_bytes'] / 1e6:.0f} MB) is written in "
        f"{shown(row['dump_s'])} s and loaded in {shown(row['load_s'])} s."
        for row in result["rows"]
        if "load_s" in row
    ]
    return "\n\n".join([f"{result['when']}, {result['cpu']}:", table_, *words, *loads, beside, log])


def ttft_table(result: dict[str, Any]) -> str:
    """Times to first token: a row per prompt length, a column per speed of the link."""
    rows = [row for row in result["rows"] if row["mbit_s"]]
    rates = sorted({row["mbit_s"] for row in rows}, reverse=True)
    points = {(row["tokens"], row["mbit_s"]): row for row in rows}
    lines = []
    for tokens in sorted({row["tokens"] for row in rows}):
        some = [points[tokens, rate] for rate in rates]
        times = [
            f"{row['with_ms']:.0f} / {row['without_ms']:.0f} = **{row['ratio']:.2f}** ({row['worst']:.2f})"
            for row in some
        ]
        lines.append([str(tokens), *times])
    head = ["tokens", *(f"{rate:g} Mb/s" for rate in rates)]
    [cold] = [row for row in result["rows"] if not row["mbit_s"]]
    words = (
        f"Where nobody has the prompt ({cold['tokens']} tokens): {cold['with_ms']:.0f} / {cold['without_ms']:.0f} = "
        f"**{cold['ratio']:.3f}** ({cold['worst']:.2f}). Medians, ms with p2pkv / ms without, and in brackets "
        f"the worst single pair; {result['when']}, {result['cpu']}."
    )
    firsts = [
        f"{row['tokens']} tokens at {row['mbit_s']:g} Mb/s {row['first']:.2f}"
        for row in rows
        if row.get("first") is not None
    ]
    after = [f"The first prompt after each change of the link, single pairs: {', '.join(firsts)}."] if firsts else []
    return "\n\n".join([table(head, lines), words, *after])


def write_measured(page: Path, measured: str) -> None:
    """Put a table where it is explained."""
    text = page.read_text()
    begin, end = text.index(MEASURED), text.index(MEASURED_END)
    page.write_text(text[: begin + len(MEASURED)] + "\n\n" + measured + "\n\n" + text[end:])


def sections(page: str) -> dict[str, str]:
    """The measured sections of the page as it is, by their headings; several of one heading together."""
    found: dict[str, str] = {}
    for part in f"\n{page}".split("\n## ")[1:]:
        heading = part.splitlines()[0]
        if f"## {heading}" not in INTRO.splitlines():
            found[heading] = "\n\n".join(filter(None, [found.get(heading), f"## {part.strip()}"]))
    return found


def main() -> int:
    """Write the pages from the files that are there."""
    files = {file.stem: file for file in sorted(RESULTS.glob("*.json")) if file.stat().st_size}
    results: dict[str, dict[str, Any]] = {name: json.loads(file.read_text()) for name, file in files.items()}
    if not results:
        print("error: no results/*.json; run `make bench`", file=sys.stderr)
        return 1
    if quick := [files[name].name for name, result in results.items() if result.get("quick")]:
        print(f"error: quick runs are not published: {', '.join(quick)} in {RESULTS}", file=sys.stderr)
        print("hint: measure without --quick, or remove the file: its section stays as it is then.", file=sys.stderr)
        return 1
    kept = sections(PAGE.read_text()) if PAGE.exists() else {}
    for name in results.keys() | {result["bench"] for result in results.values()}:
        kept.pop(name, None)  # the bench's own name, too: a file for each transport takes its place
    parts = kept | {name: section(name, result) for name, result in results.items()}
    PAGE.write_text("\n\n".join([INTRO.strip(), *(parts[name] for name in sorted(parts))]) + "\n")
    for result in results.values():
        if result["bench"] == "index":
            write_measured(INDEX_PAGE, index_table(result))
        elif result["bench"] == "ttft":
            write_measured(PULLS_PAGE, ttft_table(result))
            TTFT_PLOT.write_text(svg(result["rows"]))
    left = f"; kept: {', '.join(sorted(kept))}" if kept else ""
    print(f"wrote {PAGE.name} from {len(results)} result(s){left}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
