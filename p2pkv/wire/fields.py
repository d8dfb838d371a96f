"""Field types that both message sets use. Decoding checks their bounds, so that nothing larger is ever held."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from p2pkv.wire.limits import ERROR_FIELDS_MAX, KEYS_MAX, NAME_CHARS_MAX, TEXT_CHARS_MAX

U8 = Annotated[int, Meta(ge=0, le=0xFF)]
U16 = Annotated[int, Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, Meta(ge=0, le=0xFFFFFFFF)]
U64 = Annotated[int, Meta(ge=0)]
"""msgspec cannot bound an integer above 2**63; msgpack itself bounds it at 2**64."""
BlockHash = Annotated[bytes, Meta(min_length=8, max_length=64)]
Hashes = Annotated[list[BlockHash], Meta(max_length=KEYS_MAX)]
Name = Annotated[str, Meta(max_length=NAME_CHARS_MAX)]
Text = Annotated[str, Meta(max_length=TEXT_CHARS_MAX)]
FieldNames = Annotated[list[Name], Meta(max_length=ERROR_FIELDS_MAX)]


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """A run of bytes in an arena or a region: offset and length, both in bytes."""

    offset: U64
    length: U64
