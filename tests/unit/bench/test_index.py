"""The index benchmark on a small fleet: what it stores is what it says, and its three ways agree."""

from __future__ import annotations

import msgspec
import pytest

from p2pkv.bench import http_client, index_beside, index_dump
from p2pkv.bench import index as bench
from p2pkv.bench.child import Child
from p2pkv.bench.index_child import KINDS, DictIndex, measure
from p2pkv.bench.index_http import Served
from p2pkv.bench.index_workloads import CHAIN, WORKLOADS, cut, make, queries
from p2pkv.errors import InvalidArgument
from p2pkv.index.prefix import PrefixIndex
from p2pkv.index.reference import ReferenceIndex
from p2pkv.types import Tier

NODES, BLOCKS = 5, 2 * CHAIN + 300


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_has_the_entries_that_it_says_and_every_way_gives_the_same_answers(name: str) -> None:
    workload = make(name, NODES, BLOCKS)
    core, reference, masks = PrefixIndex(), ReferenceIndex(), DictIndex()
    for node, keys in cut(workload.events, 100):
        for index in (core, reference, masks):
            index.apply(node, keys, Tier.DRAM)
    assert core.stats().entries == workload.entries
    assert core.stats().nodes == NODES
    depths = {"full": CHAIN, "half": CHAIN // 2, "miss": 0}
    for kind in KINDS:
        for keys in queries(workload, kind, 8):
            answer = core.match(keys)
            assert answer == reference.match(keys)
            assert sorted((row.node, row.depth) for row in answer) == sorted(masks.match(keys))
            assert answer.depth == depths[kind]


def test_a_child_measures_what_was_asked() -> None:
    found = measure("core", "disjoint", NODES, BLOCKS, 16)
    assert (found.keys, found.entries) == (NODES * BLOCKS, NODES * BLOCKS)
    assert found.events == NODES * (2 * 32 + 19)
    assert set(found.asked) == set(KINDS)
    assert found.memory_bytes > 0
    assert set(found.tokens) == set(bench.TOKENS_US)


def test_lookups_beside_a_writer_are_right_and_the_writer_wrote() -> None:
    found = index_beside.measure(500)
    assert found.wrong == 0
    assert [len(times) for times in (found.idle, found.writer, found.growth)] == [500] * 3
    assert min(found.rates.values()) > 0


def test_what_is_served_over_http_is_what_the_reference_says() -> None:
    with Child("index_http", "5", "3") as child:
        served = msgspec.json.decode(child.line(), type=Served)
        asked = [http_client.post("/query_by_hash", body.encode()) for body in served.bodies]
        taken, answers = http_client.one_by_one(served.port, asked, 7)
        assert http_client.at_once(served.port, asked, 2, 0.1) > 0
    assert len(taken) == 7
    assert [msgspec.json.decode(answer) for answer in answers] == served.expected
    assert all(len(each["default"]) == 5 for each in served.expected)


def test_a_dump_is_loaded_as_it_was() -> None:
    found = index_dump.measure(10_000, 4)
    assert (found.entries, found.same) == (10_000, True)
    assert found.file_bytes > 80_000


def test_a_rival_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidArgument, match="unknown rival"):
        bench.run(rival="nobody")


def test_claims_are_of_the_core_only_and_not_ok_where_nothing_was_measured() -> None:
    lookup = bench.Lookup(
        workload="disjoint", query="full", way="core", nodes=1, blocks_per_node=1, samples=1, answer_rows=1,
        p50_us=5.5, p99_us=None,
    )  # fmt: skip
    store = bench.Store(
        workload="replicated", way="core", nodes=1, keys=9**7, entries=1, event_blocks=512, ns_per_key=99.0,
        us_per_event=1.0, rss_bytes_per_entry=3.9, memory_bytes_per_entry=None,
    )  # fmt: skip
    slow = bench.Store(
        workload="disjoint", way="dict", nodes=1, keys=1, entries=1, event_blocks=512, ns_per_key=600.0,
        us_per_event=1.0, rss_bytes_per_entry=90.0, memory_bytes_per_entry=None,
    )  # fmt: skip
    assert [(claim.id, claim.value, claim.ok) for claim in bench.claims_of([lookup, store, slow])] == [
        ("index.match.disjoint.full", 5.5, False),
        ("index.match.disjoint.full.p99", None, False),
        ("index.store.replicated.512", 99.0, True),
        ("index.memory.replicated", 3.9, True),
    ]
