"""Clocks jump: the wall clock (set by hand, or by NTP) is of no account, and a monotonic clock that is suddenly an hour
later costs what was under way, and nothing else.
"""

from __future__ import annotations

import email.utils
import http.client
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.agents import AgentProcess, Cluster, alive_peers, eventually, visible
from tests.cluster.test_peer_faults import MIB, SLACK_S, SMALL, Read, put
from tests.cluster.transports import NIXL_TCP, TCP, options

pytestmark = [pytest.mark.cluster]

COUNT = 40
HOUR_S = 3_600
YEAR_S = 365 * 24 * HOUR_S


class Clock:
    """What an agent that is started now takes for its clocks."""

    def __init__(self, path: Path, preload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path = path
        path.write_bytes(bytes(16))
        monkeypatch.setenv("SHIFTED_CLOCK", str(path))
        monkeypatch.setenv("LD_PRELOAD", str(preload))

    def set(self, *, wall_s: int = 0, monotonic_s: int = 0) -> None:
        """So far from the kernel's, from now on."""
        with self._path.open("r+b", buffering=0) as file:
            file.write(struct.pack("=qq", wall_s * 10**9, monotonic_s * 10**9))


@pytest.fixture(scope="module")
def preload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled shim."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("clock") / "shifted_clock.so"
    source = Path(__file__).with_name("shifted_clock.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


def wall_clock_of(agent: AgentProcess) -> float:
    """By the date of its answers."""
    connection = http.client.HTTPConnection("127.0.0.1", agent.http_port, timeout=10.0)
    try:
        connection.request("GET", "/healthz")
        answer = connection.getresponse()
        answer.read()
        return email.utils.parsedate_to_datetime(answer.headers["date"]).timestamp()
    finally:
        connection.close()


def uptime_of(agent: AgentProcess) -> float:
    return agent.metric("p2pkv_uptime_seconds")


class Pair:
    """An owner and a reader, each with clocks of its own."""

    def __init__(self, cluster: Cluster, kind: str, preload: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.owner_clock = Clock(cluster.directory / "clock-0", preload, monkeypatch)
        [self.owner] = cluster.start(1, capacity="96MiB", **options(kind))
        self.reader_clock = Clock(cluster.directory / "clock-1", preload, monkeypatch)
        [self.reader] = cluster.start(1, capacity="96MiB", seeds=(self.owner.address,), **options(kind))
        monkeypatch.undo()
        cluster.connected()


@pytest.mark.parametrize("kind", [TCP, NIXL_TCP])
def test_a_wall_clock_that_jumps_changes_nothing(
    cluster: Cluster, kind: str, preload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forwards here and backwards there, and the other way round, by ten years: all reads give everything, at once, and
    no peer is lost."""
    pair = Pair(cluster, kind, preload, monkeypatch)
    owner, reader = pair.owner, pair.reader
    cache = reader.open(SMALL)
    for wall_s in (10 * YEAR_S, -10 * YEAR_S):
        keys = put(owner, SMALL, 16)
        visible(cache, keys)
        read = Read(cache, keys[:8], 10_000)
        pair.owner_clock.set(wall_s=wall_s)
        pair.reader_clock.set(wall_s=-wall_s)
        assert read.end() == 8 and read.seconds < 5.0
        for agent, by in ((owner, wall_s), (reader, -wall_s)):
            eventually(lambda a=agent, w=by: abs(wall_clock_of(a) - time.time() - w) < 60, why="its date is another")  # type: ignore[misc]
        read = Read(cache, keys, 10_000)
        assert read.end() == 16 and read.seconds < 5.0
        assert owner.node in alive_peers(reader) and reader.node in alive_peers(owner)
    assert reader.metric('p2pkv_pulls_total{result="incomplete"}') == 0
    assert "hidden" not in owner.log() + reader.log()


@pytest.mark.parametrize("kind", [TCP, NIXL_TCP])
@pytest.mark.parametrize("whose", ["owner", "reader"])
def test_an_hour_that_passes_in_mid_read_costs_what_was_under_way(
    cluster: Cluster, kind: str, whose: str, preload: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every deadline, lease and silence is over at once. No byte is wrong, no local block is lost, and the two find
    each other again as if one of them had stood still."""
    pair = Pair(cluster, kind, preload, monkeypatch)
    owner, reader = pair.owner, pair.reader
    clock, agent = (pair.owner_clock, owner) if whose == "owner" else (pair.reader_clock, reader)
    own = put(reader, SMALL, 4)
    cache, small = reader.open(MIB), reader.open(SMALL)
    keys = put(owner, MIB, COUNT)
    visible(cache, keys)
    before = uptime_of(agent)
    read = Read(cache, keys, 10_000)
    eventually(lambda: read.over or reader.metric("p2pkv_pulls_in_flight_blocks") > 0, why="the pull begins")
    clock.set(monotonic_s=HOUR_S)
    read.end()
    assert read.seconds < 10.0 + SLACK_S
    assert uptime_of(agent) - before > HOUR_S / 2, "the clock has jumped"
    assert Read(small, own, 2_000).end() == 4, "a local hit has nothing to do with it"
    cluster.connected()
    visible(cache, keys)
    eventually(lambda: Read(cache, keys, 10_000).end() == COUNT, 20.0, why="everything comes in the end")
    assert reader.metric("p2pkv_rejected_blocks_total") == 0
    fresh = put(owner, SMALL, 8)
    visible(small, fresh)
    assert eventually(lambda: Read(small, fresh, 10_000).end() == 8, 10.0)
    eventually(lambda: owner.metric("p2pkv_leases") == 0, 15.0, why="leases end")
