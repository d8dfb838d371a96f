"""Numbers that an engine's client and its agent both use, in messages that each defines for itself."""

from __future__ import annotations

import enum

from p2pkv.light import Final


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
    ERROR = 95


NO_PROCESSOR: Final = 0xFFFF
"""In GET: not told."""


class Source(enum.IntEnum):
    """Where the bytes of one block came from."""

    NONE = 0
    LOCAL = 1
    PEER = 2
