"""What native code hears of blocks that are distrusted: all of it is taken back in the end."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from p2pkv.agent.suspicion import Suspicion
from p2pkv.transport import distrust
from p2pkv.transport.distrust import TTL_S

NS = 7


class Reader:
    """A Suspicion, and what its lane distrusts."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lane: set[tuple[int, bytes]] = set()
        self.suspicion = Suspicion(
            store=None,  # type: ignore[arg-type]
            arena=None,  # type: ignore[arg-type]
            movers=None,  # type: ignore[arg-type]
            network=SimpleNamespace(on=lambda *_: None, peer=lambda node: None),  # type: ignore[arg-type]
            on_change=self._changed,
            on_dropped=lambda: None,
            lease_ttl_s=1.0,
            clock=lambda: self.now,
        )

    def _changed(self, namespace: int, key: bytes, distrusted: bool) -> None:
        (self.lane.add if distrusted else self.lane.discard)((namespace, key))


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    monkeypatch.setattr(distrust, "BLOCKS_MAX", 4)
    return Reader()


def test_what_there_is_no_room_for_is_taken_back(reader: Reader) -> None:
    keys = [bytes([i]) * 16 for i in range(10)]
    reader.suspicion.rejected(1, NS, keys)
    assert reader.lane == {(NS, key) for key in keys[-4:]}
    reader.now = TTL_S
    reader.suspicion.tick()
    assert not reader.lane


def test_a_block_that_is_distrusted_at_another_node_too_is_not(reader: Reader) -> None:
    first, *others = (bytes([i]) * 16 for i in range(4))
    reader.suspicion.rejected(1, NS, [first, *others])
    reader.suspicion.rejected(2, NS, [first])  # takes the room of the same block at node 1
    assert reader.lane == {(NS, key) for key in (first, *others)}
    assert not reader.suspicion.distrusted(1, NS, first) and reader.suspicion.distrusted(2, NS, first)
