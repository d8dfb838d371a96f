"""Reads that native code began in the NIXL child and the engine has to go on with, as they stand."""

from __future__ import annotations

import pytest

from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_engine import SETTLE_S, Engine
from p2pkv.transport.nixl_fabric import FabricError, Table
from p2pkv.transport.nixl_reads import HandedOver
from p2pkv.transport.nixl_wire import ReadStatus, Run
from tests.unit.transport.test_nixl_engine import (
    ARENA,
    BASE,
    MIB,
    FakeFabric,
    Transfer,
    connect,
    only_done,
    read,
    said,
)

ID = wire.LANE_ID_MIN + 7
RUNS = [Run(0, 0, 2 * MIB), Run(8 * MIB, 4 * MIB, 3 * MIB)]


class Adopting(FakeFabric):
    """Knows one transfer that native code has posted, by its handle."""

    def __init__(self) -> None:
        super().__init__()
        self.native: dict[int, Transfer] = {}

    def posted(self, handle: int, local: Table, state: str = "flying") -> Transfer:
        transfer = self.native[handle] = Transfer("a:1:1", local, local)
        transfer.state = state
        return transfer

    def adopt(self, handle: int) -> object:
        transfer = self.native.pop(handle)
        self.transfers.append(transfer)
        return transfer


@pytest.fixture
def fabric() -> Adopting:
    return Adopting()


@pytest.fixture
def engine(fabric: Adopting) -> Engine:
    engine = Engine(fabric, BASE, ARENA, clock=lambda: 0.0)
    connect(engine, fabric, "a:1:1")
    return engine


def handed(done: int, handle: int | None = None, flying: int = 0, error: FabricError | None = None) -> HandedOver:
    return HandedOver(ID, read(RUNS), done, handle, flying, error)


def test_the_piece_that_flies_is_waited_for_and_only_the_rest_is_posted(engine: Engine, fabric: Adopting) -> None:
    flying = fabric.posted(1, [(BASE + MIB, MIB, 0)])
    engine.go_on(handed(MIB, 1, MIB), 1.0)
    engine.step(1.0)
    rest = [t for t in fabric.flying() if t is not flying]
    assert sum(t.length for t in rest) == 3 * MIB
    assert rest[0].local == [(BASE + 4 * MIB, 3 * MIB, 0)]
    fabric.land()
    engine.step(1.1)
    done = only_done(engine)
    assert (done.status, done.done_bytes, done.open) == (ReadStatus.OK, 5 * MIB, b"")
    assert not done.inline  # so that the agent asks the owner to serve from now on
    assert flying.state == "released"


def test_a_read_without_a_flying_piece_goes_on_behind_what_has_landed(engine: Engine, fabric: Adopting) -> None:
    engine.go_on(handed(3 * MIB), 1.0)
    engine.step(1.0)
    [transfer] = fabric.flying()
    assert transfer.local == [(BASE + 5 * MIB, 2 * MIB, 0)]
    fabric.land()
    engine.step(1.1)
    assert only_done(engine).done_bytes == 5 * MIB


def test_a_read_that_has_not_begun_is_checked_like_any_other(engine: Engine, fabric: Adopting) -> None:
    engine.go_on(HandedOver(ID, read([Run(ARENA, 0, 1)]), 0, None, 0, None), 1.0)
    assert only_done(engine).status is ReadStatus.INVALID
    engine.go_on(HandedOver(ID, read(RUNS, "nobody:1:1"), 0, None, 0, None), 1.0)
    assert only_done(engine).status is ReadStatus.NO_PEER
    assert not fabric.flying()


def test_what_had_landed_is_told_when_the_peer_has_gone_meanwhile(engine: Engine, fabric: Adopting) -> None:
    engine.remove_peer("a:1:1", 0.5)
    engine.go_on(handed(2 * MIB), 1.0)
    done = only_done(engine)
    assert (done.status, done.done_bytes, done.open) == (ReadStatus.NO_PEER, 2 * MIB, b"")


@pytest.mark.parametrize("disconnected", [False, True])
def test_a_piece_that_failed_is_held_until_it_has_settled(engine: Engine, fabric: Adopting, disconnected: bool) -> None:
    fabric.posted(1, [(BASE + 2 * MIB, MIB, 0)], "failed")
    engine.go_on(handed(2 * MIB, 1, MIB, FabricError("broken", disconnected=disconnected)), 1.0)
    done = only_done(engine)
    assert done.status is (ReadStatus.DISCONNECTED if disconnected else ReadStatus.ERROR)
    assert wire.unpack_extents(done.open) == [(4 * MIB, MIB)]
    engine.step(1.0 + SETTLE_S / 2)
    assert said(engine) == []
    engine.step(1.0 + SETTLE_S + 0.1)
    assert said(engine) == [(wire.QuarantineClear(), ID)]


def test_a_piece_that_could_not_be_made_leaves_nothing_open(engine: Engine, fabric: Adopting) -> None:
    engine.go_on(handed(2 * MIB, error=FabricError("no memory")), 1.0)
    done = only_done(engine)
    assert (done.status, done.done_bytes, done.open) == (ReadStatus.ERROR, 2 * MIB, b"")


def test_a_flying_piece_from_a_peer_that_is_not_known_ends_the_process(engine: Engine, fabric: Adopting) -> None:
    """Nothing else makes sure that it does not land in memory that is somebody else's by then."""
    fabric.posted(1, [(BASE, MIB, 0)])
    engine.remove_peer("a:1:1", 0.5)
    with pytest.raises(FabricError, match="not known"):
        engine.go_on(handed(0, 1, MIB), 1.0)


def test_native_code_hears_which_peers_are_inline(fabric: Adopting) -> None:
    heard: list[tuple[str, bool]] = []
    engine = Engine(fabric, BASE, ARENA, lambda: 0.0, lambda peer, inline: heard.append((peer.name, inline)))
    fabric.inline = True
    connect(engine, fabric, "a:1:1")
    assert heard == [("a:1:1", True)]
    engine.remove_peer("a:1:1", 1.0)
    assert heard[1:] == [("a:1:1", False)]
