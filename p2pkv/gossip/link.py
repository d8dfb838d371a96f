"""One control connection to a peer as a caller sees it: ask, and have the answer by a deadline.

The connection's other matters (introductions, the ownership stream) are the protocol core's. A link lives exactly as
long as its connection; all its methods run on the event loop's thread. Requests and answers are paired by the frame's
request id; ids are never used twice on a connection, so that a late answer cannot be taken for another's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec

from p2pkv.errors import (
    Busy,
    DeadlineExceeded,
    LayoutMismatch,
    LocalProtocolError,
    P2PKVError,
    PeerUnavailable,
    RemoteProtocolError,
    Unavailable,
)
from p2pkv.types import NodeId
from p2pkv.wire.frame import Frame
from p2pkv.wire.peer import (
    CODEC,
    Card,
    Hot,
    HotKeys,
    NixlConnect,
    NixlEndpointReply,
    PeerError,
    Pin,
    Pinned,
    Release,
    Released,
    Replicate,
    Replicated,
    Suspect,
    Suspected,
)

IN_FLIGHT_MAX: Final = 256
"""Unanswered requests per connection; an owner answers within a deadline, so this many waiting means it is stuck."""

ANSWERS: Final[dict[type[msgspec.Struct], type[msgspec.Struct]]] = {  # all requests there are on a control connection
    Pin: Pinned,
    Release: Released,
    NixlConnect: NixlEndpointReply,
    Suspect: Suspected,
    Hot: HotKeys,
    Replicate: Replicated,
}


ANSWERED_BY: Final = frozenset(ANSWERS.values())
"""What a reader's end is sent."""


OnLate = Callable[[msgspec.Struct], None]


class PeerLink:
    """A control connection. ``dialed``: we are the reader and ask; otherwise the peer reads us and we answer.

    Args:
        card: the peer's as of the introduction; kept up to date by the driver.
        send: appends one frame to the connection's bounded queue; False when the connection is gone.
    """

    def __init__(self, *, card: Card, dialed: bool, send: Callable[[bytes], bool]) -> None:
        self.card = card
        self.dialed = dialed
        self.answering = 0
        """Requests of the peer that are being answered here."""
        self._send = send
        self._next_id = 0
        self._waiting: dict[int, tuple[asyncio.Future[msgspec.Struct], type[msgspec.Struct]]] = {}
        self._late: dict[int, OnLate] = {}
        self._on_close: list[Callable[[], None]] = []
        self._closed: str | None = None

    @property
    def node_id(self) -> NodeId:
        """Who is at the other end."""
        return NodeId(self.card.node)

    @property
    def epoch(self) -> int:
        """The peer's epoch; a link never outlives it."""
        return self.card.epoch

    @property
    def closed(self) -> bool:
        """Whether the connection is gone."""
        return self._closed is not None

    @property
    def in_flight(self) -> int:
        """Requests that wait for their answer."""
        return len(self._waiting)

    def on_close(self, callback: Callable[[], None]) -> None:
        """Call back once when the connection is gone (at once if it already is), e.g. to let go of its leases."""
        if self.closed:
            callback()
        else:
            self._on_close.append(callback)

    async def request(
        self, message: msgspec.Struct, deadline_s: float, *, on_late: OnLate | None = None
    ) -> msgspec.Struct:
        """Send a request and wait for its answer.

        ``on_late`` gets an answer that comes when nobody waits for it any more: it may name something to give back.

        Raises:
            PeerUnavailable: the connection is gone, or went while waiting; also when the peer is shutting down.
            DeadlineExceeded: no answer within ``deadline_s``.
            Busy: too many requests in flight here, or the peer says that it is busy.
            LayoutMismatch, RemoteProtocolError: the peer refused, or answered with the wrong kind of message.
        """
        answer_type = ANSWERS.get(type(message))
        if answer_type is None or not self.dialed:
            raise LocalProtocolError("not a request that this side may send", request=type(message).__name__)
        if len(self._waiting) >= IN_FLIGHT_MAX:
            raise Busy("too many requests in flight to one peer", node=self.node_id, limit=IN_FLIGHT_MAX)
        request_id = self._take_id()
        loop = asyncio.get_running_loop()
        future: asyncio.Future[msgspec.Struct] = loop.create_future()
        if not self._send(CODEC.encode(message, request_id)):
            raise self._gone()
        self._waiting[request_id] = (future, answer_type)
        timer = loop.call_later(max(0.0, deadline_s), self._expire, future, type(message).__name__, deadline_s)
        try:
            return await future
        finally:
            timer.cancel()
            self._waiting.pop(request_id, None)
            if on_late is not None and (future.cancelled() or isinstance(future.exception(), DeadlineExceeded)):
                self._late[request_id] = on_late
                if len(self._late) > IN_FLIGHT_MAX:
                    self._late.pop(next(iter(self._late)))

    def notify(self, message: msgspec.Struct) -> None:
        """Send a message that has no answer.

        Raises:
            PeerUnavailable: the connection is gone.
        """
        if not self._send(CODEC.encode(message)):
            raise self._gone()

    def reply(self, request_id: int, answer: msgspec.Struct) -> None:
        """Answer a request of the peer; dropped when the connection is gone, as nobody waits for it any more."""
        self._send(CODEC.encode(answer, request_id))

    def on_answer(self, frame: Frame, message: msgspec.Struct) -> None:
        """An answer has come (from the driver).

        Raises:
            RemoteProtocolError: it answers nothing that was ever asked, or with the wrong kind: close the connection.
        """
        waiting = self._waiting.get(frame.request_id)
        if waiting is None:
            if not 0 < frame.request_id <= self._next_id:
                raise RemoteProtocolError("answer to a request that was never sent", request_id=frame.request_id)
            on_late = self._late.pop(frame.request_id, None)  # its deadline has passed
            if on_late is not None and not isinstance(message, PeerError):
                on_late(message)
            return
        future, answer_type = waiting
        if future.done():
            return
        if isinstance(message, PeerError):
            future.set_exception(refusal(message, self.node_id))
        elif isinstance(message, answer_type):
            future.set_result(message)
        else:
            error = RemoteProtocolError(
                "wrong kind of answer", expected=answer_type.__name__, got=type(message).__name__
            )
            future.set_exception(error)
            raise error

    def close(self, reason: str) -> None:
        """The connection is gone (from the driver): every waiting request fails now."""
        if self._closed is not None:
            return
        self._closed = reason
        self._late.clear()
        for future, _ in self._waiting.values():
            if not future.done():
                future.set_exception(self._gone())
        callbacks, self._on_close = self._on_close, []
        for callback in callbacks:
            callback()

    def _take_id(self) -> int:
        self._next_id += 1
        if self._next_id > 0xFFFFFFFF:
            raise Busy("request ids of this connection are used up", node=self.node_id)
        return self._next_id

    def _expire(self, future: asyncio.Future[msgspec.Struct], what: str, deadline_s: float) -> None:
        if not future.done():
            future.set_exception(
                DeadlineExceeded("peer did not answer in time", node=self.node_id, request=what, seconds=deadline_s)
            )

    def _gone(self) -> PeerUnavailable:
        return PeerUnavailable("connection to the peer is gone", node=self.node_id, reason=self._closed or "closing")


def refusal(error: PeerError, node: NodeId) -> P2PKVError:
    """The exception that a peer's ERROR stands for here."""
    text = f"peer refused: {error.message}"
    match error.code:
        case "busy":
            return Busy(text, node=node)
        case "layout":
            return LayoutMismatch(text, fields=tuple(error.fields), node=node)
        case "draining":
            return PeerUnavailable(text, node=node)
        case _:
            return RemoteProtocolError(text, node=node, code=error.code)


def peer_error(error: P2PKVError) -> PeerError:
    """What a peer is told of an error that its request ran into: not the context, which is not its business."""
    match error:
        case LayoutMismatch():
            return PeerError("layout", error.message[:1024], list(error.fields)[:32])
        case Unavailable():
            return PeerError("busy", error.message[:1024])
        case RemoteProtocolError():
            return PeerError("protocol", error.message[:1024])
        case _:
            return PeerError("internal", error.message[:1024])
