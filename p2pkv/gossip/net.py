"""TCP sockets for the peer port: listen, connect, and read exactly one frame. No state, no protocol.

All sockets are non-blocking; IPv4 and IPv6.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any, Final

from p2pkv.errors import ConfigError
from p2pkv.wire.frame import HEADER_BYTES, Frame, parse_header
from p2pkv.wire.peer import Address

BACKLOG: Final = 1_024
"""A whole cell may dial a restarted node at the same moment. The kernel caps it at net.core.somaxconn."""
UNACKED_MAX_MS: Final = 20_000
"""TCP_USER_TIMEOUT: an owner learns of a reader that vanished without a word from this; TCP alone takes 15 minutes."""
TCP_INFO_RTT_OFFSET: Final = 68
"""Of ``tcpi_rtt`` (smoothed, microseconds) in Linux's struct tcp_info: stable ABI since 2.6."""


async def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ConfigError: the port is in use or may not be bound, or the host is not this machine's.
    """
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ConfigError("peer.host cannot be resolved", host=host, reason=str(error)) from error
    family, kind, proto, _, address = infos[0]
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        hint = {
            errno.EADDRINUSE: "Another agent runs here? Choose another peer.port, or 0 for any free one.",
            errno.EADDRNOTAVAIL: "peer.host must be an address of this machine.",
            errno.EACCES: "Ports below 1024 need rights: choose a higher peer.port.",
        }.get(error.errno or 0, "")
        what = "port in use" if error.errno == errno.EADDRINUSE else "cannot listen for peers"
        raise ConfigError(what, hint=hint, host=host, port=port, reason=error.strerror) from error
    return sock


async def connect(address: Address) -> socket.socket:
    """A connected socket, by the first of the name's addresses that answers. No deadline of its own.

    Raises:
        OSError: none did.
    """
    loop = asyncio.get_running_loop()
    infos = await _resolve(address)
    failure: OSError | None = None
    for family, kind, proto, _, target in infos:
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            await loop.sock_connect(sock, target)
            tune(sock)
            return sock
        except OSError as error:
            sock.close()
            failure = error
        except BaseException:
            sock.close()
            raise
    raise failure or OSError(errno.EADDRNOTAVAIL, "name has no addresses")


async def _resolve(address: Address) -> list[tuple[int, int, int, str, tuple[Any, ...]]]:
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    try:
        # An IP address needs no thread of the loop's executor, which slow name servers may have filled.
        return list(socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=flags))
    except socket.gaierror:
        loop = asyncio.get_running_loop()
        return list(await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM))


def tune(sock: socket.socket) -> None:
    """Frames go out at once, and a peer that vanished is noticed."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKED_MAX_MS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


async def read_frame(sock: socket.socket, body_bytes_max: int) -> Frame:
    """Exactly one frame, and not a byte of what follows.

    Raises:
        RemoteProtocolError: unknown version, or larger than ``body_bytes_max``.
        OSError: the connection ended first.
    """
    length, message_type, flags, request_id = parse_header(await _read_exactly(sock, HEADER_BYTES), body_bytes_max)
    return Frame(message_type, request_id, flags, await _read_exactly(sock, length))


async def _read_exactly(sock: socket.socket, count: int) -> bytes:
    loop = asyncio.get_running_loop()
    # Grows with what has come: a header that promises a megabyte does not get one before sending it.
    got = bytearray()
    while len(got) < count:
        piece = await loop.sock_recv(sock, min(count - len(got), 65_536))
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "connection ended before a whole frame")
        got += piece
    return bytes(got)


def rtt_ms(sock: socket.socket) -> float | None:
    """The kernel's smoothed round-trip time of a connection in milliseconds; None where it does not say."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_RTT_OFFSET + 4)
    except (OSError, AttributeError):
        return None
    microseconds = int.from_bytes(info[TCP_INFO_RTT_OFFSET:], "little")
    return microseconds / 1e3 if microseconds else None
