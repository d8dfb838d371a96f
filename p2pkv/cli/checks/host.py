"""The interpreter and the machine: extensions, event loop, instructions, clock, descriptors, kernel settings."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import resource
from pathlib import Path
from typing import Final

from p2pkv.cli.checks.base import Check, Status, read_int, read_text
from p2pkv.config import Config

PROC: Final = Path("/proc")
SYS: Final = Path("/sys")
EXTENSIONS: Final = ("p2pkv._native", "p2pkv.index._core")
DESCRIPTORS_MIN: Final = 4_096
"""A small cell's sockets and regions with room to spare."""

CLOCKS_FAST: Final = frozenset({"tsc", "kvm-clock", "arch_sys_counter", "hyperv_clocksource_tsc_page", "ptp_kvm"})
"""Read from user space. Others cost a system call, or a slow device, each time that a deadline is looked at."""


def check_python() -> Check:
    """The interpreter's version."""
    return Check(
        "python",
        Status.OK,
        f"{platform.python_implementation()} {platform.python_version()}, Linux {platform.release()}",
    )


def check_extensions(names: tuple[str, ...] = EXTENSIONS) -> Check:
    """The C++ extensions are built for this interpreter."""
    seen = []
    for name in names:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            hint = "`make setup` in a checkout, or install p2pkv anew for this Python."
            return Check("extensions", Status.FAIL, f"{name}: {error}", hint)
        detail = getattr(module, "HASH_IMPLEMENTATION", "")
        seen.append(f"{name} ({detail})" if detail else name)
    return Check("extensions", Status.OK, ", ".join(seen))


def check_uvloop() -> Check:
    """The event loop that the agent runs on."""
    try:
        version = importlib.metadata.version("uvloop")
        importlib.import_module("uvloop")
    except (ImportError, importlib.metadata.PackageNotFoundError) as error:
        return Check("uvloop", Status.FAIL, str(error), "pip install uvloop")
    return Check("uvloop", Status.OK, version)


def check_cpu(proc: Path = PROC, machine: str = "") -> Check:
    """Vector instructions: checksums run at memory speed with AVX2 or NEON."""
    machine = machine or platform.machine()
    flags: set[str] = set()
    for line in (read_text(proc / "cpuinfo") or "").splitlines():
        name, _, rest = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags = set(rest.split())
            break
    if machine in ("x86_64", "AMD64"):
        wide = [name for name in ("avx2", "avx512f") if name in flags]
        if not wide:
            return Check("cpu", Status.WARN, f"{machine}, SSE2 only", "Checksums run at about a third of their speed.")
        return Check("cpu", Status.OK, f"{machine}: {', '.join(wide)}")
    if "asimd" in flags:
        return Check("cpu", Status.OK, f"{machine}: " + ", ".join(name for name in ("asimd", "sve") if name in flags))
    return Check("cpu", Status.WARN, machine, "Neither x86-64 nor ARM64: nobody has measured this.")


def check_clock(sys: Path = SYS) -> Check:
    """The kernel's clock can be read without a system call."""
    source = read_text(sys / "devices" / "system" / "clocksource" / "clocksource0" / "current_clocksource")
    if source is None:
        return Check("clock", Status.WARN, "unknown", "The kernel does not tell its clock source.")
    if source in CLOCKS_FAST:
        return Check("clock", Status.OK, source)
    return Check(
        "clock",
        Status.WARN,
        source,
        "A slow clock makes every deadline dearer: boot with clocksource=tsc if it is stable.",
    )


def check_descriptors(config: Config, limits: tuple[int, int] | None = None) -> Check:
    """Open files: up to two control connections for each member, some data connections, one for each engine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE) if limits is None else limits
    soft, hard = (1 << 30 if n == resource.RLIM_INFINITY else n for n in (soft, hard))
    whole = 2 * config.peer.members_max + config.engine.connections_max + 256
    value = f"limit {soft} (hard {hard})"
    hint = f"ulimit -n {max(whole, DESCRIPTORS_MIN)}; LimitNOFILE= for systemd."
    if soft < 1_024:
        return Check("open files", Status.FAIL, value, hint)
    if soft < min(whole, DESCRIPTORS_MIN):
        return Check(
            "open files",
            Status.WARN,
            value,
            f"Enough for a small cell, not for {config.peer.members_max} members: {hint}",
        )
    return Check("open files", Status.OK, value)


def check_kernel(proc: Path = PROC) -> Check:
    """Socket buffers and queues: what one TCP stream can have under way, and how many peers may knock at once."""
    seen, advice = [], []
    for name, least in (("net/core/rmem_max", 4 << 20), ("net/core/wmem_max", 4 << 20), ("net/core/somaxconn", 1_024)):
        found = read_int(proc / "sys" / name)
        if found is None:
            continue  # network namespaces other than the host's do not show net.core buffers
        key = name.replace("/", ".")
        seen.append(f"{name.rpartition('/')[2]} {found}")
        if found < least:
            advice.append(f"{key}={least}")
    for name, least in (("tcp_rmem", 4 << 20), ("tcp_wmem", 4 << 20)):
        words = (read_text(proc / "sys" / "net" / "ipv4" / name) or "").split()
        if len(words) != 3:
            continue
        seen.append(f"{name} {words[2]}")
        if int(words[2]) < least:
            advice.append(f'net.ipv4.{name}="{words[0]} {words[1]} {least}"')
    value = ", ".join(seen) or "not shown in this namespace"
    if advice:
        return Check("kernel limits", Status.WARN, value, "For fast links between hosts: sysctl -w " + " ".join(advice))
    return Check("kernel limits", Status.OK, value)
