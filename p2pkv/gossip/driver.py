"""The peer network on asyncio: sockets, timers and queues around the protocol core.

Thin: it decides nothing. Bytes become frames and go to :class:`~p2pkv.gossip.protocol.PeerProtocol`; what the core
asks for is done. Everything runs on one event loop's thread, callbacks included; they must not block.

* Accepted connections wait in a lobby until their HELLO has been read, byte for byte and not one more, from the bare
  socket. Control connections then become asyncio transports; data connections are handed over as sockets.
* Send queues hold references to frames that all readers share, and are bounded in bytes (``send_queue``) and in time
  (:data:`BLOCKED_MAX_S`): a reader that falls behind either is disconnected, and gets a checkpoint when it is back.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

import msgspec

from p2pkv.config import Peer as PeerSettings
from p2pkv.config import parse_address, parse_size
from p2pkv.errors import LocalProtocolError, PeerUnavailable, RemoteProtocolError
from p2pkv.gossip import net
from p2pkv.gossip.connection import ControlConnection
from p2pkv.gossip.discovery import Discovery, from_settings
from p2pkv.gossip.effects import Changed, Close, Deliver, Dial, Effect, Established, HandOver, Say, Send
from p2pkv.gossip.link import PeerLink
from p2pkv.gossip.protocol import PeerProtocol
from p2pkv.gossip.requests import Handler, Requests
from p2pkv.gossip.views import PeerView
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import Index
from p2pkv.types import NodeId
from p2pkv.wire.frame import PROTOCOL_MAX, PROTOCOL_MIN, Frame
from p2pkv.wire.peer import CODEC, Address, Card, Hello, PeerError, Welcome

HELLO_BYTES_MAX: Final = 1 << 20
"""Room for a card with every layout an agent may have; what one stranger can make us buffer."""
ACCEPTS_MAX: Final = 64
"""Per wake-up of the listener: others on the loop get their turn."""
ACCEPT_PAUSE_S: Final = 0.1
"""After a failed accept (out of descriptors): trying again at once would spin."""

log = logging.getLogger("p2pkv.gossip")


@dataclass(slots=True)
class _Guest:
    """An accepted connection that has not been introduced yet. ``sock`` is None once it belongs to somebody else."""

    task: asyncio.Task[None]
    sock: socket.socket | None
    out: bytearray


class PeerNetwork:
    """This node's place in the cell.

    Args:
        settings: the configuration's ``peer`` section.
        cell: name of the cell; nodes of others are refused.
        card: how this node introduces itself. Address and instance are filled in by :meth:`start`.
        log: the node's own ownership log. Record changes with the same clock as ``clock``; they are sent within
            ``flush_ms`` of becoming due.
        index: where other nodes' entries go, under slots that :meth:`node_slot` and :meth:`slot_node` translate.
        sources: where seeds come from; None = what the settings say.
    """

    def __init__(
        self,
        *,
        settings: PeerSettings,
        cell: str,
        card: Card,
        log: OwnershipLog,
        index: Index,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        sources: Iterable[Discovery] | None = None,
    ) -> None:
        self.on_data_connection: Callable[[socket.socket, Hello, bytes], None] | None = None
        """Gets every data connection: a non-blocking socket that is its own from then on, the HELLO that came on it,
        and bytes that were read behind HELLO (none, as the driver reads no further)."""
        self.on_peer_change: Callable[[PeerView], None] | None = None
        """Called when a peer's state, card or conflicts change, not when its log does."""
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._cell = cell
        self._card = card
        self._log = log
        self._index = index
        self._clock = clock
        self._rng = rng or random.Random()
        self._sources = list(sources) if sources is not None else None
        self._queue_bytes_max = parse_size(settings.send_queue, key="peer.send_queue")
        self._core: PeerProtocol | None = None
        self._listener: socket.socket | None = None
        self._port = 0
        self._connections: dict[int, ControlConnection] = {}
        self._lobby: dict[int, _Guest] = {}
        self._dials: dict[int, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._requests = Requests(self._spawn, self.counters)
        self._timer: asyncio.TimerHandle | None = None
        self._effects: list[Effect] = []
        self._acting = False
        self._stopping = False

    # --- life

    async def start(self) -> None:
        """Bind, listen, and begin to look for others. Returns when peers can connect.

        Raises:
            ConfigError: the port is in use, the host is not an address of this machine, or a seed is malformed.
        """
        settings = self._settings
        self._listener = await net.listen(settings.host, settings.port)
        self._port = int(self._listener.getsockname()[1])
        host, port = settings.host, self._port
        if settings.advertise:
            head, _, tail = settings.advertise.rpartition(":")
            with_port = head and tail.isdigit() and not (":" in head and not head.startswith("["))
            if with_port:
                host, port = parse_address(settings.advertise, key="peer.advertise")
            else:
                host = settings.advertise.removeprefix("[").removesuffix("]")
        card = msgspec.structs.replace(
            self._card, address=Address(host, port), instance=self._card.instance or self._rng.getrandbits(63)
        )
        self._core = PeerProtocol(
            settings=settings, cell=self._cell, card=card, log=self._log, index=self._index, rng=self._rng,
            now=self._clock(),
        )  # fmt: skip
        self._listen(True)
        self._arm()
        try:
            if self._sources is None:
                self._sources = from_settings(settings, cell=self._cell, card=card)
            for source in self._sources:
                await source.start(self._on_seeds)
        except BaseException:
            await self.stop(0.0)
            raise

    def leave(self) -> None:
        """Say goodbye to everybody: they drop this node's entries at once. Its connections stay until :meth:`stop`, so
        that readers can finish and release what they read; new connections are refused. Idempotent."""
        if self._core is not None:
            self._act(self._core.leave(self._clock()))

    async def stop(self, deadline_s: float = 1.0) -> None:
        """Say goodbye to everybody (if :meth:`leave` has not) and close everything. Idempotent.

        Takes at most about ``deadline_s``.
        """
        if self._stopping:
            return
        if self._listener is not None:
            self._listen(False)
            self._listener.close()
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        for source in self._sources or ():
            await source.stop()
        leaving = list(self._connections.values())
        if self._core is not None:
            self._act(self._core.close(self._clock()))
        tasks = [*self._tasks, *(guest.task for guest in self._lobby.values()), *self._dials.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if leaving:
            closed = [asyncio.ensure_future(connection.closed.wait()) for connection in leaving]
            _, pending = await asyncio.wait(closed, timeout=max(deadline_s, 0.01))
            for waiting in pending:
                waiting.cancel()
            for connection in leaving:
                connection.abort("this node is leaving")

    @property
    def port(self) -> int:
        """The port that is listened on."""
        if not self._port:
            raise LocalProtocolError("the peer network has not been started")
        return self._port

    # --- what others ask for

    @property
    def card(self) -> Card:
        """How this node introduces itself, with the address as bound."""
        return self._core.card if self._core is not None else self._card

    def set_card(self, card: Card) -> None:
        """Replace layouts, transports or the HTTP address and tell everybody. Identity and address stay as they are."""
        own = self.card
        card = msgspec.structs.replace(card, node=own.node, epoch=own.epoch, address=own.address, instance=own.instance)
        if self._core is None:
            self._card = card
        elif card != own:
            self._act(self._core.set_card(self._clock(), card))

    def peers(self) -> list[PeerView]:
        """Every other member that is known, in no particular order."""
        if self._core is None:
            return []
        return [self._with_rtt(view) for view in self._core.peers(self._clock())]

    def peer(self, node_id: int) -> PeerView | None:
        """One member."""
        view = self._core.peer(self._clock(), node_id) if self._core is not None else None
        return self._with_rtt(view) if view is not None else None

    def link(self, node_id: int) -> PeerLink | None:
        """Our control connection to a node, for requests; None while there is none."""
        conn = self._core.owner_conn(node_id) if self._core is not None else None
        connection = self._connections.get(conn) if conn is not None else None
        return connection.link if connection is not None else None

    def node_slot(self, node_id: int) -> int | None:
        """The index slot of a node; the local node's is 0."""
        if node_id == self._card.node:
            return 0
        row = self._core.table.get(node_id) if self._core is not None else None
        return row.slot if row is not None else None

    def slot_node(self, slot: int) -> NodeId | None:
        """Which node an index slot stands for; it goes to another one only after the index has forgotten the first."""
        if slot == 0:
            return NodeId(self._card.node)
        return self._core.table.node_at(slot) if self._core is not None else None

    def on(self, message_type: type[msgspec.Struct], handler: Handler) -> None:
        """Answer readers' requests of a type (PIN, RELEASE, NIXL_CONNECT).

        ``handler(link, message)`` gives the answer, or a coroutine of it, or None for no answer. A P2PKVError that it
        raises is the reader's answer too. ``link`` lives as long as the reader's connection.
        """
        self._requests.handlers[message_type] = handler

    async def open_data(self, node_id: int, deadline_s: float) -> socket.socket:
        """A data connection to a node: introduced, non-blocking, TCP_NODELAY; the caller owns the socket.

        Raises:
            PeerUnavailable: unknown, unreachable, refused, or not done within ``deadline_s``.
        """
        view = self.peer(node_id)
        if view is None:
            raise PeerUnavailable("no such peer", node=NodeId(node_id))
        card = msgspec.structs.replace(self.card, layouts=[])  # the control connection has told them
        hello = CODEC.encode(Hello(PROTOCOL_MIN, PROTOCOL_MAX, self._cell, "data", card))
        loop = asyncio.get_running_loop()
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(deadline_s):
                sock = await net.connect(view.address)
                await loop.sock_sendall(sock, hello)
                answer = CODEC.decode(await net.read_frame(sock, HELLO_BYTES_MAX))
            if isinstance(answer, PeerError):
                raise PeerUnavailable(f"peer refused: {answer.message}", node=view.node, code=answer.code)
            if not isinstance(answer, Welcome) or answer.card.node != view.node:
                raise PeerUnavailable("another node answers at the peer's address", node=view.node)
        except BaseException as error:
            if sock is not None:
                sock.close()
            if isinstance(error, OSError | TimeoutError | RemoteProtocolError):
                raise PeerUnavailable(
                    "cannot open a data connection", node=view.node, reason=str(error) or type(error).__name__
                ) from error
            raise
        return sock

    def stats(self) -> dict[str, int]:
        """Counters since the start, and a few sizes, by name."""
        core = self._core
        counters = self.counters + core.counters if core is not None else self.counters
        peers = core.table.rows.values() if core is not None else ()
        return {
            **counters,
            "peers": len(peers),
            "peers_alive": sum(not row.hidden for row in peers),
            "connections": len(self._connections),
            "queued_bytes": sum(connection.queued_bytes for connection in self._connections.values()),
        }

    # --- effects

    def _act(self, effects: list[Effect]) -> None:
        """Do what the core asks for, in order; what comes of it (a full queue) goes back to the core afterwards."""
        self._effects += effects
        if self._acting:
            return
        self._acting = True
        try:
            while self._effects:
                batch, self._effects = self._effects, []
                for effect in batch:
                    self._do(effect)
        finally:
            self._acting = False

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send():
                for conn in effect.conns:
                    self._send(conn, effect.frame)
            case Deliver():
                self._deliver(effect)
            case Dial():
                task = asyncio.create_task(self._dial(effect.conn, effect.address), name="p2pkv-peer-dial")
                self._dials[effect.conn] = task
                task.add_done_callback(lambda _: self._dials.pop(effect.conn, None))
            case Established():
                if connection := self._connections.get(effect.conn):
                    connection.link = self._make_link(connection, effect)
            case Close():
                if connection := self._connections.pop(effect.conn, None):
                    connection.close(effect.reason)
                elif dial := self._dials.get(effect.conn):
                    dial.cancel()
                # One in the lobby is closed by its task, when what it has to say has been sent.
            case Changed():
                self._changed(effect)
            case Say():
                log.log(logging.getLevelNamesMapping()[effect.level.upper()], "%s", effect.text)
            case HandOver():
                pass  # by the lobby's task, which has the socket

    def _send(self, conn: int, frame: bytes) -> bool:
        if connection := self._connections.get(conn):
            return connection.send(frame)
        if guest := self._lobby.get(conn):
            guest.out += frame
            return True
        return False

    def _changed(self, effect: Changed) -> None:
        view = self.peer(effect.node)
        if view is None:
            return
        link = self.link(view.node)
        if link is not None:
            link.card = view.card
        if self.on_peer_change is not None:
            try:
                self.on_peer_change(view)
            except Exception:
                log.exception("on_peer_change failed")

    # --- connections

    def _accept(self) -> None:
        """The listener is readable. Not a task of its own: one that is cancelled could lose what it just accepted."""
        assert self._core is not None and self._listener is not None
        for _ in range(ACCEPTS_MAX):
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self.counters["accept_errors"] += 1
                log.warning("cannot accept peer connections: %s", error)
                self._listen(False)
                asyncio.get_running_loop().call_later(ACCEPT_PAUSE_S, self._listen, True)
                return
            conn = self._core.take_conn()
            self._act(self._core.on_accepted(self._clock(), conn, str(address[0])))
            full = len(self._connections) + len(self._lobby) >= self._settings.connections_max
            if full or conn not in self._core.conns:
                self._act(self._core.on_closed(self._clock(), conn, "too many connections"))
                self.counters["connections_refused"] += 1
                sock.close()
                continue
            sock.setblocking(False)
            task = asyncio.create_task(self._introduce(conn, sock), name="p2pkv-peer-lobby")
            self._lobby[conn] = _Guest(task, sock, bytearray())
            task.add_done_callback(lambda _, conn=conn: self._left_lobby(conn))  # type: ignore[misc]

    def _listen(self, on: bool) -> None:
        loop, listener = asyncio.get_running_loop(), self._listener
        if listener is None or self._stopping:
            return
        if on:
            loop.add_reader(listener, self._accept)
        else:
            loop.remove_reader(listener)

    def _left_lobby(self, conn: int) -> None:
        guest = self._lobby.pop(conn, None)
        if guest is not None and guest.sock is not None:
            guest.sock.close()

    async def _introduce(self, conn: int, sock: socket.socket) -> None:
        """Read HELLO from the bare socket, have the core judge it, and give the connection to whom it belongs."""
        assert self._core is not None
        core, loop, guest = self._core, asyncio.get_running_loop(), self._lobby[conn]
        try:
            net.tune(sock)
            effects: list[Effect] = []
            try:
                async with asyncio.timeout(self._settings.handshake_ms / 1e3):
                    frame = await net.read_frame(sock, HELLO_BYTES_MAX)
                effects = core.on_frame(self._clock(), conn, frame)
            except RemoteProtocolError as error:
                effects = core.on_malformed(self._clock(), conn, error)
            except TimeoutError:
                self.counters["handshake_timeouts"] += 1
                effects = core.on_closed(self._clock(), conn, "no HELLO in time")
            except OSError as error:
                effects = core.on_closed(self._clock(), conn, str(error))
            hello = next((e.hello for e in effects if isinstance(e, HandOver)), None)
            if conn in core.conns:  # control: from here on the transport reads and writes
                # Known before the transport is: what the core sends meanwhile queues up behind WELCOME.
                connection = self._connections[conn] = self._make_connection(conn)
                self._act(effects)
                await loop.connect_accepted_socket(lambda: connection, sock)
                guest.sock = None
                return
            self._act(effects)
            if guest.out:
                async with asyncio.timeout(self._settings.handshake_ms / 1e3):
                    await loop.sock_sendall(sock, guest.out)
            if hello is not None and self.on_data_connection is not None and not self._stopping:
                self.on_data_connection(sock, hello, b"")
                guest.sock = None
        except (OSError, TimeoutError) as error:
            self._gone(conn, str(error) or "timed out")
        except Exception:
            log.exception("accepted connection failed")
            self._gone(conn, "internal error")

    async def _dial(self, conn: int, address: Address) -> None:
        assert self._core is not None
        try:
            async with asyncio.timeout(self._settings.handshake_ms / 1e3):
                sock = await net.connect(address)
        except (OSError, TimeoutError) as error:
            self._gone(conn, str(error) or "timed out")
            return
        try:
            host = str(sock.getpeername()[0])
            connection = self._connections[conn] = self._make_connection(conn)
            await asyncio.get_running_loop().create_connection(lambda: connection, sock=sock)
        except OSError as error:
            sock.close()
            self._gone(conn, str(error))
            return
        except BaseException:
            sock.close()
            raise
        self._act(self._core.on_dialed(self._clock(), conn, host))

    def _gone(self, conn: int, reason: str) -> None:
        assert self._core is not None
        if connection := self._connections.pop(conn, None):
            connection.abort(reason)
        self._act(self._core.on_closed(self._clock(), conn, reason))

    def _make_connection(self, conn: int) -> ControlConnection:
        assert self._core is not None
        core = self._core

        def on_frame(frame: Frame) -> None:
            self._act(core.on_frame(self._clock(), conn, frame))

        def on_malformed(error: RemoteProtocolError) -> None:
            self._act(core.on_malformed(self._clock(), conn, error))

        def on_lost(reason: str) -> None:
            self._connections.pop(conn, None)
            self._act(core.on_closed(self._clock(), conn, reason))

        return ControlConnection(
            on_frame=on_frame, on_malformed=on_malformed, on_lost=on_lost,
            queue_bytes_max=self._queue_bytes_max, counters=self.counters,
        )  # fmt: skip

    def _make_link(self, connection: ControlConnection, effect: Established) -> PeerLink:
        return PeerLink(card=effect.card, dialed=effect.dialed, send=connection.send)

    def _deliver(self, effect: Deliver) -> None:
        connection = self._connections.get(effect.conn)
        link = connection.link if connection is not None else None
        if connection is None or link is None:
            return
        if not link.dialed:
            self._requests.take(link, effect.frame.request_id, effect.message)
            return
        try:
            link.on_answer(effect.frame, effect.message)
        except RemoteProtocolError as error:
            assert self._core is not None
            self._effects += self._core.on_malformed(self._clock(), effect.conn, error)

    # --- time

    def _on_seeds(self, source: str, addresses: Iterable[Address]) -> None:
        if self._core is not None and not self._stopping:
            self._act(self._core.on_seeds(self._clock(), source, addresses))

    def _on_timer(self) -> None:
        assert self._core is not None
        try:
            self._act(self._core.on_timer(self._clock()))
            now = asyncio.get_running_loop().time()
            for connection in list(self._connections.values()):
                connection.check_progress(now)
        finally:
            self._arm()

    def _arm(self) -> None:
        if self._core is not None and not self._stopping:
            delay = max(0.0, self._core.next_timer - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _spawn(self, coroutine: Awaitable[None], name: str) -> None:
        task = asyncio.ensure_future(coroutine)
        assert isinstance(task, asyncio.Task)
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _with_rtt(self, view: PeerView) -> PeerView:
        """The kernel's smoothed estimate, where it has one; the introduction took longer for reasons of its own."""
        conn = self._core.owner_conn(view.node) if self._core is not None else None
        connection = self._connections.get(conn) if conn is not None else None
        rtt_ms = connection.rtt_ms if connection is not None else None
        return view if rtt_ms is None else view.with_rtt(rtt_ms)
