"""A protocol core on a bench: frames in by hand, effects out as a list."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import uvloop

from p2pkv.config import Peer
from p2pkv.gossip.effects import Close, Dial, Effect, Say, Send
from p2pkv.gossip.protocol import PeerProtocol
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Layout
from p2pkv.wire.frame import FrameDecoder
from p2pkv.wire.peer import CODEC, Address, Card, Hello, Welcome

SETTINGS = Peer(members_max=4, heartbeat_ms=500, silence_ms=2_500, purge_s=10.0)


def make_card(node: int = 2, epoch: int = 1, *, host: str = "10.0.0.2", instance: int = 1, **more: Any) -> Card:
    fields: dict[str, Any] = {"http": "", "host_id": "", "layouts": [], "transports": ["tcp"]}
    fields.update(more)
    return Card(node=node, epoch=epoch, address=Address(host, 7841), instance=instance, **fields)


def make_layout(**fields: Any) -> Layout:
    defaults: dict[str, Any] = {"model": "m", "revision": "r", "kv_dtype": "bf16", "block_tokens": 256}
    return Layout(**{**defaults, "block_bytes": 1 << 20, **fields})


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The driver's tests run on asyncio's own loop and on uvloop, which the agent uses."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.path.name.startswith("test_driver"):
        factories["uvloop"] = uvloop.new_event_loop
    return factories


class Bench:
    """Node 1, and whatever the test says to it."""

    def __init__(self, settings: Peer = SETTINGS, *, card: Card | None = None) -> None:
        self.now = 100.0
        self.log = OwnershipLog(1, hold_ms=0)
        self.index = PrefixIndex(max_nodes=settings.members_max + 1, max_entries=1 << 16)
        self.core = PeerProtocol(
            settings=settings, cell="c", card=card or make_card(1, host="10.0.0.1"), log=self.log, index=self.index,
            rng=random.Random(1), now=self.now,
        )  # fmt: skip
        self.effects: list[Effect] = []
        self.dialing: dict[str, int] = {}

    def keep(self, effects: list[Effect]) -> list[Effect]:
        self.effects = effects
        for effect in effects:
            if isinstance(effect, Dial):
                self.dialing[effect.address.host] = effect.conn
            if isinstance(effect, Say):
                assert effect.level.upper() in logging.getLevelNamesMapping()
        self.core.table.check_integrity()
        return effects

    def accept(self, host: str = "10.0.0.2") -> int:
        conn = self.core.take_conn()
        self.keep(self.core.on_accepted(self.now, conn, host))
        return conn

    def say(self, conn: int, message: msgspec.Struct, request_id: int = 0) -> list[Effect]:
        (frame,) = FrameDecoder().feed(CODEC.encode(message, request_id))
        return self.keep(self.core.on_frame(self.now, conn, frame))

    def hello(self, card: Card | None = None, **fields: Any) -> int:
        """A peer dials us."""
        card = card or make_card()
        conn = self.accept(card.address.host)
        hello = Hello(1, 1, "c", "control", card)
        self.say(conn, msgspec.structs.replace(hello, **fields))
        return conn

    def dial(self, host: str = "10.0.0.2") -> int:
        """We dial a seed (unless we are at it already); returns the connection."""
        self.keep(self.core.on_seeds(self.now, f"test-{host}", [Address(host, 7841)]))
        conn = self.dialing.pop(host)
        self.keep(self.core.on_dialed(self.now, conn, host))
        return conn

    def read(self, card: Card | None = None) -> int:
        """We dial a peer and it welcomes us."""
        card = card or make_card()
        conn = self.dial(card.address.host)
        self.say(conn, Welcome(1, card, [], "c"))
        return conn

    def tick(self, seconds: float = 0.1) -> list[Effect]:
        """Time passes, the timer is on time; returns the effects of all its calls."""
        end, out = self.now + seconds, []
        while self.core.next_timer <= end:
            self.now = max(self.now, self.core.next_timer)
            out += self.core.on_timer(self.now)
        self.now = end
        return self.keep(out)

    def sent(self, conn: int | None = None) -> list[msgspec.Struct]:
        """Messages among the last effects."""
        frames = [e.frame for e in self.effects if isinstance(e, Send) and (conn is None or conn in e.conns)]
        return [CODEC.decode(frame) for data in frames for frame in FrameDecoder().feed(data)]

    def closed(self, conn: int) -> bool:
        return any(isinstance(e, Close) and e.conn == conn for e in self.effects)

    def said(self, level: str) -> list[str]:
        return [e.text for e in self.effects if isinstance(e, Say) and e.level == level]

    def visible(self, keys: bytes) -> bytes:
        return self.index.contains_any(keys)


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def make_bench() -> Callable[..., Bench]:
    return Bench


@pytest.fixture
def card() -> Callable[..., Card]:
    return make_card


@pytest.fixture
def layout() -> Callable[..., Layout]:
    return make_layout
