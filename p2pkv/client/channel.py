"""One stream socket to the agent: requests out, answers in, shared by threads without a thread of its own.

Whoever waits for an answer reads the socket for everybody (leader and followers): the first waiter polls the socket
with the lock released, hands each frame to whom it belongs, and passes the lead on when its own answer is there. With
one thread that is a plain send and receive. Nothing here waits longer than the deadline it was given.
"""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import threading
import time
from collections.abc import Callable

from p2pkv.client.messages import Answer, EngineError, Request, decode, encode
from p2pkv.errors import AgentUnavailable, Busy, DeadlineExceeded, P2PKVError, RemoteProtocolError
from p2pkv.light import Final
from p2pkv.wire.frame import FrameDecoder

RECV_BYTES: Final = 16 << 10
"""CPython allocates this much for every receive; much more would be mapped and unmapped each time."""
BESIDE_S: Final = 0.001
IN_FLIGHT_MAX: Final = 256
"""Unanswered requests; the agent's own default bound is the same."""

OnAnswer = Callable[[Answer | P2PKVError], None]
"""Called once: with the answer, or with why there will be none."""


class Inbox:
    """Where the answer to one blocking request arrives. Guarded by the connection's lock."""

    __slots__ = ("answer",)

    def __init__(self) -> None:
        self.answer: Answer | None = None


class Channel:
    """A connected socket. Thread-safe.

    Once broken it stays broken: :attr:`broken` says why, every waiter gets :class:`AgentUnavailable`, and the callbacks
    of submitted requests that were not answered are left in :meth:`take_lost`.
    """

    def __init__(self, sock: socket.socket) -> None:
        """Takes the socket over."""
        sock.setblocking(False)
        self._sock = sock
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._send_lock = threading.Lock()
        self._reading = False
        self._decoder = FrameDecoder()
        self._ids = itertools.count(1)
        self._inboxes: dict[int, Inbox] = {}
        self._callbacks: dict[int, OnAnswer] = {}
        self.broken: AgentUnavailable | None = None
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)

    # --- asking ---

    def request(self, message: Request, *, deadline: float, fds: tuple[int, ...] = ()) -> Answer:
        """Send one request and wait for its one answer.

        Raises:
            DeadlineExceeded: no answer in time; a later answer is dropped.
            AgentUnavailable: the connection is or becomes broken.
            P2PKVError: what the agent's ERROR means.
        """
        inbox = Inbox()
        with self._lock:
            request_id = self._new_id()
            self._inboxes[request_id] = inbox
        try:
            self._send(encode(message, request_id), fds, deadline=deadline)
            answer = self._wait(inbox, deadline)
        finally:
            with self._lock:
                self._inboxes.pop(request_id, None)
        if isinstance(answer, EngineError):
            raise to_error(answer)
        return answer

    def submit(self, message: Request, on_answer: OnAnswer) -> int:
        """Send one request without waiting; ``on_answer`` is called by whoever reads the answer (:meth:`pump`).

        Raises:
            Busy: too many requests are unanswered, or the socket is full; nothing was sent.
            AgentUnavailable: the connection is broken.
        """
        with self._lock:
            request_id = self._new_id()
            self._callbacks[request_id] = on_answer
        try:
            self._send(encode(message, request_id), (), deadline=0.0)
        except BaseException:
            with self._lock:
                self._callbacks.pop(request_id, None)
            raise
        return request_id

    def pump(self) -> None:
        """Take in whatever has arrived, without waiting."""
        with self._lock:
            if self._reading or self.broken is not None:
                return
            self._reading = True
        self._read_once(0.0)

    def wait_readable(self, timeout_s: float, *, beside: int = -1) -> None:
        """Sleep until something arrives (or somebody else takes it in), at most ``timeout_s``.

        ``beside``: or until this descriptor is readable; looked at again and again if somebody else reads ours.
        """
        with self._lock:
            if self.broken is not None:
                return
            if self._reading:
                self._arrived.wait(timeout_s if beside < 0 else min(timeout_s, BESIDE_S))
                return
            self._reading = True
        self._read_once(timeout_s, beside)

    def take_lost(self) -> list[OnAnswer]:
        """After the connection broke: the callbacks of requests that will never be answered."""
        with self._lock:
            lost = list(self._callbacks.values())
            self._callbacks.clear()
            return lost

    def close(self, reason: str = "closed") -> None:
        """Break the connection on purpose."""
        with self._lock:
            self._break(reason)

    # --- inside ---

    def _new_id(self) -> int:
        if self.broken is not None:
            raise self.broken
        if len(self._inboxes) + len(self._callbacks) >= IN_FLIGHT_MAX:
            raise Busy("too many unanswered requests", limit=IN_FLIGHT_MAX)
        while True:
            request_id = next(self._ids) & 0xFFFFFFFF
            if request_id and request_id not in self._inboxes and request_id not in self._callbacks:
                return request_id

    def _send(self, data: bytes, fds: tuple[int, ...], *, deadline: float) -> None:
        """Send a whole frame. A frame that was sent in part and cannot be finished breaks the connection."""
        with self._send_lock:
            view = memoryview(data)
            sent = 0
            while sent < len(view):
                try:
                    if fds:
                        sent += socket.send_fds(self._sock, [view[sent:]], fds)
                        fds = ()
                    else:
                        sent += self._sock.send(view[sent:], socket.MSG_NOSIGNAL)
                    continue
                except BlockingIOError:
                    pass
                except OSError as error:
                    with self._lock:
                        self._break(f"send failed: {error.strerror}")
                    raise self._unavailable() from error
                left = deadline - time.monotonic()
                if sent:
                    left = max(left, 1.0)  # the frame has begun: finish it, or give the connection up
                if left <= 0 or not _writable(self._sock, left):
                    if not sent:
                        raise Busy("the agent does not read its socket")
                    with self._lock:
                        self._break("the agent stopped reading in the middle of a request")
                    raise self._unavailable()

    def _wait(self, inbox: Inbox, deadline: float) -> Answer:
        while True:
            with self._lock:
                if inbox.answer is not None:
                    return inbox.answer
                if self.broken is not None:
                    raise self.broken
                left = deadline - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded("the agent did not answer in time")
                if self._reading:
                    self._arrived.wait(left)
                    continue
                self._reading = True
            self._read_once(left)

    def _unavailable(self) -> AgentUnavailable:
        return self.broken or AgentUnavailable("the connection is closed")

    def _break(self, reason: str) -> None:
        if self.broken is None:
            self.broken = AgentUnavailable("the connection to the agent is gone", reason=reason)
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)  # wakes whoever sleeps on it; closing does not
            self._sock.close()
            self._arrived.notify_all()

    def _read_once(self, timeout_s: float, beside: int = -1) -> None:
        """As the leader: wait for bytes, take them in, dispatch, give up the lead. Enter with the lock released."""
        data: bytes | None = None
        reason = ""
        answered: list[tuple[OnAnswer, Answer]] = []
        try:  # a signal's handler may raise anywhere: the lead is given up all the same
            if timeout_s > 0:
                self._sleep(timeout_s, beside)
            data, reason = b"", "interrupted while it was read"  # what recv returned may be lost then
            data = self._sock.recv(RECV_BYTES)
            reason = "the agent closed it"
        except BlockingIOError:
            data = None
        except (OSError, ValueError) as error:
            data, reason = b"", str(error)
        finally:
            with self._lock:
                self._reading = False
                if data == b"":
                    self._break(reason)
                elif data:
                    self._dispatch(data, answered)
                self._arrived.notify_all()
        for on_answer, message in answered:
            on_answer(message)

    def _sleep(self, timeout_s: float, beside: int) -> None:
        """Until the socket is readable, or ``beside``."""
        if beside < 0:
            self._poll.poll(timeout_s * 1000)
            return
        self._poll.register(beside, select.POLLIN)
        try:
            self._poll.poll(timeout_s * 1000)
        finally:
            self._poll.unregister(beside)

    def _dispatch(self, data: bytes, answered: list[tuple[OnAnswer, Answer]]) -> None:
        try:
            for frame in self._decoder.feed(data):
                message = decode(frame)
                if (inbox := self._inboxes.get(frame.request_id)) is not None:
                    inbox.answer = message
                elif (on_answer := self._callbacks.pop(frame.request_id, None)) is not None:
                    answered.append((on_answer, message))
        except RemoteProtocolError as error:
            self._break(str(error))


def to_error(error: EngineError) -> P2PKVError:
    """The exception that an ERROR from the agent stands for."""
    from p2pkv.errors import InvalidArgument, LayoutMismatch

    if error.code == "layout":
        return LayoutMismatch(error.message, fields=error.fields)
    if error.code == "invalid":
        return InvalidArgument(error.message)
    if error.code in ("busy", "draining"):
        return Busy(error.message)
    return P2PKVError(error.message)


def _writable(sock: socket.socket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(timeout_s * 1000))
