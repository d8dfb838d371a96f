"""What listens, and where: nothing beyond loopback unless told otherwise."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cluster.agents import Cluster, eventually
from tests.cluster.transports import NIXL, TCP, options

pytestmark = [pytest.mark.cluster]

LISTEN = "0A"


def listening(pid: int) -> set[str]:
    """Addresses, in hexadecimal as the kernel writes them, of the TCP sockets on which a process listens."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(fd)
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_an_agent_listens_on_loopback_alone(cluster: Cluster, kind: str) -> None:
    pair = cluster.start(2, **options(kind))
    cluster.connected()
    if kind != TCP:
        for agent in pair:
            eventually(lambda a=agent: a.metric("p2pkv_nixl_ready") == 1, why="the NIXL process is up")  # type: ignore[misc]
    for agent in pair:
        assert listening(agent.pid) == {"0100007F"}, "peers and HTTP"
        for child in agent.children():
            assert listening(child) <= {"0100007F"}
