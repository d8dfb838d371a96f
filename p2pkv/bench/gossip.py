"""``p2pkv bench gossip``: what the news of a thousand-node cell costs one agent, with real sockets and seals.

The agent's peer network runs in a process of its own, on a processor of its own; the other nodes are in this one. Each
of them tells its log five times a second, as a cell of a thousand does, and the agent tells its own to all of them.
"""

from __future__ import annotations

import os
import secrets
import tempfile
import time
from pathlib import Path
from typing import Final

import msgspec

from p2pkv.bench import report
from p2pkv.bench.child import Child
from p2pkv.bench.gossip_cell import OtherNodes
from p2pkv.bench.gossip_child import Told
from p2pkv.bench.gossip_join import Joining
from p2pkv.bench.progress import Progress
from p2pkv.bench.report import Claim, Report, Row, at_least, at_most
from p2pkv.errors import Unavailable
from p2pkv.gossip import keyfile
from p2pkv.gossip.keyring import KEY_BYTES, Key, Keyring

NODES: Final = 1_000
NODES_QUICK: Final = 100
BLOCKS: Final = 25_000
BLOCKS_QUICK: Final = 1_000
ROUND_S: Final = 0.2
CHANGES_PER_S: Final = 780
MEASURE_S: Final = 10.0
MEASURE_QUICK_S: Final = 2.0
LOAD_ROUNDS: Final = 40
LOAD_DELTAS: Final = 16


class Join(Row, frozen=True, kw_only=True):
    """A node that joins: simulated seconds until it has everything, of which so many were its own work."""

    case: str
    nodes: int
    entries: int
    seconds: float | None
    working_s: float | None
    received_mb: float | None
    wants: int


class Case(Row, frozen=True, kw_only=True):
    """One agent among so many nodes, for some seconds. CPU in percent of one core."""

    case: str
    nodes: int
    entries: int
    frames_in_per_s: float | None
    frames_out_per_s: float | None
    cpu_percent: float | None
    us_per_frame: float | None
    nacks: int
    rss_mb: float | None
    index_mb: float | None


def run(*, quick: bool = False, progress: Progress | None = None) -> Report:
    """Heartbeats alone, then the typical rate of changes."""
    progress = progress or Progress()
    nodes, blocks = (NODES_QUICK, BLOCKS_QUICK) if quick else (NODES, BLOCKS)
    seconds = MEASURE_QUICK_S if quick else MEASURE_S
    processors = sorted(os.sched_getaffinity(0))
    if len(processors) > 1:
        os.sched_setaffinity(0, set(processors[1:]))
    ring = Keyring([Key(secrets.token_bytes(KEY_BYTES))])
    try:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "keys"
            keyfile.write(path, ring)
            first = processors[0] if len(processors) > 1 else -1
            with Child("gossip_child", str(path), str(first), str(CHANGES_PER_S)) as agent:
                rows = measure(agent, ring, nodes, blocks, seconds, progress)
    finally:
        os.sched_setaffinity(0, set(processors))
    progress.say("a node joins")
    joined = Joining(nodes, blocks).run()
    join = Join(
        case="join",
        nodes=nodes,
        entries=joined.entries,
        seconds=report.rounded(joined.seconds),
        working_s=report.rounded(joined.working_s),
        received_mb=report.rounded(joined.received_bytes / 1e6),
        wants=joined.wants,
    )
    return report.make_report("gossip", [*rows, join], claims_of(rows, join), quick=quick)


def ask(agent: Child) -> Told:
    """What the agent says of itself."""
    return msgspec.json.decode(agent.ask("stats"), type=Told)


def measure(agent: Child, ring: Keyring, nodes: int, blocks: int, seconds: float, progress: Progress) -> list[Case]:
    """Bring the cell together, fill it, and measure."""
    told = ask(agent)
    rows = []
    with OtherNodes(nodes - 1, ring, ("127.0.0.1", told.port)) as others:
        if not others.serve(lambda: ask(agent).alive == nodes - 1, 60.0):
            raise Unavailable("the cell did not come together", alive=ask(agent).alive, nodes=nodes - 1)
        progress.say(f"{nodes - 1} nodes have met the agent")
        rows.append(one_case(agent, others, "heartbeats", 0, seconds))
        for number in range(LOAD_ROUNDS):  # in turns, so that nobody falls silent
            for node in others.nodes:
                node.store(blocks // LOAD_ROUNDS)
                node.flush(LOAD_DELTAS)
            others.serve(lambda: True, 1.0)
            progress.step("what the nodes hold is told", number + 1, LOAD_ROUNDS)
        wanted = (nodes - 1) * (blocks // LOAD_ROUNDS) * LOAD_ROUNDS
        if not others.serve(lambda: ask(agent).entries >= wanted, 120.0):
            raise Unavailable("the agent did not learn everything", entries=ask(agent).entries, wanted=wanted)
        rows.append(one_case(agent, others, "typical", int(CHANGES_PER_S * ROUND_S), seconds))
    return rows


def one_case(agent: Child, others: OtherNodes, name: str, changes: int, seconds: float) -> Case:
    """All others tell their logs in turn, evenly over each round."""
    before, began = ask(agent), time.monotonic()
    step = ROUND_S / len(others.nodes)
    turn = 0
    while (due := began + turn * step) < began + seconds:
        wait = due - time.monotonic()
        if wait > 0.001:
            time.sleep(wait)
        node = others.nodes[turn % len(others.nodes)]
        if changes:
            node.change(changes)
        node.flush()
        turn += 1
    after, took = ask(agent), time.monotonic() - began
    frames_in, frames_out = after.received - before.received, after.sent - before.sent
    cpu_s = after.cpu_s - before.cpu_s
    return Case(
        case=name,
        nodes=len(others.nodes) + 1,
        entries=after.entries,
        frames_in_per_s=report.rounded(frames_in / took),
        frames_out_per_s=report.rounded(frames_out / took),
        cpu_percent=report.rounded(100 * cpu_s / took),
        us_per_frame=report.rounded(1e6 * cpu_s / max(1, frames_in + frames_out)),
        nacks=after.nacks - before.nacks,
        rss_mb=report.rounded(after.rss_bytes / 1e6),
        index_mb=report.rounded(after.index_bytes / 1e6),
    )


def claims_of(rows: list[Case], join: Join) -> list[Claim]:
    """What issue 4 promises of a cell of a thousand; none of a smaller one."""
    if join.nodes < NODES:
        return []
    by_case = {row.case: row for row in rows}
    nan = float("nan")
    beats, typical = by_case["heartbeats"], by_case["typical"]
    return [
        at_least("gossip.frames_in", typical.frames_in_per_s or nan, 4_500, "1/s", "frames received"),
        at_least("gossip.frames_out", typical.frames_out_per_s or nan, 4_500, "1/s", "frames sent"),
        at_most("gossip.cpu_heartbeats", beats.cpu_percent or nan, 15, "%", "of a core, heartbeats alone"),
        at_most("gossip.cpu_typical", typical.cpu_percent or nan, 20, "%", "of a core, at 780 changes/s of each node"),
        at_most("gossip.join", join.seconds or nan, 10, "s", "a joiner has 25 million entries, at 10 Gb/s"),
        at_most("gossip.rss", typical.rss_mb or nan, 500, "MB", "memory with 25,000 blocks of each node"),
    ]
