"""The Unix socket that engines connect to: who is let in. What they ask is :mod:`.engine_connection`'s business."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from pathlib import Path
from typing import Final

from p2pkv.agent.engine_connection import EngineConnection
from p2pkv.agent.lane import EngineLane
from p2pkv.agent.service import CacheService
from p2pkv.agent.warm import Ahead
from p2pkv.errors import ConfigError
from p2pkv.store.directory import DirectoryFiles

log = logging.getLogger(__name__)

ACCEPT_PAUSE_S: Final = 0.1
"""After a failed accept (out of descriptors): trying again at once would spin."""


class EngineServer:
    """Listens on the Unix socket. ``start`` and ``stop`` once each, on the event loop."""

    def __init__(
        self,
        service: CacheService,
        *,
        path: str,
        epoch: int,
        connections_max: int,
        in_flight_max: int,
        regions_max: int,
        lane: EngineLane,
        directory: DirectoryFiles | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        self.ahead = ahead
        self.lane = lane
        self.directory = directory
        self.service = service
        self.path = path
        self.epoch = epoch
        self.in_flight_max = in_flight_max
        self.regions_max = regions_max
        self.draining = False
        self.connections: set[EngineConnection] = set()
        self.refused = 0
        self.protocol_errors = 0
        self._connections_max = connections_max
        self._listener: socket.socket | None = None

    async def start(self) -> None:
        """Bind the socket (mode 0600) and listen.

        Raises:
            ConfigError: another agent listens there, or the path cannot be used.
        """
        path = Path(self.path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._remove_stale(path)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            listener.bind(self.path)
            os.chmod(self.path, 0o600)
            listener.listen(128)
        except OSError as error:
            raise ConfigError(
                "cannot listen for engines",
                socket=self.path,
                reason=error.strerror or error,
                hint="Set engine.socket (or P2PKV_SOCKET) to a path of at most 107 bytes that this user may create.",
            ) from error
        self._listener = listener
        self._accept_more()

    @staticmethod
    def _remove_stale(path: Path) -> None:
        """Remove a socket that nobody listens on any more; leave everything else alone."""
        try:
            if not stat.S_ISSOCK(path.lstat().st_mode):
                raise ConfigError("the engine socket's path is taken by something that is not a socket", path=path)
        except FileNotFoundError:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
            except BlockingIOError:
                pass
        raise ConfigError(
            "another agent listens on the engine socket",
            socket=path,
            hint="Give each agent an engine.socket of its own.",
        )

    def _accept_more(self) -> None:
        if self._listener is not None:
            asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            log.error("cannot accept an engine: %s", error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener.fileno())
            loop.call_later(ACCEPT_PAUSE_S, self._accept_more)
            return
        sock.setblocking(False)
        if len(self.connections) >= self._connections_max:
            self.refused += 1
            sock.close()
            return
        connection = EngineConnection(self, sock)
        self.connections.add(connection)
        connection.start()

    async def stop(self) -> None:
        """Stop listening, disconnect everybody, wait until no job uses an engine's memory."""
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
            Path(self.path).unlink(missing_ok=True)
        connections = list(self.connections)
        for connection in connections:
            connection.close()
        await asyncio.gather(*(connection.closed() for connection in connections))

    @property
    def in_flight(self) -> int:
        """Requests being worked on, over all connections."""
        pulls = self.lane.in_flight
        return pulls + sum(connection.in_flight for connection in self.connections)
