"""What is expected of peers, kept over restarts: one small file in the state directory.

A hint like any other: a file that is missing, damaged, old or from another version costs nothing but what would be
learnt again from the first pulls.
"""

from __future__ import annotations

import logging
import os
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


class _File(msgspec.Struct):
    version: int
    written_at: float  # time.time()
    sources: list[Kept]


class KeptEstimates:
    """One agent's file. ``directory`` None: nothing is kept."""

    def __init__(self, directory: Path | None, peers: Peers, clock: Callable[[], float] = time.time) -> None:
        self._path = directory / FILE if directory is not None else None
        self._peers = peers
        self._clock = clock
        self._saved_at = clock()
        self._saved: list[Kept] = []

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
        away_s = self._clock() - kept.written_at
        if kept.version != VERSION or not 0 <= away_s <= AGE_MAX_S:
            return 0
        return self._peers.restore([one._replace(age_s=one.age_s + away_s) for one in kept.sources])

    def tick(self) -> None:
        """Now and then: write it down, if it is time."""
        if self._clock() - self._saved_at >= SAVE_S:
            self.save()

    def save(self) -> None:
        """Write down what is known; a failure is logged, and costs nothing now."""
        self._saved_at = self._clock()
        kept = self._peers.kept()
        if self._path is None or not kept:
            return
        beside = self._path.with_suffix(".new")
        try:
            beside.write_bytes(msgspec.json.encode(_File(VERSION, self._saved_at, kept)))
            os.replace(beside, self._path)
        except OSError as error:
            log.warning("what is known of peers' links cannot be written down: %s", error)
