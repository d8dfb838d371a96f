"""Nothing stays behind of a benchmark that is ended: not a stopped engine, not a namespace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from p2pkv import netns
from p2pkv.bench import faults
from p2pkv.bench.report import Report
from p2pkv.cli.app import command
from p2pkv.demo.processes import Child, group_of
from p2pkv.errors import P2PKVError

PARENT = """
import os, signal, sys, time
from pathlib import Path
from p2pkv.demo.processes import Child

log = Path(sys.argv[1])
child = Child("engine", ["sh", "-c", "sleep 600 & echo $!; wait"], log, may_be_stopped=sys.argv[2] == "stopped")
while not log.read_text().endswith("\\n"):
    time.sleep(0.01)
child.signal(signal.SIGSTOP)
pids = [child.pid, int(log.read_text())]
while any(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T" for pid in pids):
    time.sleep(0.01)
print(*pids, flush=True)
time.sleep(600)
"""


def gone(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while group_of(pid) is not None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("may_be_stopped", [True, False])
def test_an_engine_that_stands_still_ends_with_a_killed_benchmark(tmp_path: Path, may_be_stopped: bool) -> None:
    """All of its processes. Other children are told to end, which they would never hear."""
    command_line = [sys.executable, "-c", PARENT, str(tmp_path / "log"), "stopped" if may_be_stopped else ""]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    try:
        assert [gone(pid, 10.0 if may_be_stopped else 0.3) for pid in pids] == [may_be_stopped] * 2
    finally:
        for pid in pids:
            if group_of(pid) == pids[0]:
                os.kill(pid, signal.SIGKILL)


def test_a_child_that_may_be_stopped_ends_as_others_do(tmp_path: Path) -> None:
    child = Child("engine", ["sleep", "600"], tmp_path / "log", may_be_stopped=True)
    child.signal(signal.SIGSTOP)
    assert child.stop() == -signal.SIGTERM
    assert gone(child.pid, 0.0)


def test_sigterm_is_an_interrupt_to_a_benchmark_that_has_to_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned_up = []
    before = signal.getsignal(signal.SIGTERM)

    def run(**_: object) -> Report:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10.0)
            raise AssertionError("not interrupted")
        finally:
            cleaned_up.append(True)

    monkeypatch.setattr(faults, "run", run)
    result = CliRunner().invoke(command(), ["bench", "faults"])
    assert cleaned_up and result.exit_code != 0
    assert not isinstance(result.exception, AssertionError)
    assert signal.getsignal(signal.SIGTERM) is before


def test_namespaces_of_processes_that_are_gone_are_told_by_their_names(tmp_path: Path) -> None:
    (tmp_path / "12").mkdir()
    names = ["p2pkv-12-0", "p2pkv-13-0", "p2pkv-13-switch", "p2pkv-13-mine", "p2pkv", "p2pkv-x-1", "other-13-0"]
    assert netns.left_behind(names, tmp_path) == ["p2pkv-13-0", "p2pkv-13-switch"]


@pytest.mark.root
@pytest.mark.skipif(bool(netns.missing()), reason="no network namespaces here")
def test_a_new_network_removes_what_a_killed_one_left() -> None:
    with subprocess.Popen(["true"]) as dead:
        pass
    left = f"p2pkv-{dead.pid}-0"
    netns.run("ip", "netns", "add", left)
    try:
        with netns.Network(1) as network:
            names = {path.name for path in netns.NAMED.iterdir()}
            assert left not in names and network.names[0] in names
    finally:
        netns.delete(left)
    assert network.names[0] not in {path.name for path in netns.NAMED.iterdir()}


def test_a_command_that_fails_says_what_to_do() -> None:
    with pytest.raises(P2PKVError, match="a command failed") as failed:
        netns.run("false")
    assert "tbf" in failed.value.hint
