"""Dumps of an index: they come back as they were, and what is not whole changes nothing."""

from __future__ import annotations

import os
import random
import resource
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv.errors import IntegrityError, OutOfSpace, P2PKVError
from p2pkv.index import dump as module
from p2pkv.index.dump import Dump, Loaded, Word, dump, load
from p2pkv.index.hashing import pack_keys
from p2pkv.index.prefix import Index, PrefixIndex
from p2pkv.index.reference import ReferenceIndex
from p2pkv.types import MASK64, Tier

TIERS = [tier for tier in Tier if tier is not Tier.GONE]
KEYS = st.lists(st.integers(0, MASK64), max_size=40, unique=True)
WORDS = st.builds(
    Word, st.integers(0, MASK64), st.integers(0, (1 << 32) - 1), st.integers(0, MASK64), st.floats(0, 1e12)
)
OWNERS = st.lists(st.tuples(WORDS, st.dictionaries(st.sampled_from(TIERS), KEYS)), max_size=5)


def words_of(index: Index, slots: range = range(1, 5)) -> list[tuple[int, Word]]:
    return [(slot, Word(1000 + slot, slot, 7 * slot, 100.5 + slot)) for slot in slots]


def filled(index: Index, slots: range = range(1, 5)) -> Index:
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
@given(owners=OWNERS, taken_at=st.floats(0, 1e12))
def test_what_was_dumped_comes_back(owners: list[tuple[Word, dict[Tier, list[int]]]], taken_at: float) -> None:
    index, other = ReferenceIndex(), PrefixIndex()
    for slot, (_, groups) in enumerate(owners):
        for tier, keys in groups.items():
            index.apply(slot, pack_keys(keys), tier)
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "dump")
        listed = [(slot, word) for slot, (word, _) in enumerate(owners)]
        count = dump(path, index, listed, taken_at=taken_at)
        slots = iter(range(len(owners)))
        loaded = load(path, other, lambda _: next(slots))
        assert os.listdir(directory) == ["dump"]
    assert loaded == Dump(taken_at, [Loaded(word, slot, index.count(slot)) for slot, word in listed])
    assert count == sum(each.entries for each in loaded.owners)
    assert everything(other) == everything(index)


def test_large_sets_are_read_in_pieces(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 64)
    index, other = filled(PrefixIndex()), PrefixIndex()
    dump(path, index, words_of(index), taken_at=1.0)
    load(path, other, lambda word: word.epoch)
    assert everything(other) == everything(index)


def test_an_owner_may_be_left_out(path: str) -> None:
    index, other = filled(PrefixIndex()), PrefixIndex()
    dump(path, index, words_of(index), taken_at=1.0)
    loaded = load(path, other, lambda word: None if word.epoch == 2 else word.epoch)
    assert [each.slot for each in loaded.owners] == [1, None, 3, 4]
    assert other.count(2) == 0 and [other.checksum(n) for n in (1, 3, 4)] == [index.checksum(n) for n in (1, 3, 4)]


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


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.__setitem__(slice(0, 8), b"p2pkvidy"),
        lambda data: data.__setitem__(slice(8, 12), struct.pack("<I", 2)),
        lambda data: data.__setitem__(slice(12, 16), struct.pack("<I", 0xFFFFFFFF)),  # owners
        lambda data: data.__setitem__(slice(12, 16), struct.pack("<I", 0)),
        lambda data: data.__setitem__(slice(64, 72), struct.pack("<Q", 1 << 63)),  # keys in HBM
        lambda data: data.__setitem__(slice(64, 72), struct.pack("<Q", 5)),
        lambda data: data.__setitem__(slice(48, 56), bytes(8)),  # the set's checksum
    ],
)
def test_a_file_that_lies_is_refused_although_its_trailer_fits(
    path: str, change: Callable[[bytearray], object]
) -> None:
    index = filled(PrefixIndex(), range(1, 2))
    dump(path, index, words_of(index, range(1, 2)), taken_at=1.0)
    damaged(path, change)
    damaged(path, signed)
    other = PrefixIndex()
    with pytest.raises(IntegrityError):
        load(path, other, lambda word: word.epoch)
    assert other.count(1) == 0


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
