"""The writer of the stress benchmark, a process of its own: puts ever new blocks at the owner, so that it must evict.

A block's bytes follow from its number: its 32-byte key again and again. Whoever reads a block can tell whether it is
this block, another one, or a mixture, without having been told its contents.
"""

from __future__ import annotations

import hashlib
import mmap
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Final

from p2pkv.bench.agents import layout_of
from p2pkv.bench.child import answer, requests
from p2pkv.client import AgentClient
from p2pkv.errors import P2PKVError

BLOCK_BYTES: Final = 64 << 10
BATCH: Final = 16
COUNTER: Final = struct.Struct("<Q")


def key_of(number: int) -> bytes:
    """The key of block ``number``."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def block_of(key: bytes) -> bytes:
    """The bytes of a block."""
    return key * (BLOCK_BYTES // len(key))


class Counter:
    """How many blocks have been written: 8 bytes of a file that both processes map."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(COUNTER.size))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), COUNTER.size)

    @property
    def value(self) -> int:
        """The count."""
        number: int = COUNTER.unpack_from(self._memory)[0]
        return number

    @value.setter
    def value(self, number: int) -> None:
        COUNTER.pack_into(self._memory, 0, number)


def write(socket: str, counter: Counter, per_second: float, stopping: threading.Event) -> None:
    """Put batches, at most ``per_second`` blocks a second, until told to stop."""
    with AgentClient(socket, name="p2pkv bench writer") as client:
        cache = client.open(layout_of(BLOCK_BYTES, "stress"))
        written = 0
        due = time.monotonic()
        while not stopping.is_set():
            keys = [key_of(number) for number in range(written, written + BATCH)]
            try:
                stored = cache.put(keys, [block_of(key) for key in keys])
            except P2PKVError as error:
                print(f"stress writer: {error}", file=sys.stderr, flush=True)
                stopping.wait(0.1)
                continue
            if all(stored):  # else: everything that could go is under lease; the same blocks again
                written += BATCH
                counter.value = written
            due = max(due + BATCH / per_second, time.monotonic() - 0.1)
            stopping.wait(max(0.0, due - time.monotonic()))


def main() -> None:
    """``<socket> <counter file> <blocks per second>``; ends with its input."""
    socket, path, per_second = sys.argv[1:]
    stopping = threading.Event()
    writer = threading.Thread(target=write, args=(socket, Counter(Path(path)), float(per_second), stopping))
    writer.start()
    answer("writing")
    for _ in requests():
        pass
    stopping.set()
    writer.join()


if __name__ == "__main__":
    main()
