"""Reads that native code asks the NIXL process for by itself, as far as the process's supervisor has to know of them.

The native half is ``native/nixl_reads.hpp``: it has a socket of its own to the process, and slots that late bytes may
still reach stay parked there until it says otherwise. Here: which process there is, how much is parked (the supervisor
bounds that), and signs that the process hangs.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable

from p2pkv import _native
from p2pkv.transport.nixl_child import Child
from p2pkv.transport.nixl_quarantine import Quarantine


class _Kind(enum.IntEnum):
    """As in ``native/nixl_reads.hpp``."""

    HOLD = 0
    CLEAR = 1
    LATE = 2
    LOST = 3
    BROKEN = 4
    NOT_INLINE = 5


class NativeReads:
    """See the module's docstring. Lives on the event loop.

    Args:
        native: its other half; stopped by the lane that uses it.
        on_lost: a peer (its node id) cannot be read any more over the connection that there was.
        on_not_inline: a peer has to take part in reads: native code leaves them alone, the connection stays.
    """

    def __init__(
        self, native: _native.NixlReads, on_lost: Callable[[int], None], on_not_inline: Callable[[int], None]
    ) -> None:
        self.native = native
        self._on_lost = on_lost
        self._on_not_inline = on_not_inline
        self._quarantine: Quarantine | None = None
        self._on_hold: Callable[[], None] = lambda: None
        self._on_late: Callable[[bool], None] = lambda broken: None

    def start(self, quarantine: Quarantine, on_hold: Callable[[], None], on_late: Callable[[bool], None]) -> None:
        """Attach to the running loop.

        Args:
            quarantine: where parked bytes are counted, beside those of other reads.
            on_hold: called when there is more in it.
            on_late: called with False when the process did not answer in time, and with True when its socket has ended.
        """
        self._quarantine = quarantine
        self._on_hold = on_hold
        self._on_late = on_late
        asyncio.get_running_loop().add_reader(self.native.fd, self._on_events)

    def stop(self) -> None:
        """Listen no longer."""
        asyncio.get_running_loop().remove_reader(self.native.fd)

    @property
    def bell_fd(self) -> int:
        """For the process to inherit: where it says that it has sent something."""
        return self.native.bell

    def attach(self, child: Child) -> None:
        """A process is ready: reads go there from now on."""
        self.native.attach(child.lane.detach(), child.process.pid)

    def reaped(self) -> None:
        """The process is gone: nothing that it had begun can land any more."""
        self.native.detach()

    def _on_events(self) -> None:
        assert self._quarantine is not None
        for kind, id_, size in self.native.drain():
            if kind == _Kind.HOLD:
                self._quarantine.hold(id_, [(0, size)], time.monotonic())
                self._on_hold()
            elif kind == _Kind.CLEAR:
                self._quarantine.clear(id_)
            elif kind == _Kind.LOST:
                self._on_lost(id_)
            elif kind == _Kind.NOT_INLINE:
                self._on_not_inline(id_)
            else:
                self._on_late(kind == _Kind.BROKEN)
