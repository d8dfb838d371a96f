"""``p2pkv bench fetch``: what a get from a peer takes, beside memcpy, raw TCP and raw NIXL of the same bytes.

With ``--rival`` beside another system's get, too (:mod:`p2pkv.bench.rivals`).

Two agents and this process, which is the engine: it puts blocks at the owner and gets them at the reader, either way
that an engine has: ``get_into`` its own buffer, or ``load`` into a region that the agent writes to.

* Every get is a real pull: the reader's arena holds fewer blocks than the ring that is read round and round, and the
  reader is asked, before each get, which of the blocks it does not have.
* Every block's bytes are checked by another implementation of the checksum than the agents', outside the timed part.
* Cases, ways and limits take turns, in a new random order each round: they see the same machine.
* ``memcpy_region`` is memcpy into the region that ``load`` writes to: other memory (4 KiB pages of a memfd) has another
  speed. Each case copies from a source of its own, so that it is as hot as the block that ours reads, not hotter.
* Beside a rival, whose processes have slept while others were measured, its gets, ours of blocks that are elsewhere and
  raw reads follow one of one block that does not count: not to be compared with what is measured without a rival.
* Nothing is measured cold: buffers, arenas, connections and limits have been through all blocks once before.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import mmap
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import xxhash

from p2pkv.bench import raw_nixl, report, rivals
from p2pkv.bench.agents import AgentProcess, Fleet, fleet, layout_of, put_all, wait_remote
from p2pkv.bench.memcpy import Memcpy
from p2pkv.bench.progress import Progress
from p2pkv.bench.raw_nixl import RawNixl
from p2pkv.bench.raw_tcp import RawTcp
from p2pkv.bench.report import Claim, Report, Times, at_least, at_most, below, ratio
from p2pkv.bench.rival_child import Shape
from p2pkv.bench.rivals import RIVALS
from p2pkv.client import AgentClient, Cache
from p2pkv.errors import IntegrityError, InvalidArgument, P2PKVError, TransportUnavailable

MIB: Final = 1 << 20
KIB: Final = 1 << 10
TRANSPORTS: Final = ("tcp", "nixl")
OURS: Final = ("get_into", "load")
"""The two ways; everything else that is measured is a limit, or a rival."""
DEADLINE_MS: Final = 10_000
ROUNDS: Final = 300
ROUNDS_QUICK: Final = 40
FAILED_SHARE_MAX: Final = 0.05
"""More failures than this, and it is not a measurement any more."""


class Case(NamedTuple):
    """So many blocks in one call; ``every``: measured in each so many-th round, since large ones take long."""

    name: str
    blocks: int
    every: int
    local: bool = False


class Phase(NamedTuple):
    """One block size with a pair of agents of its own, so that layouts do not take each other's memory away.

    ``reader_bytes`` is twice the largest batch or more, since one engine may hold half of an arena under lease;
    ``ring_blocks`` is more than that holds.
    """

    block_bytes: int
    ring_blocks: int
    reader_bytes: int
    cases: tuple[Case, ...]


PHASES: Final = (
    Phase(64 * KIB, 768, 32 * MIB, (Case("64KiB", 1, 1), Case("64KiB.local", 1, 1, local=True))),
    Phase(256 * KIB, 320, 64 * MIB, (Case("256KiB", 1, 1), Case("16x256KiB", 16, 2))),
    Phase(
        MIB,
        288,
        192 * MIB,
        (
            Case("1MiB", 1, 1),
            Case("1MiB.local", 1, 1, local=True),
            Case("16x1MiB", 16, 4),
            Case("16x1MiB.local", 16, 4, local=True),
            Case("64x1MiB", 64, 8),
        ),
    ),
    Phase(4 * MIB, 64, 192 * MIB, (Case("4MiB", 1, 1), Case("4MiB.local", 1, 1, local=True))),
)


class Promise(NamedTuple):
    """A way's p50 against that of a limit: at most ``value`` times it, or at least ``value`` of its rate."""

    transport: str
    case: str
    against: str
    value: float
    share: bool
    way: str = "get_into"


def _over(case: str, value: float) -> Promise:
    return Promise("tcp", case, "raw_tcp", value, share=False)


def _of(transport: str, case: str, value: float) -> Promise:
    return Promise(transport, case, f"raw_{transport}", value, share=True)


PROMISES: Final = (
    *(_over(case, value) for case, value in (("256KiB", 2.0), ("1MiB", 1.5), ("4MiB", 1.3))),
    *(_of("tcp", case, 0.9) for case in ("16x256KiB", "16x1MiB", "64x1MiB")),
    *(
        Promise("tcp", f"{case}.local", against, 0.9, share=True, way=way)
        for case in ("1MiB", "16x1MiB", "4MiB")
        for way, against in (("get_into", "memcpy"), ("load", "memcpy_region"))
    ),
    *(_of("nixl", case, value) for case, value in (("256KiB", 0.5), ("16x256KiB", 0.8))),
    *(_of("nixl", case, 0.9) for case in ("16x1MiB", "64x1MiB")),
)
"""Of issue 5: what a get from one peer takes, and what a block that is here takes."""

AS_SHIPPED: Final = "; as shipped: out of the owner's memory up to neighbour_max"
"""Both agents are on one host, where a get of up to ``transport.neighbour_max`` (4 MiB) does not go over NIXL."""

LOCAL_64K_US: Final = 100.0
"""A load of a block that is here, of 64 KiB."""


def run(
    *,
    transports: Sequence[str] = (),
    rival: Sequence[str] = (),
    quick: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Measure.

    Args:
        transports: of :data:`TRANSPORTS`; empty = those that this host has.
        rival: of :data:`p2pkv.bench.rivals.RIVALS`: these too, each beside the transport that it is like.
        quick: fewer samples.

    Raises:
        InvalidArgument: no such transport or rival. TransportUnavailable: it is not installed.
        Unavailable: a rival is not installed, or does not run here.
        IntegrityError: a get delivered bytes that are not the block's.
    """
    progress = progress or Progress()
    rows: list[Times] = []
    chosen = choose(transports, progress)
    beside = rivals.choose(rival, chosen)
    for name in beside:
        progress.say(f"fetch: beside {rivals.version(name)}")
    for transport in chosen:
        for phase in PHASES:
            rows += measure(phase, transport, ROUNDS_QUICK if quick else ROUNDS, progress, beside)
    return report.make_report("fetch", rows, claims_of(rows), quick=quick)


def choose(transports: Sequence[str], progress: Progress) -> Sequence[str]:
    """The transports to measure."""
    for transport in transports:
        if transport not in TRANSPORTS:
            raise InvalidArgument("no such transport", transport=transport, hint=f"One of {', '.join(TRANSPORTS)}.")
    if raw_nixl.installed():
        return transports or TRANSPORTS
    if "nixl" in transports:
        raise TransportUnavailable("NIXL is not installed", hint="`make nixl`, or leave it out: --transport tcp.")
    progress.say("NIXL is not installed: only tcp is measured (`make nixl` installs it)")
    return ("tcp",)


def claims_of(rows: Sequence[Times]) -> list[Claim]:
    """The promises about transports that were measured."""
    middles = {(row.transport, row.case, row.way): row.p50_us for row in rows}
    measured = {row.transport for row in rows}
    claims = []
    for transport, case, against, limit, share, way in PROMISES:
        if transport not in measured:
            continue
        ours, theirs = middles.get((transport, case, way)), middles.get((transport, case, against))
        name = f"fetch.{transport}.{case}" if way == "get_into" else f"fetch.{transport}.{case}.{way}"
        if share:
            shipped = AS_SHIPPED if transport == "nixl" and case in ("256KiB", "16x256KiB") else ""
            what = f"{way}'s GB/s at p50 of that of {against}, interleaved{shipped}"
            claims.append(at_least(f"{name}.of_{against}", ratio(theirs, ours), limit, "x", what))
        else:
            what = f"{way}'s p50 over that of {against}, interleaved"
            claims.append(at_most(f"{name}.over_{against}", ratio(ours, theirs), limit, "x", what))
    if "tcp" in measured:
        local_us = ratio(middles.get(("tcp", "64KiB.local", "load")), 1.0)
        claims.append(
            at_most("fetch.tcp.64KiB.local.load", local_us, LOCAL_64K_US, "us", "p50 of a load, to its result")
        )
    for rival in sorted({row.way for row in rows} & RIVALS.keys()):
        transport, what = RIVALS[rival].transport, f"get_into's p50 over that of {RIVALS[rival].call}, interleaved"
        for case in RIVALS[rival].faster:
            times = ratio(middles.get((transport, case, "get_into")), middles.get((transport, case, rival)))
            claims.append(below(f"fetch.{transport}.{case}.over_{rival}", times, 1.0, "x", what))
    return claims


def measure(phase: Phase, transport: str, rounds: int, progress: Progress, beside: Sequence[str] = ()) -> list[Times]:
    """All cases of one block size over one transport; ``beside``: the rivals that run here."""
    with contextlib.ExitStack() as exits:
        what = f"{transport}, blocks of {phase.block_bytes >> 10} KiB"
        progress.say(f"fetch: {what}")
        bench = Bench(exits.enter_context(fleet()), phase, transport)
        batch_bytes = bench.batch * phase.block_bytes
        sources = {case: Memcpy(case.blocks * phase.block_bytes) for case in phase.cases}
        tcp = exits.enter_context(RawTcp(batch_bytes))
        nixl = exits.enter_context(RawNixl(batch_bytes)) if transport == "nixl" else None
        shape = Shape(phase.block_bytes, phase.ring_blocks, bench.batch)
        others = {
            name: exits.enter_context(RIVALS[name].start(shape))
            for name in beside
            if RIVALS[name].transport == transport
        }

        def ways(case: Case) -> dict[str, Callable[[], float | None]]:
            buffers, memcpy = bench.buffers[: case.blocks], sources[case]
            out: dict[str, Callable[[], float | None]] = {
                "memcpy": lambda: memcpy.read(buffers),
                "get_into": lambda: bench.get_into(case, awake=bool(others) and not case.local),
                "load": lambda: bench.load(case),
            }
            if case.local:
                out["memcpy_region"] = lambda: memcpy.read(bench.region(case))
            else:
                out["raw_tcp"] = awake(lambda count: tcp.read(buffers[:count]), case, bool(others))
                if nixl is not None:
                    out["raw_nixl"] = awake(lambda count: nixl.read(count, phase.block_bytes), case, bool(others))
                out |= {name: functools.partial(other.read, case.blocks) for name, other in others.items()}
            return out

        turns = [(case, way, call) for case in phase.cases for way, call in ways(case).items()]
        bench.warm()
        for _, way, call in turns * 3:
            if way not in OURS:
                call()
        samples = interleave(turns, rounds, what, progress)
    return [row for case in phase.cases for row in rows_of(case, phase, transport, samples)]


def awake(read: Callable[[int], float], case: Case, before: bool) -> Callable[[], float]:
    """A limit's read of the case's blocks; ``before``: after one of one block that does not count, as all others'."""

    def call() -> float:
        if before:
            read(1)
        return read(case.blocks)

    return call


class Samples:
    """What was measured of one way of one case."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.failed = 0


Turn = tuple[Case, str, Callable[[], float | None]]


def interleave(turns: Sequence[Turn], rounds: int, what: str, progress: Progress) -> dict[tuple[str, str], Samples]:
    """Call everything in turns; a call returns its seconds, or None where it failed.

    Raises:
        P2PKVError: too many of a kind failed.
    """
    samples = {(case.name, way): Samples() for case, way, _ in turns}
    rng = random.Random(0)
    gc.collect()
    gc.disable()  # its pauses are this process's, not the cache's
    try:
        for round_ in range(rounds):
            progress.step(what, round_, rounds)
            due = [turn for turn in turns if round_ % turn[0].every == 0]
            rng.shuffle(due)
            for case, way, call in due:
                sample = samples[(case.name, way)]
                seconds = call()
                if seconds is None:
                    sample.failed += 1
                else:
                    sample.seconds.append(seconds)
        progress.step(what, rounds, rounds)
    finally:
        gc.enable()
    for (case_name, way), sample in samples.items():
        if sample.failed > FAILED_SHARE_MAX * (sample.failed + len(sample.seconds)):
            raise P2PKVError("too many gets failed", case=case_name, way=way, failed=sample.failed, of=rounds)
    return samples


def rows_of(case: Case, phase: Phase, transport: str, samples: dict[tuple[str, str], Samples]) -> list[Times]:
    """The rows of one case: first the limits and rivals, then each way with what it is over."""
    mine = {way: sample for (name, way), sample in samples.items() if name == case.name}
    limits = {way: sample.seconds for way, sample in mine.items() if way not in OURS}
    return [
        report.times(
            mine[way].seconds,
            case=case.name,
            way=way,
            transport=transport,
            blocks=case.blocks,
            block_bytes=phase.block_bytes,
            failed=mine[way].failed,
            limits=limits if way in OURS else {},
        )
        for way in (*limits, *OURS)
    ]


class Bench:
    """A pair of agents with a ring of blocks at the owner, and this process's buffers and region."""

    def __init__(self, agents: Fleet, phase: Phase, transport: str) -> None:
        self.phase = phase
        self.batch = max(case.blocks for case in phase.cases)
        ring_bytes = phase.ring_blocks * phase.block_bytes
        self.owner = agents.start("owner", capacity_bytes=ring_bytes + 128 * MIB, transport=transport)
        self.reader: AgentProcess = agents.start("reader", capacity_bytes=phase.reader_bytes, transport=transport)
        layout = layout_of(phase.block_bytes)
        self._at_owner = agents.open(self.owner, layout)
        self._at_reader = agents.open(self.reader, layout)
        self.buffers = [memoryview(bytearray(b"\x01") * phase.block_bytes) for _ in range(self.batch)]
        self._region = _Region(self.batch, phase.block_bytes)
        self._regions = {
            cache: cache.map_region(self._region.fd, slots=self.batch) for _, cache in (self._at_owner, self._at_reader)
        }
        self._keys: list[bytes] = []
        self._digests: dict[bytes, bytes] = {}
        self._put_ring()
        self._next = 0

    def _put_ring(self) -> None:
        rng = random.Random(self.phase.block_bytes)
        while len(self._keys) < self.phase.ring_blocks:
            count = min(32, self.phase.ring_blocks - len(self._keys))
            blocks = [rng.randbytes(self.phase.block_bytes) for _ in range(count)]
            keys = [rng.randbytes(32) for _ in range(count)]
            put_all(self._at_owner[1], keys, blocks)
            self._keys += keys
            self._digests.update((key, xxhash.xxh3_128_digest(block)) for key, block in zip(keys, blocks, strict=True))
        wait_remote(self._at_reader[1], self._keys)

    def warm(self) -> None:
        """Read the whole ring once in both ways: connections, page tables and caches are as they will be.

        Raises:
            P2PKVError: a get failed.
        """
        batch, one, here = Case("warm", self.batch, 1), Case("warm", 1, 1), Case("warm", 1, 1, local=True)
        batches = -(-self.phase.ring_blocks // self.batch)
        for case in [batch] * batches + [one, here] * 8:
            if self.get_into(case) is None or self.load(case) is None:
                raise P2PKVError("a get failed while nothing else was going on", blocks=case.blocks)

    def get_into(self, case: Case, *, awake: bool = False) -> float | None:
        """One get into this process's buffers; seconds, or None where a block did not come.

        ``awake``: after one that does not count, as rivals' gets are (:mod:`p2pkv.bench.rival_child`).
        """
        if awake:
            self.get_into(Case("awake", 1, 1, local=case.local))
        _, cache = self._end(case)
        keys = self._choose(case)
        buffers = self.buffers[: case.blocks]
        began = time.perf_counter()
        ok = cache.get_into(keys, buffers, deadline_ms=DEADLINE_MS)
        took = time.perf_counter() - began
        if not all(ok):
            return None
        self._check(keys, buffers)
        return took

    def load(self, case: Case) -> float | None:
        """One load into the region, waited for; seconds, or None where a block did not come."""
        client, cache = self._end(case)
        keys = self._choose(case)
        slots = list(range(case.blocks))
        began = time.perf_counter()
        job = cache.load(keys, self._regions[cache], slots, deadline_ms=DEADLINE_MS)
        results = client.poll(2 * DEADLINE_MS)
        took = time.perf_counter() - began
        if [result.job_id for result in results] != [job] or not all(results[0].ok):
            return None
        expected = "local" if case.local else "peer"
        if any(source != expected for source in results[0].sources):
            return None
        self._check(keys, self._region.slots[: case.blocks])
        return took

    def region(self, case: Case) -> list[memoryview]:
        """The slots that :meth:`load` writes to."""
        return self._region.slots[: case.blocks]

    def _end(self, case: Case) -> tuple[AgentClient, Cache]:
        return self._at_owner if case.local else self._at_reader

    def _choose(self, case: Case) -> list[bytes]:
        """The next keys of the ring that the reader does not have; for a local hit, keys that the owner has."""
        if case.local:
            return self._keys[: case.blocks]  # the same again and again, like memcpy's source
        ring = self._keys[self._next :] + self._keys[: self._next]
        present = self._at_reader[1].match(ring).present
        away = [i for i, where in enumerate(present) if where == "peer"][: case.blocks]
        if len(away) < case.blocks:
            raise P2PKVError("the reader holds too much of the ring", wanted=case.blocks, remote=len(away))
        self._next = (self._next + away[-1] + 1) % len(self._keys)
        return [ring[i] for i in away]

    def _check(self, keys: Sequence[bytes], blocks: Sequence[memoryview]) -> None:
        for key, block in zip(keys, blocks, strict=True):
            if xxhash.xxh3_128_digest(block) != self._digests[key]:
                raise IntegrityError("a get delivered bytes that are not the block's", key=key.hex())


class _Region:
    """Shared memory of this process, touched."""

    def __init__(self, slots: int, slot_bytes: int) -> None:
        self.fd = os.memfd_create("p2pkv-bench", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, slots * slot_bytes)
        memory = memoryview(mmap.mmap(self.fd, slots * slot_bytes))
        memory[:] = bytes(len(memory))
        self.slots = [memory[i * slot_bytes : (i + 1) * slot_bytes] for i in range(slots)]
