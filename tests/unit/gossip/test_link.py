"""A link pairs requests with answers, whatever the other side does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from p2pkv.errors import (
    Busy,
    DeadlineExceeded,
    IntegrityError,
    LayoutMismatch,
    LocalProtocolError,
    OutOfSpace,
    PeerUnavailable,
    RemoteProtocolError,
)
from p2pkv.gossip import link as link_module
from p2pkv.gossip.link import PeerLink, peer_error, refusal
from p2pkv.types import NodeId
from p2pkv.wire.frame import Frame, FrameDecoder
from p2pkv.wire.peer import CODEC, Bye, PeerError, Pin, Pinned, Release, Released


class Wire:
    """The other side's end of a link."""

    def __init__(self, card: Any, *, dialed: bool = True) -> None:
        self.frames: list[Frame] = []
        self.up = True
        self.link = PeerLink(card=card, dialed=dialed, send=self.send)

    def send(self, data: bytes) -> bool:
        self.frames += list(FrameDecoder().feed(data)) if self.up else []
        return self.up

    def answer(self, request: Frame, message: Any) -> None:
        (frame,) = FrameDecoder().feed(CODEC.encode(message, request.request_id))
        self.link.on_answer(frame, message)


@pytest.fixture
def wire(card: Any) -> Wire:
    return Wire(card())


async def asked(wire: Wire, count: int) -> None:
    while len(wire.frames) < count:
        await asyncio.sleep(0)


async def test_answers_find_their_requests_in_any_order(wire: Wire) -> None:
    tasks = [asyncio.ensure_future(wire.link.request(Release(i), 5.0)) for i in range(3)]
    await asked(wire, 3)
    assert len({f.request_id for f in wire.frames}) == 3 and wire.link.in_flight == 3
    for request, held in zip(reversed(wire.frames), (True, False, True), strict=True):
        wire.answer(request, Released(held))
    assert [answer.held for answer in await asyncio.gather(*tasks)] == [True, False, True]  # type: ignore[attr-defined]
    assert wire.link.in_flight == 0


async def test_a_late_answer_is_dropped_and_an_unasked_one_is_an_error(wire: Wire) -> None:
    with pytest.raises(DeadlineExceeded):
        await wire.link.request(Release(1), 0.0)
    wire.answer(wire.frames[0], Released(True))
    with pytest.raises(RemoteProtocolError):
        wire.answer(Frame(11, 2, 0, b""), Released(True))
    with pytest.raises(RemoteProtocolError):
        wire.answer(Frame(11, 0, 0, b""), Released(True))


async def test_an_answer_that_nobody_waits_for_any_more_may_name_something_to_give_back(wire: Wire) -> None:
    late: list[object] = []
    with pytest.raises(DeadlineExceeded):
        await wire.link.request(Release(1), 0.0, on_late=late.append)
    cancelled = asyncio.ensure_future(wire.link.request(Release(2), 5.0, on_late=late.append))
    await asked(wire, 2)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    answered = asyncio.ensure_future(wire.link.request(Release(3), 5.0, on_late=late.append))
    await asked(wire, 3)
    wire.answer(wire.frames[2], Released(True))
    await answered
    for frame in wire.frames * 2:
        wire.answer(frame, Released(True))
    assert late == [Released(True)] * 2, "once each, and not what was waited for"


async def test_what_may_come_late_is_bounded(wire: Wire) -> None:
    late: list[object] = []
    for _ in range(link_module.IN_FLIGHT_MAX + 1):
        with pytest.raises(DeadlineExceeded):
            await wire.link.request(Release(1), 0.0, on_late=late.append)
    for frame in wire.frames:
        wire.answer(frame, Released(True))
    assert len(late) == link_module.IN_FLIGHT_MAX


async def test_the_wrong_kind_of_answer_fails_the_request_and_the_connection(wire: Wire) -> None:
    task = asyncio.ensure_future(wire.link.request(Pin(1, [], 1), 5.0))
    await asked(wire, 1)
    with pytest.raises(RemoteProtocolError):
        wire.answer(wire.frames[0], Released(True))
    with pytest.raises(RemoteProtocolError):
        await task


async def test_closing_fails_what_waits_and_calls_back_once(wire: Wire) -> None:
    calls: list[int] = []
    wire.link.on_close(lambda: calls.append(1))
    task = asyncio.ensure_future(wire.link.request(Release(1), 5.0))
    await asked(wire, 1)
    wire.up = False
    wire.link.close("reset")
    wire.link.close("again")
    wire.link.on_close(lambda: calls.append(2))
    with pytest.raises(PeerUnavailable, match="reset"):
        await task
    with pytest.raises(PeerUnavailable):
        await wire.link.request(Release(1), 5.0)
    with pytest.raises(PeerUnavailable):
        wire.link.notify(Release(1))
    assert calls == [1, 2]


async def test_requests_in_flight_are_bounded(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "IN_FLIGHT_MAX", 2)
    tasks = [asyncio.ensure_future(wire.link.request(Release(i), 5.0)) for i in range(2)]
    await asked(wire, 2)
    with pytest.raises(Busy):
        await wire.link.request(Release(9), 5.0)
    wire.answer(wire.frames[0], Released(True))
    await tasks[0]
    tasks.append(asyncio.ensure_future(wire.link.request(Release(9), 5.0)))
    await asked(wire, 3)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert wire.link.in_flight == 0


async def test_only_the_reader_asks_and_only_what_is_a_request(wire: Wire, card: Any) -> None:
    with pytest.raises(LocalProtocolError):
        await wire.link.request(Bye(), 1.0)
    with pytest.raises(LocalProtocolError):
        await Wire(card(), dialed=False).link.request(Release(1), 1.0)


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (LayoutMismatch("x", fields=("order",)), "layout", LayoutMismatch),
        (Busy("x"), "busy", Busy),
        (OutOfSpace("x"), "busy", Busy),
        (RemoteProtocolError("x"), "protocol", RemoteProtocolError),
        (IntegrityError("x"), "internal", RemoteProtocolError),
    ],
)
def test_errors_keep_their_meaning_on_the_way(error: Any, code: str, kind: type[Exception]) -> None:
    told = peer_error(error)
    assert told.code == code
    assert isinstance(refusal(told, NodeId(1)), kind)


def test_a_draining_peer_is_unavailable() -> None:
    assert isinstance(refusal(PeerError("draining", "bye"), NodeId(1)), PeerUnavailable)


def test_what_a_peer_is_told_has_no_context() -> None:
    assert "secret" not in peer_error(Busy("full", path="secret")).message


def test_pinned_answers_pin() -> None:
    assert link_module.ANSWERS[Pin] is Pinned
