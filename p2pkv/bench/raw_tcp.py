"""The limit of the TCP transport: a process that sends from a bytes object, and a reader that receives in place.

What a Python program without any protocol would do: one connection, 8 bytes of request, ``sendall`` at the owner,
``recv_into`` at the reader. No checksum, no lease, and always the same bytes, so they are warm in the sender's cache.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Final

from p2pkv.bench.child import Child, answer, requests
from p2pkv.errors import Unavailable

REQUEST: Final = struct.Struct("<Q")
"""How many bytes are wanted."""


class RawTcp:
    """The reader, and the owner's process behind it."""

    def __init__(self, bytes_max: int) -> None:
        self._child = Child("raw_tcp", str(bytes_max))
        try:
            self._socket = socket.create_connection(("127.0.0.1", int(self._child.line())), timeout=30)
        except BaseException:
            self._child.__exit__(None, None, None)
            raise
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def read(self, buffers: Sequence[memoryview]) -> float:
        """Fill the buffers; returns seconds from before the request to the last byte."""
        began = time.perf_counter()
        self._socket.sendall(REQUEST.pack(sum(len(buffer) for buffer in buffers)))
        for buffer in buffers:
            got, length = 0, len(buffer)
            while got < length:
                count = self._socket.recv_into(buffer[got:])
                if not count:
                    raise Unavailable("the raw TCP owner is gone")
                got += count
        return time.perf_counter() - began

    def __enter__(self) -> RawTcp:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()
        self._child.__exit__(kind, error, at)


def serve(connection: socket.socket, data: bytes) -> None:
    """Answer requests until the reader goes."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    view = memoryview(data)
    while request := connection.recv(REQUEST.size, socket.MSG_WAITALL):
        connection.sendall(view[: REQUEST.unpack(request)[0]])


def main() -> None:
    """The owner: ``python -m p2pkv.bench.raw_tcp <bytes>``. Says its port, serves one reader, ends with its input."""
    data = b"\x5a" * int(sys.argv[1])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        answer(str(listener.getsockname()[1]))
        connection, _ = listener.accept()
    threading.Thread(target=serve, args=(connection, data), daemon=True).start()
    for _ in requests():
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
