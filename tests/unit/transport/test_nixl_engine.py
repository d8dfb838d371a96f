"""The NIXL child's decisions without NIXL: the fabric does what the test says, and the test owns the clock."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.transport import nixl_engine
from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_engine import PROBE_BYTES, PROBES_MAX, READS_INLINE, READS_MAX, SETTLE_S, Engine
from p2pkv.transport.nixl_fabric import FabricError, Table
from p2pkv.transport.nixl_reads import PIECE_BYTES_MAX, PIECE_RUNS_MAX, WINDOW_BYTES, Peer, ReadOp
from p2pkv.transport.nixl_wire import ReadStatus, Run

MIB = 1 << 20
BASE = 1 << 40
ARENA = 256 * MIB
NEVER = 1 << 62


class Transfer:
    """What the fabric was asked to move, and what the test lets it answer."""

    def __init__(self, peer: str, local: Table, remote: Table) -> None:
        self.peer, self.local, self.remote = peer, local, remote
        self.state = "new"  # -> "flying" -> "landed" | "failed"; "released" at the end

    @property
    def length(self) -> int:
        return sum(length for _, length, _ in self.local)


class FakeFabric:
    """Transfers fly until the test lands or fails them; ``inline`` ones land inside the post."""

    def __init__(self) -> None:
        self.transfers: list[Transfer] = []
        self.connected: list[str] = []
        self.inline = False
        self.fail_connect = ""
        self.fail_post: FabricError | None = None

    def connect(self, metadata: bytes) -> str:
        if self.fail_connect:
            raise FabricError(self.fail_connect)
        self.connected.append(metadata.decode())
        return metadata.decode()

    def disconnect(self, name: str) -> None:
        assert not self.flying(name), "disconnected with transfers in flight"
        self.connected.remove(name)

    def create(self, peer: str, local: Table, remote: Table) -> object:
        assert peer in self.connected
        assert [row[1] for row in local] == [row[1] for row in remote]
        transfer = Transfer(peer, local, remote)
        self.transfers.append(transfer)
        return transfer

    def probe(self, peer: str, remote_address: int, length: int) -> object:
        return self.create(peer, [(0, length, 0)], [(remote_address, length, 0)])

    def post(self, transfer: object) -> bool:
        assert isinstance(transfer, Transfer)
        assert transfer.state == "new"
        transfer.state = "flying"
        if self.fail_post:
            transfer.state = "failed"
            raise self.fail_post
        if self.inline:
            transfer.state = "landed"
        return self.inline

    def ended(self, transfer: object) -> bool:
        assert isinstance(transfer, Transfer)
        assert transfer.state != "released", "asked about a freed handle"
        if transfer.state == "failed":
            raise FabricError("broken", disconnected=True)
        return transfer.state == "landed"

    def release(self, transfer: object) -> None:
        assert isinstance(transfer, Transfer)
        assert transfer.state in ("landed", "failed"), "released while it may still write"
        transfer.state = "released"

    def progress(self) -> None: ...

    def flying(self, peer: str = "") -> list[Transfer]:
        return [t for t in self.transfers if t.state == "flying" and t.peer.startswith(peer)]

    def land(self) -> None:
        for transfer in self.flying():
            transfer.state = "landed"


def endpoint(name: str, **changes: object) -> wire.AddPeer:
    request = wire.AddPeer(name, name.encode(), 1 << 41, ARENA, NEVER)
    return msgspec.structs.replace(request, **changes)


def said(engine: Engine) -> list[tuple[msgspec.Struct, int]]:
    heard = list(engine.out)
    engine.out.clear()
    return heard


def only_done(engine: Engine) -> wire.ReadDone:
    ((message, _),) = said(engine)
    assert isinstance(message, wire.ReadDone)
    return message


def read(runs: list[Run], peer: str = "a:1:1", *, piece_bytes: int = 0, deadline: float = 100.0) -> wire.Read:
    return wire.Read(peer, wire.pack_runs(runs), piece_bytes, int(deadline * 1e9))


@pytest.fixture
def fabric() -> FakeFabric:
    return FakeFabric()


@pytest.fixture
def engine(fabric: FakeFabric) -> Iterator[Engine]:
    """Connected to "a:1:1"."""
    engine = Engine(fabric, BASE, ARENA, clock=lambda: 0.0)
    connect(engine, fabric, "a:1:1")
    yield engine


def connect(engine: Engine, fabric: FakeFabric, name: str) -> None:
    engine.add_peer(1, endpoint(name), 0.0)
    for _ in range(PROBES_MAX):
        fabric.land()
        engine.step(0.0)
    ((answer, _),) = said(engine)
    assert isinstance(answer, wire.PeerAdded)
    assert answer.error == ""


def test_a_read_is_ok_only_when_every_piece_has_landed(engine: Engine, fabric: FakeFabric) -> None:
    engine.read(5, read([Run(0, 0, 3 * PIECE_BYTES_MAX // 2)]), 0.0)
    engine.step(0.0)
    engine.step(0.0)
    first, second = fabric.flying()
    second.state = "landed"
    engine.step(0.0)
    assert said(engine) == []
    first.state = "landed"
    engine.step(0.0)
    assert said(engine) == [(wire.ReadDone(ReadStatus.OK, 3 * PIECE_BYTES_MAX // 2, b"", False, ""), 5)]


def test_progress_is_a_prefix_and_only_told_who_asked(engine: Engine, fabric: FakeFabric) -> None:
    engine.read(5, read([Run(0, 0, 6 * MIB)], piece_bytes=2 * MIB), 0.0)
    engine.read(6, read([Run(0, 32 * MIB, 6 * MIB)]), 0.0)
    for _ in range(4):
        engine.step(0.0)
    pieces = [t for t in fabric.flying() if t.local[0][0] < BASE + 32 * MIB]
    assert len(pieces) == 3
    pieces[1].state = "landed"
    engine.step(0.0)
    assert said(engine) == []
    pieces[0].state = "landed"
    engine.step(0.0)
    assert said(engine) == [(wire.ReadProgress(4 * MIB), 5)]


@given(
    st.lists(st.integers(1, 20 * MIB) | st.integers(1, 70_000), min_size=1, max_size=300),
    st.integers(0, 10 * MIB),
)
def test_pieces_cover_every_run_once_in_order_and_keep_their_bounds(lengths: list[int], piece_bytes: int) -> None:
    peer = Peer(endpoint("a:1:1"), 0.0)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    op = ReadOp(1, peer, ([s + 7 for s in starts], [s + 11 for s in starts], lengths), BASE, piece_bytes, 1.0)
    local: list[tuple[int, int]] = []
    remote: list[tuple[int, int]] = []
    while op.postable:
        here, there, size = op.take()
        assert 0 < len(here) <= PIECE_RUNS_MAX
        assert size == sum(row[1] for row in here) <= op.piece_bytes
        local += [(address, length) for address, length, _ in here]
        remote += [(address, length) for address, length, _ in there]
    assert merged(local) == merged([(BASE + s + 11, n) for s, n in zip(starts, lengths, strict=True)])
    assert merged(remote) == merged([(peer.base + s + 7, n) for s, n in zip(starts, lengths, strict=True)])


def merged(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for address, length in extents:
        if result and sum(result[-1]) == address:
            result[-1] = (result[-1][0], result[-1][1] + length)
        else:
            result.append((address, length))
    return result


def test_what_flies_of_one_read_is_bounded(engine: Engine, fabric: FakeFabric) -> None:
    engine.read(5, read([Run(0, 0, 200 * MIB)]), 0.0)
    for _ in range(100):
        engine.step(0.0)
    assert sum(t.length for t in fabric.flying()) <= WINDOW_BYTES
    assert engine.wait_s(0.0, 9.0) < 9.0


def test_a_read_is_answered_at_its_deadline_and_what_flies_is_kept(engine: Engine, fabric: FakeFabric) -> None:
    engine.read(5, read([Run(0, 64, 20 * MIB)], piece_bytes=4 * MIB, deadline=1.0), 0.0)
    for _ in range(10):
        engine.step(0.0)
    fabric.flying()[0].state = "landed"
    engine.step(0.5)
    assert said(engine) == [(wire.ReadProgress(4 * MIB), 5)]
    engine.step(1.0)
    done = only_done(engine)
    assert (done.status, done.done_bytes) == (ReadStatus.TIMEOUT, 4 * MIB)
    expected = [(t.local[0][0] - BASE, t.length) for t in fabric.flying()]
    assert wire.unpack_extents(done.open) == expected
    assert len(expected) == 4  # the last post was before the deadline, the tail of the window
    engine.step(50.0)
    assert said(engine) == []
    assert engine.stats().quarantined_bytes == 16 * MIB
    fabric.land()
    engine.step(51.0)
    assert said(engine) == [(wire.QuarantineClear(), 5)]
    assert engine.stats().quarantined_bytes == 0


def test_a_read_that_is_late_behind_others_is_still_answered_in_time(fabric: FakeFabric) -> None:
    now = 0.0

    def slow() -> float:
        nonlocal now
        now += 0.005
        return now

    engine = Engine(fabric, BASE, ARENA, clock=lambda: 0.0)
    connect(engine, fabric, "a:1:1")
    engine._clock = slow  # every drive seems to take 5 ms: only one read is served per turn
    for read_id in range(10):
        engine.read(read_id, read([Run(0, 0, MIB)], deadline=1.0), 0.0)
    engine.step(1.5)
    assert [m.status for m, _ in said(engine) if isinstance(m, wire.ReadDone)] == [ReadStatus.TIMEOUT] * 10


def test_a_failed_transfer_stays_in_quarantine_until_it_has_settled(engine: Engine, fabric: FakeFabric) -> None:
    engine.read(5, read([Run(0, 0, MIB)]), 0.0)
    engine.step(0.0)
    fabric.flying()[0].state = "failed"
    engine.step(1.0)
    done = only_done(engine)
    assert done.status is ReadStatus.DISCONNECTED
    assert wire.unpack_extents(done.open) == [(0, MIB)]
    engine.step(1.0 + SETTLE_S / 2)
    assert said(engine) == []
    engine.step(1.0 + SETTLE_S + 0.1)
    assert said(engine) == [(wire.QuarantineClear(), 5)]


def test_when_one_transfer_fails_those_beside_it_are_kept_until_they_end(engine: Engine, fabric: FakeFabric) -> None:
    engine.read(5, read([Run(0, 0, 8 * MIB)], piece_bytes=4 * MIB), 0.0)
    engine.step(0.0)
    engine.step(0.0)
    failed, flying = fabric.flying()
    failed.state = "failed"
    engine.step(1.0)
    assert wire.unpack_extents(only_done(engine).open) == [(0, 4 * MIB), (4 * MIB, 4 * MIB)]
    engine.step(100.0)
    assert said(engine) == []
    flying.state = "landed"
    engine.step(101.0)
    assert said(engine) == [(wire.QuarantineClear(), 5)]


def test_a_post_that_fails_has_its_bytes_quarantined_too(engine: Engine, fabric: FakeFabric) -> None:
    fabric.fail_post = FabricError("no", disconnected=False)
    engine.read(5, read([Run(0, 0, MIB)]), 0.0)
    engine.step(0.0)
    done = only_done(engine)
    assert (done.status, wire.unpack_extents(done.open)) == (ReadStatus.ERROR, [(0, MIB)])


def test_a_peer_that_is_gone_is_not_asked_again_and_can_be_connected_anew(engine: Engine, fabric: FakeFabric) -> None:
    engine.read(5, read([Run(0, 0, MIB)]), 0.0)
    engine.step(0.0)
    fabric.flying()[0].state = "failed"
    engine.step(0.0)
    said(engine)
    engine.read(6, read([Run(0, 0, MIB)]), 0.0)
    assert only_done(engine).status is ReadStatus.NO_PEER
    engine.add_peer(7, endpoint("a:1:1"), 0.0)
    ((answer, _),) = said(engine)
    assert isinstance(answer, wire.PeerAdded)
    assert "in flight" in answer.error
    engine.step(SETTLE_S + 1)
    engine.step(SETTLE_S + 2)
    said(engine)
    assert fabric.connected == []
    connect(engine, fabric, "a:1:1")


def test_a_new_incarnation_replaces_the_old_and_waits_for_what_flies(engine: Engine, fabric: FakeFabric) -> None:
    engine.read(5, read([Run(0, 0, MIB)]), 0.0)
    engine.step(0.0)
    engine.add_peer(6, endpoint("a:1:2"), 0.0)
    assert only_done(engine).status is ReadStatus.NO_PEER
    engine.step(1.0)
    assert fabric.connected == ["a:1:1", "a:1:2"]  # the fake asserts that nothing flies at disconnect
    fabric.land()
    engine.step(2.0)
    engine.step(3.0)
    assert fabric.connected == ["a:1:2"]


def test_other_nodes_are_no_incarnations(engine: Engine, fabric: FakeFabric) -> None:
    connect(engine, fabric, "aa:1:1")
    assert fabric.connected == ["a:1:1", "aa:1:1"]


def test_adding_a_peer_answers_when_reads_are_possible_or_at_the_deadline(fabric: FakeFabric) -> None:
    engine = Engine(fabric, BASE, ARENA, clock=lambda: 0.0)
    engine.add_peer(1, endpoint("a:1:1", deadline_ns=10**9), 0.0)
    engine.add_peer(2, endpoint("a:1:1"), 0.0)
    engine.step(0.5)
    assert said(engine) == []
    engine.step(1.0)
    ((late, request_id),) = said(engine)
    assert isinstance(late, wire.PeerAdded)
    assert (request_id, "SERVE" in late.error) == (1, True)
    for _ in range(PROBES_MAX):
        fabric.land()
        engine.step(2.0)
    ((answer, request_id),) = said(engine)
    assert (request_id, answer) == (2, wire.PeerAdded("a:1:1", "", False, 2_000_000))
    assert fabric.connected == ["a:1:1"]


def test_inline_fabrics_are_recognised(fabric: FakeFabric) -> None:
    engine = Engine(fabric, BASE, ARENA, clock=lambda: 0.0)
    engine.add_peer(1, endpoint("a:1:1"), 0.0)
    fabric.land()
    engine.step(0.0)
    fabric.inline = True  # the handshake's probes flew, as they do
    fabric.land()
    for _ in range(PROBES_MAX):
        engine.step(0.0)
    ((answer, _),) = said(engine)
    assert isinstance(answer, wire.PeerAdded)
    assert answer.inline
    engine.read(2, read([Run(0, 0, MIB)]), 0.0)
    engine.step(0.0)
    assert only_done(engine) == wire.ReadDone(ReadStatus.OK, MIB, b"", True, "")


def test_a_quick_answer_now_and_then_does_not_make_a_fabric_inline(fabric: FakeFabric) -> None:
    engine = Engine(fabric, BASE, ARENA, clock=lambda: 0.0)
    engine.add_peer(1, endpoint("a:1:1"), 0.0)
    for turn in range(PROBES_MAX):
        fabric.inline = turn % 3 != 2
        fabric.land()
        engine.step(0.0)
    ((answer, _),) = said(engine)
    assert isinstance(answer, wire.PeerAdded)
    assert not answer.inline


def one_read(engine: Engine, fabric: FakeFabric, length: int = MIB) -> bool:
    """Whether the next one counts as inline."""
    engine.read(9, read([Run(0, 0, length)]), 0.0)
    engine.step(0.0)
    fabric.land()
    engine.step(0.0)
    return only_done(engine).inline


def test_a_peer_whose_probes_all_came_too_early_is_inline_once_enough_reads_in_a_row_were(fabric: FakeFabric) -> None:
    heard: list[bool] = []
    engine = Engine(fabric, BASE, ARENA, lambda: 0.0, lambda peer, inline: heard.append(inline))
    connect(engine, fabric, "a:1:1")
    fabric.inline = True
    assert [one_read(engine, fabric) for _ in range(READS_INLINE - 1)] == [False] * (READS_INLINE - 1)
    fabric.inline = False
    assert not one_read(engine, fabric)
    fabric.inline = True
    assert not any(one_read(engine, fabric, PROBE_BYTES - 1) for _ in range(READS_INLINE + 1)), "too short to say much"
    assert [one_read(engine, fabric) for _ in range(READS_INLINE)] == [False] * (READS_INLINE - 1) + [True]
    assert heard == [True]
    fabric.inline = False
    assert not one_read(engine, fabric)
    assert heard == [True, False]


@pytest.mark.parametrize(
    "lie",
    [
        {"metadata": b"b:1:1"},
        {"base": (1 << 64) - 1},
        {"arena_bytes": 0},
    ],
    ids=["another's metadata", "beyond the address space", "no memory"],
)
def test_a_peers_lies_cost_others_nothing(engine: Engine, fabric: FakeFabric, lie: dict[str, object]) -> None:
    connect(engine, fabric, "b:1:1")
    engine.add_peer(9, endpoint("c:1:1", **lie), 0.0)
    ((answer, _),) = said(engine)
    assert isinstance(answer, wire.PeerAdded)
    assert answer.error
    assert fabric.connected.count("a:1:1") == 1
    assert "b:1:1" in fabric.connected


def test_a_connection_that_breaks_in_its_handshake_is_forgotten(fabric: FakeFabric) -> None:
    engine = Engine(fabric, BASE, ARENA, clock=lambda: 0.0)
    engine.add_peer(1, endpoint("a:1:1"), 0.0)
    fabric.flying()[0].state = "failed"
    engine.step(0.0)
    ((answer, _),) = said(engine)
    assert isinstance(answer, wire.PeerAdded)
    assert "broken" in answer.error
    assert fabric.connected == []


def test_a_peer_removed_in_its_handshake_is_disconnected_when_the_probe_has_ended(fabric: FakeFabric) -> None:
    engine = Engine(fabric, BASE, ARENA, clock=lambda: 0.0)
    engine.add_peer(1, endpoint("a:1:1"), 0.0)
    engine.remove_peer("a:1:1", 0.0)
    said(engine)
    engine.step(1.0)
    assert fabric.connected == ["a:1:1"]
    fabric.land()
    engine.step(2.0)
    assert fabric.connected == []
    assert said(engine) == []


@pytest.mark.parametrize(
    "run",
    [
        Run(0, 0, 0),
        Run(ARENA, 0, 1),
        Run(0, ARENA, 1),
        Run(ARENA - 1, 0, 2),
        Run(0, ARENA - 1, 2),
        Run((1 << 64) - 1, 0, 2),
        Run(0, (1 << 64) - 1, 2),
        Run(1, 1, (1 << 64) - 1),
    ],
    ids=str,
)
def test_a_run_that_leaves_an_arena_is_refused_whole(engine: Engine, fabric: FakeFabric, run: Run) -> None:
    before = len(fabric.transfers)
    engine.read(5, read([Run(0, 0, 1), run]), 0.0)
    engine.step(0.0)
    assert only_done(engine).status is ReadStatus.INVALID
    assert len(fabric.transfers) == before


def test_tables_are_bounded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_engine, "PEERS_MAX", 10)
    for read_id in range(READS_MAX + 1):
        engine.read(read_id, read([Run(0, 0, 1)]), 0.0)
    ((message, read_id),) = said(engine)
    assert (read_id, message.status) == (READS_MAX, ReadStatus.BUSY)  # type: ignore[attr-defined]
    for node in range(10):  # beside the one that is there
        engine.add_peer(node, endpoint(f"{node + 100}:1:1"), 0.0)
    assert said(engine) == [(wire.PeerAdded("109:1:1", "too many peers", False, 0), 9)]


def test_a_cancelled_read_is_answered_and_an_unknown_one_is_not(engine: Engine, fabric: FakeFabric) -> None:
    engine.read(5, read([Run(0, 0, MIB)]), 0.0)
    engine.step(0.0)
    engine.cancel(4, 0.0)
    engine.cancel(5, 0.0)
    done = only_done(engine)
    assert (done.status, wire.unpack_extents(done.open)) == (ReadStatus.CANCELLED, [(0, MIB)])


def test_it_sleeps_unless_something_flies_or_a_peer_reads(engine: Engine, fabric: FakeFabric) -> None:
    assert engine.wait_s(10.0, 0.1) == 0.1
    engine.serve(20.0, 10.0)
    assert engine.wait_s(10.0001, 0.1) == 0.0
    assert 0 < engine.wait_s(15.0, 0.1) <= 0.001
    assert engine.wait_s(20.0, 0.1) == 0.1
    engine.read(5, read([Run(0, 0, MIB)], deadline=100.0), 30.0)
    assert engine.wait_s(30.0, 0.1) == 0.0
    engine.step(30.0)
    assert 0 < engine.wait_s(35.0, 0.1) <= 0.001  # a stalled read is watched, not spun on
    engine.cancel(5, 35.0)
    assert 0.001 < engine.wait_s(36.0, 0.1) < 0.1  # quarantine: at a low rate
