"""The lightest HTTP/1.1 client there is: keep-alive, one request at a time per connection, answers with a length."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

from p2pkv.errors import Unavailable


class Connection:
    """One keep-alive connection to a server on this host."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._got = b""

    def send(self, request: bytes) -> None:
        """Send a whole request."""
        self._got = b""
        self.sock.sendall(request)

    def receive(self) -> bytes | None:
        """Take in what has come; the answer's body once it is whole.

        Raises:
            Unavailable: the server closed, or refused.
        """
        data = self.sock.recv(1 << 18)
        if not data:
            raise Unavailable("the HTTP server closed the connection")
        self._got += data
        head, found, body = self._got.partition(b"\r\n\r\n")
        if not found:
            return None
        if b" 200 " not in head[:16]:
            raise Unavailable("the HTTP server refuses", status=head[:64])
        _, _, rest = head.lower().partition(b"content-length:")
        return body if len(body) >= int(rest.split(b"\r\n")[0]) else None


def post(path: str, body: bytes) -> bytes:
    """A request as it is sent."""
    return b"POST %s HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        path.encode(), len(body), body,
    )  # fmt: skip


def one_by_one(port: int, requests: Sequence[bytes], count: int) -> tuple[list[float], list[bytes]]:
    """Seconds of each of ``count`` requests in turn, and the answers to the first of each."""
    connection = Connection(port)
    taken, answers = [], []
    for i in range(count):
        began = time.perf_counter()
        connection.send(requests[i % len(requests)])
        while (body := connection.receive()) is None:
            pass
        taken.append(time.perf_counter() - began)
        if i < len(requests):
            answers.append(body)
    connection.sock.close()
    return taken, answers


def at_once(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> float:
    """Answers per second over several connections."""
    open_ = {each.sock.fileno(): each for each in (Connection(port) for _ in range(connections))}
    poll = select.epoll()
    sent = done = 0
    for fd, connection in open_.items():
        poll.register(fd, select.EPOLLIN)
        connection.send(requests[sent % len(requests)])
        sent += 1
    began = time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        for fd, _ in poll.poll(1.0):
            if open_[fd].receive() is not None:
                done += 1
                open_[fd].send(requests[sent % len(requests)])
                sent += 1
    for connection in open_.values():
        connection.sock.close()
    return done / elapsed
