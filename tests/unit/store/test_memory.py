"""How much memory there is, read from made-up /proc and /sys trees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from p2pkv.store.memory import CGROUP_UNLIMITED_BYTES, available_memory, free_huge_pages, shared_thp_allowed

GIB = 1 << 30
Host = Callable[[dict[str, str]], Path]

MEMINFO = "MemTotal:       67108864 kB\nMemFree:         1048576 kB\nMemAvailable:   33554432 kB\n"


@pytest.fixture
def host(tmp_path: Path) -> Host:
    """``host({path: text})``: a root directory that says so."""

    def make(files: dict[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return make


def test_without_cgroups_it_is_what_the_kernel_has_available(host: Host) -> None:
    found = available_memory(host({"proc/meminfo": MEMINFO}))
    assert (found.bytes, found.limited_by) == (32 * GIB, "MemAvailable")


def test_a_cgroup_v2_limit_counts_and_page_cache_is_not_used_memory(host: Host) -> None:
    found = available_memory(
        host(
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/pods/me\n",
                "sys/fs/cgroup/pods/me/memory.max": f"{8 * GIB}\n",
                "sys/fs/cgroup/pods/me/memory.current": f"{5 * GIB}\n",
                "sys/fs/cgroup/pods/me/memory.stat": f"anon 7\nfile 99\ninactive_file {GIB}\nactive_file {GIB}\n",
            }
        )
    )
    assert (found.bytes, found.limited_by) == (5 * GIB, "memory.max of the cgroup")


def test_the_tightest_cgroup_on_the_way_up_counts(host: Host) -> None:
    found = available_memory(
        host(
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/pods/me\n",
                "sys/fs/cgroup/pods/me/memory.max": "max\n",
                "sys/fs/cgroup/pods/memory.max": f"{3 * GIB}\n",
                "sys/fs/cgroup/pods/memory.current": f"{GIB}\n",
            }
        )
    )
    assert found.bytes == 2 * GIB


def test_in_a_container_whose_path_is_the_hosts_the_top_of_the_mount_counts(host: Host) -> None:
    found = available_memory(
        host(
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/kubepods/somewhere/else\n",
                "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{GIB}\n",
            }
        )
    )
    assert found.bytes == GIB


def test_a_cgroup_v1_limit_counts_and_its_word_for_unlimited_does_not(host: Host) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/me\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/me/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory/me/memory.usage_in_bytes": f"{3 * GIB}\n",
        "sys/fs/cgroup/memory/me/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}\ntotal_active_file 0\n",
    }
    found = available_memory(host(files))
    assert (found.bytes, found.limited_by) == (2 * GIB, "memory.limit_in_bytes of the cgroup")


def test_a_cgroup_that_is_over_its_limit_has_nothing_left(host: Host) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": f"{GIB}\n",
        "sys/fs/cgroup/memory.current": f"{2 * GIB}\n",
    }
    assert available_memory(host(files)).bytes == 0


def test_a_host_without_proc_limits_nothing(tmp_path: Path) -> None:
    assert available_memory(tmp_path).bytes == CGROUP_UNLIMITED_BYTES
    assert free_huge_pages(tmp_path) == 0
    assert not shared_thp_allowed(tmp_path)


def test_this_host_has_some_memory() -> None:
    assert 0 < available_memory().bytes < CGROUP_UNLIMITED_BYTES


def test_huge_pages_that_are_promised_to_others_are_not_free(host: Host) -> None:
    pool = "sys/kernel/mm/hugepages/hugepages-2048kB"
    assert free_huge_pages(host({f"{pool}/free_hugepages": "10\n", f"{pool}/resv_hugepages": "3\n"})) == 7


@pytest.mark.parametrize(
    ("overall", "of_size", "allowed"),
    [
        ("always within_size [advise] never deny force", None, True),
        ("always within_size advise [never] deny force", None, False),
        ("always within_size advise never [deny] force", "[always] inherit within_size advise never", False),
        ("always within_size advise never deny [force]", "always inherit within_size advise [never]", True),
        ("always within_size advise [never] deny force", "always [inherit] within_size advise never", False),
        ("always within_size advise [never] deny force", "always inherit within_size [advise] never", True),
        ("[always] within_size advise never deny force", "always inherit within_size advise [never]", False),
    ],
)
def test_transparent_huge_pages_by_the_kernels_two_switches(
    host: Host, overall: str, of_size: str | None, allowed: bool
) -> None:
    thp = "sys/kernel/mm/transparent_hugepage"
    files = {f"{thp}/shmem_enabled": overall}
    if of_size is not None:
        files[f"{thp}/hugepages-2048kB/shmem_enabled"] = of_size
    assert shared_thp_allowed(host(files)) is allowed
