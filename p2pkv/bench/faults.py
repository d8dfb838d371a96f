"""``p2pkv bench faults``: one long prefix from several holders at once, and what a bad one among them costs.

Hosts are network namespaces, each holder behind a link of 1 Gb/s (token bucket). One reader gets a prefix that all
holders have, again and again; each time another one, since its memory holds one and a half. The cases take turns, in a
new random order each round. In each fault's case one of four holders becomes bad while the get is under way or right
before it, and is well again (or replaced) afterwards.

A bad holder that nobody asks costs nothing, so it is shown that it was a source: before each case with four holders the
reader has no breaker open and gets another prefix, uncounted, until all four give their part of it; and a holder is
stopped or killed when it has given its part of the counted get for a while, by what its link has sent.

And a crowd: so many engines at once want the same prefix, which the reader's node does not have; how much do the
holders send? By their own counters, which count everything that leaves them, not by what the reader keeps of it.
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
from pathlib import Path
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
BAD: Final = HOLDERS - 1
"""The holder that faults happen to."""
ROUNDS: Final = 7
ROUNDS_QUICK: Final = 2
DEADLINE_MS: Final = 30_000
BAD_AFTER_BYTES: Final = 16 * MIB
"""Of a get (a quarter of the holder's part, and a seventh of a second), until its source is stopped or killed."""
LOOK_EVERY_S: Final = 0.005
PART_BYTES: Final = PREFIX_BLOCKS * BLOCK_BYTES // HOLDERS // 2
"""Who gives less than half of its fair part of a prefix is hardly a source."""
HEALTHY_TRIES: Final = 8
"""Uncounted gets until all four give that; if they never do, the claims say so."""
SLOW: Final = 0.01
SLOW_BYTES: Final = 64 << 10
"""At 1 % of 1 Gb/s a holder can send a megabyte in the time of such a get; this is more than gossip sends."""
CROWD: Final = 64
CROWD_BLOCKS: Final = 64
SERVED: Final = "p2pkv_served_bytes_total"
NOT_ASKED: Final = "p2pkv_peers_not_asked"
WELL_AGAIN_S: Final = 60.0


class Row(report.Row, frozen=True, kw_only=True):
    """One case. ``gb_s`` at the median. What the bad holder's link sent, the least of all gets: ``healthy_bytes``, of
    the uncounted get right before; ``given_bytes``, of the counted one until the holder was stopped or killed (0: the
    get was over before that), or, of a slow holder, in all of it. None where no holder is bad."""

    case: str
    holders: int
    seconds_p50: float
    seconds_max: float
    gb_s: float
    missing_blocks: int
    gets: int
    healthy_bytes: int | None
    given_bytes: int | None


class CrowdRow(report.Row, frozen=True, kw_only=True):
    """Gets at the same time for the same blocks. ``seconds``: until the last of them had all. ``bytes_sent``: by all
    holders, whatever became of it."""

    case: str
    gets: int
    prefix_bytes: int
    bytes_sent: int
    seconds: float


class Sample(NamedTuple):
    """One get of the whole prefix; what the last holder's link sent in the get before it, and in it while it was well
    (see :class:`Row`)."""

    seconds: float
    missing: int
    healthy_bytes: int = 0
    given_bytes: int = 0


def run(*, quick: bool = False, progress: Progress | None = None) -> Report:
    """Measure.

    Raises:
        IntegrityError: a get delivered bytes that are not the block's.
        Unavailable: this host gives no network namespaces; says what is missing.
    """
    if why := namespaces.missing(rates=True):
        raise Unavailable("hosts for this benchmark cannot be made", reason=why, hint="Run it as root, with iproute2.")
    progress = progress or Progress()
    with contextlib.ExitStack() as exits:
        scene = Scene(exits.enter_context(fleet()), exits.enter_context(Network(1 + HOLDERS)), progress)
        samples = scene.measure(ROUNDS_QUICK if quick else ROUNDS)
        crowd = scene.crowd()
    rows = [row_of(case, samples[case.name]) for case in CASES]
    return report.make_report("faults", [*rows, crowd], [*claims_of(rows), claim_of(crowd)], quick=quick)


def claim_of(crowd: CrowdRow) -> Claim:
    """Issue 5, done when 5."""
    pulled = ratio(crowd.bytes_sent, crowd.prefix_bytes)
    what = f"bytes that the holders sent for {crowd.gets} gets of one cold prefix at once, against the prefix"
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
        healthy_bytes=min(sample.healthy_bytes for sample in samples) if case.fault else None,
        given_bytes=min(sample.given_bytes for sample in samples) if case.fault else None,
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
    by_case = {row.case: row for row in rows}
    for case in CASES:
        if case.fault:
            row = by_case[case.name]
            what = "the least that the bad holder had sent of the get right before, while it was well"
            name = f"faults.{case.fault}.was_a_source"
            claims.append(at_least(name, _mib(row.healthy_bytes), PART_BYTES / MIB, "MiB", what))
            least = SLOW_BYTES if case.fault == "slow" else BAD_AFTER_BYTES
            until = "in all of it" if case.fault == "slow" else f"when it was {case.fault}"
            what = f"the least that the bad holder had sent of the measured get, {until}"
            claims.append(at_least(f"faults.{case.fault}.had_given", _mib(row.given_bytes), least / MIB, "MiB", what))
    lost = sum(row.missing_blocks for row in rows)
    claims.append(at_most("faults.missing", lost, 0, "blocks", "blocks that did not come in any of it"))
    return claims


def _mib(count: int | None) -> float:
    return ratio(count, MIB)


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
        self._rng = rng
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
            http=True,
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
        """All cases in turns, in another order each time; the first round is not counted."""
        samples: dict[str, list[Sample]] = {case.name: [] for case in CASES}
        for round_ in range(rounds + 1):
            for n, case in enumerate(self._rng.sample(CASES, len(CASES))):
                self._progress.step("faults", round_ * len(CASES) + n, (rounds + 1) * len(CASES))
                self._all_asked()
                healthy = self._healthy() if case.holders == HOLDERS else 0
                sample = self._get(case)
                if round_:
                    samples[case.name].append(sample._replace(healthy_bytes=healthy))
        return samples

    def _healthy(self) -> int:
        """Gets that do not count, until all four holders are sources; what the last holder's link sent of the last."""
        sent = 0
        for _ in range(HEALTHY_TRIES):
            before = [self._sent(holder) for holder in range(HOLDERS)]
            self._get(CASES[2])
            each = [self._sent(holder) - before[holder] for holder in range(HOLDERS)]
            sent = each[BAD]
            if min(each) >= PART_BYTES:
                break
            self._all_asked()
        return sent

    def _all_asked(self) -> None:
        wait_until("no holder's breaker to be open", lambda: not self._metric(READER, NOT_ASKED), WELL_AGAIN_S)

    def _get(self, case: Case) -> Sample:
        prefix = self._turn % PREFIXES
        self._turn += 1
        self._visible(case, prefix)
        keys = self._keys[case.holders, prefix]
        with self._fault(case.fault) as given:
            began = time.perf_counter()
            ok = self._cache.get_into(keys, self._buffers, deadline_ms=DEADLINE_MS)
            took = time.perf_counter() - began
        came = [i for i, here in enumerate(ok) if here]
        self._check([self._buffers[i] for i in came], [self._digests[prefix][i] for i in came])
        return Sample(took, len(ok) - sum(ok), given_bytes=given.bytes)

    def crowd(self) -> CrowdRow:
        """Many gets at once, each on a connection of its own, of the beginning of a prefix that is not here.

        All of what they get would be 4 GiB. So each get has buffers of its own for a few of the blocks, and shares the
        others: each block comes into buffers that one get alone writes to, for several of the gets.
        """
        case = CASES[2]
        self._all_asked()
        self._healthy()
        prefix = self._turn % PREFIXES
        self._visible(case, prefix)
        keys = self._keys[case.holders, prefix][:CROWD_BLOCKS]
        digests = self._digests[prefix][:CROWD_BLOCKS]
        shared = [memoryview(bytearray(BLOCK_BYTES)) for _ in range(CROWD_BLOCKS)]
        own = PREFIX_BLOCKS // CROWD
        for buffer in self._buffers:
            buffer[:] = bytes(BLOCK_BYTES)
        mine = {  # of each get: which of the blocks, and where to
            get: {(get + i * CROWD_BLOCKS // own) % CROWD_BLOCKS: self._buffers[get * own + i] for i in range(own)}
            for get in range(CROWD)
        }
        caches = [self._agents.open(self._reader, self._layout)[1] for _ in range(CROWD)]

        def ask(get: int) -> list[bool]:
            buffers = [mine[get].get(block, shared[block]) for block in range(CROWD_BLOCKS)]
            return caches[get].get_into(keys, buffers, deadline_ms=DEADLINE_MS)

        before = self._served()
        began = time.perf_counter()
        with ThreadPoolExecutor(CROWD) as threads:
            results = list(threads.map(ask, range(CROWD)))
        took = time.perf_counter() - began
        sent = self._served() - before
        if not all(all(ok) for ok in results):
            raise P2PKVError("a get of the crowd missed blocks", gets=sum(not all(ok) for ok in results))
        self._check(shared, digests)
        for blocks in mine.values():
            self._check(list(blocks.values()), [digests[block] for block in blocks])
        return CrowdRow(
            case="a crowd for one cold prefix",
            gets=CROWD,
            prefix_bytes=CROWD_BLOCKS * BLOCK_BYTES,
            bytes_sent=sent,
            seconds=took,
        )

    def _metric(self, host: int, name: str) -> float:
        """All samples of a metric, whatever their labels."""
        agent = self._reader if host == READER else self._owners[host - 1]
        with namespaces.inside(self._network.names[host]):
            samples = agent.metrics()
        found = [value for sample, value in samples.items() if sample.partition("{")[0] == name]
        if not found:
            raise P2PKVError("an agent has no such metric", metric=name)
        return sum(found)

    def _served(self) -> int:
        """What all holders have sent to peers, by their own count."""
        return int(sum(self._metric(1 + holder, SERVED) for holder in range(HOLDERS)))

    def _sent(self, holder: int) -> int:
        """What a holder's link has sent, by the kernel's count."""
        return sent_bytes(Path(f"/proc/{self._owners[holder].process.pid}/net/dev").read_text(), "eth0")

    @staticmethod
    def _check(buffers: Sequence[memoryview], digests: Sequence[bytes]) -> None:
        if [xxhash.xxh3_128_digest(buffer) for buffer in buffers] != list(digests):
            raise IntegrityError("a get delivered bytes that are not the block's")

    @contextlib.contextmanager
    def _fault(self, fault: str) -> Iterator[Given]:
        """The last holder becomes bad meanwhile, and is well or replaced afterwards."""
        given = Given()
        owner = self._owners[BAD]
        if not fault:
            yield given
        elif fault == "slow":
            self._network.rate(1 + BAD, GIGABIT * SLOW)
            before = self._sent(BAD)
            try:
                yield given
            finally:
                given.bytes = self._sent(BAD) - before
                self._network.rate(1 + BAD, GIGABIT)
        elif fault == "stopped":
            try:
                with self._midway(given, lambda: owner.process.send_signal(signal.SIGSTOP)):
                    yield given
            finally:
                owner.process.send_signal(signal.SIGCONT)
        elif fault == "killed":
            with self._midway(given, owner.kill):
                yield given
            owner.stop()
            self._owners[BAD] = self._new_holder(BAD)
        else:
            raise P2PKVError("no such fault", fault=fault)

    @contextlib.contextmanager
    def _midway(self, given: Given, do: Callable[[], object]) -> Iterator[None]:
        """Do it when the last holder has sent enough of what is asked for meanwhile; not at all if it never has."""
        over = threading.Event()
        before = self._sent(BAD)

        def watch() -> None:
            while not over.wait(LOOK_EVERY_S):
                sent = self._sent(BAD) - before
                if sent >= BAD_AFTER_BYTES:
                    do()
                    given.bytes = sent
                    return

        watching = threading.Thread(target=watch, name="fault")
        watching.start()
        try:
            yield
        finally:
            over.set()
            watching.join()


class Given:
    """What a bad holder's link has sent of a get; filled in while the get is under way."""

    def __init__(self) -> None:
        self.bytes = 0


def sent_bytes(text: str, device: str) -> int:
    """What a device has sent, of the text of a ``/proc/PID/net/dev``."""
    for line in text.splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == device:
            return int(counts.split()[8])
    raise P2PKVError("there is no such network device", device=device)
