"""Processes of a benchmark: started, spoken to by lines, and gone when the benchmark is, however that ends."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Final

from p2pkv.errors import DeadlineExceeded, Unavailable

PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
ANSWER_S: Final = 60.0
"""No single answer takes nearly so long; whoever gives none by then is stuck."""

_libc = ctypes.CDLL(None)


def environment(extra: Mapping[str, str] = {}) -> dict[str, str]:
    """This process's environment without what would configure an agent: a benchmark runs with its own settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("P2PKV_")} | dict(extra)


def die_with_parent() -> None:
    """Run in a child before it executes: the kernel kills it when the thread that started it is gone."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """``python -m p2pkv.bench.<module>``: one line in, one line out. It ends when its standard input does."""

    def __init__(self, module: str, *arguments: str, env: Mapping[str, str] = {}) -> None:
        self._name = module
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"p2pkv.bench.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(env),
            preexec_fn=die_with_parent,
        )
        self._pending = b""

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def signal(self, number: int) -> None:
        """Send it a signal, if it is still there."""
        self._process.send_signal(number)

    def ask(self, line: str) -> str:
        """Send a line and wait for the answer."""
        self.tell(line)
        return self.line()

    def tell(self, line: str) -> None:
        """Send a line that has no answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Unavailable("a process of the benchmark is gone", process=self._name, reason=error) from error

    def line(self, timeout_s: float = ANSWER_S) -> str:
        """The next line that it prints.

        Raises:
            Unavailable: it ended. DeadlineExceeded: it says nothing.
        """
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise DeadlineExceeded("a process of the benchmark does not answer", process=self._name)
            data = os.read(self._process.stdout.fileno(), 65_536)
            if not data:
                raise Unavailable("a process of the benchmark ended", process=self._name, exit=self._process.wait(5))
            self._pending += data
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        stop(self._process)


def stop(process: subprocess.Popen[bytes], grace_s: float = 10.0, *, number: int | None = None) -> None:
    """Close a process's pipes, send it signal ``number`` if there is one, and kill it if it has not ended by itself."""
    if number is not None and process.poll() is None:
        process.send_signal(number)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except OSError:
                pass  # what was still to be flushed to a process that is gone
    try:
        process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def requests() -> Iterator[str]:
    """In a child: lines from the benchmark until it is done with us."""
    for line in sys.stdin:
        yield line.strip()


def answer(line: str) -> None:
    """In a child: one line to the benchmark."""
    print(line, flush=True)
