"""The prefix index by examples: what its words mean, and what it does with odd input. Core and reference both."""

from __future__ import annotations

import array
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from p2pkv.errors import InvalidArgument, OutOfSpace, P2PKVError
from p2pkv.index.hashing import pack_keys
from p2pkv.index.prefix import Holder, Index, NodeMatch, PrefixIndex
from p2pkv.index.reference import ReferenceIndex
from p2pkv.types import MASK64, Tier

CHAIN = pack_keys(range(100, 110))


def keys(*positions: int) -> bytes:
    """Packed keys of these positions of the chain."""
    return pack_keys(100 + p for p in positions)


@pytest.fixture(params=[PrefixIndex, ReferenceIndex])
def make(request: pytest.FixtureRequest) -> Callable[..., Index]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def index(make: Callable[..., Index]) -> Index:
    return make()


# --- what the words mean


def test_depth_ends_at_the_first_hole_and_comes_back_with_the_block(index: Index) -> None:
    index.apply(1, CHAIN, Tier.DRAM)
    index.apply(1, keys(4), Tier.GONE)
    assert index.match(CHAIN).depth == 4
    index.apply(1, keys(4), Tier.SSD)
    assert index.match(CHAIN).depth == 10


def test_what_lies_behind_a_hole_is_told_when_asked_for(index: Index) -> None:
    index.apply(1, keys(0, 1, 4, 5, 9), Tier.DRAM)
    assert list(index.match(CHAIN)) == [NodeMatch(1, 2, (0, 2, 0, 0), held=2, resume=10)]
    assert list(index.match(CHAIN, beyond=True)) == [NodeMatch(1, 2, (0, 2, 0, 0), held=5, resume=4)]


def test_a_node_without_the_first_block_has_a_row_only_beyond(index: Index) -> None:
    index.apply(1, keys(3), Tier.HBM)
    assert len(index.match(CHAIN)) == 0
    assert index.match(CHAIN).best is None
    assert index.match(CHAIN).depth == 0
    assert list(index.match(CHAIN, beyond=True)) == [NodeMatch(1, 0, (0, 0, 0, 0), held=1, resume=3)]


def test_tiers_split_the_prefix_and_add_up_to_its_depth(index: Index) -> None:
    index.apply(7, keys(0, 1, 2), Tier.HBM)
    index.apply(7, keys(3, 4), Tier.DRAM)
    index.apply(7, keys(5), Tier.SHARED)
    index.apply(7, keys(7, 8), Tier.SSD)  # behind the hole: not part of the prefix
    row = index.match(CHAIN).best
    assert row is not None
    assert row.by_tier == (3, 2, 0, 1)
    assert (row.depth, row.in_tier(Tier.DRAM), row.up_to(Tier.DRAM), row.up_to(Tier.SHARED)) == (6, 2, 5, 6)


def test_deepest_first_then_lowest_slot(index: Index) -> None:
    for node, depth in ((5, 3), (2, 3), (9, 7), (4, 1)):
        index.apply(node, keys(*range(depth)), Tier.DRAM)
    match = index.match(CHAIN)
    assert [(row.node, row.depth) for row in match] == [(9, 7), (2, 3), (5, 3), (4, 1)]
    assert match[-1].node == 4
    assert match.of(5) == match[2]
    assert match.of(6) is None
    with pytest.raises(IndexError):
        match[4]


def test_the_last_word_about_a_key_wins_and_counts_as_a_change_only_if_it_is_one(index: Index) -> None:
    assert index.apply(1, keys(0, 1), Tier.DRAM) == 2
    assert index.apply(1, keys(0, 1), Tier.DRAM) == 0
    assert index.apply(1, keys(0), Tier.SSD) == 1
    assert index.apply(1, keys(5), Tier.GONE) == 0
    assert index.apply(1, keys(0, 0), Tier.GONE) == 1
    assert index.snapshot(1) == [(Tier.DRAM, keys(1))]


def test_repeated_keys_in_a_chain_are_positions_of_their_own(index: Index) -> None:
    index.apply(1, keys(0), Tier.DRAM)
    assert index.match(keys(0, 0, 0, 1)).depth == 3


def test_hidden_nodes_are_in_no_answer_but_keep_up(index: Index) -> None:
    index.apply(1, CHAIN, Tier.DRAM)
    index.apply(2, keys(0), Tier.DRAM)
    index.hide(1, True)
    assert [row.node for row in index.match(CHAIN, beyond=True)] == [2]
    assert index.reach(CHAIN) == 1
    assert index.contains_any(keys(0, 1)) == b"\1\0"
    assert index.holders(keys(0, 1), start=0)[0] == (Holder(2, Tier.DRAM),)
    index.apply(1, keys(9), Tier.GONE)
    index.hide(1, False)
    assert index.match(CHAIN).depth == 9


def test_a_removed_node_leaves_nothing_and_its_slot_is_free(index: Index) -> None:
    index.apply(1, CHAIN, Tier.DRAM)
    index.apply(2, keys(0), Tier.HBM)
    index.hide(1, True)
    assert index.remove_node(1) == 10
    assert (index.count(1), index.checksum(1), index.snapshot(1)) == (0, 0, [])
    index.apply(1, keys(0), Tier.SSD)  # another node in the same slot: visible
    assert [row.node for row in index.match(CHAIN)] == [1, 2]
    assert index.remove_node(4) == 0


def test_replace_leaves_exactly_what_was_given(index: Index) -> None:
    index.apply(1, keys(0, 1, 2), Tier.DRAM)
    index.apply(2, keys(0), Tier.DRAM)
    index.hide(1, True)
    assert index.replace(1, [(Tier.HBM, keys(1, 3)), (Tier.DRAM, keys(2))]) == 3
    assert [(tier, len(packed) // 8) for tier, packed in index.snapshot(1)] == [(Tier.HBM, 2), (Tier.DRAM, 1)]
    assert index.match(keys(0)).depth == 1  # node 2 is untouched
    assert index.match(keys(1)).depth == 0  # and node 1 still hidden
    assert index.replace(1, []) == 3
    assert index.checksum(1) == 0


def test_holders_go_round_the_ring_of_slots_from_the_start_given(index: Index) -> None:
    for node in (3, 5, 8):
        index.apply(node, keys(0, 1), Tier.DRAM)
    index.apply(5, keys(1), Tier.SSD)
    assert [[h.node for h in held] for held in index.holders(keys(0, 1, 2), start=4)] == [[5, 8, 3], [5, 8, 3], []]
    assert [h.node for h in index.holders(keys(0), start=9, limit=2)[0]] == [3, 5]
    assert index.holders(keys(1), start=5)[0][0] == Holder(5, Tier.SSD)


def test_without_a_start_every_holder_gets_its_turn(index: Index) -> None:
    for node in range(20):
        index.apply(node, keys(0), Tier.DRAM)
    firsts = {index.holders(keys(0))[0][0].node for _ in range(20)}
    assert firsts == set(range(20))
    assert len(index.holders(keys(0))[0]) == 16


def test_reach_is_what_all_can_give_together(index: Index) -> None:
    index.apply(1, keys(0, 1, 4), Tier.DRAM)
    index.apply(2, keys(2, 3, 6), Tier.DRAM)
    assert index.reach(CHAIN) == 5
    assert index.contains_any(CHAIN) == bytes([1, 1, 1, 1, 1, 0, 1, 0, 0, 0])
    assert index.match(CHAIN).depth == 2


def test_every_64_bit_key_is_legal(index: Index) -> None:
    extremes = pack_keys([0, MASK64, 1 << 63, MASK64 - 1, 1])
    index.apply(0, extremes, Tier.SHARED)
    assert index.match(extremes).depth == 5
    index.apply(0, pack_keys([0, MASK64]), Tier.GONE)
    assert index.contains_any(extremes) == b"\0\0\1\1\1"


def test_the_empty_chain_has_an_empty_answer(index: Index) -> None:
    index.apply(1, CHAIN, Tier.DRAM)
    assert index.apply(1, b"", Tier.GONE) == 0
    assert (len(index.match(b"", beyond=True)), len(index.holders(b"")), index.contains_any(b""), index.reach(b"")) == (
        0, 0, b"", 0,
    )  # fmt: skip


# --- bad input


@pytest.mark.parametrize("node", [-1, 8, 1 << 40])
def test_slots_out_of_range_are_refused_everywhere(make: Callable[..., Index], node: int) -> None:
    index = make(max_nodes=8)
    calls: list[Callable[[], object]] = [
        lambda: index.apply(node, CHAIN, Tier.DRAM),
        lambda: index.replace(node, []),
        lambda: index.remove_node(node),
        lambda: index.hide(node, True),
        lambda: index.snapshot(node),
        lambda: index.checksum(node),
        lambda: index.count(node),
        lambda: index.holders(CHAIN, start=node),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument):
            call()


@pytest.mark.parametrize("tier", [-1, 5, 255])
def test_tiers_out_of_range_are_refused(index: Index, tier: int) -> None:
    with pytest.raises(InvalidArgument):
        index.apply(1, CHAIN, tier)
    with pytest.raises(InvalidArgument):
        index.replace(1, [(tier, CHAIN)])
    with pytest.raises(InvalidArgument):
        index.replace(1, [(Tier.GONE, CHAIN)])
    assert index.count(1) == 0


@pytest.mark.parametrize("limit", [0, -1, 257])
def test_a_limit_on_holders_must_be_a_small_number(index: Index, limit: int) -> None:
    with pytest.raises(InvalidArgument):
        index.holders(CHAIN, limit=limit)


def test_the_bound_on_entries_holds_and_does_not_hinder_changes(make: Callable[..., Index]) -> None:
    index = make(max_entries=3)
    index.apply(1, keys(0, 1), Tier.DRAM)
    with pytest.raises(OutOfSpace):
        index.apply(2, keys(0, 1), Tier.DRAM)
    assert index.count(2) == 1
    assert index.apply(1, keys(0, 1), Tier.SSD) == 2
    assert index.apply(2, keys(0), Tier.GONE) == 1
    assert index.apply(2, keys(1), Tier.DRAM) == 1


BAD_BUFFERS: list[Any] = [
    b"1234567",
    array.array("I", [1, 2]),
    np.array([1.0, 2.0]),
    np.array([1, 2], dtype=np.uint32),
    np.array([1, 2], dtype=">u8"),
    np.array([True] * 8),
    np.arange(10, dtype=np.uint64)[::2],
    np.arange(16, dtype=np.uint64).reshape(4, 4).T,
    memoryview(bytes(32))[::2],
    np.array([object()]),
]


@pytest.mark.parametrize("bad", BAD_BUFFERS, ids=[str(i) for i in range(len(BAD_BUFFERS))])
def test_buffers_that_are_no_packed_keys_are_refused(bad: Any) -> None:
    index = PrefixIndex()
    calls: list[Callable[[], object]] = [
        lambda: index.apply(1, bad, Tier.DRAM),
        lambda: index.replace(1, [(Tier.DRAM, CHAIN), (Tier.HBM, bad)]),
        lambda: index.match(bad),
        lambda: index.holders(bad),
        lambda: index.contains_any(bad),
        lambda: index.reach(bad),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument):
            call()
    assert index.count(1) == 0


@pytest.mark.parametrize("bad", [None, 5, [1, 2], "12345678"])
def test_what_is_no_buffer_is_a_type_error(bad: Any) -> None:
    index = PrefixIndex()
    with pytest.raises(TypeError):
        index.match(bad)
    with pytest.raises(TypeError):
        index.replace(1, bad)


def test_every_kind_of_packed_keys_is_taken() -> None:
    numbers = range(100, 110)
    region = mmap.mmap(-1, mmap.PAGESIZE)
    region[:80] = CHAIN
    readonly = np.array(numbers, dtype=np.uint64)
    readonly.flags.writeable = False
    good: list[Any] = [
        CHAIN, bytearray(CHAIN), memoryview(CHAIN), memoryview(b"x" + CHAIN)[1:], array.array("Q", numbers), readonly,
        array.array("q", numbers), np.array(numbers, dtype=np.int64), np.array(numbers, dtype="<u8").reshape(2, 5),
        memoryview(region)[:80], memoryview(CHAIN).cast("c"),
    ]  # fmt: skip
    for buffer in good:
        index = PrefixIndex()
        assert index.apply(1, buffer, Tier.DRAM) == 10
        assert index.match(buffer).chain == index.match(buffer).depth == index.reach(buffer) == 10
        assert len(index.holders(buffer)) == 10
    good.clear()
    del buffer
    region.close()  # raises BufferError if the index had kept a view


@pytest.mark.parametrize(("nodes", "entries"), [(0, 1), (-1, 1), (1 << 25, 1), (1, 0)])
def test_impossible_bounds_are_refused(nodes: int, entries: int) -> None:
    with pytest.raises(InvalidArgument):
        PrefixIndex(nodes, entries)


def test_errors_are_ours() -> None:
    assert issubclass(InvalidArgument, P2PKVError)
    with pytest.raises(P2PKVError, match=r"tier 9 is not within 0\.\.4"):
        PrefixIndex().apply(0, b"", 9)


# --- the core's own


def test_a_whole_fleet_may_hold_one_key() -> None:
    index = PrefixIndex()
    for node in range(0, 65_536, 7):
        index.apply(node, keys(0), Tier.DRAM)
    index.apply(65_535, keys(0), Tier.HBM)
    held = range(0, 65_536, 7)
    assert [row.node for row in index.match(keys(0))] == sorted({*held, 65_535})
    assert len(index.holders(keys(0), start=65_535, limit=256)[0]) == 256
    for node in held:
        assert index.apply(node, keys(0), Tier.GONE) == 1
    assert [tuple(row)[:3] for row in index.match(keys(0))] == [(65_535, 1, (1, 0, 0, 0))]


def test_a_million_keys_in_one_call() -> None:
    index = PrefixIndex()
    chain = np.random.default_rng(1).integers(0, 1 << 63, size=1 << 20, dtype=np.uint64)
    distinct = len(np.unique(chain))
    assert index.apply(1, chain, Tier.SSD) == distinct
    assert index.match(chain).depth == 1 << 20
    assert index.stats().keys == distinct
    assert index.replace(1, [(Tier.SSD, chain[:1000])]) == distinct - len(np.unique(chain[:1000]))
    assert index.stats().memory_bytes < 1 << 20  # the table has shrunk again
    assert index.match(chain).depth == 1000
    assert index.apply(1, chain, Tier.SSD) == distinct - len(np.unique(chain[:1000])), "into memory that was given back"
    assert index.match(chain).depth == 1 << 20


def test_stats_count_what_is_there() -> None:
    index = PrefixIndex()
    for node in range(3):
        index.apply(node, keys(0), Tier.DRAM)
    index.apply(0, keys(1, 2), Tier.DRAM)
    index.hide(2, True)
    stats = index.stats()
    assert (stats.nodes, stats.hidden_nodes, stats.keys, stats.entries, stats.pages) == (3, 1, 3, 5, 1)
    assert stats.capacity_keys >= 3
    assert stats.memory_bytes > 0


def test_what_eviction_leaves_of_many_pages_is_gathered_in_a_few() -> None:
    index, oracle = PrefixIndex(), ReferenceIndex()
    chain = np.random.default_rng(2).integers(0, 1 << 63, size=6_400, dtype=np.uint64)
    evicted = np.delete(chain, slice(7, None, 64))
    for each in (index, oracle):
        each.apply(1, chain, Tier.DRAM)
        each.apply(2, chain[::3].copy(), Tier.SSD)
        each.apply(2, evicted, Tier.GONE)
    assert index.stats().pages == 100, "the other owner still has them"
    for each in (index, oracle):
        each.apply(1, evicted, Tier.GONE)
    assert index.stats().keys == 100
    assert index.stats().pages <= 4
    assert index.match(chain, beyond=True) == oracle.match(chain, beyond=True)
    assert index.holders(chain) == oracle.holders(chain)
    assert index.apply(1, chain, Tier.DRAM) == len(evicted)
    assert index.match(chain).depth == len(chain)


def test_a_chain_is_found_whole_whatever_pieces_it_came_in() -> None:
    rng = np.random.default_rng(3)
    index = PrefixIndex()
    chain = rng.integers(0, 1 << 63, size=1_000, dtype=np.uint64)
    cuts = np.sort(rng.choice(1_000, size=40, replace=False))
    pieces = np.split(chain, cuts)
    for piece in [pieces[i] for i in rng.permutation(len(pieces))]:
        index.apply(int(rng.integers(1, 3)), piece, Tier.DRAM)  # either of two nodes, in any order
    for piece in pieces:
        index.apply(3, piece.copy(), Tier.HBM)
    row = index.match(chain, beyond=True).of(3)
    assert row == NodeMatch(3, 1_000, (1_000, 0, 0, 0), 1_000, 1_000)
    assert index.reach(chain) == 1_000


def test_memory_is_given_back_when_a_node_leaves() -> None:
    index = PrefixIndex()
    chains = np.random.default_rng(4).integers(0, 1 << 63, size=(3, 50_000), dtype=np.uint64)
    for node, chain in enumerate(chains):
        index.apply(node, chain, Tier.DRAM)
    full = index.stats()
    assert full.memory_bytes < 24 * full.entries
    for node in (1, 0, 2):
        assert index.remove_node(node) == 50_000
    empty = index.stats()
    assert (empty.keys, empty.entries, empty.pages, empty.nodes) == (0, 0, 0, 0)
    assert empty.memory_bytes < 64 << 10
