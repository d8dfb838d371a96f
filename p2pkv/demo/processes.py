"""Child processes that are watched, logged to files, and always ended, by their ids."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from p2pkv.errors import P2PKVError

STOP_S: Final = 20.0
LOG_LINES: Final = 30
LOG_CAUSES: Final = 8
"""Lines that name an error, from before the last :data:`LOG_LINES`: vLLM reports a cause long before it ends."""
PR_SET_PDEATHSIG: Final = 1
PR_SET_TIMERSLACK: Final = 29
_libc: Final = ctypes.CDLL(None, use_errno=True)  # loaded here: nothing may be loaded between fork and exec


class ProcessFailed(P2PKVError):
    """A child ended, or did not get ready in time; the message carries the end of its log."""


def before_exec(timer_slack_ns: int, death_signal: int = signal.SIGTERM) -> None:
    """Run in a child: it gets a signal when its parent is gone, however that ended; 0 keeps the kernel's slack."""
    _libc.prctl(PR_SET_PDEATHSIG, death_signal)
    if timer_slack_ns:
        _libc.prctl(PR_SET_TIMERSLACK, timer_slack_ns)


def clean_environment() -> dict[str, str]:
    """This process's environment without p2pkv's settings: what runs here is not a user's own agent or engine."""
    return {name: value for name, value in os.environ.items() if not name.startswith("P2PKV_")}


def guard(group: int) -> subprocess.Popen[bytes]:
    """A shell that kills a process group when its standard input ends, which we alone hold, without writing to it."""
    return subprocess.Popen(
        ["sh", "-c", 'read -r _; kill -s KILL -- "-$0"', str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


class Child:
    """One child in a process group of its own, so that whatever it starts ends with it.

    Args:
        timer_slack_s: how late its timers may be, and those of all that it starts, so that the kernel can let them fire
            together; 0: as late as ours.
        may_be_stopped: it may stand still when this process dies. SIGTERM, which lets others clean up then, would never
            arrive, and whatever it started would stand still for good. So it is killed, with its group, by a shell
            that waits for the end of this process.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        timer_slack_s: float = 0.0,
        may_be_stopped: bool = False,
    ) -> None:
        self.name = name
        self.log = log
        self._group_killed = False
        self._shared: set[Path] = set()
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                list(command),
                env=clean_environment() | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(
                    before_exec, int(timer_slack_s * 1e9), signal.SIGKILL if may_be_stopped else signal.SIGTERM
                ),
            )
        self._guard = guard(self._process.pid) if may_be_stopped else None

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def signal(self, number: int) -> None:
        """Send a signal to the child and whatever it started."""
        if self.alive:
            os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL the child and whatever it started, and reap it."""
        self._kill_group()
        self._process.wait(STOP_S)

    def terminate(self) -> None:
        """Ask it to end (SIGTERM), also if it was stopped. Does not wait; :meth:`stop` does."""
        if self.alive:
            # From here on it unmaps what it shares; Python's resource tracker, who unlinks that, may come too late.
            self._shared |= self._shared_now()
            self.signal(signal.SIGCONT)
            self._process.terminate()

    def stop(self, timeout_s: float = STOP_S) -> int:
        """Ask it to end, insist (SIGKILL) if it does not; returns its exit code."""
        self.terminate()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        finally:  # an impatient Ctrl-C ends the waiting, not the killing
            self._kill_group()
        return self._process.wait(timeout_s)

    def wait(self, timeout_s: float) -> int:
        """Wait for its end; returns its exit code.

        Raises:
            ProcessFailed: the time is over.
        """
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"{self.name} did not end within {timeout_s:.0f} s:\n{self.tail()}") from None

    def _kill_group(self) -> None:
        # The group lives on, under the child's id, while anything that the child started does. Killed once only:
        # afterwards the id may be somebody else's.
        if self._group_killed:
            return
        if self._guard is not None:  # before the group's id may be somebody else's
            self._guard.kill()
            self._guard.communicate()
        self._group_killed = True
        shared = self._shared | self._shared_now()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if shared:  # what they would have removed themselves, had they ended in their own time
            deadline = time.monotonic() + STOP_S
            while any(group_of(pid) == self._process.pid for pid in running()) and time.monotonic() < deadline:
                self._process.poll()
                time.sleep(0.01)
            for path in shared - shared_memory(running()):
                path.unlink(missing_ok=True)

    def _shared_now(self) -> set[Path]:
        return shared_memory({pid for pid in running() if group_of(pid) == self._process.pid})

    def tail(self) -> str:
        """The last lines of its log, after the last ones before them that name an error."""
        lines = self.log.read_text(errors="replace").splitlines()
        before, last = lines[:-LOG_LINES], lines[-LOG_LINES:]
        causes = [line for line in before if "Error: " in line or line.rstrip().endswith("Error")][-LOG_CAUSES:]
        return "\n".join([*causes, *(["..."] if causes else []), *last])

    def wait_until(self, ready: Callable[[], bool], timeout_s: float, tick: Callable[[], None] = lambda: None) -> None:
        """Wait for a condition while the child lives.

        Raises:
            ProcessFailed: it ended, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while not ready():
            if not self.alive:
                raise ProcessFailed(f"{self.name} ended with code {self._process.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ProcessFailed(f"{self.name} was not ready within {timeout_s:.0f} s:\n{self.tail()}")
            tick()
            time.sleep(0.1)


def answers(url: str) -> bool:
    """Whether a GET gives a 200."""
    try:
        with urllib.request.urlopen(url, timeout=2.0) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def running(proc: Path = Path("/proc")) -> set[int]:
    """Ids of all processes that this one can see."""
    return {int(entry.name) for entry in proc.iterdir() if entry.name.isdigit()}


def group_of(pid: int, proc: Path = Path("/proc")) -> int | None:
    """The process group of a process that lives; None if it is gone, or is dead and only waits to be reaped."""
    try:
        state, _, group = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else int(group)


def shared_memory(pids: Iterable[int], proc: Path = Path("/proc"), shm: Path = Path("/dev/shm")) -> set[Path]:
    """Files of /dev/shm that these processes have mapped; of others' processes nothing is known.

    Told by their inodes: glibc makes a semaphore under one name and keeps it under another.
    """
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in (proc / str(pid) / "maps").read_text(errors="replace").splitlines():
                if f" {shm}/" in line:
                    inodes.add(int(line.split(maxsplit=5)[4]))
    found = set()
    for path in shm.iterdir() if shm.is_dir() else ():
        with contextlib.suppress(OSError):
            if path.stat().st_ino in inodes:
                found.add(path)
    return found


def cpu_seconds(pid: int, proc: Path = Path("/proc")) -> float:
    """CPU time used so far by a process and its living descendants, all threads, user and system."""
    used = 0.0
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may end meanwhile
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        for task in (proc / str(pid) / "task").iterdir():
            used += sum(cpu_seconds(int(child), proc) for child in (task / "children").read_text().split())
    return used
