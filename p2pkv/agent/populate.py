"""Have the arena's pages ready before blocks need them: a fault per 4 KiB page would halve the speed of a first put.

Pages are provided by a thread, always some way ahead of the highest extent in use, never the whole arena at once: an
agent that is given a terabyte and needs ten gigabytes takes ten.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from p2pkv.errors import P2PKVError
from p2pkv.store.arena import Arena

log = logging.getLogger(__name__)

AHEAD_BYTES: Final = 256 << 20
"""Some 50 ms of writing at full speed, and about as long to provide."""
STEP_BYTES: Final = 32 << 20
"""One turn of the thread; a stopping agent waits for one at most."""


class Populator:
    """Keeps the arena populated where it is used and a little beyond. Lives on the event loop."""

    def __init__(self, arena: Arena, ahead_bytes: int = AHEAD_BYTES) -> None:
        self._arena = arena
        self._ahead_bytes = ahead_bytes
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="p2pkv-populate")
        self._asked: set[int] = set()  # steps that are populated or waiting to be
        self._waiting: deque[int] = deque()
        self._task: asyncio.Task[None] | None = None
        self.populated_bytes = 0

    def used(self, offset: int, length: int) -> None:
        """This part of the arena is about to be written: have its pages ready, and those behind it."""
        end = min(self._arena.capacity_bytes, offset + length + self._ahead_bytes)
        for step in range(offset // STEP_BYTES, -(-end // STEP_BYTES)):
            if step not in self._asked:
                self._asked.add(step)
                self._waiting.append(step)
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            offset = self._waiting.popleft() * STEP_BYTES
            length = min(STEP_BYTES, self._arena.capacity_bytes - offset)
            try:
                await loop.run_in_executor(self._executor, self._arena.populate, offset, length)
            except P2PKVError as error:
                log.warning("cannot provide the arena's pages ahead of use: %s", error)
                self._waiting.clear()
                return
            self.populated_bytes += length

    async def stop(self) -> None:
        """End the thread; waits for one step."""
        self._waiting.clear()
        if self._task is not None:
            await self._task
        self._executor.shutdown(wait=True)
