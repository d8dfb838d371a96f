"""Shared memory as a buffer, and its huge pages: where it lies, how long it lives, and that nothing in it is lost."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv import _native
from p2pkv.store.memory import HUGE_PAGE_BYTES

HUGE = HUGE_PAGE_BYTES
PAGE = mmap.PAGESIZE
LENGTH = 16 * HUGE


@pytest.fixture
def fd() -> Iterator[int]:
    made = os.memfd_create("test-mapping")
    os.ftruncate(made, LENGTH)
    yield made
    os.close(made)


def mapped(address: int) -> bool:
    """Whether this process has something at this address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split(" ")[0].split("-"))
        if begin <= address < end:
            return True
    return False


# ---- mappings


@settings(max_examples=50, deadline=None)
@given(st.one_of(st.sampled_from([1, PAGE, HUGE - 1, HUGE, HUGE + 1, LENGTH]), st.integers(1, LENGTH)))
def test_a_mapping_begins_at_a_multiple_of_a_huge_page_and_ends_where_it_should(length: int) -> None:
    fd = os.memfd_create("test-mapping")
    os.ftruncate(fd, length)
    mapping = _native.Mapping(fd, length, True)
    os.close(fd)
    assert mapping.address % HUGE == 0
    assert len(mapping) == length == memoryview(mapping).nbytes
    assert mapping.address == _native.address_of(mapping)
    memoryview(mapping)[length - 1] = 7
    assert memoryview(mapping)[length - 1] == 7


def test_two_mappings_of_one_file_are_the_same_memory(fd: int) -> None:
    one, two = _native.Mapping(fd, LENGTH, True), _native.Mapping(fd, 3 * PAGE, False)
    assert one.address != two.address
    memoryview(one)[5 : 5 + 9] = b"all of it"
    assert bytes(memoryview(two)[5 : 5 + 9]) == b"all of it"
    assert os.pread(fd, 9, 5) == b"all of it"
    os.pwrite(fd, b"back", 2 * PAGE)
    assert bytes(memoryview(one)[2 * PAGE : 2 * PAGE + 4]) == bytes(memoryview(two)[2 * PAGE :][:4]) == b"back"


def test_what_is_mapped_for_reading_cannot_be_written(fd: int) -> None:
    memory = _native.Mapping(fd, LENGTH, False)
    view = memoryview(memory)
    assert view.readonly and not memoryview(_native.Mapping(fd, LENGTH, True)).readonly
    with pytest.raises(TypeError):
        view[0] = 1
    with pytest.raises((BufferError, TypeError)):
        _native.copy(memory, bytes(LENGTH))
    with pytest.raises((BufferError, TypeError)):
        os.readv(fd, [memory])
    assert _native.copy(bytearray(LENGTH), memory)


def test_a_descriptor_that_is_for_reading_only_can_be_mapped_for_reading_only(fd: int) -> None:
    reading = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    try:
        os.pwrite(fd, b"here", 0)
        assert bytes(memoryview(_native.Mapping(reading, PAGE, False))[:4]) == b"here"
        with pytest.raises(PermissionError):
            _native.Mapping(reading, PAGE, True)
    finally:
        os.close(reading)


def test_a_buffer_keeps_the_memory_alive_and_the_last_one_unmaps_it(fd: int) -> None:
    mapping = _native.Mapping(fd, LENGTH, True)
    address = mapping.address
    view = memoryview(mapping)[HUGE : HUGE + 4]
    view[:] = b"kept"
    del mapping
    gc.collect()
    assert mapped(address) and bytes(view) == b"kept"
    view.release()
    gc.collect()
    assert not mapped(address)
    assert os.pread(fd, 4, HUGE) == b"kept"


def test_nothing_is_left_of_a_thousand_mappings(fd: int) -> None:
    def bytes_mapped() -> int:
        return int(Path("/proc/self/statm").read_text().split()[0]) * PAGE

    _native.Mapping(fd, LENGTH, True)
    before = bytes_mapped()
    for length in range(LENGTH - 1000, LENGTH):
        _native.Mapping(fd, length, True)
    assert bytes_mapped() - before < 10 * LENGTH


@pytest.mark.parametrize("length", [PAGE, LENGTH])
def test_a_bad_descriptor_is_an_error_of_the_system(length: int) -> None:
    with pytest.raises(OSError) as raised:
        _native.Mapping(-1, length, True)
    assert raised.value.errno == errno.EBADF
    reading, writing = os.pipe()
    try:
        with pytest.raises(OSError) as raised:
            _native.Mapping(reading, length, False)
        assert raised.value.errno in (errno.ENODEV, errno.EACCES)
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("length", [0, 1 << 60, (1 << 64) - 1, (1 << 64) - HUGE])
def test_a_length_that_cannot_be_is_an_error_of_the_system(fd: int, length: int) -> None:
    with pytest.raises(OSError) as raised:
        _native.Mapping(fd, length, True)
    assert raised.value.errno in (errno.EINVAL, errno.ENOMEM, errno.EOVERFLOW)


# ---- huge pages


def filled(mapping: _native.Mapping) -> bytes:
    """Give every page its random bytes, one small page at a time."""
    content = random.Random(3).randbytes(len(mapping))
    view = memoryview(mapping)
    for at in range(0, len(mapping), PAGE):
        view[at : at + PAGE] = content[at : at + PAGE]
    return content


def collapse(mapping: _native.Mapping) -> int:
    """All of it; skips where the kernel does not."""
    done = _native.collapse(mapping.address, len(mapping))
    assert done % HUGE == 0 and done <= len(mapping)
    if done == 0:
        pytest.skip("THIS KERNEL COLLAPSES NO SHARED MEMORY")
    return done


def in_huge_pages(address: int) -> int:
    """Bytes of the mapping at this address that are mapped as huge pages."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ")[0]
        if "-" in first:
            here = int(first.split("-")[0], 16) == address
        elif here and first in ("ShmemPmdMapped:", "FilePmdMapped:") and (size := int(line.split()[1])):
            return size << 10
    return 0


def test_collapsed_memory_keeps_what_is_in_it_and_is_in_huge_pages(fd: int) -> None:
    mapping = _native.Mapping(fd, LENGTH, True)
    content = filled(mapping)
    done = collapse(mapping)
    assert bytes(memoryview(mapping)) == content
    assert in_huge_pages(mapping.address) == done
    assert _native.collapse(mapping.address, LENGTH) == done, "again"
    assert bytes(memoryview(mapping)) == content == os.pread(fd, LENGTH, 0)


def test_memory_that_nobody_has_touched_collapses_to_zeros(fd: int) -> None:
    mapping = _native.Mapping(fd, LENGTH, True)
    collapse(mapping)
    assert bytes(memoryview(mapping)) == bytes(LENGTH)


def test_what_is_written_meanwhile_is_not_lost(fd: int) -> None:
    """One thread writes here, another through a mapping of its own, as an engine would."""
    mapping = _native.Mapping(fd, LENGTH, True)
    content = bytearray(filled(mapping))
    other = _native.Mapping(fd, LENGTH, True)
    over = threading.Event()
    going = [threading.Event(), threading.Event()]
    written: list[dict[int, int]] = [{}, {}]

    def write(who: int, view: memoryview) -> None:
        chance = random.Random(who)
        while not over.is_set():
            at = 2 * chance.randrange(LENGTH // 2) + who  # one has the even bytes
            view[at] = written[who][at] = chance.randrange(256)
            going[who].set()

    threads = [threading.Thread(target=write, args=(i, memoryview(m))) for i, m in enumerate((mapping, other))]
    for thread in threads:
        thread.start()
    try:
        assert all(event.wait(10) for event in going)
        collapse(mapping)
    finally:
        over.set()
        for thread in threads:
            thread.join(10)
    for places in written:
        for at, byte in places.items():
            content[at] = byte
    assert bytes(memoryview(mapping)) == bytes(memoryview(other)) == content


def test_only_whole_huge_pages_within_the_range_are_collapsed(fd: int) -> None:
    mapping = _native.Mapping(fd, LENGTH, True)
    content = filled(mapping)
    if in_huge_pages(mapping.address):
        pytest.skip("THIS SYSTEM GIVES SHARED MEMORY HUGE PAGES BY ITSELF")
    for begin, length in ((0, 0), (0, HUGE - 1), (1, HUGE), (PAGE, 2 * HUGE - 2 * PAGE)):
        assert _native.collapse(mapping.address + begin, length) == 0
    assert in_huge_pages(mapping.address) == 0
    if _native.collapse(mapping.address + PAGE, 3 * HUGE) == 0:
        pytest.skip("THIS KERNEL COLLAPSES NO SHARED MEMORY")
    assert in_huge_pages(mapping.address) == 2 * HUGE
    assert bytes(memoryview(mapping)) == content


def test_memory_that_is_for_reading_only_is_left_as_it_is(fd: int) -> None:
    writable = _native.Mapping(fd, LENGTH, True)
    content = filled(writable)
    done = _native.collapse(_native.Mapping(fd, LENGTH, False).address, LENGTH)
    assert done % HUGE == 0 and bytes(memoryview(writable)) == content
