"""READs in the NIXL process's native code: every byte, in turns, and to Python with all that is not plain reading."""

from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv.transport import nixl_wire as wire
from p2pkv.transport.nixl_wire import NixlType, Read, ReadDone, ReadProgress, ReadStatus, Run
from tests.unit.native.nixl_socket import (
    ARENA,
    ID,
    NEVER_NS,
    OURS,
    PEER,
    THEIRS,
    UNTOUCHED,
    Bench,
    Fabric,
    body_of,
    frame,
    landed,
)
from tests.unit.native.serving import until

pytestmark = pytest.mark.deep

KIB, MIB = 1 << 10, 1 << 20
DONE = ReadDone(ReadStatus.OK, 0, b"", True, "")
pack = msgspec.msgpack.encode
replace = msgspec.structs.replace


def same(one: bytes | bytearray, two: bytes | bytearray) -> bool:
    """Megabytes that pytest should not explain the difference of."""
    return one == two


# ---- what is read


def lengths() -> st.SearchStrategy[int]:
    edges = st.sampled_from([1, 4095, 4096, 4097, 256 * KIB, 512 * KIB, 512 * KIB + 1, MIB - 1, MIB, MIB + 1, 3 * MIB])
    return st.one_of(st.integers(1, 9000), st.integers(1, MIB), edges)


@st.composite
def reads(draw: st.DrawFn) -> list[Run]:
    """Runs from anywhere to places that do not overlap, in any order, with gaps between them."""
    wanted = draw(st.lists(lengths(), min_size=1, max_size=20))
    while sum(wanted) > ARENA:
        wanted.pop()
    gap = (ARENA - sum(wanted)) // len(wanted)
    runs, at = [], 0
    for length in wanted:
        at += draw(st.integers(0, gap))
        runs.append(Run(draw(st.integers(0, ARENA - length)), at, length))
        at += length
    return draw(st.permutations(runs))


@settings(max_examples=120, deadline=None)
@given(reads(), st.sampled_from([1, 256 * KIB, 300_001, MIB, 4 * MIB, 0xFFFF_FFFF]))
def test_every_byte_of_every_run_arrives_and_progress_is_what_has_landed(runs: list[Run], piece_bytes: int) -> None:
    total = sum(run.length for run in runs)
    want = bytearray([UNTOUCHED]) * ARENA
    for remote, local, length in runs:
        want[local : local + length] = THEIRS[remote : remote + length]
    with Bench() as bench:
        bench.ask(body_of(runs, piece_bytes=piece_bytes))
        told = 0
        while told < total:
            assert bench.serve() == []
            [(read_id, message)] = bench.heard()
            assert read_id == ID and told < message.done_bytes <= total
            told = message.done_bytes
            assert landed(runs, told)
            assert told == sum(transfer.length for transfer in bench.fabric.posted)
        assert message == replace(DONE, done_bytes=total)
        assert same(OURS, want), "nothing else is written"
        fabric = bench.fabric
        assert fabric.released == list(fabric.made) and {t.peer for t in fabric.posted} == {PEER}
        assert all(t.length <= min(max(piece_bytes, 256 * KIB), 8 * MIB) for t in fabric.posted)
        assert (bench.lane.reads, bench.lane.bytes_read) == (1, total)


def test_a_large_run_is_told_in_parts_and_its_end_is_near_the_last_of_them() -> None:
    runs = [Run(5, 11, 3 * MIB + 13)]
    with Bench() as bench:
        bench.ask(body_of(runs, piece_bytes=8 * MIB))
        *progress, done = [message.done_bytes for _, message in bench.until_done()]
        parts = [end - begin for begin, end in zip([0, *progress], [*progress, done], strict=True)]
    assert len(progress) >= 3 and max(parts) <= MIB and parts[-1] <= 512 * KIB
    assert done == 3 * MIB + 13


def test_the_first_pieces_grow_as_the_last_ones_shrink() -> None:
    """Whoever works on a piece has the one before it to work on while it is read, and little left after the last."""
    assert ARENA >= 16 * 250 * KIB
    runs = [Run(0, i * 250 * KIB, 250 * KIB) for i in range(16)]
    with Bench() as bench:
        bench.ask(body_of(runs, piece_bytes=4 * MIB))
        *progress, done = [message.done_bytes for _, message in bench.until_done()]
        parts = [end - begin for begin, end in zip([0, *progress], [*progress, done], strict=True)]
    assert done == 16 * 250 * KIB and parts[0] <= MIB and parts[-1] <= 512 * KIB
    assert all(part <= max(MIB, before) for before, part in zip([0, *progress], parts, strict=True))


def test_the_most_runs_a_read_may_have_are_read_in_pieces_of_at_most_128() -> None:
    runs = [Run(ARENA - (i + 1) * 200, i * 150, 133) for i in range(wire.RUNS_MAX)]
    data = frame(NixlType.READ, body_of(runs))
    with Bench() as bench:
        for at in range(0, len(data), 32 * KIB):
            bench.far.sendall(data[at : at + 32 * KIB])
            assert bench.serve() == []
        bench.until_done()
        assert landed(runs, 133 * len(runs))
        assert max(len(transfer.local) for transfer in bench.fabric.posted) == 128


def test_a_read_that_comes_byte_by_byte_is_a_read() -> None:
    with Bench() as bench:
        for byte in frame(NixlType.READ, body_of([Run(1, 2, 3)])):
            assert bench.heard() == []
            bench.far.sendall(bytes([byte]))
            assert bench.serve() == []
        assert bench.heard() == [(ID, replace(DONE, done_bytes=3))]


def test_of_a_peer_added_again_the_later_memory_is_read() -> None:
    with Bench() as bench:
        bench.lane.add_peer(PEER, 4096, 10)
        bench.ask(body_of([Run(5, 0, 10)]))
        assert len(bench.serve()) == 1 and bench.fabric.strays == []
        bench.ask(body_of([Run(0, 0, 10)]))
        [(_, _, done, handle, _, error)] = bench.serve()
        assert (done, handle) == (0, None) and isinstance(error, MemoryError)
        [stray] = bench.fabric.strays
        assert stray.remote == [(4096, 10, 0)]


# ---- turns


def test_a_small_read_does_not_wait_for_a_large_one() -> None:
    with Bench() as bench:
        bench.ask(body_of([Run(0, 0, 3 * MIB)]), ID)
        bench.ask(body_of([Run(0, 3 * MIB, 100)]), ID + 1)
        heard = bench.until_done(2)
    assert heard[1] == (ID + 1, replace(DONE, done_bytes=100)), "after one piece of the other"
    assert len(heard) >= 5 and heard[-1] == (ID, replace(DONE, done_bytes=3 * MIB))


def test_reads_take_turns_piece_by_piece() -> None:
    with Bench() as bench:
        for i in range(3):
            bench.ask(body_of([Run(0, i * MIB, MIB)], piece_bytes=256 * KIB), ID + i)
        assert [read_id for read_id, _ in bench.until_done(3)] == [ID, ID + 1, ID + 2] * 4
        assert same(OURS[: 3 * MIB], THEIRS[:MIB] * 3)


def test_so_many_pieces_are_read_at_a_time_as_are_asked_for() -> None:
    with Bench() as bench:
        bench.ask(body_of([Run(0, 0, 3 * MIB)]))
        assert bench.serve(pieces=2) == [] and len(bench.fabric.posted) == 2
        assert bench.serve(pieces=1) == [] and len(bench.fabric.posted) == 3
        assert bench.serve(pieces=1000) == [] and bench.heard()[-1][1] == replace(DONE, done_bytes=3 * MIB)


def test_it_comes_back_when_the_other_socket_has_something() -> None:
    with Bench() as bench:
        assert bench.lane.serve(0.0, bench.other.fileno(), False, 9) == ([], False)
        assert bench.lane.serve(0.0, bench.other.fileno(), True, 9) == ([], True), "there is room in it"
        bench.other_far.sendall(b"x")
        started = time.monotonic()
        assert bench.lane.serve(60.0, bench.other.fileno(), False, 9) == ([], True)
        bench.ask(body_of([Run(0, 0, 3 * MIB)]))
        assert bench.lane.serve(60.0, bench.other.fileno(), False, 9) == ([], True)
        assert time.monotonic() - started < 30
        assert len(bench.fabric.posted) == 1, "and not at the end of the read"


def test_it_waits_as_long_as_it_may_and_not_while_there_is_something_to_read() -> None:
    with Bench() as bench:
        started = time.monotonic()
        assert bench.serve(0.05) == []
        assert time.monotonic() - started >= 0.05
        bench.ask(body_of([Run(0, 0, 3 * MIB)]))
        while not bench.lane.reads:
            assert bench.serve(60.0) == []
        assert time.monotonic() - started < 30


# ---- what is Python's


def whole(**changes: object) -> list[object]:
    """The fields of a lawful READ, some of them replaced."""
    fields = {"peer": PEER, "runs": wire.pack_runs([Run(0, 0, 10)]), "piece_bytes": MIB, "deadline_ns": NEVER_NS}
    return list((fields | changes).values())


LAWFUL = pack(whole())
NOT_HERE = {
    "an unknown peer": body_of([Run(0, 0, 10)], peer="c:1:1"),
    "another incarnation": body_of([Run(0, 0, 10)], peer="b:1:2"),
    "a name that begins as a known one": body_of([Run(0, 0, 10)], peer=PEER[:-1]),
    "no name": pack(whole(peer="")),
    "the owner's arena is too small": body_of([Run(ARENA - 9, 0, 10)]),
    "behind the owner's arena": body_of([Run(ARENA + 1, 0, 1)]),
    "our arena is too small": body_of([Run(0, ARENA - 9, 10)]),
    "behind our arena": body_of([Run(0, ARENA + 1, 1)]),
    "larger than both": body_of([Run(0, 0, ARENA + 1)]),
    "the owner's addresses overflow": body_of([Run((1 << 64) - 1, 0, 2)]),
    "our addresses overflow": body_of([Run(0, (1 << 64) - 1, 2)]),
    "the length overflows": body_of([Run(8, 8, (1 << 64) - 8)]),
    "only the last run is outside": body_of([Run(0, 0, 10), Run(0, 10, 10), Run(0, ARENA, 1)]),
    "a run of nothing": body_of([Run(0, 0, 0)]),
    "a run of nothing among others": body_of([Run(0, 0, 5), Run(5, 5, 0), Run(5, 5, 5)]),
    "no run": pack(whole(runs=b"")),
    "half a run": pack(whole(runs=bytes(23))),
    "a run and a half": pack(whole(runs=wire.pack_runs([Run(0, 0, 10)]) + bytes(12))),
    "one run too many": pack(whole(runs=wire.pack_runs([Run(0, 0, 10)]) * 16_385)),
    "nothing": b"",
    "no msgpack": b"\xc1" * 20,
    "a map": pack({"peer": PEER}),
    "a field too few": pack(whole()[:3]),
    "a field too many": pack([*whole(), 0]),
    "something behind it": LAWFUL + b"\x00",
    "bytes for the name": pack(whole(peer=PEER.encode())),
    "text for the runs": pack(whole(runs="x" * 24)),
    "a negative piece": pack(whole(piece_bytes=-1)),
    "a fraction for the deadline": pack(whole(deadline_ns=1.5)),
    "more runs claimed than there are": b"\x94\xa5b:1:1\xc6\xff\xff\xff\xff" + bytes(24),
}


@pytest.mark.parametrize("body", NOT_HERE)
def test_what_cannot_be_read_here_is_handed_over_as_it_came(body: str) -> None:
    with Bench() as bench:
        data = frame(NixlType.READ, NOT_HERE[body])
        handed_over = []
        for at in range(0, len(data), 32 * KIB):
            bench.far.sendall(data[at : at + 32 * KIB])
            handed_over += bench.serve()
        assert handed_over == [(ID, NOT_HERE[body], 0, None, 0, None)]
        nothing_was_done(bench)
        bench.ask(LAWFUL, ID + 1)
        assert bench.until_done() == [(ID + 1, replace(DONE, done_bytes=10))], "the next one is read"


def nothing_was_done(bench: Bench) -> None:
    fabric = bench.fabric
    assert (fabric.made, fabric.posted, fabric.strays, bench.heard()) == ({}, [], [], [])
    assert same(OURS, bytes([UNTOUCHED]) * ARENA)


@pytest.mark.parametrize("cut", range(0, len(LAWFUL), 3))
def test_a_read_that_is_cut_short_is_handed_over(cut: int) -> None:
    with Bench() as bench:
        bench.ask(LAWFUL[:cut])
        assert bench.serve() == [(ID, LAWFUL[:cut], 0, None, 0, None)]
        nothing_was_done(bench)


def test_a_read_that_wants_no_progress_is_handed_over() -> None:
    """piece_bytes 0: "do not report, and use the largest transfers" (nixl_wire.Read)."""
    with Bench() as bench:
        body = body_of([Run(0, 0, 3 * MIB)], piece_bytes=0)
        bench.ask(body)
        assert bench.serve() == [(ID, body, 0, None, 0, None)]
        nothing_was_done(bench)


def test_a_read_from_a_peer_that_was_removed_is_handed_over() -> None:
    with Bench() as bench:
        bench.lane.remove_peer(PEER)
        bench.lane.remove_peer("nobody")
        bench.ask(LAWFUL)
        assert bench.serve() == [(ID, LAWFUL, 0, None, 0, None)]
        nothing_was_done(bench)


def test_a_read_whose_peer_is_removed_meanwhile_is_handed_over_with_what_has_landed() -> None:
    body = body_of([Run(0, 0, 3 * MIB)])
    with Bench() as bench:
        bench.ask(body)
        assert bench.serve(pieces=2) == []
        bench.lane.remove_peer(PEER)
        assert bench.serve() == [(ID, body, 2 * MIB, None, 0, None)]
        assert len(bench.fabric.posted) == 2
        assert bench.serve() == [] and isinstance(bench.heard()[-1][1], ReadProgress)


def test_what_was_prepared_is_given_back_before_nixl_forgets_the_peer() -> None:
    with Bench() as bench:
        bench.ask(body_of([Run(0, 0, 3 * MIB)]))
        assert bench.serve(pieces=2) == []
        assert len(bench.fabric.made) > len(bench.fabric.posted) == 2, "requests are made ahead"
        assert bench.kept()
        bench.lane.remove_peer(PEER)
        assert bench.kept() == set()


@pytest.mark.parametrize("runs", [1, 2, 300])
def test_requests_are_made_ahead_and_all_given_back(runs: int) -> None:
    length = 3 * MIB // runs
    with Bench() as bench:
        bench.ask(body_of([Run(i * length, i * length, length) for i in range(runs)]))
        assert bench.until_done()[-1][1].status == 0
        assert bench.kept() == set() and len(bench.fabric.made) == len(bench.fabric.posted)
        assert len(bench.fabric.released) == len(set(bench.fabric.released))


def test_a_request_that_cannot_be_made_ahead_is_made_when_it_is_its_turn() -> None:
    with Bench() as bench:
        bench.fabric.fail_create[1] = ConnectionError("not now")
        bench.ask(body_of([Run(0, 0, 3 * MIB)]))
        assert bench.serve(pieces=1) == []
        del bench.fabric.fail_create[1]
        assert bench.until_done()[-1][1].status == 0
        assert bench.kept() == set()


def test_more_reads_at_a_time_than_a_thousand_are_handed_over() -> None:
    body = body_of([Run(0, 0, 3 * MIB)])
    with Bench() as bench:
        handed_over = []
        for begin in range(0, 1030, 206):
            bench.far.sendall(b"".join(frame(NixlType.READ, body, ID + i) for i in range(begin, begin + 206)))
            handed_over += bench.serve()
    assert handed_over == [(ID + i, body, 0, None, 0, None) for i in range(1024, 1030)]


@pytest.mark.parametrize("piece", [0, 1, 2])
def test_a_piece_that_still_flies_is_handed_over_with_its_handle(piece: int) -> None:
    body = body_of([Run(0, 0, 3 * MIB)])
    with Bench() as bench:
        bench.fabric.flies = {piece}
        bench.ask(body)
        [(read_id, asked, done, handle, flying, error)] = bench.serve(pieces=100)
        assert (read_id, asked, done, error) == (ID, body, sum(t.length for t in bench.fabric.posted[:piece]), None)
        assert handle is not None and bench.fabric.made[handle] is bench.fabric.posted[piece]
        assert flying == bench.fabric.posted[piece].length > 0
        check_given_up(bench, handle, done)


def check_given_up(bench: Bench, handle: int | None, done: int) -> None:
    """Native code has nothing more to do with the read, and has not told of more than has landed."""
    assert bench.kept(handle) == set()
    posted = len(bench.fabric.posted)
    assert handle not in bench.fabric.released
    assert bench.serve() == [] and len(bench.fabric.posted) == posted
    assert [message for _, message in bench.heard()][-1:] == ([ReadProgress(done)] if done else [])
    assert bench.lane.bytes_read == done
    bench.ask(LAWFUL, ID + 1)
    assert bench.until_done() == [(ID + 1, replace(DONE, done_bytes=10))]


@pytest.mark.parametrize("piece", [0, 1, 2])
@pytest.mark.parametrize("call", ["fail_descriptors", "fail_create", "fail_post"])
def test_an_exception_is_handed_over_with_what_has_landed(call: str, piece: int) -> None:
    body, error = body_of([Run(0, 0, 3 * MIB)]), ConnectionError("the peer is gone")
    with Bench() as bench:
        getattr(bench.fabric, call)[piece] = error
        bench.ask(body)
        [(read_id, asked, done, handle, flying, raised)] = bench.serve(pieces=100)
        assert (read_id, asked) == (ID, body) and raised is error
        assert done == sum(t.length for t in bench.fabric.posted[:piece])
        if call == "fail_post":
            assert handle is not None and flying == bench.fabric.made[handle].length > 0
        else:
            assert (handle, flying) == (None, 0)
        setattr(bench.fabric, call, {})
        check_given_up(bench, handle, done)


def test_a_deadline_that_has_passed_is_answered_without_reading() -> None:
    with Bench() as bench:
        bench.ask(body_of([Run(0, 0, 10)], deadline_ns=time.monotonic_ns()))
        assert bench.serve() == []
        assert bench.heard() == [(ID, ReadDone(ReadStatus.TIMEOUT, 0, b"", True, ""))]
        nothing_was_done(bench)


def test_a_deadline_that_passes_meanwhile_ends_the_read_with_what_has_landed() -> None:
    with Bench() as bench:
        deadline_ns = time.monotonic_ns() + 300_000_000
        bench.ask(body_of([Run(0, 0, 3 * MIB)], deadline_ns=deadline_ns))
        bench.fabric.on_post = lambda: until(lambda: time.monotonic_ns() > deadline_ns)
        heard = bench.until_done()
        assert heard == [(ID, ReadProgress(MIB)), (ID, ReadDone(ReadStatus.TIMEOUT, MIB, b"", True, ""))]
        assert len(bench.fabric.posted) == 1 and bench.kept() == set()


# ---- the socket


BREAKS = {
    "another type": frame(NixlType.CANCEL, b"\x90"),
    "an answer": frame(NixlType.READ_DONE, pack([0, 0, b"", True, ""])),
    "another version": frame(NixlType.READ, LAWFUL, version=2),
    "too long": frame(NixlType.READ, b"", length=wire.BODY_BYTES_MAX + 1),
    "4 GiB": frame(NixlType.READ, b"", length=0xFFFF_FFFF),
    "HTTP": b"GET / HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("nonsense", BREAKS)
def test_what_is_no_read_ends_it(nonsense: str) -> None:
    with Bench() as bench:
        bench.far.sendall(BREAKS[nonsense])
        with pytest.raises(RuntimeError, match="no READ"):
            bench.serve()
        assert bench.fabric.made == {}


@pytest.mark.parametrize("nonsense", BREAKS)
def test_what_is_no_read_ends_it_behind_a_read_too(nonsense: str) -> None:
    with Bench() as bench:
        bench.far.sendall(frame(NixlType.READ, LAWFUL) + BREAKS[nonsense])
        with pytest.raises(RuntimeError, match="no READ"):
            bench.serve()


def test_a_closed_socket_is_said_to_be_closed() -> None:
    with Bench() as bench:
        bench.far.close()
        with pytest.raises(RuntimeError, match=r"^closed$"):
            bench.serve(60.0)
    with Bench() as bench:
        bench.fabric.on_post = bench.far.close
        bench.ask(LAWFUL)
        with pytest.raises(RuntimeError, match=r"^closed$"):
            bench.serve()
        with pytest.raises(RuntimeError, match=r"^closed$"):
            bench.lane.send(b"x")


def test_the_bell_is_rung_for_all_that_is_sent() -> None:
    with Bench() as bench:
        bench.serve()
        assert bench.rung() == 0
        bench.ask(body_of([Run(0, 0, 3 * MIB)]))
        while not bench.lane.reads:
            assert bench.serve() == []
            assert bench.rung() > 0 and len(bench.heard()) == 1
        bench.lane.send(frame(NixlType.READ_PROGRESS, pack([5])))
        assert bench.rung() > 0 and bench.heard() == [(ID, ReadProgress(5))]


def test_what_does_not_fit_into_the_socket_comes_in_order_when_it_is_read() -> None:
    count = 20_000
    with Bench() as bench:
        for i in range(count):
            bench.lane.send(frame(NixlType.READ_PROGRESS, pack([i])))
        heard: list[int] = []
        rung = bench.rung()
        while len(heard) < count:
            assert rung > 0, "nobody would look"
            heard += [message.done_bytes for _, message in bench.heard()]
            assert bench.serve() == []
            rung = max(bench.rung(), len(heard) == count)
        assert heard == list(range(count))


def test_an_agent_that_reads_nothing_is_not_written_to_for_ever() -> None:
    with Bench() as bench:
        data = frame(NixlType.READ_PROGRESS, bytes(1 * MIB))
        with pytest.raises(RuntimeError, match="does not read"):
            for _ in range(16):
                bench.lane.send(data)


# ---- anything


def check_survives(bench: Bench, data: bytes) -> None:
    """It is read, handed over, or the socket's end; and no byte is touched that it must not touch."""
    fabric: Fabric = bench.fabric
    bench.far.sendall(data)
    try:
        for _ in range(8):
            for _, _, _, handle, flying, error in bench.serve(pieces=50):
                assert (handle, flying, error) == (None, 0, None)
            bench.heard()
    except RuntimeError as error:
        assert "no READ" in str(error)
    assert fabric.strays == [] and len(fabric.posted) == len(fabric.released)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_random_bytes_are_survived(data: bytes) -> None:
    with Bench() as bench:
        check_survives(bench, data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bodies_are_handed_over(body: bytes) -> None:
    with Bench() as bench:
        bench.ask(body)
        assert bench.serve() == [(ID, body, 0, None, 0, None)]
        nothing_was_done(bench)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_reads_are_survived(data: st.DataObject) -> None:
    number = st.integers(0, ARENA // 4)
    runs = st.lists(st.builds(Run, number, number, number), min_size=1, max_size=6)
    read = st.builds(Read, st.sampled_from([PEER, "c:1:1"]), runs.map(wire.pack_runs), number, st.just(NEVER_NS))
    sent = bytearray(b"".join(wire.CODEC.encode(r, ID) for r in data.draw(st.lists(read, min_size=1, max_size=4))))
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(sent) - 1), st.integers(0, 255)), max_size=4)):
        sent[at] = byte
    with Bench() as bench:
        check_survives(bench, bytes(sent))
