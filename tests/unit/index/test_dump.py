"""Dumps of an index: they come back as they were, and what is not whole changes nothing."""

from __future__ import annotations

import os
import random
import resource
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv.errors import IntegrityError, InvalidArgument, OutOfSpace, P2PKVError
from p2pkv.index import dump as module
from p2pkv.index.dump import Dump, Word, dump, load
from p2pkv.index.hashing import pack_keys
from p2pkv.index.prefix import Index, PrefixIndex
from p2pkv.index.reference import ReferenceIndex
from p2pkv.types import MASK64, Tier

TIERS = [tier for tier in Tier if tier is not Tier.GONE]
KEYS = st.lists(st.integers(0, MASK64), max_size=40, unique=True)
WORDS = st.builds(
    Word,
    st.integers(0, MASK64),
    st.integers(0, (1 << 32) - 1),
    st.integers(0, MASK64),
    st.floats(0, 1e12),
    st.binary(max_size=50),
)
NOTE = b"a note"
OWNERS = st.lists(st.tuples(WORDS, st.dictionaries(st.sampled_from(TIERS), KEYS)), max_size=5)


def words_of(index: PrefixIndex, slots: range = range(1, 5)) -> list[tuple[int, Word]]:
    return [(slot, Word(1000 + slot, slot, 7 * slot, 100.5 + slot, NOTE)) for slot in slots]


def filled(index: PrefixIndex, slots: range = range(1, 5)) -> PrefixIndex:
    rng = random.Random(3)
    shared = pack_keys(rng.getrandbits(64) for _ in range(300))
    for slot in slots:
        index.apply(slot, shared, Tier.DRAM)
        index.apply(slot, pack_keys(rng.getrandbits(64) for _ in range(100 * slot)), TIERS[slot % 4])
    return index


def everything(index: Index) -> list[object]:
    return [
        ([(tier, sorted(memoryview(keys).cast("Q"))) for tier, keys in index.snapshot(slot)], index.checksum(slot))
        for slot in range(8)
    ]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "index.dump")


@settings(max_examples=60, deadline=None)
@given(owners=OWNERS, taken_at=st.floats(0, 1e12), chunk=st.sampled_from([1, 700, 1 << 20]))
def test_what_was_dumped_comes_back(
    owners: list[tuple[Word, dict[Tier, list[int]]]], taken_at: float, chunk: int
) -> None:
    index, other = PrefixIndex(), PrefixIndex()
    for slot, (_, groups) in enumerate(owners):
        for tier, keys in groups.items():
            index.apply(slot, pack_keys(keys), tier)
    listed = [(slot, word) for slot, (word, _) in enumerate(owners)]
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk)
        path = os.path.join(directory, "dump")
        size = dump(path, index, listed, taken_at=taken_at)
        slots = iter(range(len(owners)))
        loaded = load(path, other, lambda _: next(slots))
        assert os.listdir(directory) == ["dump"]
        assert os.path.getsize(path) == size
    assert loaded == Dump(taken_at, [(word, slot) for slot, word in listed])
    assert everything(other) == everything(index)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 32), chunk=st.sampled_from([1, 700, 1 << 20]))
def test_pages_with_holes_and_owners_that_were_left_out(seed: int, chunk: int) -> None:
    """Sets that overlap, with entries removed again, some of whose owners are not dumped, or not loaded."""
    rng = random.Random(seed)
    index, other, oracle = PrefixIndex(), PrefixIndex(), ReferenceIndex()
    chains = [[rng.getrandbits(64) for _ in range(rng.randrange(1, 300))] for _ in range(4)]
    dumped, loaded = [3, 1, 6, 4], [None, 2, 7, 0]
    for _ in range(60):
        slot, chain = rng.randrange(8), rng.choice(chains)
        at = rng.randrange(len(chain))
        keys, tier = pack_keys(chain[at : at + rng.randrange(1, 200)]), rng.choice([Tier.GONE, *TIERS])
        index.apply(slot, keys, tier)
        if slot in dumped and (to := loaded[dumped.index(slot)]) is not None:
            oracle.apply(to, keys, tier)
    slots = iter(loaded)
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk)
        path = os.path.join(directory, "dump")
        dump(path, index, [(slot, Word(slot, 1, 1, 1.0)) for slot in dumped], taken_at=1.0)
        load(path, other, lambda _: next(slots))
    assert everything(other) == everything(oracle)


def test_hidden_owners_are_dumped_and_come_back_to_be_seen(path: str) -> None:
    index, other = filled(PrefixIndex()), PrefixIndex()
    index.hide(2, True)
    dump(path, index, words_of(index), taken_at=1.0)
    load(path, other, lambda word: word.epoch)
    assert everything(other) == everything(index)
    assert other.stats().hidden_nodes == 0


def test_a_dump_is_taken_while_the_index_is_written(path: str) -> None:
    """What changes is in it as it was or will be, and nothing else is; what nobody removes from lies where it was."""
    index, other = filled(PrefixIndex()), PrefixIndex()
    rng = random.Random(9)
    batches = [pack_keys(rng.getrandbits(64) for _ in range(700)) for _ in range(6)]
    steady = {slot: index.snapshot(slot) for slot in range(1, 5)}
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            for batch in batches:
                index.apply(5, batch, Tier.SSD)
            for batch in batches:
                index.apply(5, batch, Tier.GONE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", 1)
        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(20):
                dump(path, index, [*words_of(index), (5, Word(5, 5, 5, 5.0))], taken_at=1.0)
        finally:
            over.set()
            writer.join()
    load(path, other, lambda word: word.epoch)
    for slot, groups in steady.items():
        got = {tier: set(memoryview(keys).cast("Q")) for tier, keys in other.snapshot(slot)}
        assert got == {tier: set(memoryview(keys).cast("Q")) for tier, keys in groups}
    written = {key for batch in batches for key in memoryview(batch).cast("Q")}
    assert all(set(memoryview(keys).cast("Q")) <= written for _, keys in other.snapshot(5))


def test_an_owner_may_be_left_out(path: str) -> None:
    index, other = filled(PrefixIndex()), PrefixIndex()
    dump(path, index, words_of(index), taken_at=1.0)
    loaded = load(path, other, lambda word: None if word.epoch == 2 else word.epoch)
    assert [slot for _, slot in loaded.owners] == [1, None, 3, 4]
    assert other.count(2) == 0 and [other.checksum(n) for n in (1, 3, 4)] == [index.checksum(n) for n in (1, 3, 4)]


def test_what_cannot_be_dumped_is_refused(path: str) -> None:
    index = filled(PrefixIndex())
    with pytest.raises(InvalidArgument, match="twice"):
        dump(path, index, [*words_of(index), *words_of(index)], taken_at=1.0)
    with pytest.raises(InvalidArgument, match="not within"):
        dump(path, index, [(1 << 20, Word(1, 1, 1, 1.0))], taken_at=1.0)
    with pytest.raises(InvalidArgument, match="too long"):
        dump(path, index, [(1, Word(1, 1, 1, 1.0, bytes((1 << 20) + 1)))], taken_at=1.0)
    assert not os.listdir(os.path.dirname(path))


def damaged(path: str, change: Callable[[bytearray], object]) -> None:
    data = bytearray(Path(path).read_bytes())
    change(data)
    Path(path).write_bytes(data)


def signed(data: bytearray) -> None:
    """With a trailer that fits: somebody meant it."""
    data[-16:] = xxhash.xxh3_128_digest(data[:-16])


def test_a_flipped_bit_anywhere_is_found_and_nothing_is_loaded(path: str) -> None:
    index = filled(PrefixIndex(), range(1, 3))
    dump(path, index, words_of(index, range(1, 3)), taken_at=1.0)
    whole = Path(path).read_bytes()
    rng = random.Random(5)
    for at in [*range(150), *rng.sample(range(len(whole)), 150), *range(len(whole) - 20, len(whole))]:
        other = PrefixIndex()
        Path(path).write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(IntegrityError):
            load(path, other, lambda word: word.epoch)
        assert other.stats().entries == 0


def test_a_file_that_was_cut_off_is_found_and_nothing_is_loaded(path: str) -> None:
    index = filled(PrefixIndex(), range(1, 2))
    dump(path, index, words_of(index, range(1, 2)), taken_at=1.0)
    whole = Path(path).read_bytes()
    for length in [*range(120), len(whole) // 2, len(whole) - 17, len(whole) - 16, len(whole) - 1]:
        Path(path).write_bytes(whole[:length])
        with pytest.raises(IntegrityError):
            load(path, PrefixIndex(), lambda word: word.epoch)


OWNER_AT, PAGES_AT = 24, 24 + 32 + len(NOTE)
"""Of the one owner in a file, and of its first record: u32 keys, u32 holders, 64 keys, 1 mask, 1 owner."""


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"p2pkvidy"),
        (8, struct.pack("<I", 2)),  # version
        (12, struct.pack("<I", 0xFFFFFFFF)),  # owners
        (12, struct.pack("<I", 0)),
        (OWNER_AT + 12, struct.pack("<I", 0xFFFFFFFF)),  # length of the note
        (OWNER_AT + 12, struct.pack("<I", 0)),
        (PAGES_AT, struct.pack("<I", 65)),  # keys of the first record
        (PAGES_AT, struct.pack("<I", 0)),
        (PAGES_AT, bytes(8)),  # an end mark, and more behind it
        (PAGES_AT + 4, struct.pack("<I", 0)),  # its holders
        (PAGES_AT + 4, struct.pack("<I", 5)),
        (PAGES_AT + 8 + 512, bytes(8)),  # a mask
        (PAGES_AT + 8 + 512 + 8, struct.pack("<I", 1 << 3 | 2)),  # a holder that is not listed
        (PAGES_AT + 8 + 512 + 8, struct.pack("<I", 5)),  # in no tier
        (PAGES_AT + 8 + 512 + 8, struct.pack("<I", 0)),
    ],
)
def test_a_file_that_lies_is_refused_although_its_trailer_fits(path: str, at: int, value: bytes) -> None:
    index = filled(PrefixIndex(), range(1, 2))
    dump(path, index, words_of(index, range(1, 2)), taken_at=1.0)
    damaged(path, lambda data: data.__setitem__(slice(at, at + len(value)), value))
    damaged(path, signed)
    other = PrefixIndex()
    with pytest.raises(IntegrityError):
        load(path, other, lambda word: 1)
    assert other.stats().entries == 0


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=300), sign=st.booleans())
def test_any_bytes_are_a_dump_or_an_integrity_error(data: bytes, sign: bool) -> None:
    other = PrefixIndex()
    with tempfile.NamedTemporaryFile() as file:
        file.write(data + xxhash.xxh3_128_digest(data) if sign else data)
        file.flush()
        with pytest.raises(IntegrityError):
            load(file.name, other, lambda _: 1)
    assert other.stats().entries == 0


def test_an_index_that_it_does_not_fit_into_keeps_nothing_of_it(path: str) -> None:
    index = filled(PrefixIndex())
    dump(path, index, words_of(index), taken_at=1.0)
    other = PrefixIndex(max_entries=1000)
    with pytest.raises(OutOfSpace):
        load(path, other, lambda word: word.epoch)
    assert other.stats().entries == 0


def test_there_may_be_none(path: str) -> None:
    with pytest.raises(FileNotFoundError):
        load(path, PrefixIndex(), lambda _: 1)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_leaves_the_dump_of_before(path: str) -> None:
    index = filled(PrefixIndex())
    dump(path, index, words_of(index), taken_at=1.0)
    before = Path(path).read_bytes()
    with file_size_limit(4096), pytest.raises(P2PKVError, match="cannot be dumped") as caught:
        dump(path, index, words_of(index), taken_at=2.0)
    assert caught.value.hint
    assert Path(path).read_bytes() == before
    assert os.listdir(os.path.dirname(path)) == ["index.dump"]


def test_a_place_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(P2PKVError, match="cannot be dumped"):
        dump(str(tmp_path / "no" / "such"), PrefixIndex(), [], taken_at=1.0)
