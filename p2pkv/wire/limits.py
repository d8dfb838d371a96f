"""Bounds of fields, the same on both sides of a message: nothing larger is ever held by who receives it."""

from __future__ import annotations

from p2pkv.light import Final

KEYS_MAX: Final = 16_384
"""Most blocks in one message: 4 million tokens at the default block of 256."""

NAME_CHARS_MAX: Final = 256
TEXT_CHARS_MAX: Final = 1_024
"""Of what an ERROR says."""

ERROR_FIELDS_MAX: Final = 32
NODES_MAX: Final = 65_536
"""Rows of a MATCHED; more than a cell has nodes."""
REPLICAS_MAX: Final = 64
"""Nodes of one REPLICATE."""

NO_PROCESSOR: Final = 0xFFFF
"""In GET: where the thread runs that waits for the answer is not told."""
