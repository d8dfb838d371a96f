"""The limit that the machine's memory sets: copying bytes that are there already."""

from __future__ import annotations

import time
from collections.abc import Sequence


class Memcpy:
    """Copies from memory of its own, which it has touched, so that no page fault is measured."""

    def __init__(self, bytes_max: int) -> None:
        self._source = memoryview(bytearray(b"\xa5") * bytes_max)

    def read(self, buffers: Sequence[memoryview]) -> float:
        """Fill the buffers, one copy each; returns seconds."""
        start = 0
        began = time.perf_counter()
        for buffer in buffers:
            end = start + len(buffer)
            buffer[:] = self._source[start:end]
            start = end
        return time.perf_counter() - began
