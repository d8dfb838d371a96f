"""Peers that are not asked are tried out again, for as long as they are peers, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace

import pytest

from p2pkv import _native
from p2pkv.agent import sources as module
from p2pkv.agent.sources import Sources
from p2pkv.transport.base import PullRequest, PullResult
from p2pkv.transport.breaker import Fault
from p2pkv.types import Status

NODE = 10
SLOT = 3


class Peer:
    """A peer as the network shows it, and the transport to it. ``answers``: what comes of each probe, the last for
    ever."""

    def __init__(self) -> None:
        self.view: SimpleNamespace | None = SimpleNamespace(alive=True, age_ms=None)
        self.answers: list[Status | Exception] = [Status.TIMEOUT]
        self.asked = 0
        self.pool = _native.Pool(1, 1.0)

    async def pull(self, request: PullRequest) -> PullResult:
        answer = self.answers[min(self.asked, len(self.answers) - 1)]
        self.asked += 1
        await asyncio.sleep(0)
        if isinstance(answer, Exception):
            raise answer
        return PullResult([answer], 0)


@pytest.fixture
def peer() -> Peer:
    return Peer()


@pytest.fixture
async def sources(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Sources]:
    monkeypatch.setattr(module, "LOOK_S", 0.001)
    transports = SimpleNamespace(
        rdma=False, tcp=SimpleNamespace(pool=peer.pool), setup_s=lambda node: 0.0, pick=lambda node: peer
    )
    network = SimpleNamespace(peer=lambda node: peer.view, load_of=lambda node: 0, node_slot={NODE: SLOT}.get)
    made = Sources(network, transports, "127.0.0.1")  # type: ignore[arg-type]
    monkeypatch.setattr(made.peers, "worth_a_probe", lambda node: True)  # without the pauses
    yield made
    await made.stop()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():
            await asyncio.sleep(0.001)


def fails(sources: Sources) -> None:
    """As many pulls in a row as open the breaker."""
    for _ in range(Fault.FAILED.value):
        sources.peers.failed(NODE)


async def test_a_peer_is_tried_out_until_it_answers(sources: Sources, peer: Peer) -> None:
    peer.answers = [Status.TIMEOUT, Status.UNREACHABLE, Status.LOST, Status.MISS]
    fails(sources)
    assert sources.not_asked == 1 and not sources.peers.usable(NODE)
    assert peer.pool.shunned(SLOT) and not peer.pool.shunned(SLOT + 1)
    await until(lambda: not sources.not_asked)
    assert sources.peers.usable(NODE) and peer.asked == 4
    assert not peer.pool.shunned(SLOT)


async def test_the_probe_of_a_peer_that_is_hidden_ends(sources: Sources, peer: Peer) -> None:
    await ends(sources, peer, SimpleNamespace(alive=False, age_ms=5.0))


async def test_the_probe_of_a_peer_that_is_forgotten_ends(sources: Sources, peer: Peer) -> None:
    await ends(sources, peer, None)


async def ends(sources: Sources, peer: Peer, view: SimpleNamespace | None) -> None:
    fails(sources)
    await until(lambda: peer.asked > 2)
    peer.view = view
    await until(lambda: not sources.not_asked)
    assert sources.peers.usable(NODE), "when it is back, it is asked as any other"
    assert not peer.pool.shunned(SLOT), "and whoever has its place in the index by then is"


async def test_a_peer_that_goes_while_it_is_tried_out_leaves_its_place_to_others(sources: Sources, peer: Peer) -> None:
    fails(sources)
    await until(lambda: peer.asked > 0)
    sources.gone(NODE)
    assert sources.not_asked == 0 and not peer.pool.shunned(SLOT)


@pytest.mark.parametrize("view", [None, SimpleNamespace(alive=False, age_ms=5.0)], ids=["forgotten", "hidden"])
async def test_pulls_that_fail_after_their_peer_has_gone_begin_no_probe(
    sources: Sources, peer: Peer, view: SimpleNamespace | None
) -> None:
    peer.view = view
    sources.gone(NODE)
    fails(sources)
    sources.peers.silent(NODE)
    assert sources.not_asked == 0 and sources.peers.usable(NODE)


async def test_a_probe_that_breaks_is_logged_and_another_one_follows(
    sources: Sources, peer: Peer, caplog: pytest.LogCaptureFixture
) -> None:
    peer.answers = [RuntimeError("a bug"), RuntimeError("a bug"), Status.MISS]
    fails(sources)
    await until(lambda: sources.peers.usable(NODE))
    assert peer.asked == 3 and caplog.text.count("RuntimeError: a bug") == 2
