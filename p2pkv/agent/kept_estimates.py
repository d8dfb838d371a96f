"""What is expected of peers, kept over restarts: one small file in the state directory.

A hint like any other: a file that is missing, damaged, old or from another version costs nothing but what would be
learnt again from the first pulls.

On the event loop, apart from the writing: a thread of its own does that, and nobody waits for a disk that hangs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from p2pkv.transport.estimates import Kept
from p2pkv.transport.peers import Peers

log = logging.getLogger(__name__)

FILE: Final = "estimates.json"
VERSION: Final = 1
BYTES_MAX: Final = 4 << 20
AGE_MAX_S: Final = 86_400.0
SAVE_S: Final = 60.0
"""How often it is written: what is newer is learnt again by a pull or two."""
POLL_S: Final = 0.005


class _File(msgspec.Struct):
    version: int
    written_at: float  # time.time()
    sources: list[Kept]


class KeptEstimates:
    """One agent's file.

    Args:
        directory: None: nothing is kept.
        clock: says when it is time to write again; monotonic.
        wall: Unix seconds, for the file: they mean the same after a restart.
    """

    def __init__(
        self,
        directory: Path | None,
        peers: Peers,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = directory / FILE if directory is not None else None
        self._peers = peers
        self._clock = clock
        self._wall = wall
        self._saved_at = clock()
        self._writer: threading.Thread | None = None

    def load(self) -> int:
        """Take over what was written down; of how many sources."""
        if self._path is None:
            return 0
        try:
            with self._path.open("rb") as file:
                data = file.read(BYTES_MAX + 1)
            kept = msgspec.json.decode(data, type=_File)
        except FileNotFoundError:
            return 0
        except (OSError, msgspec.DecodeError) as error:
            log.warning("what was known of peers' links cannot be read, and is learnt anew: %s", error)
            return 0
        away_s = self._wall() - kept.written_at
        if kept.version != VERSION or not 0 <= away_s <= AGE_MAX_S:
            return 0
        return self._peers.restore([one._replace(age_s=one.age_s + away_s) for one in kept.sources])

    def tick(self) -> None:
        """Now and then: write it down, if it is time."""
        if self._clock() - self._saved_at >= SAVE_S:
            self.save()

    def save(self) -> None:
        """Begin to write down what is known, unless the last time is still under way. A failure is logged, and costs
        nothing now."""
        self._saved_at = self._clock()
        kept = self._peers.kept()
        if self._path is None or not kept:
            return
        if self._under_way:
            log.warning("what is known of peers' links is not written down: the last attempt has not ended yet")
            return
        file = _File(VERSION, self._wall(), kept)
        writer = threading.Thread(target=_write, args=(self._path, file), name="p2pkv-estimates", daemon=True)
        try:
            writer.start()
        except RuntimeError as error:  # no more threads
            log.warning("what is known of peers' links cannot be written down: %s", error)
        else:
            self._writer = writer

    async def stop(self, deadline_s: float) -> None:
        """Write it down once more; in bounded time, whatever the disk does. Nothing begins afterwards."""
        deadline = time.monotonic() + deadline_s
        await self._written(deadline)
        self.save()
        self._path = None
        await self._written(deadline)

    @property
    def _under_way(self) -> bool:
        return self._writer is not None and self._writer.is_alive()

    async def _written(self, deadline: float) -> None:
        while self._under_way and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)


def _write(path: Path, file: _File) -> None:
    """In a thread that the interpreter does not wait for at its end."""
    beside = path.with_suffix(".new")
    try:
        beside.write_bytes(msgspec.json.encode(file))
        os.replace(beside, path)
    except OSError as error:
        log.warning("what is known of peers' links cannot be written down: %s", error)
