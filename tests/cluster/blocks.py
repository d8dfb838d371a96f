"""Blocks whose bytes follow from their key, so that whoever reads one can tell every wrong byte without a copy
of it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

UNIT_BYTES = 4096


def new_keys(count: int) -> list[bytes]:
    """Fresh random block hashes."""
    return [os.urandom(32) for _ in range(count)]


def block_of(key: bytes, length: int) -> bytes:
    """The content of a block: 4 KiB of SHAKE-128 of its key, over and over, so that two blocks differ in every unit."""
    unit = hashlib.shake_128(key).digest(UNIT_BYTES)
    whole, rest = divmod(length, UNIT_BYTES)
    return unit * whole + unit[:rest]


def blocks_of(keys: Iterable[bytes], length: int) -> list[bytes]:
    """:func:`block_of` of each key."""
    return [block_of(key, length) for key in keys]
