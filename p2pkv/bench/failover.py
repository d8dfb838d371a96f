"""``p2pkv bench failover``: a peer is killed, or stands still; do local hits feel it, and what do gets of it take?

Three agents; this process is the engine of the first. It gets local blocks one by one while another agent is killed
(SIGKILL) or stopped (SIGSTOP: its sockets stay open, and say nothing) in between, and right after that, when nobody
may know it yet, asks once for a block that only this agent had; then for others of its blocks, one by one. What that
costs is beside what a block that nobody has costs: the first beside the median of many, the longest of the others
beside the longest of as many, asked for in turn with them, since the longest of eight of anything is longer than a
median. Repeated with a fresh victim; the claims are about the median round for the ratios (two cores have other
things to do as well) and about the worst round for the misses.

This process has a processor to itself, and the agents have the others: where the scheduler puts two threads that take
turns, on one processor or on two, makes a factor of 2.5 in a virtual machine (waking an idle processor is slow there),
and a kill shakes that up without a p99 of ours being any worse. So the agents share what they have, the one that serves
the gets with those that see the death.

The kernel closes a killed process's sockets only after it has taken its memory down, which takes longer the more of it
was in use. Therefore one round more kills an agent with a large, full arena.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from p2pkv.bench import report
from p2pkv.bench.agents import AgentProcess, Fleet, fleet, layout_of, put_all, wait_remote, wait_until
from p2pkv.bench.progress import Progress
from p2pkv.bench.report import Claim, Report, Row, at_most, percentile, ratio
from p2pkv.client import Cache, Layout, Status
from p2pkv.errors import IntegrityError, P2PKVError

BLOCK_BYTES: Final = 64 << 10
CAPACITY_BYTES: Final = 64 << 20
GETS: Final = 50_000
KILL_AT: Final = 5_000
"""The get before which the victim is killed: nine tenths of them see its death."""
LOCAL_KEYS: Final = 64
VICTIM_KEYS: Final = 16
NOBODY_GETS: Final = 50
THEN_KEYS: Final = 8
"""Asked one by one after the first."""
ROUNDS: Final = 5
"""Of each fault."""
FAULTS: Final = ("killed", "stopped")
FULL_BYTES: Final = 1 << 30
"""The large, full arena."""
FILL_KEYS: Final = 256
DEADLINE_MS: Final = 2_000
P99_RATIO_MAX: Final = 1.1
MISS_MS_MAX: Final = 100.0
THEN_MS_MAX: Final = 1.0
"""None, as far as one can tell from one get."""


class Round(Row, frozen=True, kw_only=True):
    """One kill, or stop. p99 of local gets before, while and after it; how much longer the first get of a block of its
    took than that of a block that nobody has, the longest of those that followed than the longest of nobody's, and one
    when it was hidden."""

    round: int
    fault: str
    victim_bytes: int
    block_bytes: int
    gets: int
    before_p50_us: float | None
    before_p99_us: float | None
    during_p99_us: float | None
    after_p99_us: float | None
    during_over_before: float | None
    after_over_before: float | None
    nobody_ms: float | None
    nobody_then_ms: float | None
    first_extra_ms: float | None
    first_status: str
    then_extra_ms: float | None
    hidden_extra_ms: float | None
    hidden_after_ms: float | None


class Kill(NamedTuple):
    """What one round measured, in seconds."""

    before: list[float]
    during: list[float]
    after: list[float]
    nobody: float
    nobody_then: float
    first: float
    first_status: Status
    then: float
    hidden: float
    hidden_after: float


def run(*, quick: bool = False, transport: str = "tcp", progress: Progress | None = None) -> Report:
    """Measure.

    Raises:
        IntegrityError: a get delivered wrong bytes. P2PKVError: a local get missed.
    """
    progress = progress or Progress()
    rows: list[Round] = []
    rounds = 1 if quick else ROUNDS
    with fleet() as agents, Apart() as apart:
        scene = Scene(agents, transport, apart)
        for number in range(rounds):
            progress.step("rounds", number, rounds)
            rows += [row_of(number, fault, CAPACITY_BYTES, scene.lose_one(fault)) for fault in FAULTS]
        progress.step("rounds", rounds, rounds)
        if not quick:
            progress.say(f"an agent with {FULL_BYTES >> 30} GiB of blocks")
            rows.append(row_of(rounds, "killed", FULL_BYTES, scene.lose_one("killed", full=True)))
    return report.make_report("failover", rows, claims_of(rows), quick=quick)


def row_of(number: int, fault: str, victim_bytes: int, kill: Kill) -> Round:
    """Sum a round up."""
    before, during, after = (percentile(samples, 99) for samples in (kill.before, kill.during, kill.after))
    return Round(
        round=number,
        fault=fault,
        victim_bytes=victim_bytes,
        block_bytes=BLOCK_BYTES,
        gets=len(kill.before),
        before_p50_us=report.rounded(percentile(kill.before, 50) * 1e6),
        before_p99_us=report.rounded(before * 1e6),
        during_p99_us=report.rounded(during * 1e6),
        after_p99_us=report.rounded(after * 1e6),
        during_over_before=report.rounded(ratio(during, before)),
        after_over_before=report.rounded(ratio(after, before)),
        nobody_ms=report.rounded(kill.nobody * 1e3),
        nobody_then_ms=report.rounded(kill.nobody_then * 1e3),
        first_extra_ms=report.rounded((kill.first - kill.nobody) * 1e3),
        first_status=kill.first_status.name.lower(),
        then_extra_ms=report.rounded((kill.then - kill.nobody_then) * 1e3),
        hidden_extra_ms=report.rounded((kill.hidden - kill.nobody) * 1e3),
        hidden_after_ms=report.rounded(kill.hidden_after * 1e3),
    )


def claims_of(rows: list[Round]) -> list[Claim]:
    """The promises of issue 5, point 6."""
    claims = []
    got = sum(row.first_status == Status.OK.name.lower() for row in rows)
    claims.append(
        at_most("failover.blocks_from_the_dead", got, 0, "blocks", "gets of a lost node's block that said OK")
    )
    for fault in FAULTS:
        mine = [row for row in rows if row.fault == fault]
        small = [row for row in mine if row.victim_bytes != FULL_BYTES]
        during = percentile([nan_if_none(row.during_over_before) for row in small], 50)
        after = percentile([nan_if_none(row.after_over_before) for row in small], 50)
        what = f"p99 of {GETS} local gets over that of before, median of {len(small)} rounds"
        claims += [
            at_most(f"failover.{fault}.local_p99.during_over_before", during, P99_RATIO_MAX, "x", what),
            at_most(f"failover.{fault}.local_p99.after_over_before", after, P99_RATIO_MAX, "x", what),
        ]
        for bytes_, suffix in ((CAPACITY_BYTES, ""), (FULL_BYTES, ".full_arena")):
            of_size = [row for row in mine if row.victim_bytes == bytes_]
            if not of_size:
                continue
            first = max(nan_if_none(row.first_extra_ms) for row in of_size)
            then = max(max(nan_if_none(row.then_extra_ms), nan_if_none(row.hidden_extra_ms)) for row in of_size)
            what = f"over a get of what nobody has, the longest of {len(of_size)} rounds, arena of {bytes_ >> 20} MiB"
            claims += [
                at_most(f"failover.{fault}.first_get{suffix}", first, MISS_MS_MAX, "ms", what),
                at_most(f"failover.{fault}.then{suffix}", then, THEN_MS_MAX, "ms", what),
            ]
    return claims


def nan_if_none(value: float | None) -> float:
    """For arithmetic on what may not have been measured."""
    return float("nan") if value is None else value


class Apart:
    """The calling thread, and what it starts, on the first processor of its own; within :meth:`others` on the rest.

    Does nothing where there is only one.
    """

    def __enter__(self) -> Apart:
        self._all = sorted(os.sched_getaffinity(0))
        self._put(self._all[:1])
        return self

    def __exit__(self, *_: object) -> None:
        self._put(self._all)

    @contextlib.contextmanager
    def others(self) -> Iterator[None]:
        """What is started in here stays on the other processors."""
        self._put(self._all[1:])
        try:
            yield
        finally:
            self._put(self._all[:1])

    def _put(self, processors: list[int]) -> None:
        os.sched_setaffinity(0, processors or self._all)


class Scene:
    """Two agents that stay and one that is killed and replaced, with blocks at each."""

    def __init__(self, agents: Fleet, transport: str, apart: Apart) -> None:
        self._agents = agents
        self._apart = apart
        self._transport = transport
        self._layout: Layout = layout_of(BLOCK_BYTES)
        self._rng = random.Random(0)
        reader = self._start("reader")
        bystander = self._start("bystander")
        self._cache = agents.open(reader, self._layout)[1]
        self._blocks = self._fill(self._cache, LOCAL_KEYS)
        there = self._fill(agents.open(bystander, self._layout)[1], VICTIM_KEYS)
        wait_remote(self._cache, list(there))
        self._buffer = bytearray(BLOCK_BYTES)
        self._victims = 0

    def _start(self, name: str, capacity_bytes: int = CAPACITY_BYTES) -> AgentProcess:
        with self._apart.others():
            return self._agents.start(name, capacity_bytes=capacity_bytes, transport=self._transport)

    def _fill(self, cache: Cache, count: int) -> dict[bytes, bytes]:
        blocks = {self._rng.randbytes(32): self._rng.randbytes(BLOCK_BYTES) for _ in range(count)}
        put_all(cache, list(blocks), list(blocks.values()))
        return blocks

    def lose_one(self, fault: str, *, full: bool = False) -> Kill:
        """One round with a fresh victim, whose large arena is full of other blocks if asked for."""
        victim = self._start(f"victim{self._victims}", FULL_BYTES if full else CAPACITY_BYTES)
        self._victims += 1
        client, cache = self._agents.open(victim, self._layout)
        for _ in range(FULL_BYTES // BLOCK_BYTES // FILL_KEYS if full else 0):
            self._fill(cache, FILL_KEYS)
        keys = list(self._fill(cache, VICTIM_KEYS))
        client.close()
        wait_remote(self._cache, keys)
        if self._cache.get_into([keys[0]], [self._buffer], deadline_ms=DEADLINE_MS) != [True]:
            raise P2PKVError("the victim's blocks cannot be read while it lives")  # and its connection is in use now
        asked: list[tuple[float, Status]] = []
        nobodys: list[float] = []
        lost_at = 0.0

        def lose(i: int) -> None:
            nonlocal lost_at
            if i == KILL_AT:
                lost_at = time.perf_counter()
                victim.kill() if fault == "killed" else victim.process.send_signal(signal.SIGSTOP)
                asked.append(self._ask(keys[1]))
                for key in keys[2 : 2 + THEN_KEYS]:
                    nobodys.append(self._ask(self._rng.randbytes(32))[0])
                    asked.append(self._ask(key))

        gc.collect()
        gc.disable()
        try:
            self._local_gets(None)  # warm
            nobody = percentile([self._ask(self._rng.randbytes(32))[0] for _ in range(NOBODY_GETS)], 50)
            before = self._local_gets(None)
            during = self._local_gets(lose)
            wait_until("the lost node's entries to be hidden", lambda: self._cache.match([keys[-1]]).present == [None])
            hidden_after = time.perf_counter() - lost_at
            self._local_gets(None)  # warm, as before: the first after seconds of waiting take longer without any fault
            after = self._local_gets(None)
            self._ask(self._rng.randbytes(32))  # the first question after seconds wakes the agent, whatever it is about
            hidden, _ = self._ask(keys[-2])
        finally:
            gc.enable()
            if fault == "stopped":
                victim.kill()
        (first, status), then = asked[0], max(took for took, _ in asked[1:])
        return Kill(before, during, after, nobody, max(nobodys), first, status, then, hidden, hidden_after)

    def _ask(self, key: bytes) -> tuple[float, Status]:
        began = time.perf_counter()
        status = self._cache.get_statuses([key], [self._buffer], DEADLINE_MS)[0]
        return time.perf_counter() - began, status

    def _local_gets(self, before_each: Callable[[int], None] | None) -> list[float]:
        keys = list(self._blocks)
        seconds = []
        for i in range(GETS):
            if before_each is not None:
                before_each(i)
            key = keys[i % len(keys)]
            began = time.perf_counter()
            ok = self._cache.get_into([key], [self._buffer], deadline_ms=DEADLINE_MS)
            seconds.append(time.perf_counter() - began)
            if ok != [True]:
                raise P2PKVError("a local get missed", get=i)
            if self._buffer != self._blocks[key]:
                raise IntegrityError("a local get delivered wrong bytes", key=key.hex())
        return seconds
