"""One engine's connection: what it asks, and what it has opened and mapped, which lasts as long as the connection.

One task per request that has to wait. Leases that it did not give back run out by themselves, because its process may
still be reading the arena.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import msgspec

from p2pkv.agent.engine_wire import EngineWire
from p2pkv.agent.lane import Port, Rest
from p2pkv.agent.regions import DESCRIPTORS_HINT, MappedRegion
from p2pkv.agent.service import Ready
from p2pkv.agent.warm import Ahead
from p2pkv.errors import Busy, InvalidArgument, LayoutMismatch, P2PKVError, RemoteProtocolError
from p2pkv.transport.movers import Code
from p2pkv.transport.plan import Prefill
from p2pkv.types import Layout, Status
from p2pkv.wire.engine import (
    CODEC,
    Attach,
    EngineError,
    Get,
    Got,
    Load,
    MapRegion,
    MatchKeys,
    Ok,
    Open,
    Opened,
    Prefetch,
    ReleaseLease,
    Replicate,
    Store,
    UnmapRegion,
    Warm,
)
from p2pkv.wire.engine import (
    Ready as ReadyMessage,
)
from p2pkv.wire.engine_types import ENGINE_PROTOCOL_MAX, ENGINE_PROTOCOL_MIN
from p2pkv.wire.frame import Frame

if TYPE_CHECKING:
    from p2pkv.agent.ipc import EngineServer

log = logging.getLogger(__name__)

DEADLINE_MS_MAX: Final = 600_000
DIRECTORY_PROTOCOL: Final = 2
"""From this version on an engine takes the arena's directory."""

_ids = itertools.count(1)


class EngineConnection:
    """One engine's connection."""

    def __init__(self, server: EngineServer, sock: socket.socket) -> None:
        self.id = next(_ids)
        """Names this connection in the lane, and as a holder of leases."""
        self._server = server
        self._service = server.service
        self._loop = asyncio.get_running_loop()
        self._wire = EngineWire(
            sock, on_frame=self._on_frame, on_end=self._on_end, on_nonsense=lambda error: self._nonsense(str(error))
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._layouts: dict[int, Layout] = {}
        self._regions: dict[int, MappedRegion] = {}
        self._fetches: set[asyncio.Task[None]] = set()
        self._attached: Attach | None = None
        self._closed = False
        self._cleanup: asyncio.Task[None] | None = None
        self._handlers: dict[type[msgspec.Struct], Callable[[Any, int], None]] = {
            Open: self._on_open,
            MapRegion: self._on_map,
            UnmapRegion: self._on_unmap,
            MatchKeys: self._on_match,
            Get: self._on_get,
            ReleaseLease: self._on_release,
            Store: self._on_store,
            Load: self._on_load,
            Prefetch: self._on_prefetch,
            Replicate: self._on_replicate,
            Warm: self._on_warm,
        }

    @property
    def name(self) -> str:
        """What the engine calls itself."""
        return self._attached.name if self._attached else "?"

    @property
    def in_flight(self) -> int:
        """Requests that are being worked on."""
        return len(self._tasks) + len(self._fetches)

    def start(self) -> None:
        """Begin to read."""
        self._wire.start()

    def still_there(self) -> bool:
        """Whether the engine has not closed the connection, asked of the kernel rather than of what was read so far."""
        return not self._closed and self._wire.still_there()

    def close(self) -> None:
        """Disconnect. Jobs and pulls under way are cancelled and publish nothing that they finish from now on.

        The socket is closed last: an engine that sees it closed knows that nothing writes into its memory any more.
        """
        if self._closed:
            return
        self._closed = True
        self._server.lane.close(self.id)
        self._wire.stop()
        for layout in self._layouts.values():
            self._service.close(layout)
        self._layouts.clear()
        for task in self._tasks:
            task.cancel()
        for fetching in self._fetches:
            self._service.cancel(fetching)
        self._cleanup = self._loop.create_task(self._unmap_all())

    async def closed(self) -> None:
        """Wait until everything of the connection has been given back."""
        if self._cleanup is not None:
            await self._cleanup

    async def _unmap_all(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)
        for region in self._regions.values():
            await region.close()
        self._regions.clear()
        self._wire.close()
        self._server.connections.discard(self)

    # --- frames in ---

    def _nonsense(self, reason: str) -> None:
        self._server.protocol_errors += 1
        self._send_error(0, "protocol", reason)

    def _on_end(self, reason: str) -> None:
        if reason and not self._closed:
            log.warning("engine %s is disconnected: %s", self.name, reason)
        self.close()

    def _on_frame(self, frame: Frame) -> None:
        message = CODEC.decode(frame)
        if self._attached is None:
            if not isinstance(message, Attach):
                raise RemoteProtocolError("the first message must be ATTACH", got=type(message).__name__)
            self._on_attach(message, frame.request_id)
            return
        handler = self._handlers.get(type(message))
        if handler is None:
            raise RemoteProtocolError("not a request", got=type(message).__name__)
        try:
            self._admit(message)
            handler(message, frame.request_id)
        except P2PKVError as error:
            self._refuse(frame.request_id, error)
        except Exception as error:  # a bug here: this engine loses its connection, everybody else goes on
            log.exception("a request of engine %s failed: %r", self.name, error)
            self.close()

    def _admit(self, message: msgspec.Struct) -> None:
        """Whether this request is worked on at all.

        Raises:
            Busy: it is not. A descriptor that came with it is closed: it must not be taken for the next region's.
        """
        refusal: Busy | None = None
        if self._server.draining and not isinstance(message, ReleaseLease | UnmapRegion):
            refusal = Busy("the agent is shutting down")
        elif self.in_flight >= self._server.in_flight_max and not isinstance(message, ReleaseLease):
            refusal = Busy("too many requests in flight", limit=self._server.in_flight_max)
        if refusal is not None:
            if isinstance(message, MapRegion):
                self._wire.drop_fd()
            raise refusal

    def _on_attach(self, message: Attach, request_id: int) -> None:
        if not message.protocol_min <= ENGINE_PROTOCOL_MAX or not message.protocol_max >= ENGINE_PROTOCOL_MIN:
            raise RemoteProtocolError(
                "no common protocol version", engine=message.protocol_max, agent=ENGINE_PROTOCOL_MAX
            )
        self._attached = message
        protocol = min(ENGINE_PROTOCOL_MAX, message.protocol_max)
        service = self._service
        ready = ReadyMessage(
            protocol,
            service.node,
            self._server.epoch,
            service.arena.capacity_bytes,
            int(service.lease_ttl_s * 1000),
        )
        descriptors: list[int] = []
        try:
            descriptors.append(service.arena.readonly_fd())
            if protocol >= DIRECTORY_PROTOCOL and self._server.directory is not None:
                descriptors += self._server.directory.descriptors()
            ours, theirs = socket.socketpair()  # close-on-exec by default
            ours.setblocking(False)
            descriptors.insert(1, theirs.detach())
            self._server.lane.open(self.id, ours.detach(), Port(self._on_rest, self._on_lane_gone))
            self._wire.send_fds(CODEC.encode(ready, request_id), descriptors)
        except OSError as error:
            log.warning("engine %s is disconnected: %s", self.name, error)  # gone, or this agent is out of descriptors
            self.close()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    # --- requests that are answered at once ---

    def _on_open(self, message: Open, request_id: int) -> None:
        if message.layout not in self._layouts.values():
            namespace = self._service.open(message.layout)
            self._layouts[namespace] = message.layout
            self._server.lane.allow(self.id, namespace)
        self._send(Opened(message.layout.namespace), request_id)

    def _on_map(self, message: MapRegion, request_id: int) -> None:
        fd = self._wire.take_fd()
        if fd is None:
            if self._wire.fds_lost:
                raise Busy("the agent is out of descriptors", hint=DESCRIPTORS_HINT)
            raise InvalidArgument("MAP_REGION came without a descriptor")
        try:
            if message.region in self._regions:
                raise InvalidArgument("the region's number is taken", region=message.region)
            if len(self._regions) >= self._server.regions_max:
                raise Busy("too many regions", limit=self._server.regions_max)
            self._regions[message.region] = MappedRegion(fd, message)
        finally:
            os.close(fd)
        self._send(Ok(), request_id)

    def _on_unmap(self, message: UnmapRegion, request_id: int) -> None:
        region = self._regions.pop(message.region, None)

        async def unmap() -> None:
            if region is not None:
                await region.close()
            self._send(Ok(), request_id)

        self._spawn(unmap(), request_id)

    def _on_match(self, message: MatchKeys, request_id: int) -> None:
        self._check_namespace(message.namespace)
        self._send(
            self._service.match(message.namespace, message.keys, detail=message.detail, prefill=_prefill(message)),
            request_id,
        )

    def _on_release(self, message: ReleaseLease, request_id: int) -> None:
        self._service.store.release(message.lease, time.monotonic(), self.id)

    # --- requests that may have to wait ---

    def _on_get(self, message: Get, request_id: int) -> None:
        self._check_namespace(message.namespace)
        asked_at = time.monotonic()
        send_got = partial(self._send_got, self._send, request_id, asked_at)
        local = self._service.get_local(message.namespace, message.keys, self.id)
        if local.indices or not local.more:
            send_got(local)
        if local.more:
            deadline_s = min(message.deadline_ms, DEADLINE_MS_MAX) / 1000
            self._fetch(message.namespace, message.keys, local.indices, deadline_s, send_got)

    def _on_rest(self, rest: Rest) -> None:
        """Go on with a GET that the lane has not finished; the answer goes out where it came in."""
        send_got = partial(self._send_got, self._send_lane, rest.request_id, rest.asked_at)
        deadline_s = max(0.0, rest.deadline - time.monotonic())
        have = [i for i, settled in enumerate(rest.settled) if settled]
        try:
            if not have:
                self._admit(Get(rest.namespace, rest.keys, 0))
            self._check_namespace(rest.namespace)
            # A connection that had died unnoticed says nothing about the node: it may be asked again, over a new one.
            # One that took longer than others are expected to take may be as good as they are, once they were asked.
            # One that was busy may be asked again, after a pause.
            again = (Code.CLOSED, Code.TIMEOUT, Code.REFUSED)
            excluded = (rest.node,) if rest.node and rest.code not in again else ()
            if not rest.node and not have:
                local = self._service.get_local(rest.namespace, rest.keys, self.id)
                if local.indices or not local.more:
                    send_got(local)
                have = local.indices
                if not local.more:
                    return
            self._fetch(rest.namespace, rest.keys, have, deadline_s, send_got, excluded, rest.failed)
        except P2PKVError as error:
            self._refuse(rest.request_id, error, self._send_lane)

    def _on_lane_gone(self, reason: str) -> None:
        """The engine's short way has ended: with a reason, it broke the protocol; without, it does not want it."""
        if reason:
            self._nonsense(reason)
            self._on_end(reason)

    def _fetch(
        self,
        namespace: int,
        keys: list[bytes],
        have: list[int],
        deadline_s: float,
        send_got: Callable[[Ready], None],
        excluded: Sequence[int] = (),
        failed: Mapping[int, Status] | None = None,
    ) -> None:
        fetching = self._service.get_rest(
            namespace, keys, have, deadline_s, self.id, send_got, lambda: not self._closed, excluded, failed
        )
        if fetching is not None:
            self._fetches.add(fetching)
            fetching.add_done_callback(self._fetches.discard)

    def _send_got(
        self, send: Callable[[msgspec.Struct, int], None], request_id: int, asked_at: float, ready: Ready
    ) -> None:
        # Counted from when the request came: the engine counts from before it asked, so its end is never after ours.
        waited = time.monotonic() - asked_at
        ttl_s = self._service.lease_ttl_s + waited if ready.lease else 0.0
        send(
            Got(
                ready.lease,
                int(ttl_s * 1000),
                ready.indices,
                bytes(ready.statuses),
                bytes(ready.sources),
                ready.extents,
                ready.more,
            ),
            request_id,
        )

    def _on_store(self, message: Store, request_id: int) -> None:
        region = self._check_job(message)

        async def store() -> None:
            deadline_s = min(message.deadline_ms, DEADLINE_MS_MAX) / 1000
            done = await self._service.store_blocks(
                message.namespace, message.keys, region, message.slots, deadline_s, self.still_there
            )
            self._send(done, request_id)

        self._spawn(store(), request_id)

    def _on_load(self, message: Load, request_id: int) -> None:
        region = self._check_job(message)

        async def load() -> None:
            deadline_s = min(message.deadline_ms, DEADLINE_MS_MAX) / 1000
            done = await self._service.load_blocks(
                message.namespace,
                message.keys,
                region,
                message.slots,
                deadline_s,
                self.id,
                prefill=_prefill(message),
            )
            self._send(done, request_id)

        self._spawn(load(), request_id)

    # --- ahead of need ---

    @property
    def _ahead(self) -> Ahead:
        if self._server.ahead is None:
            raise Busy("this agent has not joined its cell")
        return self._server.ahead

    def _on_prefetch(self, message: Prefetch, request_id: int) -> None:
        self._check_namespace(message.namespace)
        ahead, deadline_s = self._ahead, min(message.deadline_ms, DEADLINE_MS_MAX) / 1000

        async def prefetch() -> None:
            self._send(await ahead.prefetch(message.namespace, message.keys, deadline_s), request_id)

        self._spawn(prefetch(), request_id)

    def _on_replicate(self, message: Replicate, request_id: int) -> None:
        self._check_namespace(message.namespace)
        ahead = self._ahead

        async def replicate() -> None:
            self._send(await ahead.replicate(message.namespace, message.keys, message.nodes), request_id)

        self._spawn(replicate(), request_id)

    def _on_warm(self, message: Warm, request_id: int) -> None:
        self._send(self._ahead.warm(message), request_id)

    def _check_namespace(self, namespace: int) -> Layout:
        layout = self._layouts.get(namespace)
        if layout is None:
            raise InvalidArgument("the namespace has not been opened on this connection", namespace=f"{namespace:016x}")
        return layout

    def _check_job(self, message: Store | Load) -> MappedRegion:
        layout = self._check_namespace(message.namespace)
        region = self._regions.get(message.region)
        if region is None:
            raise InvalidArgument("no such region", region=message.region)
        if len(message.slots) != len(message.keys):
            raise InvalidArgument("as many slots as keys are needed", keys=len(message.keys), slots=len(message.slots))
        if region.slot_bytes < layout.block_bytes:
            raise InvalidArgument("the region's slots are smaller than a block", slot=region.slot_bytes)
        region.addresses(message.slots)
        return region

    def _spawn(self, work: Coroutine[Any, Any, None], request_id: int) -> None:
        async def guarded() -> None:
            try:
                await work
            except P2PKVError as error:
                self._refuse(request_id, error)

        task = self._loop.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a request of engine %s failed: %r", self.name, error, exc_info=error)
            self.close()  # its answer will never come: better lost than waited for

    # --- frames out ---

    def _refuse(
        self, request_id: int, error: P2PKVError, send: Callable[[msgspec.Struct, int], None] | None = None
    ) -> None:
        fields: tuple[str, ...] = ()
        code = "internal"
        if isinstance(error, LayoutMismatch):
            code, fields = "layout", error.fields
        elif isinstance(error, InvalidArgument):
            code = "invalid"
        elif isinstance(error, Busy):
            code = "draining" if self._server.draining else "busy"
        (send or self._send)(EngineError(code, str(error)[:1000], list(fields)), request_id)

    def _send_lane(self, message: msgspec.Struct, request_id: int) -> None:
        if not self._closed:
            self._server.lane.send(self.id, CODEC.encode(message, request_id))

    def _send_error(self, request_id: int, code: str, text: str, fields: list[str] | None = None) -> None:
        self._send(EngineError(code, text[:1000], fields or []), request_id)

    def _send(self, message: msgspec.Struct, request_id: int) -> None:
        if not self._closed:
            self._wire.send(CODEC.encode(message, request_id))


def _prefill(message: MatchKeys | Load) -> Prefill | None:
    """The engine's pace, where it knows it."""
    if not message.prefill_us:
        return None
    overhead_us = message.overhead_us if isinstance(message, MatchKeys) else 0
    return Prefill(message.prefill_us / 1e6, message.prefill_more_ns / 1e9, overhead_us / 1e6)
