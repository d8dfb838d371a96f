"""Loads of blocks that are in the arena, done by threads of the engine itself: no question, and no agent that could be
slow. What turns out to have gone meanwhile is asked of the agent.

An instance belongs to one connection; its memory stays mapped for as long as anything is copied into it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from p2pkv import _native
from p2pkv.light import Final, NamedTuple
from p2pkv.types import Status

OPEN_MAX: Final = 1_024

_STATUS_OF: Final = bytes([Status.MISS, Status.OK]) + bytes([Status.MISS]) * 254

OnCopied = Callable[[bytes], None]
"""Called once, by :meth:`OwnLoads.begin` already or from whoever polls, with a status per key."""


class _Job(NamedTuple):
    memory: object  # kept alive
    on_copied: OnCopied


class OwnLoads:
    """Thread-safe."""

    def __init__(self, gets: _native.Gets) -> None:
        self._gets = gets
        self._lock = threading.Lock()
        self._jobs: dict[int, _Job] = {}
        self._next = 1

    @property
    def fd(self) -> int:
        """Readable when :meth:`pump` has something to do; -1: never."""
        return self._gets.copied_fd

    @property
    def running(self) -> int:
        """Jobs that have not ended."""
        return len(self._jobs)

    def begin(
        self,
        namespace: int,
        keys: list[bytes],
        memory: object,
        to: Sequence[int],
        block_bytes: int,
        on_copied: OnCopied,
    ) -> bool:
        """Copy blocks to these addresses of ``memory``, if all are here. False: they are not, or this has ended;
        nothing is done. After an exception nothing goes on, and nothing will be reported."""
        with self._lock:
            if len(self._jobs) >= OPEN_MAX:
                return False
            job, self._next = self._next, self._next + 1
            self._jobs[job] = _Job(memory, on_copied)
        try:
            came = self._gets.copy_here(job, namespace, keys, to, block_bytes)
        except BaseException:
            self._gets.call_off_copies()  # if that was a signal's handler, it may have begun
            with self._lock:
                self._jobs.pop(job, None)
            raise
        if came is True:
            return True
        with self._lock:
            del self._jobs[job]
        if not isinstance(came, bytes):
            return False
        on_copied(_statuses(came))
        return True

    def pump(self) -> None:
        """Report what is done."""
        for number, came in self._gets.copied():
            with self._lock:
                job = self._jobs.pop(number, None)
            if job is not None:  # else somebody was to wake up only
                job.on_copied(_statuses(came))

    def wake(self) -> None:
        """Make :attr:`fd` readable until the next :meth:`pump`."""
        self._gets.wake_copied()

    def call_off(self) -> None:
        """Give up what is not begun, wait for the rest (a block per thread), and report all. What other threads begin
        meanwhile goes on."""
        self._gets.call_off_copies()
        self.pump()

    def end(self) -> None:
        """Likewise, and for good: nothing begins any more, and nobody writes."""
        self._gets.end_copies()
        self.pump()

    def __del__(self) -> None:
        if self._jobs:  # before their memory goes
            self._gets.end_copies()


def _statuses(came: bytes) -> bytes:
    return came.translate(_STATUS_OF)
