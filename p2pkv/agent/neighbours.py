"""Agents of this host whose memory we read: found by their cards, attached to as an engine attaches.

Where NIXL is used, blocks of an owner on this host are read out of its memory anyway, by the NIXL processes. What is
not much is read by the lane itself (``native/neighbours.hpp``): the owner's arena is mapped here, with the directory by
which its engines find blocks in it. That needs what an engine needs: the other agent's socket, in a file system and of
a user that both have. Where one of them is missing, all goes on as without it.

The connection that was attached by is kept: it ends when the other agent does.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import socket
import stat
import struct
from typing import Final, NamedTuple

from p2pkv.agent.lane import EngineLane
from p2pkv.errors import RemoteProtocolError, Unavailable
from p2pkv.gossip.views import PeerView
from p2pkv.wire.engine import CODEC, Attach, EngineError, Ready
from p2pkv.wire.engine_types import ENGINE_PROTOCOL_MAX, ENGINE_PROTOCOL_MIN
from p2pkv.wire.frame import FrameDecoder

log = logging.getLogger(__name__)

NEIGHBOURS_MAX: Final = 16
"""Whose arenas are mapped; a host with more agents asks the others."""
ATTACH_S: Final = 2.0
RETRY_S: Final = (1.0, 60.0)
"""First and longest pause before another attempt at an agent that could not be attached to."""
DESCRIPTORS: Final = 4
"""Arena, a socket for gets, and the directory's table and marks."""

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid


class Attached(NamedTuple):
    """An open connection to another agent, and descriptors of its files; the caller closes all of them."""

    sock: socket.socket
    arena: int
    arena_bytes: int
    table: int
    marks: int

    def close(self) -> None:
        """Close everything."""
        self.close_files()
        self.sock.close()

    def close_files(self) -> None:
        """Close what need not stay open once it is mapped."""
        for descriptor in (self.arena, self.table, self.marks):
            os.close(descriptor)


async def attach(path: str, node: int, name: str) -> Attached:
    """Introduce ourselves to the agent that listens at ``path``, which must be ``node``; at most :data:`ATTACH_S`.

    Raises:
        Unavailable: nobody is there, it is another user's or another agent, or it gives no directory.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    descriptors: list[int] = []
    try:
        async with asyncio.timeout(ATTACH_S):
            await _connect_to_our_own(sock, path)
            introduction = CODEC.encode(Attach(ENGINE_PROTOCOL_MIN, ENGINE_PROTOCOL_MAX, name, os.getpid()), 1)
            await asyncio.get_running_loop().sock_sendall(sock, introduction)
            ready = await _ready(sock, descriptors)
        if ready.node != node:
            raise Unavailable("another agent listens there", socket=path, node=f"{ready.node:016x}")
        if len(descriptors) != DESCRIPTORS:
            raise Unavailable("it does not give its directory out", socket=path)
        arena, gets, table, marks = descriptors
        os.close(gets)  # we ask for nothing
        return Attached(sock, arena, ready.arena_bytes, table, marks)
    except BaseException as error:
        for descriptor in descriptors:
            os.close(descriptor)
        sock.close()
        if isinstance(error, OSError | RemoteProtocolError):
            raise Unavailable("it cannot be attached to", socket=path, reason=error) from error
        raise


async def _connect_to_our_own(sock: socket.socket, path: str) -> None:
    """A card may name any path: nothing is said to what is not a socket of our own user's."""
    status = os.stat(path)
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
        raise Unavailable("not a socket of this user", socket=path)
    await asyncio.get_running_loop().sock_connect(sock, path)
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if uid != os.geteuid():
        raise Unavailable("another user listens there", socket=path)


async def _ready(sock: socket.socket, descriptors: list[int]) -> Ready:
    decoder = FrameDecoder()
    while True:
        await _readable(sock)
        data, fds, _, _ = socket.recv_fds(sock, 4096, DESCRIPTORS)
        descriptors += fds
        if not data:
            raise Unavailable("it closed the connection at once")
        for frame in decoder.feed(data):
            answer = CODEC.decode(frame)
            if isinstance(answer, Ready):
                for descriptor in descriptors:
                    os.set_inheritable(descriptor, False)
                return answer
            raise Unavailable("it refuses", reason=answer.message if isinstance(answer, EngineError) else type(answer))


async def _readable(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    seen = loop.create_future()
    loop.add_reader(sock.fileno(), lambda: None if seen.done() else seen.set_result(None))
    try:
        await seen
    finally:
        loop.remove_reader(sock.fileno())


class Neighbours:
    """See the module's docstring. On the event loop; ``stop`` once.

    Args:
        lane: reads what we have attached to.
        node: ours; ``host_id``: our host's, as in our card.
    """

    def __init__(self, lane: EngineLane, node: int, host_id: str) -> None:
        self._lane = lane
        self._node = node
        self._host_id = host_id
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._paths: dict[int, tuple[str, int]] = {}
        self.attached: set[int] = set()
        """Nodes whose memory is read now."""

    def review(self, peer: PeerView) -> None:
        """A peer's state or card has changed."""
        node, card = int(peer.node), peer.card
        wanted = peer.alive and bool(card.socket) and card.host_id == self._host_id and node != self._node
        at = (card.socket, card.instance)
        if node in self._tasks and (not wanted or self._paths[node] != at):
            self._drop(node)
        if wanted and node not in self._tasks and len(self._tasks) < NEIGHBOURS_MAX:
            self._paths[node] = at
            self._tasks[node] = asyncio.get_running_loop().create_task(self._keep(node, card.socket))

    def _drop(self, node: int) -> None:
        self._tasks.pop(node).cancel()
        del self._paths[node]

    async def stop(self) -> None:
        """Let go of all of them."""
        tasks = list(self._tasks.values())
        for node in list(self._tasks):
            self._drop(node)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _keep(self, node: int, path: str) -> None:
        """Be attached for as long as it is there."""
        pause_s = RETRY_S[0]
        while True:
            try:
                attached = await attach(path, node, f"neighbour {self._node:016x}")
            except Unavailable as error:
                level = logging.INFO if pause_s == RETRY_S[0] else logging.DEBUG
                log.log(level, "the memory of %016x, an agent of this host, is not read: %s", node, error)
            else:
                if await self._read(node, attached):
                    pause_s = RETRY_S[0]
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_S[1])

    async def _read(self, node: int, attached: Attached) -> bool:
        """Have its memory read until it closes the connection. False: it cannot be."""
        try:
            try:
                files = [(fd, _sealed_bytes(fd)) for fd in (attached.table, attached.marks)]
                self._lane.set_neighbour(node, (attached.arena, attached.arena_bytes), files)
            except (OSError, ValueError) as error:
                log.warning("the memory of %016x, an agent of this host, cannot be read: %s", node, error)
                return False
            finally:
                attached.close_files()
            self.attached.add(node)
            log.info("the memory of %016x, an agent of this host, is read", node)
            await _until_closed(attached.sock)
            return True
        finally:
            self.attached.discard(node)
            self._lane.drop_neighbour(node)
            attached.sock.close()


def _sealed_bytes(fd: int) -> int:
    """How long a file is that cannot become shorter: to read what has been cut off would end this process.

    Raises:
        ValueError: it can.
    """
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise ValueError("its directory is not sealed")
    return os.fstat(fd).st_size


async def _until_closed(sock: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    with contextlib.suppress(OSError):
        while await loop.sock_recv(sock, 4096):
            pass
