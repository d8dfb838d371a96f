"""The arena's directory: engines find exactly what is there, and never take a slot's next block for the last one."""

from __future__ import annotations

import enum
import errno
import mmap
import os
import random
import threading
import time
from collections.abc import Iterator

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv import _native
from p2pkv.errors import ConfigError
from p2pkv.store.arena import Arena
from p2pkv.store.base import Reservation
from p2pkv.store.directory import ENTRIES_MIN, DirectoryFiles
from p2pkv.store.dram import DramStore
from p2pkv.types import Layout, Status

PAGE = 4096


def layout_of(block_bytes: int, model: str = "m") -> Layout:
    return Layout(model=model, revision="r", kv_dtype="u8", block_tokens=16, block_bytes=block_bytes)


def bytes_of(key: bytes, length: int) -> bytes:
    return random.Random(key).randbytes(64) * (length // 64)


class Scene:
    """A store with a directory over a real arena, and a reader of it."""

    def __init__(self, slots: int, block_bytes: int = PAGE, *, unchecked: bool = False) -> None:
        self.block_bytes = block_bytes
        self.arena = Arena.create(slots * block_bytes, huge="none")
        self.store = DramStore(self.arena.capacity_bytes, extent_bytes=block_bytes)
        self.files = DirectoryFiles(self.store, self.arena.capacity_bytes)
        self.namespace = self.store.register(layout_of(block_bytes))
        table, marks = self.files.descriptors()
        try:
            self.table = _native.Mapping(table, os.fstat(table).st_size, False)
            self.marks = _native.Mapping(marks, os.fstat(marks).st_size, True)
        finally:
            os.close(table)
            os.close(marks)
        memory = self.arena.view(0, self.arena.capacity_bytes)
        self.reader = _native.DirectoryReader(self.table, self.marks, memory, unchecked)

    def put(self, key: bytes, now: float = 0.0, content: bytes | None = None) -> Status | None:
        place = self.store.reserve(self.namespace, key, now)
        if isinstance(place, Status):
            return place
        content = bytes_of(key, self.block_bytes) if content is None else content
        self.fill(place, content)
        self.store.commit(place, xxhash.xxh3_128_digest(content), now)
        return None

    def fill(self, place: Reservation, content: bytes) -> None:
        assert _native.copy(self.arena.view(place.offset, place.length), content)

    def read(self, key: bytes) -> bytes | None:
        out = bytearray(self.block_bytes)
        return bytes(out) if self.reader.copy(self.namespace, key, out) else None

    def prove(self, key: bytes) -> tuple[Proof, bytes]:
        """As an agent of the same host reads it."""
        out = bytearray(self.block_bytes)
        return Proof(self.reader.copy_proven(self.namespace, key, out)), bytes(out)


class Proof(enum.IntEnum):
    """``native/directory_reader.hpp``"""

    GOOD = 0
    GONE = 1
    WRONG = 2


@pytest.fixture
def scene() -> Scene:
    return Scene(4)


KEYS = [bytes([i]) * (8 + i % 57) for i in range(12)]


def test_what_is_put_can_be_read_without_asking_and_is_counted(scene: Scene) -> None:
    assert scene.read(KEYS[0]) is None
    scene.put(KEYS[0])
    assert scene.read(KEYS[0]) == bytes_of(KEYS[0], PAGE)
    assert scene.store.core.read_unasked() == (1, PAGE)


def test_a_neighbour_proves_what_it_reads_and_counts_it_as_used_but_not_as_a_hit(scene: Scene) -> None:
    assert scene.prove(KEYS[0])[0] is Proof.GONE
    for now, key in enumerate(KEYS[:4]):
        scene.put(key, float(now))
    assert scene.prove(KEYS[0]) == (Proof.GOOD, bytes_of(KEYS[0], PAGE))
    assert scene.store.core.read_unasked() == (0, 0)
    scene.put(KEYS[4], 10.0)
    assert [scene.prove(key)[0] for key in KEYS[:3]] == [Proof.GOOD, Proof.GONE, Proof.GOOD]


def test_a_neighbour_notices_a_bit_that_flipped_in_the_arena(scene: Scene) -> None:
    scene.put(KEYS[0])
    place = scene.store.lookup(scene.namespace, KEYS[0])
    assert place is not None
    changed = bytearray(bytes_of(KEYS[0], PAGE))
    changed[PAGE // 2] ^= 1
    assert _native.copy(scene.arena.view(place.offset, place.length), bytes(changed))
    assert scene.prove(KEYS[0])[0] is Proof.WRONG


def test_a_block_that_is_being_written_cannot_be_read(scene: Scene) -> None:
    place = scene.store.reserve(scene.namespace, KEYS[0], 0.0)
    assert isinstance(place, Reservation)
    assert scene.read(KEYS[0]) is None
    scene.store.abort(place)
    assert scene.read(KEYS[0]) is None


def test_of_another_namespace_or_length_it_is_not_there(scene: Scene) -> None:
    scene.put(KEYS[0])
    assert not scene.reader.copy(scene.namespace + 1, KEYS[0], bytearray(PAGE))
    assert not scene.reader.copy(scene.namespace, KEYS[0], bytearray(PAGE - 1))
    assert not scene.reader.copy(scene.namespace, KEYS[0] + b"x", bytearray(PAGE))


def test_what_engines_read_by_themselves_is_not_evicted_as_unused(scene: Scene) -> None:
    for now, key in enumerate(KEYS[:4]):
        scene.put(key, float(now))
    assert scene.read(KEYS[0]) is not None
    scene.put(KEYS[4], 10.0)
    assert [scene.read(key) is not None for key in KEYS[:5]] == [True, False, True, True, True]


def test_what_engines_read_by_themselves_is_hot_once_that_is_counted_and_a_prefix_before_what_follows(
    scene: Scene,
) -> None:
    chain, cold = KEYS[:2], KEYS[2:4]
    for now, key in enumerate(chain + cold):
        scene.put(key, float(now))
    for key in chain:
        assert scene.read(key) is not None
    assert scene.store.hot(scene.namespace, 10) == cold[::-1] + chain[::-1]
    step = b""
    for _ in range(2):
        step = scene.store.count_marks(scene.namespace, step, 2, 10.0)
    assert step == b""
    assert scene.store.hot(scene.namespace, 10) == chain + cold[::-1]
    assert scene.store.hot(scene.namespace, 10, chain[0]) == [chain[1], *cold[::-1]]
    assert scene.store.hot(scene.namespace, 1, cold[0]) == []


def test_an_engine_that_marks_everything_all_the_time_cannot_fill_the_store(scene: Scene) -> None:
    marks = memoryview(scene.marks)
    for now, key in enumerate(KEYS):
        marks[:] = b"\xff" * len(marks)
        assert scene.put(key, float(now)) is None


@pytest.mark.parametrize("hot", [4, 100], ids=["a few", "more than are looked at"])
def test_a_layout_that_engines_read_by_themselves_does_not_lose_its_memory_to_one_that_is_only_written(
    hot: int,
) -> None:
    scene = Scene(2 * hot)
    other = scene.store.register(layout_of(2 * PAGE, "other"))
    read = [bytes([1]) + i.to_bytes(15, "little") for i in range(hot)]
    for key in read:
        scene.put(key)
    for now in range(1, 40):
        assert all(scene.read(key) is not None for key in read), now
        for i in range(hot // 2):
            place = scene.store.reserve(other, now.to_bytes(8, "little") + i.to_bytes(8, "little"), float(now * 10))
            assert isinstance(place, Reservation)
            scene.store.commit(place, bytes(16), float(now * 10))
    assert scene.store.stats().extents_reclaimed_total == 0
    scene.store.check_integrity()


def test_a_layout_that_is_all_read_still_gives_room_to_one_that_has_nothing(scene: Scene) -> None:
    other = scene.store.register(layout_of(2 * PAGE, "other"))
    for key in KEYS[:4]:
        scene.put(key)
    memoryview(scene.marks)[:] = b"\xff" * len(scene.marks)
    assert isinstance(scene.store.reserve(other, KEYS[0], 10.0), Reservation)
    scene.store.check_integrity()


def test_a_store_of_many_blocks_has_them_all_as_far_as_it_has_entries() -> None:
    scene = Scene(3 * ENTRIES_MIN)
    keys = [i.to_bytes(16, "little") for i in range(3 * ENTRIES_MIN)]
    for key in keys:
        scene.put(key, content=key * 256)
    found = [scene.read(key) for key in keys]
    assert found == [key * 256 for key in keys[:ENTRIES_MIN]] + [None] * (2 * ENTRIES_MIN)
    for key in keys[: ENTRIES_MIN // 2]:
        scene.store.delete(scene.namespace, key)
    fresh = [bytes(8) + i.to_bytes(8, "little") + b"x" for i in range(ENTRIES_MIN // 2)]
    for key in fresh:
        scene.put(key, content=bytes(PAGE))
    assert all(scene.read(key) is not None for key in fresh)


def test_a_dropped_namespace_is_gone_from_it(scene: Scene) -> None:
    scene.put(KEYS[0])
    scene.store.drop_namespace(scene.namespace)
    assert scene.read(KEYS[0]) is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "read", "delete", "pin"]), st.sampled_from(KEYS)), max_size=60))
def test_it_has_exactly_what_the_store_has(steps: list[tuple[str, bytes]]) -> None:
    scene = Scene(4)
    for now, (step, key) in enumerate(steps):
        if step == "put":
            scene.put(key, float(now))
        elif step == "delete":
            scene.store.delete(scene.namespace, key)
        elif step == "pin":
            scene.store.pin(scene.namespace, [key], 3.0, float(now), 1)
        else:
            scene.read(key)
        for each in KEYS:
            here = scene.store.lookup(scene.namespace, each) is not None
            assert scene.read(each) == (bytes_of(each, PAGE) if here else None)
    scene.store.check_integrity()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda table: table.__setitem__(slice(0, 8), bytes(8)),
        lambda table: table.__setitem__(slice(8, 12), b"\xff" * 4),
        lambda table: table.__setitem__(slice(16, 24), (1 << 30).to_bytes(8, "little")),
        lambda table: table.__setitem__(slice(16, 24), (3).to_bytes(8, "little")),
        lambda table: table.__setitem__(slice(24, 32), (1 << 30).to_bytes(8, "little")),
        lambda table: table.__setitem__(slice(40, 48), (1 << 50).to_bytes(8, "little")),
    ],
    ids=["magic", "version", "too many buckets", "odd buckets", "too many entries", "larger arena"],
)
def test_what_is_no_directory_is_refused(scene: Scene, spoil: object) -> None:
    table = bytearray(scene.table)
    spoil(table)  # type: ignore[operator]
    with pytest.raises(ValueError, match="directory"):
        _native.DirectoryReader(table, bytearray(scene.marks), bytearray(scene.arena.capacity_bytes))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 2000))
def test_whatever_is_in_it_nothing_outside_of_the_arena_is_read(garbage: bytes, at: int) -> None:
    scene = Scene(4)
    for key in KEYS[:4]:
        scene.put(key)
    table = bytearray(scene.table)
    start = 4096 + at * 64
    table[start : start + len(garbage)] = garbage[: max(0, len(table) - start)]
    reader = _native.DirectoryReader(table, bytearray(scene.marks), scene.arena.view(0, scene.arena.capacity_bytes))
    for key in KEYS:
        reader.copy(scene.namespace, key, bytearray(PAGE))


def test_an_engine_cannot_cut_off_the_files(scene: Scene) -> None:
    for descriptor in scene.files.descriptors():
        with pytest.raises(OSError, match=r"^\[Errno"):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)
    table, marks = scene.files.descriptors()
    with pytest.raises(PermissionError):
        mmap.mmap(table, PAGE)
    os.close(table)
    os.close(marks)


def test_its_table_can_only_be_read(scene: Scene) -> None:
    table, marks = scene.files.descriptors()
    try:
        assert os.fstat(table).st_mode & 0o777 == 0o400
    finally:
        os.close(table)
        os.close(marks)


@pytest.mark.parametrize("nth", [1, 2])
def test_without_memory_for_it_the_settings_are_wrong_and_nothing_is_left(
    monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    store = DramStore(16 * PAGE, extent_bytes=PAGE)
    create, calls = os.memfd_create, 0

    def fails(name: str, flags: int) -> int:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise OSError(errno.EMFILE, "Too many open files")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", fails)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match="directory"):
        DirectoryFiles(store, 16 * PAGE)
    assert os.listdir("/proc/self/fd") == before


def test_a_table_without_marks_is_not_kept() -> None:
    store = DramStore(16 * PAGE, extent_bytes=PAGE)
    table = os.memfd_create("p2pkv-left-behind")
    with pytest.raises(OSError, match="descriptor"):
        store.core.publish(table, -1, ENTRIES_MIN)
    os.close(table)
    with open("/proc/self/maps") as maps:
        assert "p2pkv-left-behind" not in maps.read()


BLOCK = 1 << 20
BLOCKS = 6
NAMES = [bytes([i]) * 16 for i in range(1, 13)]


def wrong_reads(scene: Scene, *, proven: bool, until_wrong: bool, seconds: float) -> tuple[int, int]:
    """Read while every slot is reused again and again; (reads that succeeded, those with a wrong byte, or of which that
    was said)."""
    contents = {name: name * (BLOCK // 16) for name in NAMES}
    over = threading.Event()

    def reuse() -> None:
        rng = random.Random(0)
        while not over.is_set():
            name = rng.choice(NAMES)
            scene.put(name, time.monotonic(), contents[name])

    writer = threading.Thread(target=reuse)
    writer.start()
    good = wrong = 0
    rng = random.Random(1)
    out = bytearray(BLOCK)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline and not (until_wrong and wrong):
            name = rng.choice(NAMES)
            if proven:
                proof = scene.reader.copy_proven(scene.namespace, name, out)
                good += proof == Proof.GOOD
                wrong += proof == Proof.WRONG or (proof == Proof.GOOD and out != contents[name])
            elif scene.reader.copy(scene.namespace, name, out):
                good += 1
                wrong += out != contents[name]
    finally:
        over.set()
        writer.join()
    return good, wrong


@pytest.fixture
def made() -> Iterator[list[Scene]]:
    yield (scenes := [])
    for scene in scenes:
        scene.files.close()


@pytest.mark.parametrize("proven", [False, True], ids=["an-engine", "a-neighbour"])
def test_a_slot_that_is_reused_while_it_is_copied_gives_no_wrong_byte(made: list[Scene], proven: bool) -> None:
    """And nobody is accused of one."""
    scene = Scene(BLOCKS, BLOCK)
    made.append(scene)
    good, wrong = wrong_reads(scene, proven=proven, until_wrong=False, seconds=1.0)
    assert good > 50 and wrong == 0


@pytest.mark.parametrize("proven", [False, True], ids=["an-engine", "a-neighbour"])
def test_without_the_look_afterwards_it_would(made: list[Scene], proven: bool) -> None:
    scene = Scene(BLOCKS, BLOCK, unchecked=True)
    made.append(scene)
    _, wrong = wrong_reads(scene, proven=proven, until_wrong=True, seconds=20.0)
    assert wrong > 0
