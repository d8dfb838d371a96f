"""The writer of the stress benchmark, a process of its own: puts ever new blocks at the owner, so that it must evict.

A block's bytes follow from its number: its 32-byte key again and again. Whoever reads a block can tell whether it is
this block, another one, or a mixture, without having been told its contents.
"""

from __future__ import annotations

import hashlib
import mmap
import sys
import threading
import time
from pathlib import Path
from typing import Final

from p2pkv.bench.agents import layout_of
from p2pkv.bench.child import answer, requests
from p2pkv.client import AgentClient, Cache
from p2pkv.errors import AgentUnavailable, P2PKVError

BLOCK_BYTES: Final = 4 << 10
BATCH: Final = 16
COUNTER_BYTES: Final = 8


def key_of(number: int) -> bytes:
    """The key of block ``number``."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def block_of(key: bytes) -> bytes:
    """The bytes of a block."""
    return key * (BLOCK_BYTES // len(key))


class Counter:
    """How many blocks have been written: 8 bytes of a file that both processes map.

    One aligned word, read and written as one: struct's pack_into would zero it first, and a reader would see that.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(COUNTER_BYTES))
        with path.open("r+b") as file:
            self._word = memoryview(mmap.mmap(file.fileno(), COUNTER_BYTES)).cast("Q")

    @property
    def value(self) -> int:
        """The count."""
        return self._word[0]

    @value.setter
    def value(self, number: int) -> None:
        self._word[0] = number


class Writer(threading.Thread):
    """Puts batches, at most ``per_second`` blocks a second, or as fast as it can while a burst is asked for."""

    def __init__(self, socket: str, counter: Counter, per_second: float) -> None:
        super().__init__(name="writer")
        self._socket = socket
        self._counter = counter
        self._per_second = per_second
        self._changed = threading.Condition()
        self._written = 0
        self._burst_until = 0
        self._stopping = False

    def burst(self, blocks: int) -> None:
        """Write so many more at once; returns when they are written, or the writer has been stopped."""
        with self._changed:
            self._burst_until = self._written + blocks
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._stopping or self._written >= self._burst_until)

    def stop(self) -> None:
        """End after the batch under way."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def run(self) -> None:
        """Write until stopped."""
        with AgentClient(self._socket, name="p2pkv bench writer") as client:
            cache = client.open(layout_of(BLOCK_BYTES, "stress"))
            while not self._stopping:
                began = time.monotonic()
                stored = self._put(cache)
                with self._changed:
                    if stored:
                        self._written += BATCH
                        self._counter.value = self._written
                        self._changed.notify_all()
                    left = began + BATCH / self._per_second - time.monotonic()
                    self._changed.wait_for(self._hurried, timeout=max(0.0, left))

    def _hurried(self) -> bool:
        return self._stopping or self._written < self._burst_until

    def _put(self, cache: Cache) -> bool:
        """The next batch. False: what could make room is under lease; the same blocks again."""
        keys = [key_of(number) for number in range(self._written, self._written + BATCH)]
        try:
            return all(cache.put(keys, [block_of(key) for key in keys]))
        except AgentUnavailable:
            time.sleep(0.02)  # it was killed; there will be another one
            return False
        except P2PKVError as error:
            print(f"stress writer: {error}", file=sys.stderr, flush=True)
            time.sleep(0.1)
            return False


def main() -> None:
    """``<socket> <counter file> <blocks per second>``; a line is the length of a burst, answered when it is written."""
    socket, path, per_second = sys.argv[1:]
    writer = Writer(socket, Counter(Path(path)), float(per_second))
    writer.start()
    answer("writing")
    for line in requests():
        writer.burst(int(line))
        answer("written")
    writer.stop()
    writer.join()


if __name__ == "__main__":
    main()
