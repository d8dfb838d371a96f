"""Effects on their way from the core to the driver, in order. Shared by the core's parts."""

from __future__ import annotations

from typing import Final

import msgspec

from p2pkv.gossip.effects import Effect, Say, Send
from p2pkv.wire.peer import CODEC

SAY_AGAIN_S: Final = 30.0
SAID_MAX: Final = 1_024


class Outbox:
    """Collects effects until they are taken."""

    def __init__(self) -> None:
        self._effects: list[Effect] = []
        self._said: dict[tuple[str, str], float] = {}

    def put(self, effect: Effect) -> None:
        """Ask for something."""
        self._effects.append(effect)

    def take(self) -> list[Effect]:
        """Everything asked for since the last call."""
        out, self._effects = self._effects, []
        return out

    def send(self, conn: int, message: msgspec.Struct) -> None:
        """Send one message."""
        self._effects.append(Send((conn,), CODEC.encode(message)))

    def send_all(self, conns: tuple[int, ...], frame: bytes) -> None:
        """Send one frame to many."""
        if conns:
            self._effects.append(Send(conns, frame))

    def say(self, level: str, text: str) -> None:
        """A line for the log."""
        self._effects.append(Say(level, text))

    def say_once(self, now: float, level: str, key: tuple[str, str], text: str) -> None:
        """At most once per key and half minute: strangers must not be able to fill the log."""
        if now - self._said.get(key, float("-inf")) < SAY_AGAIN_S:
            return
        if len(self._said) >= SAID_MAX:
            self._said.clear()
        self._said[key] = now
        self.say(level, text)
