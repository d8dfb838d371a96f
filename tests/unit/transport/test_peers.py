"""What a peer is expected to do, from what is known of it and what it says of itself."""

from __future__ import annotations

import pytest

from p2pkv.transport.peers import Peers
from p2pkv.transport.plan import Estimate, Source, plan
from p2pkv.types import Tier

MIB = 1 << 20
A, B = (Source(node, Tier.DRAM) for node in (1, 2))


class Scene:
    def __init__(self) -> None:
        self.load = {1: 0, 2: 0}
        self.setup = {1: 0.0, 2: 0.0}
        self.peers = Peers(
            lambda source: Estimate(0.001, 1e9),
            heard_at=lambda node: 0.0,
            clock=lambda: 0.0,
            load_bytes=self.load.__getitem__,
            setup_s=self.setup.__getitem__,
        )


def test_what_a_peer_gives_to_others_comes_first_and_what_it_gives_to_us_counts_once() -> None:
    scene = Scene()
    scene.load[1] = 100 * MIB
    assert scene.peers.estimate(A).busy_s == pytest.approx(100 * MIB / 1e9)
    scene.peers.began(A, 60 * MIB)
    assert scene.peers.estimate(A).busy_s == pytest.approx(100 * MIB / 1e9)
    scene.load[1] = 0  # what we asked for has not come into what it tells yet
    assert scene.peers.estimate(A).busy_s == pytest.approx(60 * MIB / 1e9)


@pytest.mark.parametrize("salt", range(8))
def test_of_two_equal_holders_the_one_that_others_do_not_ask_is_asked(salt: int) -> None:
    scene = Scene()
    scene.load[1] = 100 * MIB
    found = plan([[A, B]] * 4, scene.peers.estimate, block_bytes=MIB, deadline_s=9.0, salt=salt)
    assert {run.source for run in found.runs} == {B}
    scene.load[1], scene.setup[2] = 0, 0.05
    found = plan([[A, B]] * 4, scene.peers.estimate, block_bytes=MIB, deadline_s=9.0, salt=salt)
    assert {run.source for run in found.runs} == {A}, "nor one that must be connected to first"
