"""Engine memory mapped by descriptor. A region is used by jobs and unmapped only when the last of them has ended."""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import stat
from collections.abc import Sequence
from typing import Final

from p2pkv import _native
from p2pkv.errors import Busy, InvalidArgument
from p2pkv.wire.engine import MapRegion

DESCRIPTORS_HINT: Final = "Raise its limit: ulimit -n; LimitNOFILE= for systemd."


class MappedRegion:
    """One mapped region: slot ``i`` begins at ``address + i * slot_bytes``."""

    def __init__(self, fd: int, request: MapRegion) -> None:
        """Map it; ``fd`` stays the caller's.

        Raises:
            InvalidArgument: not shared memory, or smaller than it says.
            Busy: this process is out of descriptors.
        """
        self.slots = request.slots
        self.slot_bytes = request.slot_bytes
        length = request.slots * request.slot_bytes
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidArgument("a region must be a memfd or a file", mode=oct(status.st_mode))
        if length == 0 or request.offset + length > status.st_size:
            raise InvalidArgument(
                "a region is smaller than it says",
                needs=request.offset + length,
                has=status.st_size,
                hint="Give the file its full size (ftruncate) before mapping it.",
            )
        if request.offset % mmap.ALLOCATIONGRANULARITY:
            raise InvalidArgument("a region's offset is not a multiple of the page size", offset=request.offset)
        try:
            self._map: mmap.mmap | None = mmap.mmap(fd, length, offset=request.offset)
        except (OSError, ValueError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):  # a mapping keeps one
                raise Busy("the agent is out of descriptors", hint=DESCRIPTORS_HINT) from error
            raise InvalidArgument("a region cannot be mapped for reading and writing", reason=error) from error
        self._address = _native.address_of(self._map)
        self._users = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing = False

    def addresses(self, slots: Sequence[int]) -> list[int]:
        """Where these slots begin.

        Raises:
            InvalidArgument: a slot is outside the region, or the region is being unmapped.
        """
        if self._closing:
            raise InvalidArgument("the region is being unmapped")
        if slots and max(slots) >= self.slots:
            raise InvalidArgument("a slot is outside its region", slot=max(slots), slots=self.slots)
        return [self._address + slot * self.slot_bytes for slot in slots]

    def __enter__(self) -> MappedRegion:
        self._users += 1
        self._idle.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self._users -= 1
        if not self._users:
            self._idle.set()

    async def close(self) -> None:
        """Unmap once no job uses it (jobs have deadlines)."""
        self._closing = True
        await self._idle.wait()
        if self._map is not None:
            self._map.close()
            self._map = None
