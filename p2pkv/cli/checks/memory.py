"""Memory: is there enough for the arena, may it be locked, and in pages of what size."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

from p2pkv.cli.checks.base import Check, Status, read_int, read_text, size
from p2pkv.config import Store, parse_size

PROC: Final = Path("/proc")
SYS: Final = Path("/sys")
ARENA_BYTES_SMALL: Final = 256 << 20
"""Below this an arena holds so few blocks of a real model that sharing hardly pays."""

CAP_IPC_LOCK: Final = 14
SHM_FREE_BYTES_MIN: Final = 1 << 30


def meminfo(proc: Path = PROC) -> dict[str, int]:
    """``/proc/meminfo`` in bytes; page counts (``HugePages_*``) as they are."""
    facts = {}
    for line in (read_text(proc / "meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            facts[name] = int(words[0]) * (1024 if words[-1] == "kB" else 1)
    return facts


def cgroup_headroom(sys: Path = SYS) -> int | None:
    """Bytes that this container may still take (cgroup v2, then v1); ``None`` without a limit."""
    root = sys / "fs" / "cgroup"
    for limit_name, used_name in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, used = read_int(root / limit_name), read_int(root / used_name)
        if limit is not None and used is not None and limit < 1 << 60:
            return max(0, limit - used)
    return None


def available_bytes(proc: Path = PROC, sys: Path = SYS) -> int:
    """Memory that an arena could be made of now: what the kernel calls available, within the container's limit."""
    free = meminfo(proc).get("MemAvailable", 0)
    headroom = cgroup_headroom(sys)
    return free if headroom is None else min(free, headroom)


def arena_bytes(store: Store, available: int) -> int:
    """How large the configured arena would be."""
    return parse_size(store.capacity, key="store.capacity", percent_of=available)


def check_arena(store: Store, available: int) -> Check:
    """The arena fits, and is large enough to be of use."""
    wanted = arena_bytes(store, available)
    value = f"{size(wanted)} ({store.capacity}) of {size(available)} available"
    if wanted > available:
        return Check("arena", Status.FAIL, value, 'Set store.capacity lower, e.g. "25%".')
    if wanted < ARENA_BYTES_SMALL:
        return Check("arena", Status.WARN, value, "Room for few blocks: free memory, or set store.capacity higher.")
    return Check("arena", Status.OK, value)


def check_memory_lock(store: Store, arena: int, proc: Path = PROC, limit: int | None = None) -> Check:
    """The arena may be locked: RDMA pins it, and ``store.lock_memory`` asks for it. ``limit`` in bytes, -1 = none."""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if limit is None else limit
    if soft == resource.RLIM_INFINITY or soft < 0:
        return Check("memory lock", Status.OK, "unlimited")
    if _has_capability(CAP_IPC_LOCK, proc):
        return Check("memory lock", Status.OK, f"limit {size(soft)}, lifted by CAP_IPC_LOCK")
    value = f"limit {size(soft)}, arena {size(arena)}"
    if soft >= arena:
        return Check("memory lock", Status.OK, value)
    hint = "ulimit -l unlimited; LimitMEMLOCK=infinity for systemd; CAP_IPC_LOCK in a container."
    if store.lock_memory:
        return Check("memory lock", Status.FAIL, value, hint + " Or set store.lock_memory: false.")
    return Check("memory lock", Status.WARN, value, "Matters for RDMA and store.lock_memory only: " + hint)


def check_huge_pages(store: Store, arena: int, proc: Path = PROC, sys: Path = SYS) -> Check:
    """The arena can have large pages: fewer TLB misses and page faults on every copy."""
    facts = meminfo(proc)
    page, free = facts.get("Hugepagesize", 2 << 20), facts.get("HugePages_Free", 0)
    reserve = f"vm.nr_hugepages={-(-arena // page)}"
    if page * free >= arena:
        return Check("huge pages", Status.OK, f"{free} x {size(page)} reserved and free")
    if store.huge_pages == "huge":
        value = f"{free} x {size(page)} free, {size(arena)} needed"
        return Check("huge pages", Status.FAIL, value, f"sysctl {reserve}, or set store.huge_pages: auto.")
    setting = sys / "kernel" / "mm" / "transparent_hugepage" / "shmem_enabled"
    mode = _chosen(read_text(setting) or "")
    value = f"transparent for shared memory: {mode or 'unknown'}; reserved: {free}"
    if mode in ("always", "within_size", "advise", "force"):
        return Check("huge pages", Status.OK, value)
    if store.huge_pages == "none":
        return Check("huge pages", Status.OK, value + "; not asked for")
    return Check(
        "huge pages",
        Status.WARN,
        value,
        f"Works with 4 KiB pages, but slower. As root: echo advise > {setting}; or {reserve}.",
    )


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
        hint = "Engines' offload regions live there: remove leaked files; docker run --shm-size; a Memory emptyDir in a pod."
        return Check("shared memory", Status.WARN, value, hint)
    return Check("shared memory", Status.OK, value)


def _chosen(text: str) -> str:
    """The bracketed word of a kernel setting: ``always [never]`` -> ``never``."""
    return text.partition("[")[2].partition("]")[0]


def _has_capability(number: int, proc: Path) -> bool:
    for line in (read_text(proc / "self" / "status") or "").splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False
