"""Hashing and copying without the GIL: right for every length and alignment, and alive when memory goes away."""

from __future__ import annotations

import array
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv import _native

KIB = 1 << 10
PIECE = 256 * KIB
LENGTHS = [0, 1, 2, 3, 4, 8, 9, 16, 17, 128, 129, 240, 241, 255, 256, 1023, 1024, 1025, 4096, 65_536, PIECE - 1, PIECE,
           PIECE + 1, 3 * PIECE + 17, 5 * (1 << 20) + 13]  # fmt: skip


def noise(length: int) -> bytes:
    return np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("length", LENGTHS)
def test_the_checksum_is_that_of_the_xxhash_package(length: int) -> None:
    data = noise(length)
    assert _native.xxh3_128(data) == xxhash.xxh3_128_digest(data)


@given(st.binary(max_size=5_000), st.integers(0, 64))
def test_the_checksum_does_not_depend_on_where_the_bytes_lie(data: bytes, shift: int) -> None:
    buffer = bytearray(shift) + data
    assert _native.xxh3_128(memoryview(buffer)[shift:]) == xxhash.xxh3_128_digest(data)


@settings(max_examples=60)
@given(st.binary(max_size=20_000), st.data())
def test_a_checksum_taken_in_pieces_is_that_of_the_whole(data: bytes, draw: st.DataObject) -> None:
    buffer = bytearray(data)
    address = _native.address_of(buffer) if data else 0
    hasher = _native.Hasher()
    done = 0
    while done < len(data):
        size = draw.draw(st.integers(1, len(data) - done))
        hasher.update(address + done, size)
        done += size
    assert hasher.digest() == xxhash.xxh3_128_digest(data)
    assert hasher.digest() == xxhash.xxh3_128_digest(data), "taking it changes nothing"


@pytest.mark.parametrize("length", LENGTHS)
def test_a_copy_is_equal_and_stays_within_its_bounds(length: int) -> None:
    source = noise(length)
    target = bytearray(b"\xaa" * (length + 128))
    assert _native.copy(memoryview(target)[64 : 64 + length], source)
    assert target == b"\xaa" * 64 + source + b"\xaa" * 64
    target = bytearray(b"\xaa" * (length + 128))
    assert _native.copy_hash(memoryview(target)[64 : 64 + length], source) == xxhash.xxh3_128_digest(source)
    assert target == b"\xaa" * 64 + source + b"\xaa" * 64


@pytest.mark.parametrize(
    "make", [bytearray, memoryview, lambda b: array.array("B", b), lambda b: np.frombuffer(b, np.uint8)]
)
def test_anything_with_a_buffer_will_do(make: object) -> None:
    data = noise(1000)
    assert _native.xxh3_128(make(bytearray(data))) == xxhash.xxh3_128_digest(data)  # type: ignore[operator]


def test_what_cannot_be_copied_is_refused() -> None:
    with pytest.raises(ValueError, match="length"):
        _native.copy(bytearray(3), b"1234")
    with pytest.raises(ValueError, match="length"):
        _native.copy_hash(bytearray(3), b"1234")
    with pytest.raises((BufferError, TypeError)):
        _native.copy(b"123", b"123")
    with pytest.raises((BufferError, TypeError)):
        _native.copy("abc", b"123")  # type: ignore[arg-type]
    with pytest.raises((BufferError, ValueError)):
        _native.xxh3_128(np.zeros((8, 8), np.uint8)[:, ::2])


@pytest.fixture
def shrinking() -> Iterator[tuple[int, mmap.mmap]]:
    """A mapped file of 16 pages, of which the test cuts off the end."""
    fd = os.memfd_create("test-shrink")
    os.ftruncate(fd, 16 * 4096)
    mapping = mmap.mmap(fd, 16 * 4096)
    mapping[:] = b"\x11" * (16 * 4096)
    yield fd, mapping
    mapping.close()
    os.close(fd)


def test_memory_that_has_gone_is_an_answer_and_not_the_end(shrinking: tuple[int, mmap.mmap]) -> None:
    fd, mapping = shrinking
    other = bytearray(16 * 4096)
    os.ftruncate(fd, 4096)
    assert not _native.copy(other, mapping)
    assert not _native.copy(mapping, other)
    assert _native.copy_hash(other, mapping) is None
    assert _native.copy_hash(mapping, other) is None
    address = _native.address_of(mapping)
    ok, _ = _native.run_now(2, [(0, address, 4096), (0, address, 8192)])
    assert ok == b"\x01\x00"
    assert _native.copy(memoryview(other)[:4096], memoryview(mapping)[:4096])


def test_memory_that_goes_under_other_threads_ends_only_their_copies(shrinking: tuple[int, mmap.mmap]) -> None:
    fd, mapping = shrinking
    results: list[bool] = []

    def copy() -> None:
        target = bytearray(16 * 4096)
        for _ in range(200):
            results.append(_native.copy(target, mapping))

    threads = [threading.Thread(target=copy) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        os.ftruncate(fd, 4096)
        os.ftruncate(fd, 16 * 4096)
    for thread in threads:
        thread.join(60)
    assert len(results) == 800
    assert _native.copy(bytearray(16 * 4096), mapping)


GUARD_PROGRAM = """
import faulthandler, mmap, os, sys
from p2pkv import _native
if sys.argv[1] == "faulthandler-first":
    faulthandler.enable()
fd = os.memfd_create("x"); os.ftruncate(fd, 8192); m = mmap.mmap(fd, 8192)
os.ftruncate(fd, 0)
assert not _native.copy(bytearray(8192), m)
if sys.argv[1] == "faulthandler-after":
    faulthandler.enable()
    assert not _native.copy(bytearray(8192), m)
print("alive", flush=True)
m[0]
"""


@pytest.mark.parametrize("order", ["none", "faulthandler-first", "faulthandler-after"])
def test_the_guard_guards_copies_and_nothing_else(order: str) -> None:
    """SIGBUS anywhere else still ends the process, whoever else has a handler."""
    done = subprocess.run(
        [sys.executable, "-c", GUARD_PROGRAM, order], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGBUS
    assert ("Bus error" in done.stderr) == (order != "none")


def test_nothing_is_written_after_the_deadline() -> None:
    source, target = bytearray(noise(PIECE * 4)), bytearray(PIECE * 4)
    ok, _ = _native.run_now(1, [(_native.address_of(target), _native.address_of(source), len(source))], 0.0)
    assert ok == b"\x00"
    assert target == bytes(PIECE * 4)
    ok, digests = _native.run_now(1, [(_native.address_of(target), _native.address_of(source), len(source))], 60.0)
    assert ok == b"\x01" and target == source and digests == xxhash.xxh3_128_digest(bytes(source))


def test_unknown_work_is_refused() -> None:
    for work in (-1, 3):
        with pytest.raises(ValueError, match="work"):
            _native.run_now(work, [])


def test_populated_memory_keeps_what_is_in_it() -> None:
    mapping = mmap.mmap(-1, 1 << 20)
    mapping[5] = 7
    assert _native.populate(_native.address_of(mapping), 1 << 20) in (0, 22)
    assert mapping[5] == 7


@pytest.mark.parametrize("threads", [1, 3])
def test_worker_threads_finish_every_job_with_its_own_results(threads: int) -> None:
    workers = _native.Workers(threads)
    try:
        jobs: dict[int, tuple[list[bytearray], list[bytes]]] = {}
        for job in range(1, 30):
            sources = [bytearray(noise(1000 * job + i)) for i in range(job % 5)]
            targets = [bytearray(len(source)) for source in sources]
            jobs[job] = targets, [bytes(source) for source in sources]
            items = [
                (_native.address_of(target), _native.address_of(source), len(source))
                for target, source in zip(targets, sources, strict=True)
            ]
            workers.submit(job, 1, items)
            keep.append(sources)
        done: dict[int, tuple[bytes, bytes]] = {}
        import select

        while len(done) < len(jobs):
            assert select.select([workers.fd], [], [], 30)[0]
            for job, ok, digests in workers.drain():
                assert job not in done
                done[job] = ok, digests
        for job, (targets, contents) in jobs.items():
            assert done[job][0] == b"\x01" * len(contents)
            assert done[job][1] == b"".join(map(xxhash.xxh3_128_digest, contents))
            assert [bytes(target) for target in targets] == contents
        assert workers.drain() == []
    finally:
        workers.stop()
        keep.clear()


keep: list[object] = []


def test_workers_that_are_stopped_with_work_left_end() -> None:
    workers = _native.Workers(1)
    source, target = bytearray(8 << 20), bytearray(8 << 20)
    for job in range(50):
        workers.submit(job, 1, [(_native.address_of(target), _native.address_of(source), len(source))])
    workers.stop()
    workers.stop()
    assert len(workers.drain()) <= 50
