"""Numbers that an engine's client and its agent both use, in messages that each defines for itself."""

from __future__ import annotations

import enum

from p2pkv.light import Final, NamedTuple


class EngineType(enum.IntEnum):
    """Message types between engine client and agent."""

    ATTACH = 64
    READY = 65
    OPEN = 66
    OPENED = 67
    MAP_REGION = 68
    UNMAP_REGION = 69
    STORE = 70
    LOAD = 71
    DONE = 72
    GET = 73
    GOT = 74
    RELEASE = 75
    MATCH = 76
    MATCHED = 77
    OK = 78
    AHEAD = 79
    PREFETCH = 80
    REPLICATE = 81
    REPLICATED = 82
    WARM = 83
    WARMING = 84
    ERROR = 95


ENGINE_PROTOCOL_MIN: Final = 1
ENGINE_PROTOCOL_MAX: Final = 3
"""Versions of these messages that this build speaks; ATTACH carries both and READY the highest common one. From 2 on
the descriptors of the arena's directory may come beside READY; from 3 on there are PREFETCH, REPLICATE and WARM."""
WARM_PROTOCOL: Final = 3


class Pace(NamedTuple):
    """What computing blocks takes an engine: the first of a chain ``block_us``, each further one ``more_ns`` more than
    the one before it (there is more to attend to); and ``overhead_us``, what a pull costs it besides waiting for it.

    ``block_us`` 0: not known."""

    block_us: int = 0
    more_ns: int = 0
    overhead_us: int = 0


class Source(enum.IntEnum):
    """Where the bytes of one block came from."""

    NONE = 0
    LOCAL = 1
    PEER = 2
