"""The two curves of a simulated cell as one SVG, over time: how many changes are visible everywhere, and how many nodes
still show a dead one. Written by hand: two polylines need no library."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from xml.sax.saxutils import escape

WIDTH: Final = 720
HEIGHT: Final = 300
LEFT: Final = 60
TOP: Final = 40
INNER_W: Final = 620
INNER_H: Final = 200


def svg(title: str, visible_ms: list[float], detection: list[tuple[float, float]]) -> str:
    """Both panels, one above the other."""
    panels = [
        panel(f"{title}: changes visible at all nodes", "ms after the change", cumulative(visible_ms), 0),
        panel("nodes that still show a dead one", "s after its death", detection, HEIGHT),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{2 * HEIGHT}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
        f"{''.join(panels)}</svg>\n"
    )


def cumulative(values: list[float], points: int = 200) -> list[tuple[float, float]]:
    """The share of values up to each of so many of them."""
    ordered = sorted(values)
    if not ordered:
        return []
    steps = sorted({round(i * (len(ordered) - 1) / points) for i in range(points + 1)})
    return [(ordered[i], (i + 1) / len(ordered)) for i in steps]


def panel(title: str, unit: str, curve: Iterable[tuple[float, float]], top: int) -> str:
    """One curve of shares (0 to 1) with its axes."""
    points = sorted(curve)
    most = max((x for x, _ in points), default=1.0) or 1.0
    at = [(LEFT + INNER_W * x / most, top + TOP + INNER_H * (1 - y)) for x, y in points]
    base = top + TOP + INNER_H
    ticks = [(LEFT + INNER_W * i / 5, most * i / 5) for i in range(6)]
    right = LEFT + INNER_W
    marks = "".join(
        f'<line x1="{x}" y1="{base}" x2="{x}" y2="{base + 5}" stroke="black"/>'
        f'<text x="{x}" y="{base + 18}" text-anchor="middle">{value:.3g}</text>'
        for x, value in ticks
    ) + "".join(
        f'<line x1="{LEFT}" y1="{base - INNER_H * i / 4}" x2="{right}" y2="{base - INNER_H * i / 4}" stroke="#ddd"/>'
        f'<text x="{LEFT - 8}" y="{base - INNER_H * i / 4 + 4}" text-anchor="end">{25 * i} %</text>'
        for i in range(5)
    )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    return (
        f'<text x="{LEFT}" y="{top + 22}" font-weight="bold">{escape(title)}</text>{marks}'
        f'<polyline points="{line}" fill="none" stroke="#0b62a4" stroke-width="2"/>'
        f'<text x="{LEFT + INNER_W}" y="{base + 36}" text-anchor="end">{escape(unit)}</text>'
    )
