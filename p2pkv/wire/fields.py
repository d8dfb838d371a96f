"""Bounds and field types that both message sets use. Decoding checks them, so that nothing larger is ever held."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

KEYS_MAX: Final = 16_384
"""Most blocks in one message: 4 million tokens at the default block of 256."""

U8 = Annotated[int, Meta(ge=0, le=0xFF)]
U16 = Annotated[int, Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
U64 = Annotated[int, Meta(ge=0)]
"""msgspec cannot bound an integer above 2**63; msgpack itself bounds it at 2**64."""
BlockHash = Annotated[bytes, Meta(min_length=8, max_length=64)]
Hashes = Annotated[list[BlockHash], Meta(max_length=KEYS_MAX)]
Name = Annotated[str, Meta(max_length=256)]
