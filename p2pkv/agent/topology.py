"""What the host itself tells of its links, before anything has been measured: the speed of its network and RDMA ports.

Read from sysfs, which every Linux has; no privilege and no library is needed.
"""

from __future__ import annotations

import contextlib
import fcntl
import re
import socket
import struct
from pathlib import Path
from typing import Final

SIOCGIFADDR: Final = 0x8915  # linux/sockios.h
BITS: Final = 8
NET: Final = Path("/sys/class/net")
RDMA: Final = Path("/sys/class/infiniband")


def link_bytes_per_s(host: str, net: Path = NET) -> float | None:
    """Of the interface that has this address, or of the fastest one where it is a wildcard; None: not known."""
    wildcard = host in ("", "0.0.0.0", "::")
    speeds = []
    for _, name in socket.if_nameindex():
        if wildcard or _address_of(name) == host:
            with contextlib.suppress(OSError, ValueError):  # an interface that is down has none
                speeds.append(int((net / name / "speed").read_text()))
    fastest = max(speeds, default=0)
    return fastest * 1e6 / BITS if fastest > 0 else None


def rdma_bytes_per_s(rdma: Path = RDMA) -> float | None:
    """Of all active RDMA ports together; None: there is none."""
    total = 0.0
    for rate in rdma.glob("*/ports/*/rate") if rdma.is_dir() else ():
        with contextlib.suppress(OSError):
            active = "ACTIVE" in (rate.parent / "state").read_text()
            found = re.match(r"([\d.]+) Gb/sec", rate.read_text())
            if active and found:
                total += float(found[1]) * 1e9 / BITS
    return total or None


def _address_of(interface: str) -> str:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    return ""
