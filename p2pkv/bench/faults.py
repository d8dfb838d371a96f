"""``p2pkv bench faults``: one long prefix from several holders at once, and what a bad one among them costs.

Hosts are network namespaces, each holder behind a link of 1 Gb/s (token bucket). One reader gets a prefix that all
holders have, again and again; each time another one, since its memory holds one and a half. The cases take turns. In
each fault's case one of four holders becomes bad while the get is under way or right before it, and is well again (or
replaced) afterwards.

And a crowd: so many engines at once want the same prefix, which the reader's node does not have; how much is pulled?
"""

from __future__ import annotations

import contextlib
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import xxhash

from p2pkv import netns as namespaces
from p2pkv.bench import report
from p2pkv.bench.agents import AgentProcess, Fleet, fleet, layout_of, put_all, wait_until
from p2pkv.bench.progress import Progress
from p2pkv.bench.report import Claim, Report, at_least, at_most, ratio
from p2pkv.errors import IntegrityError, P2PKVError, Unavailable
from p2pkv.netns import Network
from p2pkv.types import Tier

MIB: Final = 1 << 20
GIGABIT: Final = 1e9
HOLDERS: Final = 4
BLOCK_BYTES: Final = MIB
PREFIX_BLOCKS: Final = 256
PREFIXES: Final = 3
READER: Final = 0
ROUNDS: Final = 7
ROUNDS_QUICK: Final = 2
DEADLINE_MS: Final = 30_000
BAD_AFTER_S: Final = 0.2
"""Of a get, until its source is stopped or killed."""
SLOW: Final = 0.01
CROWD: Final = 64
CROWD_BLOCKS: Final = 64


class Row(report.Row, frozen=True, kw_only=True):
    """One case. ``gb_s`` at the median."""

    case: str
    holders: int
    seconds_p50: float
    seconds_max: float
    gb_s: float
    missing_blocks: int
    gets: int


class CrowdRow(report.Row, frozen=True, kw_only=True):
    """Gets at the same time for the same blocks. ``seconds``: until the last of them had all."""

    case: str
    gets: int
    prefix_bytes: int
    bytes_pulled: int
    seconds: float


class Sample(NamedTuple):
    """One get of the whole prefix."""

    seconds: float
    missing: int


def run(*, quick: bool = False, progress: Progress | None = None) -> Report:
    """Measure.

    Raises:
        IntegrityError: a get delivered bytes that are not the block's.
        Unavailable: this host gives no network namespaces; says what is missing.
    """
    if why := namespaces.missing():
        raise Unavailable("hosts for this benchmark cannot be made", reason=why, hint="Run it as root, with iproute2.")
    progress = progress or Progress()
    with contextlib.ExitStack() as exits:
        scene = Scene(exits.enter_context(fleet()), exits.enter_context(Network(1 + HOLDERS)), progress)
        samples = scene.measure(ROUNDS_QUICK if quick else ROUNDS)
        crowd = scene.crowd()
    rows = [row_of(case, samples[case.name]) for case in CASES]
    return report.make_report("faults", [*rows, crowd], [*claims_of(rows), claim_of(crowd)])


def claim_of(crowd: CrowdRow) -> Claim:
    """Issue 5, done when 5."""
    pulled = ratio(crowd.bytes_pulled, crowd.prefix_bytes)
    what = f"bytes pulled for {crowd.gets} gets of one cold prefix at once, against the prefix"
    return at_most("faults.crowd.pulled", pulled, 1.05, "x", what)


def row_of(case: Case, samples: Sequence[Sample]) -> Row:
    """A case's row."""
    seconds = [sample.seconds for sample in samples]
    middle = statistics.median(seconds)
    return Row(
        case=case.name,
        holders=case.holders,
        seconds_p50=middle,
        seconds_max=max(seconds),
        gb_s=PREFIX_BLOCKS * BLOCK_BYTES / middle / 1e9,
        missing_blocks=sum(sample.missing for sample in samples),
        gets=len(samples),
    )


def claims_of(rows: Sequence[Row]) -> list[Claim]:
    """Issue 5, done when 3 and 4."""
    middle = {row.case: row.seconds_p50 for row in rows}
    claims = [
        at_least(
            "faults.four_holders.speedup",
            ratio(middle["one holder"], middle["four holders"]),
            3.5,
            "x",
            "a 256 MiB prefix from four holders behind 1 Gb/s each, against one of them",
        )
    ]
    for case in CASES:
        if case.fault:
            claims.append(
                at_most(
                    f"faults.{case.fault}.over_three",
                    ratio(middle[case.name], middle["three holders"]),
                    1.3,
                    "x",
                    f"{case.name}, against three holders",
                )
            )
    lost = sum(row.missing_blocks for row in rows)
    claims.append(at_most("faults.missing", lost, 0, "blocks", "blocks that did not come in any of it"))
    return claims


class Case(NamedTuple):
    """``fault``: what happens to the last of the holders; empty: nothing."""

    name: str
    holders: int
    fault: str = ""


CASES: Final = (
    Case("one holder", 1),
    Case("three holders", 3),
    Case("four holders", 4),
    Case("four holders, one of them at 1 % of its speed", 4, "slow"),
    Case("four holders, one of them stopped meanwhile", 4, "stopped"),
    Case("four holders, one of them killed meanwhile", 4, "killed"),
)


class Scene:
    """A reader and its holders, each on a host of its own."""

    def __init__(self, agents: Fleet, network: Network, progress: Progress) -> None:
        self._agents = agents
        self._network = network
        self._progress = progress
        self._layout = layout_of(BLOCK_BYTES)
        rng = random.Random(0)
        self._blocks = [[rng.randbytes(BLOCK_BYTES) for _ in range(PREFIX_BLOCKS)] for _ in range(PREFIXES)]
        self._digests = [[xxhash.xxh3_128_digest(block) for block in blocks] for blocks in self._blocks]
        # Who has a prefix is part of the case: each number of holders has keys of its own for the same bytes.
        self._keys = {
            (holders, prefix): [rng.randbytes(32) for _ in range(PREFIX_BLOCKS)]
            for holders in sorted({case.holders for case in CASES})
            for prefix in range(PREFIXES)
        }
        prefix_bytes = PREFIX_BLOCKS * BLOCK_BYTES
        self._buffers = [memoryview(bytearray(BLOCK_BYTES)) for _ in range(PREFIX_BLOCKS)]
        self._reader = self._start("reader", READER, prefix_bytes + 128 * MIB)
        self._cache = agents.open(self._reader, self._layout)[1]
        self._started = 0
        self._owners: list[AgentProcess] = []
        for holder in range(HOLDERS):
            progress.say(f"faults: holder {holder + 1} of {HOLDERS}")
            self._owners.append(self._new_holder(holder))
        self._turn = 0

    def _start(self, name: str, host: int, capacity_bytes: int) -> AgentProcess:
        return self._agents.start(
            name,
            capacity_bytes=capacity_bytes,
            transport="tcp",
            http=host == READER,
            host=self._network.address(host),
            prefix=self._network.prefix(host),
        )

    def _new_holder(self, holder: int) -> AgentProcess:
        """An agent with every prefix that this holder has, behind its link."""
        mine = [which for which in self._keys if which[0] > holder]
        capacity = len(mine) * PREFIX_BLOCKS * BLOCK_BYTES + 64 * MIB
        self._started += 1
        owner = self._start(f"holder{holder}-{self._started}", 1 + holder, capacity)
        client, cache = self._agents.open(owner, self._layout)
        for which in mine:
            put_all(cache, self._keys[which], self._blocks[which[1]])
        client.close()
        self._network.rate(1 + holder, GIGABIT)
        return owner

    def _visible(self, case: Case, prefix: int) -> None:
        """Wait until the reader knows as many holders as the case has."""
        keys = self._keys[case.holders, prefix]

        def known() -> bool:
            depths = [depth[Tier.GONE] for depth in self._cache.match(keys).nodes.values()]
            return depths.count(len(keys)) == case.holders

        wait_until("all holders to be known at the reader", known)
        if here := self._cache.match(keys).local:
            raise P2PKVError("the reader still has some of the prefix", blocks=here)

    def measure(self, rounds: int) -> dict[str, list[Sample]]:
        """All cases in turns; the first round is not counted."""
        samples: dict[str, list[Sample]] = {case.name: [] for case in CASES}
        for round_ in range(rounds + 1):
            for n, case in enumerate(CASES):
                self._progress.step("faults", round_ * len(CASES) + n, (rounds + 1) * len(CASES))
                sample = self._get(case)
                if round_:
                    samples[case.name].append(sample)
        return samples

    def _get(self, case: Case) -> Sample:
        prefix = self._turn % PREFIXES
        self._turn += 1
        self._visible(case, prefix)
        keys = self._keys[case.holders, prefix]
        with self._fault(case.fault):
            began = time.perf_counter()
            ok = self._cache.get_into(keys, self._buffers, deadline_ms=DEADLINE_MS)
            took = time.perf_counter() - began
        came = [i for i, here in enumerate(ok) if here]
        self._check([self._buffers[i] for i in came], [self._digests[prefix][i] for i in came])
        return Sample(took, len(ok) - sum(ok))

    def crowd(self) -> CrowdRow:
        """Many gets at once, each on a connection of its own, of the beginning of a prefix that is not here."""
        case = CASES[2]
        prefix = self._turn % PREFIXES
        self._visible(case, prefix)
        keys = self._keys[case.holders, prefix][:CROWD_BLOCKS]
        buffers = self._buffers[:CROWD_BLOCKS]
        caches = [self._agents.open(self._reader, self._layout)[1] for _ in range(CROWD)]
        before = self._pulled_bytes()
        began = time.perf_counter()
        with ThreadPoolExecutor(CROWD) as threads:
            results = list(threads.map(lambda cache: cache.get_into(keys, buffers, deadline_ms=DEADLINE_MS), caches))
        took = time.perf_counter() - began
        if not all(all(ok) for ok in results):
            raise P2PKVError("a get of the crowd missed blocks", gets=sum(not all(ok) for ok in results))
        self._check(buffers, self._digests[prefix][:CROWD_BLOCKS])
        pulled = int(self._pulled_bytes() - before)
        return CrowdRow(
            case="a crowd for one cold prefix",
            gets=CROWD,
            prefix_bytes=CROWD_BLOCKS * BLOCK_BYTES,
            bytes_pulled=pulled,
            seconds=took,
        )

    def _pulled_bytes(self) -> float:
        with namespaces.inside(self._network.names[READER]):
            return self._reader.metrics()["p2pkv_pulled_bytes_total"]

    @staticmethod
    def _check(buffers: Sequence[memoryview], digests: Sequence[bytes]) -> None:
        if [xxhash.xxh3_128_digest(buffer) for buffer in buffers] != list(digests):
            raise IntegrityError("a get delivered bytes that are not the block's")

    @contextlib.contextmanager
    def _fault(self, fault: str) -> Iterator[None]:
        bad = HOLDERS - 1
        if not fault:
            yield
        elif fault == "slow":
            self._network.rate(1 + bad, GIGABIT * SLOW)
            try:
                yield
            finally:
                self._network.rate(1 + bad, GIGABIT)
        elif fault == "stopped":
            with self._later(lambda: self._owners[bad].process.send_signal(signal.SIGSTOP)):
                yield
            self._owners[bad].process.send_signal(signal.SIGCONT)
        elif fault == "killed":
            with self._later(self._owners[bad].kill):
                yield
            self._owners[bad].stop()
            self._owners[bad] = self._new_holder(bad)
        else:
            raise P2PKVError("no such fault", fault=fault)

    @contextlib.contextmanager
    def _later(self, do: Callable[[], object]) -> Iterator[None]:
        timer = threading.Timer(BAD_AFTER_S, do)
        timer.start()
        try:
            yield
        finally:
            timer.join()
