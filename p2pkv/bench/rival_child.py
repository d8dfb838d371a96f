"""What the processes of rivals have in common: the blocks, and how a reader is asked.

A block is made from its number, so that reader and holder need to tell each other nothing. A reader goes through the
ring once, says ``ready``, and then answers each line, a number of blocks, with ``ok SECONDS``, ``failed`` or
``wrong``. Each get that counts follows one of one block that does not, as ours do then: its processes have slept
while others were measured, and whatever is said over a rival is said over one that is awake. A process that cannot
start says ``cannot WHY``.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import mmap
import os
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import xxhash

from p2pkv.bench.child import Child, answer, requests
from p2pkv.errors import IntegrityError, Unavailable

CANNOT: Final = "cannot "
WARM_SINGLES: Final = 8


class Shape(NamedTuple):
    """What a rival is to hold, and the most blocks of one get."""

    block_bytes: int
    ring_blocks: int
    batch: int

    def arguments(self) -> tuple[str, ...]:
        """For the command line of a process."""
        return tuple(map(str, self))

    @staticmethod
    def of(arguments: Sequence[str]) -> Shape:
        """From the command line of a process."""
        block_bytes, ring_blocks, batch = map(int, arguments)
        return Shape(block_bytes, ring_blocks, batch)


def first_line(rival: str, child: Child, needs: str) -> str:
    """The first line of a rival's process; ``needs``: what it needs of a host.

    Raises:
        Unavailable: it says that it cannot run here.
    """
    line = child.line()
    if line.startswith(CANNOT):
        raise Unavailable("the rival cannot run here", rival=rival, why=line.removeprefix(CANNOT), hint=needs)
    return line


def seconds_of(rival: str, line: str) -> float | None:
    """A reader's answer.

    Raises:
        IntegrityError: the bytes were not the blocks'.
    """
    word, _, seconds = line.partition(" ")
    if word == "wrong":
        raise IntegrityError("a rival's get delivered bytes that are not the block's", rival=rival)
    return float(seconds) if word == "ok" else None


def load(module: str) -> Any:
    """In a child: a module of the rival's wheel. Where that cannot be, says why and ends."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        cannot(f"{type(error).__name__}: {error}")


def cannot(why: str) -> None:
    """In a child: say why it does not run here, and end."""
    answer(CANNOT + " ".join(why.split()))
    os._exit(0)


def block(block_bytes: int, number: int) -> bytes:
    """The bytes of a block of the ring."""
    return random.Random(f"{block_bytes} {number}").randbytes(block_bytes)


class Memory:
    """In a child: touched memory with its address, never given back."""

    def __init__(self, length: int) -> None:
        self._map = mmap.mmap(-1, length)
        self.view = memoryview(self._map)
        self.view[:] = b"\x01" * length
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))


class Ring:
    """In a reader: gets of the ring's blocks, one after the other, timed and checked.

    ``read`` is given numbers of blocks; it puts these to the front of ``memory``, in their order, and says whether all
    of them came.
    """

    def __init__(self, shape: Shape, memory: memoryview, read: Callable[[Sequence[int]], bool]) -> None:
        self._shape = shape
        self._memory = memory
        self._read = read
        self._digests = [xxhash.xxh3_128_digest(block(shape.block_bytes, i)) for i in range(shape.ring_blocks)]
        self._next = 0

    def get(self, blocks: int) -> str:
        """The answer to a question for so many blocks."""
        length = self._shape.block_bytes
        numbers = [(self._next + i) % self._shape.ring_blocks for i in range(blocks)]
        self._next = (self._next + blocks) % self._shape.ring_blocks
        began = time.perf_counter()
        came = self._read(numbers)
        took = time.perf_counter() - began
        if not came:
            return "failed"
        for i, number in enumerate(numbers):
            if xxhash.xxh3_128_digest(self._memory[i * length : (i + 1) * length]) != self._digests[number]:
                return "wrong"
        return f"ok {took!r}"


def serve(shape: Shape, memory: Memory, read: Callable[[Sequence[int]], bool]) -> None:
    """In a reader: get blocks as asked, until the input ends."""
    ring = Ring(shape, memory.view, read)
    batches = -(-shape.ring_blocks // shape.batch)
    for blocks in [shape.batch] * batches + [1] * WARM_SINGLES:
        if not (said := ring.get(blocks)).startswith("ok "):
            cannot(f"a get while nothing else was going on: {said}")
    gc.collect()
    gc.disable()  # like the benchmark's own
    answer("ready")
    for line in requests():
        said = ring.get(1)
        answer(said if said == "wrong" else ring.get(int(line)))
    os._exit(0)
