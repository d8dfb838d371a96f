"""Answers to readers' requests: one handler per message type, bounded per reader, errors told in the peer's words."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec

from p2pkv.errors import P2PKVError
from p2pkv.gossip.link import PeerLink, peer_error
from p2pkv.wire.peer import PeerError

REQUESTS_MAX: Final = 64
"""Requests of one reader that are being answered at the same time; more are answered "busy"."""

log = logging.getLogger("p2pkv.gossip.requests")

Answer = msgspec.Struct | None
Handler = Callable[[PeerLink, msgspec.Struct], Awaitable[Answer] | Answer]


class Requests:
    """Hands requests to handlers and their answers back. On the event loop's thread only.

    Args:
        spawn: runs a coroutine as a task of the network's, which ends it when it stops.
    """

    def __init__(self, spawn: Callable[[Awaitable[None], str], None], counters: Counter[str]) -> None:
        self.handlers: dict[type[msgspec.Struct], Handler] = {}
        self._spawn = spawn
        self._counters = counters

    def take(self, link: PeerLink, request_id: int, message: msgspec.Struct) -> None:
        """A request has come on a reader's link."""
        handler = self.handlers.get(type(message))
        if handler is None:
            self._answer(link, request_id, PeerError("unsupported", "no handler for this request"))
        elif link.answering >= REQUESTS_MAX:
            self._counters["requests_refused"] += 1
            self._answer(link, request_id, PeerError("busy", "too many requests at the same time"))
        else:
            try:
                answer = handler(link, message)
            except Exception as error:  # the reader must have an answer, whatever went wrong here
                answer = self._failed(error)
            if inspect.isawaitable(answer):
                link.answering += 1
                self._spawn(self._answer_later(link, request_id, answer), "p2pkv-peer-request")
            else:
                self._answer(link, request_id, answer)

    async def _answer_later(self, link: PeerLink, request_id: int, answer: Awaitable[Answer]) -> None:
        try:
            reply = await answer
        except Exception as error:
            reply = self._failed(error)
        finally:
            link.answering -= 1
        self._answer(link, request_id, reply)

    def _answer(self, link: PeerLink, request_id: int, answer: Answer) -> None:
        if answer is not None and request_id:
            link.reply(request_id, answer)

    def _failed(self, error: Exception) -> PeerError:
        if isinstance(error, P2PKVError):
            return peer_error(error)
        log.error("a peer's request failed", exc_info=error)
        return PeerError("internal", "the request failed at the owner")
