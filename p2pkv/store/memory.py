"""How much memory an arena may take on this host: what the kernel has to give, and what the cgroup lets us have.

Reads /proc and /sys and changes nothing. ``root`` is a parameter so that tests can show it another machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

HUGE_PAGE_BYTES: Final = 2 << 20
HUGETLB_POOL: Final = "sys/kernel/mm/hugepages/hugepages-2048kB"
THP: Final = "sys/kernel/mm/transparent_hugepage"

CGROUP_UNLIMITED_BYTES: Final = 1 << 60
"""cgroup v1 says "no limit" as a number just below 2**63."""

_CACHE: Final = ("active_file", "inactive_file")


class AvailableMemory(msgspec.Struct, frozen=True):
    """Bytes that this process can still allocate, and what sets that limit ("MemAvailable" or a cgroup's file)."""

    bytes: int
    limited_by: str


def available_memory(root: Path = Path("/")) -> AvailableMemory:
    """The least of the kernel's MemAvailable and what is left in this process's cgroup and those above it (v1 and v2).

    A cgroup's page cache counts as left, because the kernel takes it back before it refuses memory. Files that are
    not there limit nothing; a host without /proc/meminfo has 2**60 bytes.
    """
    least = AvailableMemory(_fields(root / "proc/meminfo").get("MemAvailable:", CGROUP_UNLIMITED_BYTES), "MemAvailable")
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = top / path.lstrip("/")
        # Within a container the path may be the host's, where only the container's own group is mounted, at the top.
        for each in [group, *group.parents] if group.is_dir() else [top]:
            limit = _number(each / names[0])
            if limit is not None and limit < CGROUP_UNLIMITED_BYTES:
                used = _number(each / names[1]) or 0
                stat = _fields(each / "memory.stat")
                cache = sum(stat.get(f"{prefix}{kind}", 0) for prefix in _prefixes(stat) for kind in _CACHE)
                left = max(0, limit - max(0, used - cache))
                if left < least.bytes:
                    least = AvailableMemory(left, f"{names[0]} of the cgroup")
            if each == top:
                break
    return least


def free_huge_pages(root: Path = Path("/")) -> int:
    """2 MiB pages of the hugetlb pool that are neither used nor promised to anybody."""
    free = _number(root / HUGETLB_POOL / "free_hugepages") or 0
    return max(0, free - (_number(root / HUGETLB_POOL / "resv_hugepages") or 0))


def shared_thp_allowed(root: Path = Path("/")) -> bool:
    """Whether madvise(MADV_HUGEPAGE) gives shared memory transparent huge pages of 2 MiB."""
    overall = _choice(root / THP / "shmem_enabled")
    of_size = _choice(root / THP / "hugepages-2048kB/shmem_enabled")  # since Linux 6.10
    if overall in ("deny", "force"):
        return overall == "force"
    return (overall if of_size in ("", "inherit") else of_size) in ("always", "within_size", "advise")


def _prefixes(stat: dict[str, int]) -> tuple[str, ...]:
    """v1 counts the group itself as "x" and with its children as "total_x"; v2 has only "x", children included."""
    return ("total_",) if "total_inactive_file" in stat else ("",)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _choice(path: Path) -> str:
    """The word in brackets of a file like "always [madvise] never"."""
    return _read(path).partition("[")[2].partition("]")[0]


def _fields(path: Path) -> dict[str, int]:
    """Lines of "name number [kB]" as bytes."""
    found: dict[str, int] = {}
    for line in _read(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return found
