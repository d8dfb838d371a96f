"""Memory: is there enough for the arena, may it be locked, and in pages of what size."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Final

from p2pkv.cli.checks.base import Check, Status, read_text, size
from p2pkv.config import Store, parse_size
from p2pkv.store.arena import shared_memory_collapses
from p2pkv.store.memory import HUGE_PAGE_BYTES, THP, AvailableMemory, free_huge_pages, shared_thp_allowed

ROOT: Final = Path("/")
ARENA_BYTES_SMALL: Final = 256 << 20
"""Below this an arena holds so few blocks of a real model that sharing hardly pays."""

CAP_IPC_LOCK: Final = 14
SHM_FREE_BYTES_MIN: Final = 1 << 30


def arena_bytes(store: Store, available: AvailableMemory) -> int:
    """How large the configured arena would be."""
    return parse_size(store.capacity, key="store.capacity", percent_of=available.bytes)


def check_arena(store: Store, available: AvailableMemory) -> Check:
    """The arena fits, and is large enough to be of use."""
    wanted = arena_bytes(store, available)
    value = f"{size(wanted)} ({store.capacity}) of {size(available.bytes)} available ({available.limited_by})"
    if wanted > available.bytes:
        return Check("arena", Status.FAIL, value, 'Set store.capacity lower, e.g. "25%".')
    if wanted < ARENA_BYTES_SMALL:
        return Check("arena", Status.WARN, value, "Room for few blocks: free memory, or set store.capacity higher.")
    return Check("arena", Status.OK, value)


def check_memory_lock(store: Store, arena: int, root: Path = ROOT, limit: int | None = None) -> Check:
    """The arena may be locked: RDMA pins it, and ``store.lock_memory`` asks for it. ``limit`` in bytes, -1 = none."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    if soft == resource.RLIM_INFINITY or soft < 0:
        return Check("memory lock", Status.OK, "unlimited")
    if _has_capability(CAP_IPC_LOCK, root):
        return Check("memory lock", Status.OK, f"limit {size(soft)}, lifted by CAP_IPC_LOCK")
    value = f"limit {size(soft)}, arena {size(arena)}"
    if soft >= arena:
        return Check("memory lock", Status.OK, value)
    hint = "ulimit -l unlimited; LimitMEMLOCK=infinity for systemd; CAP_IPC_LOCK in a container."
    if store.lock_memory:
        return Check("memory lock", Status.FAIL, value, hint + " Or set store.lock_memory: false.")
    return Check("memory lock", Status.WARN, value, "Matters for RDMA and store.lock_memory only: " + hint)


def check_huge_pages(
    store: Store, arena: int, root: Path = ROOT, collapses: Callable[[], bool] = shared_memory_collapses
) -> Check:
    """The arena can have large pages: fewer TLB misses and page faults on every copy."""
    free = free_huge_pages(root)
    needed = -(-arena // HUGE_PAGE_BYTES)
    if store.huge_pages == "none":
        return Check("huge pages", Status.OK, "not asked for (store.huge_pages: none)")
    if free >= needed and store.huge_pages != "thp":
        return Check("huge pages", Status.OK, f"{free} of {size(HUGE_PAGE_BYTES)} reserved and free, {needed} needed")
    reserve = f"sysctl vm.nr_hugepages={needed}"
    if store.huge_pages == "huge":
        value = f"{free} of {size(HUGE_PAGE_BYTES)} reserved and free, {needed} needed"
        return Check("huge pages", Status.FAIL, value, f"As root: {reserve}; or set store.huge_pages: auto.")
    if shared_thp_allowed(root):
        return Check("huge pages", Status.OK, f"transparent, also for shared memory; {free} reserved")
    if collapses():
        return Check("huge pages", Status.OK, f"transparent, by MADV_COLLAPSE; {free} reserved")
    setting = Path("/") / THP / "shmem_enabled"
    hint = f"Works with 4 KiB pages, but slower. As root: echo advise > {setting}; or {reserve}."
    return Check("huge pages", Status.WARN, f"not transparent for shared memory; {free} reserved", hint)


def check_memfd() -> Check:
    """Anonymous shared memory can be made and sealed: the arena is one memfd."""
    try:
        descriptor = os.memfd_create("p2pkv-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return Check("memfd", Status.FAIL, str(error), "Allow memfd_create in the container's seccomp profile.")
    try:
        os.ftruncate(descriptor, 1 << 21)
    except OSError as error:
        return Check(
            "memfd", Status.FAIL, f"cannot be sized: {error.strerror}", "Free memory, or raise the container's limit."
        )
    finally:
        os.close(descriptor)
    return Check("memfd", Status.OK, "works")


def check_dev_shm(path: Path = Path("/dev/shm")) -> Check:
    """Engines keep their own shared regions there (vLLM's offload region); agents do not."""
    try:
        facts = os.statvfs(path)
    except OSError as error:
        return Check(
            "shared memory",
            Status.WARN,
            f"{path}: {error.strerror}",
            "Engines cannot offload to host memory without it.",
        )
    free, whole = facts.f_bavail * facts.f_frsize, facts.f_blocks * facts.f_frsize
    value = f"{path}: {size(free)} of {size(whole)} free"
    if free < SHM_FREE_BYTES_MIN:
        hint = "Engines keep offload regions there: remove leaked files; docker run --shm-size; a Memory emptyDir."
        return Check("shared memory", Status.WARN, value, hint)
    return Check("shared memory", Status.OK, value)


def _has_capability(number: int, root: Path) -> bool:
    for line in (read_text(root / "proc" / "self" / "status") or "").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False
