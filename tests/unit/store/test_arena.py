"""Arena: shared memory that others can read, that cannot shrink under them, and that refuses what is not there."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pkv import _native
from p2pkv.errors import ConfigError, InvalidArgument, LocalProtocolError, OutOfSpace
from p2pkv.store import arena as arena_module
from p2pkv.store.arena import Arena, ArenaPages
from p2pkv.store.memory import available_memory, free_huge_pages

MIB = 1 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena.create(4 * MIB)
    yield made
    made.close()


def fake_host(tmp_path: Path, *, available_kb: int = 1 << 30, free_huge: int = 0, shmem: str = "[never]") -> Path:
    for name, text in {
        "proc/meminfo": f"MemAvailable: {available_kb} kB\n",
        "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages": f"{free_huge}\n",
        "sys/kernel/mm/transparent_hugepage/shmem_enabled": f"{shmem}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def pages_present(arena: Arena) -> int:
    """4 KiB pages that the memfd has."""
    return os.fstat(arena.fd).st_blocks * 512 // 4096


def test_views_are_of_the_memory_itself(arena: Arena) -> None:
    assert arena.capacity_bytes == 4 * MIB
    view = arena.view(4096, 5)
    view[:] = b"hello"
    assert bytes(arena.view(4096, 5)) == b"hello"
    assert ctypes.string_at(arena.base_address + 4096, 5) == b"hello"
    assert os.pread(arena.fd, 5, 4096) == b"hello"
    assert len(arena.view(0, 0)) == 0
    view.release()


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (4 * MIB, 1), (0, 4 * MIB + 1), (1 << 62, 1 << 62)])
def test_what_is_outside_the_arena_cannot_be_viewed_or_populated(arena: Arena, offset: int, length: int) -> None:
    with pytest.raises(InvalidArgument, match="outside"):
        arena.view(offset, length)
    with pytest.raises(InvalidArgument, match="outside"):
        arena.populate(offset, length)


def test_capacity_is_rounded_down_to_pages() -> None:
    made = Arena.create(3 * MIB + 5000, huge="none")
    assert made.capacity_bytes == 3 * MIB + 4096
    made.close()


def test_engines_see_what_is_written_and_cannot_write(arena: Arena) -> None:
    fd = arena.readonly_fd()
    try:
        assert not os.get_inheritable(fd)
        with mmap.mmap(fd, arena.capacity_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as seen:
            arena.view(0, 3)[:] = b"abc"
            assert seen[:3] == b"abc"
        with pytest.raises(PermissionError):
            mmap.mmap(fd, arena.capacity_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
    finally:
        os.close(fd)


def test_the_arena_cannot_change_its_size_under_those_who_map_it(arena: Arena) -> None:
    for size in (0, 2 * MIB, 8 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.fd, size)
    fd = arena.readonly_fd()
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(fd, 0)
    os.close(fd)


@pytest.fixture
def without_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel before 6.1: it gives shared memory huge pages only where the system's settings say so."""
    monkeypatch.setattr(arena_module, "_collapse", lambda address, length: False)


def test_populating_makes_the_pages_and_keeps_what_is_in_them() -> None:
    arena = Arena.create(4 * MIB, huge="none")
    arena.view(8192, 4)[:] = b"keep"
    before = pages_present(arena)
    arena.populate(4096 + 7, MIB)  # any offset, any length
    assert pages_present(arena) >= before + 255
    assert bytes(arena.view(8192, 4)) == b"keep"
    arena.populate(0, arena.capacity_bytes)
    assert pages_present(arena) == 1024
    arena.populate(0, 0)
    arena.close()


def test_populating_large_areas_goes_in_steps(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = arena_module._populate_write, []

    def counted(address: int, length: int) -> None:
        calls.append((address - arena.base_address, length))
        real(address, length)

    monkeypatch.setattr(arena_module, "POPULATE_STEP_BYTES", 64 << 10)
    monkeypatch.setattr(arena_module, "_populate_write", counted)
    arena.populate(4096 + 7, (128 << 10) - 7)
    assert calls == [(4096, 64 << 10), (4096 + (64 << 10), 64 << 10)]  # the kernel wants whole pages


def test_populating_works_on_kernels_that_cannot_do_it_in_one_call(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def old_kernel(address: int, length: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(arena_module, "_populate_write", old_kernel)
    arena.view(0, 4)[:] = b"keep"
    arena.populate(0, 2 * MIB)
    assert pages_present(arena) >= 512
    assert bytes(arena.view(0, 4)) == b"keep"


def test_a_host_that_runs_out_while_populating_says_so(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(address: int, length: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(arena_module, "_populate_write", no_memory)
    with pytest.raises(OutOfSpace, match="Cannot allocate memory"):
        arena.populate(0, 4096)


def test_populating_in_a_thread_beside_a_writer_tears_nothing(arena: Arena) -> None:
    errors: list[BaseException] = []

    def populate() -> None:
        try:
            for _ in range(20):
                arena.populate(0, arena.capacity_bytes)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=populate)
    thread.start()
    for i in range(1024):
        arena.view(i * 4096, 8)[:] = i.to_bytes(8, "little")
    thread.join()
    assert not errors
    assert all(int.from_bytes(arena.view(i * 4096, 8), "little") == i for i in range(1024))


@pytest.mark.parametrize("huge", ["auto", "thp", "none"])
def test_an_arena_larger_than_memory_is_refused_before_it_is_made(tmp_path: Path, huge: str) -> None:
    root = fake_host(tmp_path, available_kb=1024, shmem="[advise]")
    with pytest.raises(ConfigError, match="larger than the memory that is available") as caught:
        Arena.create(2 * MIB, huge=huge, root=root)  # type: ignore[arg-type]
    assert caught.value.hint
    assert caught.value.context["available_bytes"] == MIB


def test_an_arena_larger_than_this_host_is_refused() -> None:
    with pytest.raises(ConfigError, match="larger than the memory"):
        Arena.create(available_memory().bytes * 2)


@pytest.mark.parametrize("capacity", [0, 4095, -1])
def test_an_arena_of_nothing_is_refused(capacity: int) -> None:
    with pytest.raises(ConfigError, match="smaller than one page"):
        Arena.create(capacity)


def test_an_unknown_page_mode_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="auto, huge, thp, none"):
        Arena.create(MIB, huge="large")  # type: ignore[arg-type]


def test_asking_for_huge_pages_that_are_not_reserved_says_how_to_reserve_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 huge pages of 2 MiB are free, 4 are needed") as caught:
        Arena.create(8 * MIB, huge="huge", root=fake_host(tmp_path, free_huge=1))
    assert "vm.nr_hugepages=4" in caught.value.hint


@pytest.mark.usefixtures("without_collapse")
def test_asking_for_transparent_huge_pages_that_are_off_says_how_to_get_them(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match="no transparent huge pages") as caught:
        Arena.create(8 * MIB, huge="thp", root=fake_host(tmp_path))
    assert "shmem_enabled" in caught.value.hint
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.usefixtures("without_collapse")
def test_auto_falls_back_to_small_pages_and_says_why(tmp_path: Path) -> None:
    made = Arena.create(4 * MIB, root=fake_host(tmp_path))
    assert (made.backing.pages, made.backing.page_bytes) == (ArenaPages.SMALL, 4096)
    assert "0 huge pages" in made.backing.note
    assert "shmem_enabled" in made.backing.note
    made.close()


def test_auto_takes_transparent_huge_pages_where_they_are_allowed(tmp_path: Path) -> None:
    made = Arena.create(4 * MIB, root=fake_host(tmp_path, shmem="[advise]"))
    assert made.backing.pages is ArenaPages.THP
    made.close()


@pytest.mark.usefixtures("without_collapse")
def test_huge_pages_that_are_gone_when_they_are_asked_for_end_in_the_next_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between reading the count and mapping, somebody else may have taken them."""
    real = os.memfd_create

    def refuse(name: str, flags: int) -> int:
        if flags & os.MFD_HUGETLB:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return real(name, flags)

    monkeypatch.setattr(os, "memfd_create", refuse)
    root = fake_host(tmp_path, free_huge=100)
    made = Arena.create(4 * MIB, root=root)
    assert made.backing.pages is ArenaPages.SMALL
    assert "Cannot allocate memory" in made.backing.note
    made.close()
    with pytest.raises(ConfigError, match="Cannot allocate memory"):
        Arena.create(4 * MIB, huge="huge", root=root)


def test_a_system_without_memfd_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(ConfigError, match="no memfd"):
        Arena.create(MIB)


def test_a_memfd_that_cannot_be_mapped_leaves_no_descriptor_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, length: int) -> _native.Mapping:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(arena_module, "_map", refuse)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match="cannot be made"):
        Arena.create(MIB, huge="none")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.skipif(free_huge_pages() < 4, reason="no free huge pages are reserved on this host")
def test_huge_pages_are_used_where_they_are_reserved() -> None:
    before = free_huge_pages()
    made = Arena.create(8 * MIB + 5000, huge="huge")
    assert made.backing.pages is ArenaPages.HUGETLB
    assert made.capacity_bytes == 8 * MIB
    assert free_huge_pages() == before - 4  # promised by the mapping, so that no touch can fail
    made.populate(0, made.capacity_bytes)
    made.view(8 * MIB - 1, 1)[:] = b"x"
    fd = made.readonly_fd()
    with mmap.mmap(fd, made.capacity_bytes, mmap.MAP_SHARED, mmap.PROT_READ) as seen:
        assert seen[-1:] == b"x"
    os.close(fd)
    made.close()
    assert free_huge_pages() == before


def pmd_mapped_kib() -> int:
    areas = Path("/proc/self/smaps").read_text().split("/memfd:p2pkv-arena")[1]
    return int(next(line for line in areas.splitlines() if line.startswith("ShmemPmdMapped:")).split()[1])


@pytest.mark.parametrize("setting", ["[never]", "[advise]"])
def test_huge_pages_really_come_whatever_the_systems_setting(tmp_path: Path, setting: str) -> None:
    made = Arena.create(64 * MIB, root=fake_host(tmp_path, shmem=setting))
    if made.backing.pages is not ArenaPages.THP:
        made.close()
        pytest.skip("THIS KERNEL DOES NOT COLLAPSE SHARED MEMORY (MADV_COLLAPSE, since Linux 6.1)")
    content = os.urandom(5 * MIB)
    made.view(3 * MIB, len(content))[:] = content
    made.populate(0, made.capacity_bytes)
    assert pmd_mapped_kib() == 64 << 10
    assert made.view(3 * MIB, len(content)) == content
    made.close()


def test_closing_is_final_idempotent_and_returns_the_memory() -> None:
    made = Arena.create(MIB)
    fd, address = made.fd, made.base_address
    made.close()
    made.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert f"{address:x}-" not in Path("/proc/self/maps").read_text()
    with pytest.raises(LocalProtocolError, match="closed"):
        made.view(0, 1)
    with pytest.raises(LocalProtocolError, match="closed"):
        made.populate(0, 1)


def test_closing_under_a_view_leaves_the_view_readable() -> None:
    made = Arena.create(MIB)
    view = made.view(0, 4)
    view[:] = b"live"
    made.close()
    assert bytes(view) == b"live"


def test_the_arena_is_left_out_of_core_dumps(arena: Arena) -> None:
    flags = Path("/proc/self/smaps").read_text().split("/memfd:p2pkv-arena")[1].partition("VmFlags:")[2].splitlines()[0]
    assert "dd" in flags.split()
