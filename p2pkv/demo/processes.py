"""Child processes that are watched, logged to files, and always ended, by their ids."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from p2pkv.errors import P2PKVError

STOP_S: Final = 20.0
LOG_LINES: Final = 25


class ProcessFailed(P2PKVError):
    """A child ended, or did not get ready in time; the message carries the end of its log."""


class Child:
    """One child in a process group of its own, so that whatever it starts ends with it."""

    def __init__(self, name: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                list(command),
                env={**os.environ, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

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

    def stop(self, timeout_s: float = STOP_S) -> int:
        """Ask it to end (SIGTERM), insist (SIGKILL) if it does not; returns its exit code."""
        if self.alive:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # whatever of its group is left
        except ProcessLookupError:
            pass
        return self._process.wait(timeout_s)

    def tail(self) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])

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
