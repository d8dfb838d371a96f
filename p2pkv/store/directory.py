"""The two files by which engines find blocks in the arena without asking: made, sealed, handed out.

``store/core/directory_layout.hpp`` says what is in them. Sizes are sealed, so that no engine can kill the agent
(SIGBUS) by cutting one off; the table goes out read-only.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

from p2pkv.errors import ConfigError
from p2pkv.store.dram import DramStore

BYTES_PER_ENTRY: Final = 16 << 10
"""Of the arena: smaller blocks than this, all over it, do not all have an entry, and are asked for. An entry is 112
bytes and 16 to 32 of hash table, and only what is used takes memory."""
ENTRIES_MIN: Final = 1 << 10
ENTRIES_MAX: Final = 1 << 24


class DirectoryFiles:
    """The directory of one store."""

    def __init__(self, store: DramStore, arena_bytes: int) -> None:
        """Make it; the store keeps it from now on.

        Raises:
            ConfigError: this system has no memfd, or no memory.
        """
        entries = min(max(arena_bytes // BYTES_PER_ENTRY, ENTRIES_MIN), ENTRIES_MAX)
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        self._files: list[int] = []
        try:
            for name in ("p2pkv-directory", "p2pkv-marks"):
                self._files.append(os.memfd_create(name, flags))
            self._table, self._marks = self._files
            store.core.publish(self._table, self._marks, entries)
            os.fchmod(self._table, 0o400)  # a read-only descriptor cannot be reopened for writing by accident
            for descriptor in self._files:
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError as error:
            self.close()
            raise ConfigError("no memory for the directory of the arena", reason=error.strerror) from error

    def descriptors(self) -> tuple[int, int]:
        """New descriptors of table (read-only) and marks, for one engine. The caller closes them."""
        table = os.open(f"/proc/self/fd/{self._table}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return table, os.dup(self._marks)
        except OSError:
            os.close(table)
            raise

    def close(self) -> None:
        """Close our descriptors; mappings stay."""
        for descriptor in self._files:
            os.close(descriptor)
