"""``p2pkv bench index``: the prefix index, beside a dict of bit masks and the reference written to be obviously right.

Each workload is stored and asked in a process of its own (:mod:`p2pkv.bench.index_child`), so that its resident memory
is the index's. Times of lookups are those of whole calls from Python, with keys in a numpy array, answer readable; of
stores, CPU time. The slow ways get a smaller fleet, which is in their rows.
"""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Final

import msgspec

from p2pkv.bench import http_client, report
from p2pkv.bench.child import Child
from p2pkv.bench.index_beside import ENTRIES_PER_S, Beside
from p2pkv.bench.index_child import BLOCK_TOKENS, KINDS, TOKENS, Measured
from p2pkv.bench.index_dump import Dumped
from p2pkv.bench.index_http import Served
from p2pkv.bench.index_large import Large
from p2pkv.bench.index_log import Logged
from p2pkv.bench.index_workloads import CHAIN, WORKLOADS
from p2pkv.bench.progress import Progress
from p2pkv.bench.report import Claim, Report, Row, at_least, at_most, percentile, ratio, rounded
from p2pkv.errors import InvalidArgument

NODES: Final = 100
BLOCKS: Final = 31_000
NODES_SLOW: Final = 20
BLOCKS_SLOW: Final = 5_120
BLOCKS_QUICK: Final = 2_560
EVENTS: Final = (512, 16, 1)
"""Blocks per event. The smallest is asked of one workload only: 3.1 million calls."""
TOKENS_US: Final = {"hash": 10.0, "hash_and_match": 25.0}
BESIDE_P99_OVER_IDLE: Final = 2.0
SAMPLES_BESIDE: Final = 3_000_000
SAMPLES_BESIDE_QUICK: Final = 100_000
CHILD_S: Final = 300.0
MEMORY_KEYS_MIN: Final = 1_000_000
"""With fewer, what every index has from its start is most of its memory."""

HTTP_OWNERS: Final = 100
HTTP_CHAINS: Final = 64
HTTP_SAMPLES: Final = 4_000
HTTP_SAMPLES_QUICK: Final = 500
HTTP_CONNECTIONS: Final = 8
HTTP_S: Final = 5.0
HTTP_QUICK_S: Final = 1.0
HTTP_US: Final = 300.0
HTTP_PER_S: Final = 2_000.0
DUMP_ENTRIES: Final = 25_000_000
DUMP_ENTRIES_QUICK: Final = 1_000_000
LOAD_S: Final = 10.0
LARGE_ENTRIES: Final = 100_000_000
LARGE_ENTRIES_QUICK: Final = 2_000_000
LARGE_BYTES: Final = 24.0
"""Per entry; 2.4 GB for all of them."""
LOG_BLOCKS: Final = 262_144
LOG_BLOCKS_QUICK: Final = 32_768

LOOKUP_US: Final = {"disjoint": 5.0, "shared": 8.0, "replicated": 8.0}
LOOKUP_P99_US: Final = 20.0
STORE_NS: Final = {512: 100.0, 16: 200.0, 1: 1_000.0}
MEMORY_BYTES: Final = {"disjoint": 24.0, "replicated": 4.0}


class Lookup(Row, frozen=True, kw_only=True):
    """Calls of ``match`` with chains of 512 keys. ``answer_rows``: nodes in an answer."""

    workload: str
    query: str
    way: str
    nodes: int
    blocks_per_node: int
    samples: int
    answer_rows: int
    p50_us: float | None
    p99_us: float | None


class Store(Row, frozen=True, kw_only=True):
    """Storing all of a workload, CPU time. ``keys``: in all events; ``entries``: distinct (node, key) pairs.
    ``rss_bytes_per_entry``: what the process grew by; ``memory_...``: what the index says of itself."""

    workload: str
    way: str
    nodes: int
    keys: int
    entries: int
    event_blocks: int
    ns_per_key: float | None
    us_per_event: float | None
    rss_bytes_per_entry: float | None
    memory_bytes_per_entry: float | None


class Tokens(Row, frozen=True, kw_only=True):
    """Calls with the token ids of a prompt, beside an index that holds the workload."""

    workload: str
    call: str
    tokens: int
    block_tokens: int
    samples: int
    p50_us: float | None
    p99_us: float | None


class BesideWriter(Row, frozen=True, kw_only=True):
    """Lookups alone, beside a writer that stores and drops, and beside one whose entries all stay."""

    case: str
    entries_per_s: float | None
    samples: int
    p50_us: float | None
    p99_us: float | None
    p99_99_us: float | None
    wrong: int


class Http(Row, frozen=True, kw_only=True):
    """``POST /query_by_hash`` over loopback: one connection's round trips, and all connections' rate.

    The server has one processor, and the client another one. ``differing``: answers that were not the reference's.
    """

    path: str
    hashes: int
    owners: int
    samples: int
    p50_us: float | None
    p99_us: float | None
    connections: int
    per_s: float | None
    differing: int


class Log(Row, frozen=True, kw_only=True):
    """Events through an ownership log: CPU time of its owner and of a reader, per block; bytes on the wire."""

    event_blocks: int
    blocks: int
    owner_ns: float | None
    reader_ns: float | None
    wire_bytes: float | None
    same: bool


class Size(Row, frozen=True, kw_only=True):
    """An index of very many entries, all of them different. Storing is CPU time; lookups are of whole chains."""

    entries: int
    owners: int
    rss_bytes: int
    rss_bytes_per_entry: float | None
    memory_bytes_per_entry: float | None
    ns_per_key: float | None
    samples: int
    p50_us: float | None
    p99_us: float | None
    wrong: int


class Load(Row, frozen=True, kw_only=True):
    """A dump of an index, written and loaded again; wall-clock time."""

    entries: int
    owners: int
    file_bytes: int
    dump_s: float | None
    load_s: float | None
    rss_bytes_per_entry: float | None
    same: bool


def run(*, quick: bool = False, rival: str = "", progress: Progress | None = None) -> Report:
    """Measure every workload with every way; ``rival``: "dynamo" too.

    Raises:
        InvalidArgument: no such rival, or it is not installed.
    """
    progress = progress or Progress()
    if rival not in ("", "dynamo"):
        raise InvalidArgument("unknown rival", rival=rival, hint="There is dynamo.")
    if rival and importlib.util.find_spec(rival) is None:
        raise InvalidArgument("the rival is not installed", rival=rival, hint="pip install ai-dynamo-runtime")
    rows: list[Row] = []
    for workload in WORKLOADS:
        for event in EVENTS:
            if event == 1 and workload != "disjoint":
                continue
            rows += measure("core", workload, NODES, BLOCKS_QUICK if quick else BLOCKS, event, progress)
            if rival and event == EVENTS[0]:  # its events name their parents: whole chains are enough
                rows += measure(rival, workload, NODES, BLOCKS_QUICK if quick else BLOCKS, event, progress)
        for way in ("dict", "reference"):
            rows += measure(way, workload, NODES_SLOW, BLOCKS_QUICK if quick else BLOCKS_SLOW, EVENTS[0], progress)
    rows += measure_beside(SAMPLES_BESIDE_QUICK if quick else SAMPLES_BESIDE, progress)
    rows.append(measure_http(quick, progress))
    rows.append(measure_load(DUMP_ENTRIES_QUICK if quick else DUMP_ENTRIES, progress))
    rows.append(measure_size(LARGE_ENTRIES_QUICK if quick else LARGE_ENTRIES, progress))
    rows += [measure_log(event, LOG_BLOCKS_QUICK if quick else LOG_BLOCKS, progress) for event in EVENTS]
    return report.make_report("index", rows, claims_of(rows), quick=quick)


def measure(way: str, workload: str, nodes: int, blocks: int, event: int, progress: Progress) -> list[Row]:
    """One process: its rows."""
    progress.say(f"index: {workload}, {way}, {nodes} nodes x {blocks} blocks in events of {event}")
    with Child("index_child", way, workload, str(nodes), str(blocks), str(event)) as child:
        found = msgspec.json.decode(child.line(CHILD_S), type=Measured)
    rows: list[Row] = [
        Store(
            workload=workload,
            way=way,
            nodes=nodes,
            keys=found.keys,
            entries=found.entries,
            event_blocks=event,
            ns_per_key=rounded(found.store_s / found.keys * 1e9),
            us_per_event=rounded(found.store_s / found.events * 1e6),
            rss_bytes_per_entry=rounded(found.rss_bytes / found.entries),
            memory_bytes_per_entry=rounded(found.memory_bytes / found.entries) if found.memory_bytes else None,
        )
    ]
    if event != EVENTS[0]:
        return rows  # the same index, asked the same
    for kind in KINDS:
        times = found.asked[kind]
        rows.append(
            Lookup(
                workload=workload,
                query=kind,
                way=way,
                nodes=nodes,
                blocks_per_node=blocks,
                samples=len(times),
                answer_rows=found.rows[kind],
                p50_us=rounded(percentile(times, 50) * 1e6),
                p99_us=rounded(percentile(times, 99) * 1e6),
            )
        )
    for call, times in found.tokens.items():
        rows.append(
            Tokens(
                workload=workload,
                call=call,
                tokens=TOKENS,
                block_tokens=BLOCK_TOKENS,
                samples=len(times),
                p50_us=rounded(percentile(times, 50) * 1e6),
                p99_us=rounded(percentile(times, 99) * 1e6),
            )
        )
    return rows


def measure_beside(samples: int, progress: Progress) -> list[Row]:
    """Lookups beside a writer."""
    progress.say(f"index: {samples} lookups beside a writer of {ENTRIES_PER_S} entries/s")
    with Child("index_beside", str(samples)) as child:
        found = msgspec.json.decode(child.line(CHILD_S), type=Beside)
    return [
        BesideWriter(
            case=case,
            entries_per_s=rounded(found.rates.get(case, 0.0)),
            samples=len(times),
            p50_us=rounded(percentile(times, 50) * 1e6),
            p99_us=rounded(percentile(times, 99) * 1e6),
            p99_99_us=rounded(percentile(times, 99.99) * 1e6),
            wrong=found.wrong if case == "writer" else 0,
        )
        for case, times in (("idle", found.idle), ("writer", found.writer), ("growth", found.growth))
    ]


def measure_http(quick: bool, progress: Progress) -> Http:
    """Questions over HTTP."""
    progress.say(f"index: /query_by_hash with {CHAIN} hashes and {HTTP_OWNERS} owners")
    before = os.sched_getaffinity(0)
    with Child("index_http", str(HTTP_OWNERS), str(HTTP_CHAINS)) as child:
        served = msgspec.json.decode(child.line(CHILD_S), type=Served)
        asked = [http_client.post("/query_by_hash", body.encode()) for body in served.bodies]
        os.sched_setaffinity(0, {min(before)})
        try:
            http_client.one_by_one(served.port, asked, len(asked))
            taken, answers = http_client.one_by_one(served.port, asked, HTTP_SAMPLES_QUICK if quick else HTTP_SAMPLES)
            per_s = http_client.at_once(served.port, asked, HTTP_CONNECTIONS, HTTP_QUICK_S if quick else HTTP_S)
        finally:
            os.sched_setaffinity(0, before)
    wrong = sum(msgspec.json.decode(got) != wanted for got, wanted in zip(answers, served.expected, strict=True))
    return Http(
        path="/query_by_hash",
        hashes=CHAIN,
        owners=HTTP_OWNERS,
        samples=len(taken),
        p50_us=rounded(percentile(taken, 50) * 1e6),
        p99_us=rounded(percentile(taken, 99) * 1e6),
        connections=HTTP_CONNECTIONS,
        per_s=rounded(per_s),
        differing=wrong,
    )


def measure_load(entries: int, progress: Progress) -> Load:
    """A dump, there and back."""
    progress.say(f"index: a dump of {entries} entries")
    with Child("index_dump", str(entries), str(NODES)) as child:
        found = msgspec.json.decode(child.line(CHILD_S), type=Dumped)
    return Load(
        entries=found.entries,
        owners=NODES,
        file_bytes=found.file_bytes,
        dump_s=rounded(found.dump_s),
        load_s=rounded(found.load_s),
        rss_bytes_per_entry=rounded(found.rss_bytes / found.entries),
        same=found.same,
    )


def measure_size(entries: int, progress: Progress) -> Size:
    """Very many entries."""
    progress.say(f"index: {entries} entries")
    with Child("index_large", str(entries), str(NODES)) as child:
        found = msgspec.json.decode(child.line(CHILD_S), type=Large)
    return Size(
        entries=found.entries,
        owners=NODES,
        rss_bytes=found.rss_bytes,
        rss_bytes_per_entry=rounded(found.rss_bytes / found.entries),
        memory_bytes_per_entry=rounded(found.memory_bytes / found.entries),
        ns_per_key=rounded(found.store_s / found.entries * 1e9),
        samples=len(found.asked),
        p50_us=rounded(percentile(found.asked, 50) * 1e6),
        p99_us=rounded(percentile(found.asked, 99) * 1e6),
        wrong=found.wrong,
    )


def measure_log(event: int, blocks: int, progress: Progress) -> Log:
    """Events through an ownership log."""
    progress.say(f"index: an ownership log, events of {event}")
    with Child("index_log", str(event), str(blocks)) as child:
        found = msgspec.json.decode(child.line(CHILD_S), type=Logged)
    return Log(
        event_blocks=event,
        blocks=found.blocks,
        owner_ns=rounded(found.owner_s / found.blocks * 1e9),
        reader_ns=rounded(found.reader_s / found.blocks * 1e9),
        wire_bytes=rounded(found.wire_bytes / found.blocks),
        same=found.same,
    )


def claims_of(rows: list[Row]) -> list[Claim]:
    """Issue 3, points 1 to 5, and 7."""
    claims = []
    for row in rows:
        if isinstance(row, Lookup) and row.way == "core":
            id_ = f"index.match.{row.workload}.{row.query}"
            what = "a chain of 512 keys, from Python"
            claims.append(at_most(id_, number(row.p50_us), LOOKUP_US[row.workload], "us", f"{what}, p50"))
            claims.append(at_most(f"{id_}.p99", number(row.p99_us), LOOKUP_P99_US, "us", f"{what}, p99"))
        if isinstance(row, Store) and row.way == "core":
            id_, limit = f"index.store.{row.workload}.{row.event_blocks}", STORE_NS[row.event_blocks]
            claims.append(at_most(id_, number(row.ns_per_key), limit, "ns", "CPU per key of an event"))
            if row.event_blocks == EVENTS[0] and row.workload in MEMORY_BYTES and row.keys >= MEMORY_KEYS_MIN:
                what = "resident bytes per (node, key) entry"
                id_, limit = f"index.memory.{row.workload}", MEMORY_BYTES[row.workload]
                claims.append(at_most(id_, number(row.rss_bytes_per_entry), limit, "B", what))
        if isinstance(row, Tokens) and row.workload == WORKLOADS[0]:
            id_, what = f"index.tokens.{row.call}", f"{TOKENS} tokens in blocks of {BLOCK_TOKENS}, p50"
            claims.append(at_most(id_, number(row.p50_us), TOKENS_US[row.call], "us", what))
        if isinstance(row, Http):
            id_, what = "index.http.query_by_hash", f"{row.hashes} hashes, {row.owners} owners"
            claims.append(at_most(f"{id_}.p50", number(row.p50_us), HTTP_US, "us", f"{what}, round trip"))
            claims.append(at_least(f"{id_}.rate", number(row.per_s), HTTP_PER_S, "1/s", f"{what}, one core"))
            claims.append(at_most(f"{id_}.differing", float(row.differing), 0, "answers", "not the reference's"))
        if isinstance(row, Load):
            what = f"seconds to load {row.entries} entries"
            claims.append(at_most("index.load", number(row.load_s) if row.same else math.nan, LOAD_S, "s", what))
        if isinstance(row, Size) and row.entries >= MEMORY_KEYS_MIN:
            what = f"resident bytes per entry of {row.entries}, all different"
            value = number(row.rss_bytes_per_entry) if row.wrong == 0 else math.nan
            claims.append(at_most("index.memory.large", value, LARGE_BYTES, "B", what))
    beside = {row.case: row for row in rows if isinstance(row, BesideWriter)}
    if beside:
        times = ratio(beside["writer"].p99_us, beside["idle"].p99_us)
        claims.append(at_most("index.beside_writer.p99_over_idle", times, BESIDE_P99_OVER_IDLE, "x", "lookups' p99"))
        wrong = sum(row.wrong for row in beside.values())
        claims.append(at_most("index.beside_writer.wrong", float(wrong), 0, "answers", "beside a writer, or after it"))
    return claims


def number(value: float | None) -> float:
    """What a row shows, for a claim."""
    return float("nan") if value is None else value
