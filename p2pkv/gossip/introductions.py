"""HELLO and WELCOME: how both ends of a TCP connection say who they are, and prove it, before anything else is read.

Both read from the bare socket, byte for byte and not one more, so that whoever gets the socket afterwards finds all
that follows. A ticket (:mod:`.tickets`) shows that an end has the cell's key, which life it is, and whom it means.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from p2pkv.errors import PeerUnavailable, RemoteProtocolError
from p2pkv.gossip import net, tickets
from p2pkv.gossip.addresses import at, life_of
from p2pkv.gossip.sayings import Sayings
from p2pkv.gossip.sealed import Life, Opener, Sealer
from p2pkv.gossip.tls import Tls
from p2pkv.types import NodeId
from p2pkv.wire.frame import PROTOCOL_MAX, PROTOCOL_MIN, Frame
from p2pkv.wire.peer import CODEC, Address, Card, Hello, PeerError, PeerType, Welcome

HELLO_BYTES_MAX: Final = 1 << 20
"""Room for a card with every layout an agent may have; what one stranger can make us buffer."""


class ThisNode(Protocol):
    """This node, as it introduces itself."""

    @property
    def card(self) -> Card: ...
    @property
    def life(self) -> Life: ...
    @property
    def leaving(self) -> bool: ...
    def life_of(self, node: int) -> Life | None:
        """The life of a member."""
        ...


class Introductions:
    """Of one node, on the event loop's thread.

    Args:
        deadline_s: for those who have connected to us.
    """

    def __init__(
        self,
        *,
        cell: str,
        local: ThisNode,
        sealer: Sealer,
        opener: Opener,
        clock: Callable[[], float],
        deadline_s: float,
        tls: Tls | None,
        counters: Counter[str],
        sayings: Sayings,
    ) -> None:
        self._cell = cell
        self._local = local
        self._sealer = sealer
        self._opener = opener
        self._clock = clock
        self._deadline_s = deadline_s
        self._tls = tls
        self._counters = counters
        self._sayings = sayings

    async def make(self, where: Address, life: Life, role: str) -> tuple[socket.socket, Welcome]:
        """Connect to a life of a node and introduce this one. The caller bounds the time, and owns the socket.

        Raises:
            ConnectionRefusedError: nothing listens there.
            PeerUnavailable: whoever is there refuses, or is somebody else.
            OSError, RemoteProtocolError: it broke, or made no sense.
        """
        ticket = tickets.hello_ticket(self._sealer, life)
        card = self._local.card
        if role == "data":
            card = msgspec.structs.replace(card, layouts=[])  # gossip has told them
        hello = CODEC.encode(Hello(PROTOCOL_MIN, PROTOCOL_MAX, self._cell, role, card, ticket))
        sock = await net.connect(where)
        if self._tls is not None:
            sock = await self._tls.wrap(sock, server=False)
        try:
            await asyncio.get_running_loop().sock_sendall(sock, hello)
            answer = CODEC.decode(await net.read_frame(sock, HELLO_BYTES_MAX))
            if isinstance(answer, PeerError):
                self._counters[f"refused_by_peer_{answer.code}"] += 1
                raise PeerUnavailable(f"peer refused: {answer.message}", node=NodeId(life.node), code=answer.code)
            if not isinstance(answer, Welcome) or life_of(answer.card) != life:
                raise PeerUnavailable("another node answers at the peer's address", node=NodeId(life.node))
            if not tickets.check_welcome(self._opener, answer.ticket, claimed=life, hello=ticket, now=self._clock()):
                raise PeerUnavailable("the peer does not prove that it has the cell's key", node=NodeId(life.node))
        except BaseException:
            sock.close()
            raise
        return sock, answer

    async def receive(self, sock: socket.socket, host: str) -> tuple[socket.socket, Hello] | None:
        """Welcome who has connected from ``host``. The socket is this method's, and the caller's when it returns one.

        None: they may not stay, and have been told why.

        Raises:
            OSError: the connection ended.
        """
        owned = True
        try:
            async with asyncio.timeout(self._deadline_s):
                net.tune(sock)
                if self._tls is not None:
                    owned = False
                    sock = await self._tls.wrap(sock, server=True)
                    owned = True
                try:
                    hello = self._judge(await net.read_frame(sock, HELLO_BYTES_MAX), host)
                except RemoteProtocolError as error:
                    await self._refuse(sock, host, error)
                    return None
                welcome = Welcome(
                    min(hello.protocol_max, PROTOCOL_MAX), self._local.card, self._cell,
                    tickets.welcome_ticket(self._sealer, hello.ticket),
                )  # fmt: skip
                await asyncio.get_running_loop().sock_sendall(sock, CODEC.encode(welcome))
            owned = False
            return sock, hello
        except TimeoutError:
            self._counters["handshake_timeouts"] += 1
        except ssl.SSLError as error:
            self._counters["tls_failures"] += 1
            self._sayings.say("tls", host, f"refused {host}: {error.reason or error}", logging.ERROR)
        finally:
            if owned:
                sock.close()
        return None

    async def _refuse(self, sock: socket.socket, host: str, error: RemoteProtocolError) -> None:
        code = str(error.context.get("code", "protocol"))
        self._counters["malformed" if code == "protocol" else f"refused_{code}"] += 1
        level = logging.WARNING if code == "draining" else logging.ERROR
        self._sayings.say(code, host, f"refused {host}: {error}", level)
        await asyncio.get_running_loop().sock_sendall(sock, CODEC.encode(PeerError(code, error.message[:1024])))

    def _judge(self, frame: Frame, host: str) -> Hello:
        """The HELLO that a frame is, if whoever sent it may stay.

        Raises:
            RemoteProtocolError: it may not; ``code`` is for the other side.
        """
        if frame.type != PeerType.HELLO:
            raise RemoteProtocolError("frame out of place", type=frame.type, phase="waiting for HELLO")
        hello = CODEC.decode(frame)
        assert isinstance(hello, Hello)
        claimed = life_of(hello.card)
        who = f"{NodeId(claimed.node)} at {at(hello.card.address)}"
        if not max(hello.protocol_min, PROTOCOL_MIN) <= min(hello.protocol_max, PROTOCOL_MAX):
            text = f"{who} speaks {hello.protocol_min}..{hello.protocol_max}, not {PROTOCOL_MIN}..{PROTOCOL_MAX}"
            raise RemoteProtocolError(text)
        if hello.cell != self._cell:
            raise RemoteProtocolError(f"{who} is of cell {hello.cell!r}, this is cell {self._cell!r}", code="cell")
        if hello.role not in ("control", "data"):
            raise RemoteProtocolError("unknown role in HELLO", role=hello.role[:32])
        if not tickets.check_hello(
            self._opener, hello.ticket, claimed=claimed, own=self._local.life, now=self._clock()
        ):
            raise RemoteProtocolError(
                f"{who} does not prove that it has the cell's key and that it means this node", code="key"
            )
        if self._local.leaving:
            raise RemoteProtocolError("this node is leaving", code="draining")
        known = self._local.life_of(claimed.node)
        if known is not None and known != claimed and claimed.epoch <= known.epoch:
            raise RemoteProtocolError(f"{who} is not the life of that node that is known", code="stale")
        return hello
