"""What the demo found, and whether it is what was promised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import msgspec

TTFT_RATIO_MAX: Final = 0.35
PULLED_SHARE_MIN: Final = 0.95


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt on one replica."""

    prompt: int
    how: str  # "cold", "pulled", "recomputed" or "warmed"
    replica: str
    ttft_s: float
    cached_tokens: int
    from_local_tokens: int  # out of the node's own agent
    from_peer_tokens: int  # out of another node's agent
    bytes_moved: int  # between nodes
    pull_s: float  # that the loads took, as the engine saw it
    tokens: list[int]


class Promise(msgspec.Struct, frozen=True, kw_only=True):
    """One thing the demo promises."""

    id: str
    value: float
    limit: float
    unit: str
    ok: bool


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that was measured."""

    prompt_tokens: int
    full_blocks: int
    block_tokens: int
    transport: str
    runs: list[Run]
    promises: list[Promise]

    @property
    def ok(self) -> bool:
        """Whether every promise was kept."""
        return all(promise.ok for promise in self.promises)


def promises(
    runs: Sequence[Run], *, full_blocks: int, block_tokens: int, asked: str = "auto", used: str = ""
) -> list[Promise]:
    """Judge the runs: tokens of every run of a prompt, blocks of the worst pull, time of the worst pull.

    The time is over that of the same prompt recomputed. ``full_blocks``: of each prompt, ``block_tokens`` each.
    ``asked`` and ``used`` are transports.
    """
    first = first_tokens(runs)
    unequal = {run.prompt for run in runs if run.tokens != first[run.prompt]}
    recomputed = {run.prompt: run.ttft_s for run in runs if run.how == "recomputed"}
    pulled = [run for run in runs if run.how == "pulled"]
    share = min((run.from_peer_tokens / (full_blocks * block_tokens) for run in pulled), default=0.0)
    ratio = max((run.ttft_s / recomputed[run.prompt] for run in pulled if run.prompt in recomputed), default=math.inf)
    warmed = [run for run in runs if run.how == "warmed"]
    found = [
        _promise("demo.tokens_differ", len(unequal), 0, "prompts", most=True),
        _promise("demo.pulled_share_of_full_blocks", share, PULLED_SHARE_MIN, "ratio", most=False),
        _promise("demo.ttft_pulled_over_recomputed", ratio, TTFT_RATIO_MAX, "ratio", most=True),
        _promise("demo.other_transport_than_asked", asked not in ("auto", used), 0, "transports", most=True),
    ]
    if warmed:
        here = min(run.from_local_tokens / (full_blocks * block_tokens) for run in warmed)
        found.append(_promise("demo.warmed_share_of_full_blocks", here, PULLED_SHARE_MIN, "ratio", most=False))
        found.append(
            _promise("demo.warmed_asked_peers_for", sum(run.bytes_moved for run in warmed), 0, "bytes", most=True)
        )
    return found


def first_tokens(runs: Sequence[Run]) -> dict[int, list[int]]:
    """What the first run of each prompt answered: what all others must."""
    return {run.prompt: run.tokens for run in reversed(runs)}


def _promise(name: str, value: float, limit: float, unit: str, *, most: bool) -> Promise:
    shown = round(float(value), 4)
    return Promise(id=name, value=shown, limit=limit, unit=unit, ok=shown <= limit if most else shown >= limit)


def table(outcome: Outcome) -> str:
    """The runs and the promises, for people."""
    head = ("prompt", "run", "on", "TTFT", "cached", "own node", "peer", "moved", "GB/s", "via", "tokens")
    first = first_tokens(outcome.runs)
    rows = [
        (
            str(run.prompt),
            run.how,
            run.replica,
            f"{run.ttft_s * 1e3:.0f} ms",
            str(run.cached_tokens),
            str(run.from_local_tokens),
            str(run.from_peer_tokens),
            f"{run.bytes_moved / 2**20:.0f} MiB" if run.bytes_moved else "-",
            f"{run.bytes_moved / run.pull_s / 1e9:.2f}" if run.bytes_moved and run.pull_s else "-",
            outcome.transport if run.bytes_moved else "-",
            "equal" if run.tokens == first[run.prompt] else "DIFFER",
        )
        for run in outcome.runs
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.append("")
    for promise in outcome.promises:
        lines.append(f"{'ok  ' if promise.ok else 'FAIL'}  {promise.id} = {promise.value:g} (limit {promise.limit:g})")
    return "\n".join(lines)
