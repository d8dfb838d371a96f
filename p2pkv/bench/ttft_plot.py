"""``p2pkv bench ttft`` as one SVG: time to first token with p2pkv over that without it, a line per speed of the link.

Written by hand: polylines need no library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final
from xml.sax.saxutils import escape

WIDTH: Final = 720
HEIGHT: Final = 400
LEFT: Final = 60
TOP: Final = 50
INNER_W: Final = 520
INNER_H: Final = 280
RATIO_MAX: Final = 1.2
TITLE: Final = "Time to first token with p2pkv, as a multiple of that without"
COLOURS: Final = ("#0b62a4", "#1b9e77", "#7570b3", "#d95f02", "#b2182b", "#666666")


def svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """The plot of a report's rows; those where nobody had the prompt are left out."""
    lines: dict[float, list[tuple[int, float]]] = {}
    for row in rows:
        if row["mbit_s"] and row["ratio"] is not None:
            lines.setdefault(row["mbit_s"], []).append((row["tokens"], row["ratio"]))
    lengths = sorted({tokens for line in lines.values() for tokens, _ in line})
    parts = [
        f'<text x="{LEFT}" y="24" font-weight="bold">{TITLE}</text>',
        *(_level(ratio) for ratio in (0.0, 0.25, 0.5, 0.75, 1.0)),
        *(_length(tokens, lengths) for tokens in lengths),
        f'<text x="{LEFT + INNER_W}" y="{TOP + INNER_H + 40}" text-anchor="end">tokens of the prompt</text>',
    ]
    for number, (rate, line) in enumerate(sorted(lines.items(), reverse=True)):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{_x(tokens, lengths):.1f},{_y(ratio):.1f}" for tokens, ratio in sorted(line))
        at = TOP + 10 + 20 * number
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'
            f'<line x1="{LEFT + INNER_W + 20}" y1="{at}" x2="{LEFT + INNER_W + 44}" y2="{at}" stroke="{colour}" '
            f'stroke-width="2"/><text x="{LEFT + INNER_W + 50}" y="{at + 4}">{escape(_speed(rate))}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _x(tokens: int, lengths: Sequence[int]) -> float:
    first, last = math.log2(lengths[0]), math.log2(lengths[-1])
    return LEFT + INNER_W * (math.log2(tokens) - first) / ((last - first) or 1.0)


def _y(ratio: float) -> float:
    return TOP + INNER_H * (1.0 - min(ratio, RATIO_MAX) / RATIO_MAX)


def _level(ratio: float) -> str:
    colour = "#333" if ratio == 1.0 else "#ddd"
    return (
        f'<line x1="{LEFT}" y1="{_y(ratio):.1f}" x2="{LEFT + INNER_W}" y2="{_y(ratio):.1f}" stroke="{colour}"/>'
        f'<text x="{LEFT - 8}" y="{_y(ratio) + 4:.1f}" text-anchor="end">{ratio:g}</text>'
    )


def _length(tokens: int, lengths: Sequence[int]) -> str:
    return f'<text x="{_x(tokens, lengths):.1f}" y="{TOP + INNER_H + 18}" text-anchor="middle">{tokens}</text>'


def _speed(mbit_s: float) -> str:
    return f"{mbit_s / 1000:g} Gb/s" if mbit_s >= 1000 else f"{mbit_s:g} Mb/s"
