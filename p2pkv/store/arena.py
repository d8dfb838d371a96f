"""The arena: one memfd, mapped once, that holds every block of the DRAM tier. The I/O rim of the store.

Why a memfd: engines and the NIXL process map the same memory by descriptor, and sendfile serves peers from it. Its
size is sealed, so that nobody who maps it can be killed (SIGBUS) by its shrinking. It is mapped for the life of the
process and **never unmapped while anybody may read**: a peer's one-sided read of unmapped memory kills the owner.

Which bytes may be touched is the :class:`~p2pkv.store.dram.DramStore`'s business, not this module's.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Final, Literal

import msgspec

from p2pkv import _native
from p2pkv.errors import ConfigError, InvalidArgument, LocalProtocolError, OutOfSpace
from p2pkv.store.memory import HUGE_PAGE_BYTES, available_memory, free_huge_pages, shared_thp_allowed

HugeMode = Literal["auto", "huge", "thp", "none"]
HUGE_MODES: Final = ("auto", "huge", "thp", "none")

MEMFD_NAME: Final = "p2pkv-arena"
"""Shown as /memfd:p2pkv-arena in /proc/*/maps, so that an operator sees whose memory it is."""

# Absent where there is no memfd, which create() says in better words than an import error would.
MEMFD_FLAGS: Final = getattr(os, "MFD_CLOEXEC", 0) | getattr(os, "MFD_ALLOW_SEALING", 0)

MADV_POPULATE_WRITE: Final = 23
"""linux/mman.h; since Linux 5.14. Faults pages in for writing, keeps what is in them."""

POPULATE_STEP_BYTES: Final = 64 << 20
"""One system call's worth of populating, so that an agent that is told to stop need not wait for a terabyte."""


class ArenaPages(enum.Enum):
    """What kind of pages back an arena."""

    HUGETLB = "hugetlb"
    THP = "thp"
    SMALL = "small"


class ArenaBacking(msgspec.Struct, frozen=True):
    """What the arena got, for doctor and metrics. ``note``: why not better pages, and what to do; empty if the best."""

    pages: ArenaPages
    page_bytes: int
    note: str


class Arena:
    """One region of shared memory of fixed size. Made by :meth:`create`.

    Thread-safe: it changes nothing after creation but by ``close``.
    """

    def __init__(self, fd: int, memory: _native.Mapping, backing: ArenaBacking) -> None:
        self._fd = fd
        self._memory: _native.Mapping | None = memory
        self._view = memoryview(memory)
        self._backing = backing
        self._base_address = memory.address
        self._capacity_bytes = len(memory)

    @classmethod
    def create(cls, capacity_bytes: int, *, huge: HugeMode = "auto", root: Path = Path("/")) -> Arena:
        """Make and map an arena of ``capacity_bytes``, rounded down to pages, which come when touched or populated.

        Args:
            capacity_bytes: as configured.
            huge: "huge" = 2 MiB pages from the hugetlb pool, "thp" = transparent huge pages, "none" = 4 KiB pages,
                "auto" = the best of these that this host has, with the reason in :attr:`backing`.
            root: where /proc and /sys are looked for. For tests.

        Raises:
            ConfigError: the host has not so much memory, not the pages asked for, or no memfd.
        """
        if huge not in HUGE_MODES:
            raise ConfigError("unknown arena page mode", huge=huge, hint=f"Use one of {', '.join(HUGE_MODES)}")
        if not hasattr(os, "memfd_create"):
            raise ConfigError("this system has no memfd", hint="The agent needs Linux")
        reasons: list[str] = []
        if huge in ("auto", "huge"):
            arena = cls._on_hugetlb(capacity_bytes, root, reasons)
            if arena is not None:
                return arena
            if huge == "huge":
                raise ConfigError("no huge pages for the arena: " + reasons[-1], hint=_hugetlb_hint(capacity_bytes))
        return cls._on_shmem(capacity_bytes, root, huge, reasons)

    @classmethod
    def _on_hugetlb(cls, capacity_bytes: int, root: Path, reasons: list[str]) -> Arena | None:
        pages = capacity_bytes // HUGE_PAGE_BYTES
        free = free_huge_pages(root)
        if pages < 1 or free < pages:
            reasons.append(f"{free} huge pages of 2 MiB are free, {max(pages, 1)} are needed")
            return None
        fd = -1
        try:
            fd = os.memfd_create(MEMFD_NAME, MEMFD_FLAGS | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
            # Mapping reserves the pages: if they are gone by now it fails here, not with SIGBUS at the first touch.
            memory = _map(fd, pages * HUGE_PAGE_BYTES)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            reasons.append(f"the kernel refused huge pages: {error.strerror}")
            return None
        return cls(fd, memory, ArenaBacking(ArenaPages.HUGETLB, HUGE_PAGE_BYTES, ""))

    @classmethod
    def _on_shmem(cls, capacity_bytes: int, root: Path, huge: HugeMode, reasons: list[str]) -> Arena:
        length = capacity_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        if length < 1:
            raise ConfigError("the arena is smaller than one page", capacity_bytes=capacity_bytes)
        # Shared memory is not reserved by mapping it: beyond what there is, the OOM killer would answer, much later.
        available = available_memory(root)
        if length > available.bytes:
            raise ConfigError(
                "the arena is larger than the memory that is available",
                hint="Set a smaller arena (the default is 25% of free memory), or give this host or container more",
                arena_bytes=length,
                available_bytes=available.bytes,
                limited_by=available.limited_by,
            )
        fd = -1
        try:
            fd = os.memfd_create(MEMFD_NAME, MEMFD_FLAGS)
            memory = _map(fd, length)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            hint = "Check the limits on address space and locked memory" if fd >= 0 else "The agent needs Linux's memfd"
            raise ConfigError(f"the arena cannot be made: {error.strerror}", hint=hint, arena_bytes=length) from error
        if huge == "none":
            _advise(memory, mmap.MADV_NOHUGEPAGE)
        elif _advise(memory, mmap.MADV_HUGEPAGE) and (shared_thp_allowed(root) or _collapse(memory.address, length)):
            # Whether the system gives shared memory huge pages by itself or not: populate() collapses what is not.
            return cls(fd, memory, ArenaBacking(ArenaPages.THP, HUGE_PAGE_BYTES, "; ".join(reasons)))
        else:
            hint = "As root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
            if huge == "thp":
                os.close(fd)
                raise ConfigError("this host gives shared memory no transparent huge pages", hint=hint)
            reasons.append(f"transparent huge pages are off for shared memory ({hint})")
        return cls(fd, memory, ArenaBacking(ArenaPages.SMALL, mmap.PAGESIZE, "; ".join(reasons)))

    @property
    def fd(self) -> int:
        """The writable descriptor: for sendfile, and for the NIXL process to inherit. Stays the arena's."""
        return self._fd

    @property
    def capacity_bytes(self) -> int:
        """Size of the mapping."""
        return self._capacity_bytes

    @property
    def base_address(self) -> int:
        """Where the arena is mapped in this process: for native code and for registration."""
        return self._base_address

    @property
    def backing(self) -> ArenaBacking:
        """What kind of pages it got."""
        return self._backing

    def readonly_fd(self) -> int:
        """A new descriptor of the same memory that can only be mapped for reading: for engines. The caller closes it.

        This keeps an engine from overwriting blocks by mistake; a process of the same user that means harm can
        attach to the agent itself.
        """
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def view(self, offset: int, length: int) -> memoryview:
        """These bytes, writable, not copied. Drop it before ``close``.

        Raises:
            InvalidArgument: outside the arena.
        """
        self._check(offset, length)
        return self._view[offset : offset + length]

    def populate(self, offset: int, length: int) -> None:
        """Have the kernel provide these pages now, rather than one fault at a time under somebody's block.

        What is in them stays. Blocks (0.1 to 0.5 s per GiB) without the GIL: call it from an executor thread.

        Raises:
            InvalidArgument: outside the arena.
            OutOfSpace: the kernel has no pages.
        """
        self._check(offset, length)
        begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
        end = offset + length
        while begin < end:
            step = min(POPULATE_STEP_BYTES, end - begin)
            if self._backing.pages is ArenaPages.THP:
                _native.collapse(self._base_address + begin, step)  # what it cannot have stays small
            try:
                _populate_write(self._base_address + begin, step)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise OutOfSpace(f"the arena's pages cannot be had: {error.strerror}", offset=begin) from error
                self._allocate(begin, step)
            begin += step

    def lock(self) -> None:
        """Keep the arena in memory (mlock): faults all of it in, at some GB/s.

        Raises:
            ConfigError: RLIMIT_MEMLOCK is lower than the arena.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mlock(ctypes.c_void_p(self._base_address), ctypes.c_size_t(self._capacity_bytes)) != 0:
            raise ConfigError(
                "cannot lock the arena in memory",
                reason=os.strerror(ctypes.get_errno()),
                hint="Raise RLIMIT_MEMLOCK (ulimit -l; LimitMEMLOCK= in systemd), or set store.lock_memory to false.",
            )

    def _allocate(self, begin: int, length: int) -> None:
        """For kernels before 5.14: makes the pages, maps them not. Touching them could tear a concurrent write."""
        try:
            os.posix_fallocate(self._fd, begin, length)
        except OSError as error:
            raise OutOfSpace(f"the arena's pages cannot be had: {error.strerror}", offset=begin) from error

    def close(self) -> None:
        """Give the memory up, at exit only: no peer, engine or NIXL process may be reading. Idempotent.

        A part that is still viewed somewhere keeps the mapping until it is not.
        """
        if self._fd < 0:
            return
        os.close(self._fd)
        self._fd = -1
        self._view.release()
        self._memory = None  # unmapped, unless somebody views it

    def _check(self, offset: int, length: int) -> None:
        if self._fd < 0:
            raise LocalProtocolError("the arena is closed")
        if offset < 0 or length < 0 or offset + length > self._capacity_bytes:
            raise InvalidArgument("outside the arena", offset=offset, length=length, arena_bytes=self._capacity_bytes)


def _map(fd: int, length: int) -> _native.Mapping:
    """Size, seal and map a new memfd, left out of core dumps (it is other people's prompts, and terabytes)."""
    os.ftruncate(fd, length)
    os.fchmod(fd, 0o400)  # a read-only descriptor cannot be reopened for writing by accident
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    memory = _native.Mapping(fd, length, True)
    _advise(memory, mmap.MADV_DONTDUMP)
    return memory


def _advise(memory: _native.Mapping, advice: int) -> bool:
    """madvise on a whole mapping; False where the kernel does not know that (no transparent huge pages)."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.madvise(ctypes.c_void_p(memory.address), ctypes.c_size_t(len(memory)), advice) == 0)


def shared_memory_collapses() -> bool:
    """Whether this kernel makes shared memory huge when it is told to: tries it on 2 MiB."""
    fd = os.memfd_create("p2pkv-try", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, HUGE_PAGE_BYTES)
        memory = _native.Mapping(fd, HUGE_PAGE_BYTES, True)
        return _advise(memory, mmap.MADV_HUGEPAGE) and _collapse(memory.address, len(memory))
    finally:
        os.close(fd)


def _collapse(address: int, length: int) -> bool:
    """Whether this kernel makes shared memory huge when it is told to (MADV_COLLAPSE): tries it on the first 2 MiB."""
    return length >= HUGE_PAGE_BYTES and _native.collapse(address, HUGE_PAGE_BYTES) == HUGE_PAGE_BYTES


def _populate_write(address: int, length: int) -> None:
    """madvise(MADV_POPULATE_WRITE) through ctypes, which lets go of the GIL; ``mmap.madvise`` does not."""
    libc = ctypes.CDLL(None, use_errno=True)
    while libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), MADV_POPULATE_WRITE):
        number = ctypes.get_errno()
        if number not in (errno.EINTR, errno.EAGAIN):
            raise OSError(number, os.strerror(number))


def _hugetlb_hint(capacity_bytes: int) -> str:
    pages = max(1, capacity_bytes // HUGE_PAGE_BYTES)
    return f"As root: sysctl vm.nr_hugepages={pages} (more if others use them), or set the mode to auto"
