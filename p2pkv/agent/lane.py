"""The engines' short way as the agent sees it: what native code answered by itself, and what it hands over.

The native lane (``native/lane.hpp``) serves GETs on sockets of their own. This module moves its events onto the event
loop: GETs that need thought go to their engine's connection, pulls that ended go to the books.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Callable, Sequence
from typing import NamedTuple

from p2pkv import _native
from p2pkv.transport.movers import Code
from p2pkv.types import Status, namespace_salt

UNSETTLED = 255
"""The status of a key that nothing is known about yet."""


class Rest(NamedTuple):
    """A GET that the lane has not finished. ``settled``: one byte per key, 1 where the engine has its answer.

    ``failed``: how the lane's own attempt at ``node`` (0 = none) ended, by position of the key; ``code`` of all of it.
    Times are those of the monotonic clock, in seconds.
    """

    request_id: int
    namespace: int
    keys: list[bytes]
    settled: bytes
    failed: dict[int, Status]
    asked_at: float
    deadline: float
    node: int
    code: Code


class PullEnd(NamedTuple):
    """How a whole pull ended, in blocks; ``rejected`` and ``missed`` are part of ``failed``."""

    blocks: int
    bytes_moved: int
    failed: int
    rejected: int
    missed: int
    waited_s: float  # until the first byte; 0 = none came
    took_s: float  # all of it
    reason: str


class Landed(NamedTuple):
    """Blocks of a pull have come that somebody had asked to watch (``keys``, ``statuses``), some were not what they
    should have been (``rejected``), or it is over.

    ``end``: then, and only then.
    """

    namespace: int
    keys: list[bytes]
    statuses: Sequence[Status]
    rejected: list[bytes]
    node: int
    code: Code
    end: PullEnd | None


class _Kind(enum.IntEnum):
    REST = 0
    LANDED = 1
    GONE = 2


class Port(NamedTuple):
    """One engine's end: what to call for its events. ``on_gone`` gets why, "" when the engine just closed it."""

    on_rest: Callable[[Rest], None]
    on_gone: Callable[[str], None]


class EngineLane:
    """The native lane on an event loop. ``start`` and ``stop`` once each."""

    def __init__(self, native: _native.Lane, on_landed: Callable[[Landed], None]) -> None:
        self._native = native
        self._on_landed = on_landed
        self._ports: dict[int, Port] = {}

    def start(self) -> None:
        """Attach to the running loop."""
        asyncio.get_running_loop().add_reader(self._native.fd, self._on_events)

    def stop(self) -> None:
        """End every pull and close every socket; milliseconds. What ended is still told to ``on_landed``."""
        self._native.stop()
        self._ports.clear()
        self._on_events()
        asyncio.get_running_loop().remove_reader(self._native.fd)

    def open(self, connection: int, fd: int, port: Port) -> None:
        """Serve an engine on a connected, non-blocking socket, which is the lane's from now on."""
        self._ports[connection] = port
        self._native.add(connection, fd, connection)

    def close(self, connection: int) -> None:
        """The engine has gone, or is sent away."""
        self._ports.pop(connection, None)
        self._native.close(connection)

    def allow(self, connection: int, namespace: int) -> None:
        """The engine has opened this namespace."""
        self._native.allow(connection, namespace, namespace_salt(namespace))

    def send(self, connection: int, frame: bytes) -> None:
        """Answer what was handed over."""
        self._native.send(connection, frame)

    def watch(self, namespace: int, key: bytes) -> bool:
        """Whether the lane is pulling this block now; then the key is named when that has ended."""
        return self._native.watch(namespace, key)

    def distrust(self, namespace: int, key: bytes, distrusted: bool) -> None:
        """Whether GETs of this block are to be handed over: some holder of it must not be asked."""
        self._native.distrust(namespace, key, distrusted)

    def set_neighbour(self, node: int, arena: tuple[int, int], directory: Sequence[tuple[int, int]]) -> None:
        """Read small blocks of this node out of its memory: descriptors, and how long the files are, of its arena and
        of its directory's table and marks. They stay the caller's.

        Raises:
            OSError: they cannot be mapped. ValueError: they are not of this version, or not of each other.
        """
        table, marks = directory
        self._native.set_neighbour(node, *arena, *table, *marks)

    def drop_neighbour(self, node: int) -> None:
        """It is to be asked again, or has gone."""
        self._native.drop_neighbour(node)

    def drain(self) -> None:
        """Hand every further GET over: the agent is leaving."""
        self._native.set_draining(True)

    @property
    def in_flight(self) -> int:
        """Pulls under way."""
        return self._native.in_flight

    @property
    def blocks_in_flight(self) -> int:
        """Blocks of these pulls."""
        return self._native.blocks_in_flight

    def counters(self) -> dict[str, int]:
        """Since the start: hits_local, bytes_local, hits_peer, hits_neighbour (of these), bytes_peer, misses,
        handed_over."""
        return self._native.counters()

    def _on_events(self) -> None:
        for event in self._native.drain():
            kind, connection, request_id, namespace, keys, statuses, settled, asked_at, deadline, node = event[:10]
            code, final, blocks, failed, rejected, missed, moved, waited_s, took_s, rejected_keys, detail = event[10:]
            reason = detail.decode(errors="replace")
            if kind == _Kind.LANDED:
                ended = PullEnd(blocks, moved, failed, rejected, missed, waited_s, took_s, reason) if final else None
                landed = Landed(namespace, keys, _statuses(statuses), rejected_keys, node, Code(code), ended)
                self._on_landed(landed)
                continue
            port = self._ports.get(connection)
            if port is None:
                continue
            if kind == _Kind.GONE:
                port.on_gone(reason)
                continue
            worst = {i: Status(status) for i, status in enumerate(statuses) if status != UNSETTLED}
            port.on_rest(Rest(request_id, namespace, keys, settled, worst, asked_at, deadline, node, Code(code)))


def _statuses(statuses: bytes) -> Sequence[Status]:
    return [Status(status) for status in statuses]
