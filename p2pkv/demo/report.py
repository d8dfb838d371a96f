"""What the demo found, and whether it is what was promised."""

from __future__ import annotations

from typing import Final

import msgspec

TTFT_RATIO_MAX: Final = 0.35
PULLED_SHARE_MIN: Final = 0.95


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt on one replica."""

    prompt: int
    how: str  # "cold", "pulled" or "recomputed"
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

    model_bytes_per_token: int
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


def promises(runs: list[Run], *, full_blocks: int, block_tokens: int) -> list[Promise]:
    """Judge the runs: pulled against recomputed on the same replica, per prompt, by the worst prompt."""
    by: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        by.setdefault((run.prompt, run.how), []).append(run)
    prompts = sorted({run.prompt for run in runs})
    unequal = sum(any(run.tokens != runs_of[0].tokens for run in runs_of[1:]) for runs_of in _by_prompt(runs).values())
    pulled = [run for run in runs if run.how == "pulled"]
    share = min((run.from_peer_tokens / (full_blocks * block_tokens) for run in pulled), default=0.0)
    ratios = [
        run.ttft_s / min(r.ttft_s for r in by[(prompt, "recomputed")])
        for prompt in prompts
        for run in by.get((prompt, "pulled"), [])
        if (prompt, "recomputed") in by
    ]
    ratio = sorted(ratios)[len(ratios) // 2] if ratios else float("inf")
    return [
        _promise("demo.tokens_differ", unequal, 0, "prompts", most=True),
        _promise("demo.pulled_share_of_full_blocks", share, PULLED_SHARE_MIN, "ratio", most=False),
        _promise("demo.ttft_pulled_over_recomputed", ratio, TTFT_RATIO_MAX, "ratio", most=True),
    ]


def _by_prompt(runs: list[Run]) -> dict[int, list[Run]]:
    found: dict[int, list[Run]] = {}
    for run in runs:
        found.setdefault(run.prompt, []).append(run)
    return found


def _promise(name: str, value: float, limit: float, unit: str, *, most: bool) -> Promise:
    ok = value <= limit if most else value >= limit
    return Promise(id=name, value=round(value, 4), limit=limit, unit=unit, ok=ok)


def table(outcome: Outcome) -> str:
    """The runs and the promises, for people."""
    head = ("prompt", "run", "on", "TTFT", "cached", "own node", "peer", "moved", "GB/s", "via", "tokens")
    first = {run.prompt: run.tokens for run in reversed(outcome.runs)}
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
