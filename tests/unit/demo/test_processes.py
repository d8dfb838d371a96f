"""Children of the demo: what is shown of one that failed, and that nothing of one that was killed is left."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pkv.demo.processes import LOG_LINES, Child, ProcessFailed, cpu_seconds, group_of, running

LEAVER = """
import multiprocessing, time
from multiprocessing import shared_memory

if __name__ == "__main__":
    memory = shared_memory.SharedMemory(create=True, size=4096)
    spawn = multiprocessing.get_context("spawn")
    lock = spawn.Lock()
    spawn.Process(target=time.sleep, args=(600,)).start()
    print(memory.name, "sem." + lock._semlock.name.lstrip("/"), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def children() -> Iterator[list[Child]]:
    """Killed afterwards."""
    made: list[Child] = []
    yield made
    for child in made:
        child.kill()


def said(child: Child, deadline_s: float = 30.0) -> str:
    """The first line that a child prints."""
    deadline = time.monotonic() + deadline_s
    while "\n" not in child.log.read_text():
        assert child.alive and time.monotonic() < deadline, child.log.read_text()
        time.sleep(0.01)
    return child.log.read_text().splitlines()[0]


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_child_leaves_no_process_and_no_shared_memory(
    tmp_path: Path, children: list[Child], stopped: bool
) -> None:
    script = tmp_path / "leaver.py"
    script.write_text(LEAVER)
    child = Child("leaver", [sys.executable, str(script)], tmp_path / "log")
    children.append(child)
    left = [Path("/dev/shm") / name for name in said(child).split()]
    group = child.pid
    assert [path.exists() for path in left] == [True, True]
    if stopped:
        child.signal(signal.SIGSTOP)
    child.kill()
    assert [path.exists() for path in left] == [False, False]
    assert [pid for pid in running() if group_of(pid) == group] == []


UNMAPPER = """
import os, signal, time
from multiprocessing import resource_tracker, shared_memory

memory = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(memory._name, "shared_memory")  # as if it were killed before it gets to it


def end(*_):
    memory.close()
    os._exit(0)


signal.signal(signal.SIGTERM, end)
print(memory.name, flush=True)
time.sleep(600)
"""


def test_a_child_that_ends_without_removing_what_it_shared_leaves_nothing_either(
    tmp_path: Path, children: list[Child]
) -> None:
    script = tmp_path / "unmapper.py"
    script.write_text(UNMAPPER)
    child = Child("unmapper", [sys.executable, str(script)], tmp_path / "log")
    children.append(child)
    left = Path("/dev/shm") / said(child)
    assert left.exists()
    assert child.stop() == 0
    assert not left.exists()


def test_a_stopped_child_ends_when_it_is_asked_to(tmp_path: Path, children: list[Child]) -> None:
    child = Child(
        "sleeper", [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(600)"], tmp_path / "log"
    )
    children.append(child)
    said(child)
    child.signal(signal.SIGSTOP)
    assert child.stop() == -signal.SIGTERM


def test_a_failure_shows_the_cause_however_far_up_it_stands(tmp_path: Path) -> None:
    noise = f"for i in range({2 * LOG_LINES}): print('line', i)"
    program = f"print('ValueError: the cause'); {noise}".replace("; for", "\nfor") + "\nraise SystemExit(3)"
    child = Child("failing", [sys.executable, "-c", program], tmp_path / "log")
    with pytest.raises(ProcessFailed) as caught:
        child.wait_until(lambda: False, 30.0)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("failing ended with code 3")
    assert lines[1] == "ValueError: the cause"
    assert f"line {2 * LOG_LINES - 1}" in lines


def test_settings_of_p2pkv_do_not_reach_a_child(
    tmp_path: Path, children: list[Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("P2PKV_VLLM_PYTHON", "somewhere")
    program = "import os; print([name for name in os.environ if name.startswith('P2PKV_')])"
    child = Child("looker", [sys.executable, "-c", program], tmp_path / "log")
    children.append(child)
    assert child.wait(30.0) == 0
    assert said_at_the_end(child) == "[]"


def said_at_the_end(child: Child) -> str:
    return child.log.read_text().strip()


SPINNER = """
import time
while time.process_time() < 0.3:
    pass
print("done", flush=True)
time.sleep(600)
"""


def test_cpu_time_counts_descendants(tmp_path: Path, children: list[Child]) -> None:
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SPINNER!r}])"
    child = Child("parent", [sys.executable, "-c", program], tmp_path / "log")
    children.append(child)
    assert said(child) == "done"
    assert cpu_seconds(child.pid) >= 0.29
    assert cpu_seconds(2**22 + 1) == 0.0  # beyond any process id


def test_timers_of_a_child_and_of_what_it_starts_may_be_as_late_as_it_was_told(
    tmp_path: Path, children: list[Child]
) -> None:
    show = "print(open('/proc/self/timerslack_ns').read().strip(), flush=True)"
    outer = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {show!r}]))"
    ours = Path("/proc/self/timerslack_ns").read_text()
    for name, slack_s, shown in (("told", 0.010, "10000000"), ("not told", 0.0, ours)):
        children.append(child := Child("outer", [sys.executable, "-c", outer], tmp_path / name, None, slack_s))
        assert child.wait(30.0) == 0
        assert said(child) == shown.strip()
