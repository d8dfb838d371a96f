"""``p2pkv bench idle``: the CPU time of agents that have nothing to do.

Two agents with an engine connected and blocks stored; some were pulled, so that every connection and endpoint is there.
Then nothing is asked of them, and the kernel is asked what all their threads and child processes used meanwhile.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from p2pkv.bench import raw_nixl, report
from p2pkv.bench.agents import AgentProcess, Fleet, fleet, layout_of, put_all, wait_remote
from p2pkv.bench.progress import Progress
from p2pkv.bench.report import Claim, Report, Row, below
from p2pkv.errors import P2PKVError

IDLE_S: Final = 30.0
IDLE_QUICK_S: Final = 5.0
SETTLE_S: Final = 3.0
"""After the last pull: populating, batching and serving on for a while are work, not idleness."""
LIMIT_PERCENT: Final = 2.0
BLOCK_BYTES: Final = 1 << 20
BLOCKS: Final = 16
CAPACITY_BYTES: Final = 256 << 20


class Idle(Row, frozen=True, kw_only=True):
    """CPU of one agent, its NIXL process included, in percent of one core."""

    agent: str
    transport: str
    seconds: float
    processes: int
    agent_percent: float | None
    children_percent: float | None
    total_percent: float | None


def run(*, quick: bool = False, progress: Progress | None = None) -> Report:
    """Measure with each transport that this host has. The claims are nixl's where there is NIXL."""
    progress = progress or Progress()
    transports = ["tcp", "nixl"] if raw_nixl.installed() else ["tcp"]
    rows: list[Idle] = []
    for transport in transports:
        with fleet() as agents:
            rows += measure(agents, transport, IDLE_QUICK_S if quick else IDLE_S, progress)
    return report.make_report("idle", rows, claims_of(rows), quick=quick)


def claims_of(rows: list[Idle]) -> list[Claim]:
    """The agent's half of issue 2, point 8: one claim per transport, about the busier of the two agents."""
    claims = []
    for transport in dict.fromkeys(row.transport for row in rows):
        totals = [row.total_percent for row in rows if row.transport == transport]
        worst = float("nan") if None in totals else max(total for total in totals if total is not None)
        what = "CPU of an idle agent and its children, the busier of two"
        claims.append(below(f"idle.{transport}.agent", worst, LIMIT_PERCENT, "% of a core", what))
    return claims


def measure(agents: Fleet, transport: str, idle_s: float, progress: Progress) -> list[Idle]:
    """Bring two agents to rest and watch them."""
    owner = agents.start("owner", capacity_bytes=CAPACITY_BYTES, transport=transport)
    reader = agents.start("reader", capacity_bytes=CAPACITY_BYTES, transport=transport)
    if transport not in owner.ready.transports:
        raise P2PKVError("an agent runs without the transport that was asked for", transport=transport)
    layout = layout_of(BLOCK_BYTES)
    (_, at_owner), (_, at_reader) = agents.open(owner, layout), agents.open(reader, layout)
    rng = random.Random(0)
    keys = [rng.randbytes(32) for _ in range(BLOCKS)]
    put_all(at_owner, keys, [rng.randbytes(BLOCK_BYTES)] * BLOCKS)
    wait_remote(at_reader, keys)
    got = at_reader.get_into(keys, [bytearray(BLOCK_BYTES) for _ in keys], deadline_ms=10_000)
    if not all(got):
        raise P2PKVError("blocks could not be pulled", got=sum(got), of=len(got))
    time.sleep(SETTLE_S)
    watched = {agent.name: agent for agent in (owner, reader)}
    began = time.monotonic()
    before = {name: cpu_seconds(agent) for name, agent in watched.items()}
    while (passed := time.monotonic() - began) < idle_s:
        progress.step(f"idle with {transport}, seconds", int(passed), int(idle_s))
        time.sleep(min(1.0, idle_s - passed))
    progress.step(f"idle with {transport}, seconds", int(idle_s), int(idle_s))
    after = {name: cpu_seconds(agent) for name, agent in watched.items()}
    seconds = time.monotonic() - began
    rows = []
    for name in watched:
        own, children = (after[name][i] - before[name][i] for i in range(2))
        rows.append(
            Idle(
                agent=name,
                transport=transport,
                seconds=report.rounded(seconds) or seconds,
                processes=1 + len(list(descendants(watched[name].process.pid))),
                agent_percent=report.rounded(100 * own / seconds),
                children_percent=report.rounded(100 * children / seconds),
                total_percent=report.rounded(100 * (own + children) / seconds),
            )
        )
    return rows


def cpu_seconds(agent: AgentProcess) -> tuple[float, float]:
    """CPU time used so far by an agent and by its children."""
    pid = agent.process.pid
    return process_seconds(pid), sum(process_seconds(child) for child in descendants(pid))


def process_seconds(pid: int, proc: Path = Path("/proc")) -> float:
    """User and system time of all threads of a process, those that have ended included."""
    fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int, proc: Path = Path("/proc")) -> Iterator[int]:
    """Process ids of children, their children, and so on."""
    for task in sorted((proc / str(pid) / "task").iterdir()):
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from descendants(int(child), proc)
