"""One frame format for every stream socket: 12 bytes of header, then a msgpack body.

    offset  size  field
    0       4     body length in bytes, little-endian
    4       1     version of the frame format
    5       1     message type
    6       2     flags (none defined yet; receivers ignore what they do not know)
    8       4     request id, chosen by the asker, repeated in the answer; 0 when there is no answer

The decoder is sans-IO: it is fed bytes and yields whole frames. It never buffers more than one frame of the largest
size it was told to accept, and it raises before it has buffered a body that would be too long.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from p2pkv.errors import LocalProtocolError, RemoteProtocolError
from p2pkv.light import Final, NamedTuple

FRAME_VERSION: Final = 1
HEADER: Final = struct.Struct("<IBBHI")
HEADER_BYTES: Final = HEADER.size

PROTOCOL_MIN: Final = 1
PROTOCOL_MAX: Final = 1
"""Versions of the message set that this build speaks; HELLO carries both and WELCOME the highest common one."""

BODY_BYTES_MAX: Final = 4 << 20
"""Fits the largest lawful message (16,384 keys of 64 bytes, or a snapshot part); a peer cannot make us hold more."""


class Frame(NamedTuple):
    """A received frame whose body is not decoded yet. ``body`` is owned by the receiver of this tuple."""

    type: int
    request_id: int
    flags: int
    body: bytes


def encode(message_type: int, body: bytes, request_id: int = 0, flags: int = 0) -> bytes:
    """A whole frame, ready to be sent in one call."""
    if len(body) > BODY_BYTES_MAX:
        raise LocalProtocolError("message is too large for a frame", bytes=len(body), limit=BODY_BYTES_MAX)
    return HEADER.pack(len(body), FRAME_VERSION, message_type, flags, request_id) + body


def parse_header(
    header: bytes | bytearray | memoryview, body_bytes_max: int = BODY_BYTES_MAX
) -> tuple[int, int, int, int]:
    """Check a 12-byte header; returns (body length, type, flags, request id)."""
    length, version, message_type, flags, request_id = HEADER.unpack(header)
    if version != FRAME_VERSION:
        raise RemoteProtocolError(
            "frame has a version this build does not speak", version=version, speaks=FRAME_VERSION,
            hint="Is something other than p2pkv, or a newer p2pkv, connected to this port?",
        )  # fmt: skip
    if length > body_bytes_max:
        raise RemoteProtocolError("frame is too large", bytes=length, limit=body_bytes_max, type=message_type)
    return length, message_type, flags, request_id


class FrameDecoder:
    """Cuts a byte stream into frames. Not thread-safe. After an error it must not be fed again."""

    def __init__(self, body_bytes_max: int = BODY_BYTES_MAX) -> None:
        self._buffer = bytearray()
        self._body_bytes_max = body_bytes_max

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Yield every frame that ``data`` completes.

        Raises:
            RemoteProtocolError: unknown version or a body over the limit.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= HEADER_BYTES:
                header = buffer[start : start + HEADER_BYTES]
                length, message_type, flags, request_id = parse_header(header, self._body_bytes_max)
                end = start + HEADER_BYTES + length
                if len(buffer) < end:
                    break
                body = bytes(buffer[start + HEADER_BYTES : end])
                start = end
                yield Frame(message_type, request_id, flags, body)
        finally:
            del buffer[:start]

    @property
    def pending_bytes(self) -> int:
        """Bytes of an unfinished frame that are buffered."""
        return len(self._buffer)
