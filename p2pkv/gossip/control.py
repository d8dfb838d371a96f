"""TCP between agents: control connections for letters and requests, and the doors of data connections.

Connections are opened when somebody needs them, shared by all who do, and closed when nobody has for a while; a cell of
a thousand nodes needs a handful at a time. Both ends prove who they are (:mod:`.introductions`) before anything else is
read. Everything runs on one event loop's thread, callbacks included; they must not block.

* Accepted connections wait in a lobby until they are introduced. Control connections then become asyncio transports;
  data connections are handed over as sockets.
* Letters for an address wait, bounded, until its connection is there, and are dropped when it does not come: the gossip
  core asks again.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, Protocol

from p2pkv.config import Peer as PeerSettings
from p2pkv.config import parse_size
from p2pkv.errors import PeerUnavailable, RemoteProtocolError
from p2pkv.gossip.addresses import at, life_of, observed, parse
from p2pkv.gossip.connection import ControlConnection
from p2pkv.gossip.introductions import Introductions, ThisNode
from p2pkv.gossip.link import ANSWERED_BY, ANSWERS, PeerLink
from p2pkv.gossip.requests import Requests
from p2pkv.gossip.sayings import Sayings
from p2pkv.gossip.sealed import Life, Opener, Sealer
from p2pkv.gossip.tls import Tls
from p2pkv.types import NodeId
from p2pkv.wire.frame import Frame, encode
from p2pkv.wire.peer import CODEC, Address, Bye, Card, Hello, PeerError, PeerType, Welcome

UNINTRODUCED_MAX: Final = 64
"""Accepted connections that have not said HELLO yet; each may make us buffer one."""
ACCEPTS_MAX: Final = 64
"""Per wake-up of the listener: others on the loop get their turn."""
ACCEPT_PAUSE_S: Final = 0.1
"""After a failed accept (out of descriptors): trying again at once would spin."""
IDLE_S: Final = 60.0
WAITING_BYTES_MAX: Final = 32 << 20
"""Letters for one address whose connection is being opened: a snapshot of the largest owner."""
DIAL_AGAIN_S: Final = 0.2
DIALS_MAX: Final = 64

log = logging.getLogger("p2pkv.gossip")


class Local(ThisNode, Protocol):
    """This node, as the connections need to know it."""

    def life_at(self, address: str) -> Life | None:
        """The life of the member that is reached there."""
        ...


@dataclass(slots=True)
class _Conn:
    """A control connection that is introduced."""

    connection: ControlConnection
    life: Life
    address: str
    dialed: bool
    used_at: float
    said_bye: bool = False


@dataclass(slots=True)
class _Dial:
    """A connection on its way, and what waits for it."""

    task: asyncio.Task[None] | None = None
    letters: list[bytes] = field(default_factory=list)
    letter_bytes: int = 0
    waiters: list[asyncio.Future[PeerLink]] = field(default_factory=list)


class Control:
    """See the module's docstring.

    Args:
        on_letter: gets every letter with the life that sent it.
        on_lost: told when a control connection broke that nobody had closed, or when a node's port refuses any.
        on_data: gets every data connection: a non-blocking socket that is its own from then on, and the HELLO.
    """

    def __init__(
        self,
        *,
        settings: PeerSettings,
        cell: str,
        local: Local,
        sealer: Sealer,
        opener: Opener,
        clock: Callable[[], float],
        requests: Requests,
        on_letter: Callable[[Life, bytes], None],
        on_lost: Callable[[int], None],
        on_data: Callable[[socket.socket, Hello], None],
        counters: Counter[str],
        tls: Tls | None = None,
    ) -> None:
        self._settings = settings
        self._local = local
        self._clock = clock
        self._requests = requests
        self._on_letter = on_letter
        self._on_lost = on_lost
        self._on_data = on_data
        self._counters = counters
        self._tls = tls
        self._queue_bytes_max = parse_size(settings.send_queue, key="peer.send_queue")
        self._handshake_s = settings.handshake_ms / 1e3
        self._sayings = Sayings(clock)
        self._introductions = Introductions(
            cell=cell, local=local, sealer=sealer, opener=opener, clock=clock, deadline_s=self._handshake_s, tls=tls,
            counters=counters, sayings=self._sayings,
        )  # fmt: skip
        self._listener: socket.socket | None = None
        self._lobby: set[asyncio.Task[None]] = set()
        self._conns: dict[ControlConnection, _Conn] = {}
        self._by_address: dict[str, _Conn] = {}  # for letters: either way
        self._dialed: dict[int, _Conn] = {}  # for requests, by node
        self._dials: dict[str, _Dial] = {}
        self._failed: dict[str, tuple[float, Life | None]] = {}  # when, and who was to be there
        self._stopping = False

    # --- life

    def listen(self, listener: socket.socket) -> None:
        """Accept on a listening socket, which is this object's from here on."""
        self._listener = listener
        self._accept_more(True)

    async def stop(self, deadline_s: float) -> None:
        """Close everything; takes at most about ``deadline_s``."""
        self._stopping = True
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()
        tasks = [*self._lobby, *(dial.task for dial in self._dials.values() if dial.task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        closing = list(self._conns)
        for conn in list(self._conns.values()):
            self._close(conn, "this node is leaving")
        if closing:
            closed = [asyncio.ensure_future(connection.closed.wait()) for connection in closing]
            _, pending = await asyncio.wait(closed, timeout=max(deadline_s, 0.01))
            for waiting in pending:
                waiting.cancel()
            for connection in closing:
                connection.abort("this node is leaving")
        if self._tls is not None:
            await self._tls.stop()

    def tick(self) -> None:
        """Now and then: close what nobody needs, and those who do not read."""
        now = self._clock()
        loop_now = asyncio.get_running_loop().time()
        for conn in list(self._conns.values()):
            conn.connection.check_progress(loop_now)
            link = conn.connection.link
            busy = link is not None and (link.in_flight or link.answering)
            if conn.dialed and not busy and now - conn.used_at > IDLE_S:
                self._counters["connections_idle"] += 1
                conn.connection.send(CODEC.encode(Bye()))
                self._close(conn, "idle")
        for address, (failed_at, _) in list(self._failed.items()):
            if now - failed_at > DIAL_AGAIN_S:
                del self._failed[address]

    @property
    def connections(self) -> int:
        """Control connections that are open."""
        return len(self._conns)

    @property
    def queued_bytes(self) -> int:
        """Bytes that wait for peers to read."""
        return sum(connection.queued_bytes for connection in self._conns)

    # --- what others ask for

    def link(self, node: int) -> PeerLink | None:
        """The connection over which a node is asked, while there is one."""
        conn = self._dialed.get(node)
        return conn.connection.link if conn is not None else None

    def rtt_ms(self, node: int) -> float | None:
        """Round-trip time to a node as the kernel sees it, while there is a connection."""
        conn = self._dialed.get(node)
        return conn.connection.rtt_ms if conn is not None else None

    async def reach(self, node: int, address: str, deadline_s: float) -> PeerLink:
        """The connection over which a node is asked; opened if need be.

        Raises:
            PeerUnavailable: refused, unreachable, or not there within ``deadline_s``.
        """
        conn = self._dialed.get(node)
        if conn is not None and conn.connection.link is not None:
            conn.used_at = self._clock()
            return conn.connection.link
        dial = self._dial(address, for_requests=True)
        if dial is None:
            raise PeerUnavailable("cannot connect to the peer", node=NodeId(node), reason="it has just failed")
        waiter: asyncio.Future[PeerLink] = asyncio.get_running_loop().create_future()
        dial.waiters.append(waiter)
        try:
            async with asyncio.timeout(deadline_s):
                return await waiter
        except TimeoutError as error:
            raise PeerUnavailable(
                "cannot connect to the peer in time", node=NodeId(node), seconds=deadline_s
            ) from error

    def letter(self, address: str, payload: bytes) -> None:
        """Send a letter; it may be lost."""
        frame = encode(PeerType.LETTER, payload)
        conn = self._by_address.get(address)
        if conn is not None:
            conn.used_at = self._clock()
            conn.connection.send(frame)
            return
        dial = self._dial(address)
        if dial is None or dial.letter_bytes + len(frame) > WAITING_BYTES_MAX:
            self._counters["letters_dropped"] += 1
            return
        dial.letters.append(frame)
        dial.letter_bytes += len(frame)

    async def open_data(self, node: int, address: Address, deadline_s: float) -> socket.socket:
        """A data connection to a node: introduced, non-blocking, TCP_NODELAY; the caller owns the socket.

        Raises:
            PeerUnavailable: unreachable, refused, or not done within ``deadline_s``.
        """
        sock: socket.socket | None = None
        life = self._local.life_of(node)
        if life is None:
            raise PeerUnavailable("no such peer", node=NodeId(node))
        try:
            async with asyncio.timeout(deadline_s):
                sock, _ = await self._introduce(address, life, "data")
        except BaseException as error:
            if isinstance(error, OSError | TimeoutError | RemoteProtocolError):
                raise PeerUnavailable(
                    "cannot open a data connection", node=NodeId(node), reason=str(error) or type(error).__name__
                ) from error
            raise
        return sock

    def forget(self, node: int) -> None:
        """Earlier lives of a node are over: whatever is connected to them is closed."""
        now = self._local.life_of(node)
        for conn in [conn for conn in self._conns.values() if conn.life.node == node and conn.life != now]:
            self._close(conn, "that life of the node is over")

    # --- dialing

    def _dial(self, address: str, *, for_requests: bool = False) -> _Dial | None:
        dial = self._dials.get(address)
        if dial is not None:
            return dial
        if self._stopping or len(self._dials) >= DIALS_MAX or self._has_just_failed(address):
            return None
        dial = self._dials[address] = _Dial()
        self._counters["dials"] += 1
        dial.task = asyncio.create_task(self._open(address, dial), name="p2pkv-peer-dial")
        return dial

    def _has_just_failed(self, address: str) -> bool:
        """Whether whoever is there now could not be connected to a moment ago. An earlier life says nothing of it."""
        failed_at, life = self._failed.get(address, (-math.inf, None))
        return self._clock() - failed_at < DIAL_AGAIN_S and life == self._local.life_at(address)

    async def _open(self, address: str, dial: _Dial) -> None:
        reason = "unknown"
        life = self._local.life_at(address)
        try:
            if life is None:
                raise RemoteProtocolError("no member is there any more")
            where = parse(address)
            async with asyncio.timeout(self._handshake_s):
                sock, welcome = await self._introduce(where, life, "control")
            conn = await self._adopt(sock, life, address, welcome.card, dialed=True)
            for frame in dial.letters:
                conn.connection.send(frame)
            assert conn.connection.link is not None
            for waiter in dial.waiters:
                if not waiter.done():
                    waiter.set_result(conn.connection.link)
        except (OSError, TimeoutError, RemoteProtocolError, PeerUnavailable, ValueError) as error:
            reason = str(error) or type(error).__name__
            self._counters["dial_failures"] += 1
            self._counters["letters_dropped"] += len(dial.letters)
            self._failed[address] = self._clock(), life
            self._sayings.say("dial", address, f"cannot connect to {address}: {reason}", logging.INFO)
        finally:
            del self._dials[address]
            for waiter in dial.waiters:
                if not waiter.done():
                    waiter.set_exception(PeerUnavailable("cannot connect to the peer", reason=reason))

    async def _introduce(self, where: Address, life: Life, role: str) -> tuple[socket.socket, Welcome]:
        try:
            return await self._introductions.make(where, life, role)
        except ConnectionRefusedError:  # its host says that the process is gone: as good as a connection that broke
            self._lost(life)
            raise

    # --- accepting

    def _accept(self) -> None:
        """The listener is readable. Not a task of its own: one that is cancelled could lose what it just accepted."""
        assert self._listener is not None
        for _ in range(ACCEPTS_MAX):
            try:
                sock, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._counters["accept_errors"] += 1
                log.warning("cannot accept peer connections: %s", error)
                self._accept_more(False)
                asyncio.get_running_loop().call_later(ACCEPT_PAUSE_S, self._accept_more, True)
                return
            full = len(self._conns) + len(self._lobby) >= self._settings.connections_max
            if full or len(self._lobby) >= UNINTRODUCED_MAX:
                self._counters["connections_refused" if full else "unintroduced_refused"] += 1
                sock.close()
                continue
            sock.setblocking(False)
            task = asyncio.create_task(self._receive(sock, str(address[0])), name="p2pkv-peer-lobby")
            self._lobby.add(task)
            task.add_done_callback(partial(self._received, sock))

    def _received(self, sock: socket.socket, task: asyncio.Task[None]) -> None:
        self._lobby.discard(task)
        if task.cancelled():  # perhaps before its first step: then nobody has closed it
            sock.close()

    def _accept_more(self, on: bool) -> None:
        if self._listener is None or self._stopping:
            return
        loop = asyncio.get_running_loop()
        if on:
            loop.add_reader(self._listener, self._accept)
        else:
            loop.remove_reader(self._listener)

    async def _receive(self, sock: socket.socket, host: str) -> None:
        """Introduce who has connected, and give the connection to whom it belongs."""
        try:
            introduced = await self._introductions.receive(sock, host)
            if introduced is None:
                return
            sock, hello = introduced
            if self._stopping:
                sock.close()
            elif hello.role == "data":
                self._on_data(sock, hello)
            else:
                card = observed(hello.card, host)
                await self._adopt(sock, life_of(card), at(card.address), card, dialed=False)
        except OSError as error:
            log.debug("an accepted connection ended: %s", error)
        except Exception:
            log.exception("accepted connection failed")

    # --- connections

    async def _adopt(self, sock: socket.socket, life: Life, address: str, card: Card, *, dialed: bool) -> _Conn:
        """A socket whose ends are introduced becomes a control connection."""
        loop = asyncio.get_running_loop()
        connection = ControlConnection(
            on_frame=lambda frame: self._on_frame(conn, frame),
            on_malformed=lambda error: self._on_malformed(conn, error),
            on_lost=lambda reason: self._gone(conn, reason),
            queue_bytes_max=self._queue_bytes_max, counters=self._counters,
        )  # fmt: skip
        conn = _Conn(connection, life, address, dialed, self._clock())
        connection.link = PeerLink(card=card, dialed=dialed, send=connection.send)
        self._conns[connection] = conn
        self._by_address[address] = conn
        self._failed.pop(address, None)
        if dialed:
            self._dialed[life.node] = conn
        try:
            await (
                loop.create_connection(lambda: connection, sock=sock)
                if dialed
                else loop.connect_accepted_socket(lambda: connection, sock)
            )
        except BaseException:
            self._drop(conn)
            sock.close()
            raise
        return conn

    def _on_frame(self, conn: _Conn, frame: Frame) -> None:
        conn.used_at = self._clock()
        if frame.type == PeerType.LETTER:
            self._on_letter(conn.life, frame.body)
            return
        link = conn.connection.link
        assert link is not None
        try:
            message = CODEC.decode(frame)
            if isinstance(message, Bye):
                conn.said_bye = True
            elif isinstance(message, PeerError) and frame.request_id == 0:
                self._counters["refused_by_peer"] += 1
                self._close(conn, f"the peer says: {message.code}: {message.message}")
            elif conn.dialed and (type(message) in ANSWERED_BY or isinstance(message, PeerError)):
                link.on_answer(frame, message)
            elif not conn.dialed and type(message) in ANSWERS:
                self._requests.take(link, frame.request_id, message)
            else:
                raise RemoteProtocolError("frame out of place", type=frame.type)
        except RemoteProtocolError as error:
            self._on_malformed(conn, error)

    def _on_malformed(self, conn: _Conn, error: RemoteProtocolError) -> None:
        self._counters["malformed"] += 1
        self._sayings.say(
            "malformed",
            conn.address,
            f"protocol error from {NodeId(conn.life.node)} ({conn.address}): {error}",
            logging.WARNING,
        )
        conn.connection.send(CODEC.encode(PeerError("protocol", error.message[:1024])))
        self._close(conn, "protocol error")

    def _close(self, conn: _Conn, reason: str) -> None:
        self._drop(conn)
        conn.connection.close(reason)

    def _gone(self, conn: _Conn, reason: str) -> None:
        self._drop(conn)
        if not conn.said_bye:
            log.debug("connection with %s broke: %s", conn.address, reason)
            self._lost(conn.life)

    def _lost(self, life: Life) -> None:
        if not self._stopping and self._local.life_of(life.node) == life:
            self._on_lost(life.node)

    def _drop(self, conn: _Conn) -> None:
        self._conns.pop(conn.connection, None)
        if self._by_address.get(conn.address) is conn:
            del self._by_address[conn.address]
            other = next((c for c in self._conns.values() if c.address == conn.address), None)
            if other is not None:
                self._by_address[conn.address] = other
        if self._dialed.get(conn.life.node) is conn:
            del self._dialed[conn.life.node]
