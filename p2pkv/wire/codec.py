"""Typed bodies of frames: msgspec encodes them, and decodes nothing that is not exactly what it should be.

The agent's half. What engines import must not import msgspec, and has a half of its own: ``p2pkv/client/messages.py``.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar, get_type_hints

import msgspec

from p2pkv.errors import RemoteProtocolError
from p2pkv.types import Layout
from p2pkv.wire.frame import Frame, encode

_FIELD_TYPES: Final = get_type_hints(Layout)
_LayoutMap: Final = msgspec.defstruct(
    "Layout",
    [(name, _FIELD_TYPES[name], Layout.DEFAULTS.get(name, msgspec.NODEFAULT)) for name in Layout.FIELDS],
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
)
"""How a layout travels: a map of its fields, none unknown, none of another type."""


def _to_wire(value: object) -> dict[str, object]:
    if isinstance(value, Layout):
        return value.asdict()
    raise NotImplementedError(f"a message holds a {type(value).__name__}")


def _from_wire(kind: type, value: object) -> Layout:
    if kind is Layout:
        return Layout(**msgspec.structs.asdict(msgspec.convert(value, _LayoutMap, strict=True)))
    raise NotImplementedError(f"a message holds a {kind.__name__}")


_encoder: Final = msgspec.msgpack.Encoder(enc_hook=_to_wire)


T = TypeVar("T", bound=msgspec.Struct)


def pack(value: msgspec.Struct) -> bytes:
    """One struct by itself, unframed."""
    return _encoder.encode(value)


class Unpacker(Generic[T]):
    """Reads one struct that :func:`pack` wrote."""

    def __init__(self, kind: type[T]) -> None:
        self._decoder = msgspec.msgpack.Decoder(kind, strict=True, dec_hook=_from_wire)

    def __call__(self, data: bytes) -> T:
        """The struct.

        Raises:
            RemoteProtocolError: it is not one.
        """
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise RemoteProtocolError("malformed value", reason=str(error)[:200]) from error


class Codec:
    """Typed bodies for one message set: an enum of types, and the struct of each."""

    def __init__(self, structs: dict[int, type[msgspec.Struct]]) -> None:
        self._structs = structs
        self._decoders: dict[int, msgspec.msgpack.Decoder[msgspec.Struct]] = {}  # made when first needed
        self._types = {s: t for t, s in structs.items()}

    def encode(self, message: msgspec.Struct, request_id: int = 0) -> bytes:
        """Frame a message by its struct's type."""
        return encode(self._types[type(message)], _encoder.encode(message), request_id)

    def decode(self, frame: Frame) -> msgspec.Struct:
        """Decode a frame's body.

        Raises:
            RemoteProtocolError: the type is unknown, or the body is not what the type says.
        """
        decoder = self._decoders.get(frame.type)
        if decoder is None:
            struct_type = self._structs.get(frame.type)
            if struct_type is None:
                raise RemoteProtocolError("unknown message type", type=frame.type)
            decoder = self._decoders[frame.type] = msgspec.msgpack.Decoder(
                struct_type, strict=True, dec_hook=_from_wire
            )
        try:
            message: msgspec.Struct = decoder.decode(frame.body)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise RemoteProtocolError("malformed message", type=frame.type, reason=str(error)[:200]) from error
        return message
