"""A client's connection to its agent: the introduction, the agent's arena mapped read-only, and two sockets.

GETs have a socket of their own (``gets``), which native code at both ends sees to; all else goes over this channel.
"""

from __future__ import annotations

import functools
import os
import socket
import time

from p2pkv import _native
from p2pkv.client.channel import Channel
from p2pkv.client.messages import Attach, EngineError, Ready, decode, encode
from p2pkv.client.own_loads import OwnLoads
from p2pkv.errors import AgentUnavailable, RemoteProtocolError, Unavailable
from p2pkv.wire.engine_types import ENGINE_PROTOCOL_MAX, ENGINE_PROTOCOL_MIN
from p2pkv.wire.frame import FrameDecoder


class Connection(Channel):
    """A connected, introduced socket and the agent's arena mapped read-only. Thread-safe."""

    def __init__(self, path: str, *, name: str, deadline: float) -> None:
        """Connect and introduce ourselves.

        Raises:
            AgentUnavailable: nobody listens there, or it does not answer by ``deadline`` (``time.monotonic()``).
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self.ready, descriptors = _introduce(sock, path, name, deadline)
        except BaseException:
            sock.close()
            raise
        gets = descriptors.pop(1)
        try:
            self.arena = memoryview(_native.Mapping(descriptors[0], self.ready.arena_bytes, False))
            self.gets = _gets(gets, self.arena, descriptors[1:])
        except OSError as error:
            sock.close()
            os.close(gets)
            raise AgentUnavailable(
                "the agent's arena cannot be mapped",
                arena_bytes=self.ready.arena_bytes,
                reason=error.strerror,
                hint="Is the address space of this process limited (ulimit -v)?",
            ) from error
        except BaseException:
            sock.close()
            os.close(gets)
            raise
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self.own_loads = OwnLoads(self.gets)
        super().__init__(sock)

    def speaking(self, protocol: int) -> Connection:
        """This connection, if the agent speaks at least this version.

        Raises:
            Unavailable: it is older.
        """
        if self.ready.protocol < protocol:
            raise Unavailable("the agent is too old for that", speaks=self.ready.protocol, needed=protocol)
        return self

    def wait_news(self, timeout_s: float) -> None:
        """Sleep until something arrives or a load of our own is done, at most ``timeout_s``."""
        self.wait_readable(timeout_s, beside=self.own_loads.fd)  # another thread may begin one meanwhile
        self.own_loads.pump()

    def _break(self, reason: str) -> None:
        super()._break(reason)
        self.gets.close(reason)


def _gets(fd: int, arena: memoryview, directory: list[int]) -> _native.Gets:
    """With the arena's directory, if the agent gave one that can be used: without one, it is asked for everything."""
    try:
        return _native.Gets(fd, arena, *_directory(directory))
    except (ValueError, OSError, RuntimeError) as error:
        if not directory:
            raise
        _log_unusable(str(error))
    return _native.Gets(fd, arena)


@functools.cache
def _log_unusable(reason: str) -> None:
    """Once per reason, however often a client reconnects."""
    import logging  # engines import it themselves; nobody else pays for it

    logging.getLogger("p2pkv.client").warning("the directory of the agent's arena is not used: %s", reason)


def _directory(descriptors: list[int]) -> list[_native.Mapping]:
    """Map the arena's directory, if the agent gave it: its table, and the marks that we may write."""
    return [
        _native.Mapping(descriptor, os.fstat(descriptor).st_size, writable)
        for descriptor, writable in zip(descriptors, (False, True), strict=False)
    ]


def _introduce(sock: socket.socket, path: str, name: str, deadline: float) -> tuple[Ready, list[int]]:
    """Attach. Returns what the agent says, and its descriptors: the arena's, that of a socket for GETs, and perhaps
    those of the arena's directory (table, marks)."""
    sock.settimeout(max(0.001, deadline - time.monotonic()))
    descriptors: list[int] = []
    try:
        sock.connect(path)
        sock.sendall(encode(Attach(ENGINE_PROTOCOL_MIN, ENGINE_PROTOCOL_MAX, name, os.getpid()), 1))
        decoder = FrameDecoder()
        while True:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            data, fds, _, _ = socket.recv_fds(sock, 4096, 4)
            descriptors += fds
            if not data:
                raise AgentUnavailable("the agent closed the connection at once", socket=path)
            for frame in decoder.feed(data):
                answer = decode(frame)
                if isinstance(answer, Ready) and len(descriptors) in (2, 4):
                    for descriptor in descriptors:
                        os.set_inheritable(descriptor, False)
                    given, descriptors = descriptors, []
                    return answer, given
                reason = answer.message if isinstance(answer, EngineError) else type(answer).__name__
                raise AgentUnavailable("the agent refuses this client", socket=path, reason=reason)
    except TimeoutError as error:
        raise AgentUnavailable("the agent does not answer", socket=path) from error
    except RemoteProtocolError as error:
        raise AgentUnavailable(
            "what listens on the socket is no agent of this version", socket=path, reason=error.message
        ) from error
    except OSError as error:
        raise AgentUnavailable(
            "no agent listens on the socket",
            socket=path,
            reason=error.strerror,
            hint="Start one with `p2pkv agent`, or set P2PKV_SOCKET.",
        ) from error
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
