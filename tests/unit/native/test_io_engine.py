"""The native I/O thread over socket pairs: what a peer may send, what it may not, and when a transfer is given up."""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import xxhash

from p2pkv import _native
from p2pkv.transport.movers import Code
from p2pkv.types import Status
from p2pkv.wire.frame import HEADER
from p2pkv.wire.peer import CODEC, GOT_RECORD, PeerError, PeerType

REQUEST = b"please"
LENGTH = 70_000
NEVER = 1 << 40


class End(NamedTuple):
    """What was heard of one transfer."""

    code: Code
    statuses: dict[int, int]
    digests: dict[int, bytes]
    moved: int
    detail: bytes
    events: int
    waited_s: float


class Bench:
    """An engine, and both ends of a connection: ``near`` is the engine's, ``far`` plays the peer."""

    def __init__(self, transfers_max: int = 16) -> None:
        self.engine = _native.IoEngine(transfers_max)
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.far.settimeout(10)
        self.memory = bytearray(b"\xee" * (4 << 20))
        self.base = _native.address_of(self.memory)

    def close(self) -> None:
        self.engine.stop()
        self.near.close()
        self.far.close()

    def receive(
        self,
        lengths: list[int],
        *,
        deadline_s: float = 10,
        first_byte_s: float = 10,
        stall_s: float = 10,
        partial: int = NEVER,
    ) -> None:
        blocks, at = [], self.base
        for length in lengths:
            blocks.append((at, length))
            at += length
        assert self.begin(self.near.fileno(), blocks, 1, deadline_s, first_byte_s, stall_s, partial)

    def begin(
        self,
        fd: int,
        blocks: list[tuple[int, int]],
        job: int = 1,
        deadline_s: float = 60,
        first_byte_s: float = 60,
        stall_s: float = 60,
        partial: int = NEVER,
    ) -> bool:
        return self.engine.receive(job, fd, REQUEST, blocks, deadline_s, first_byte_s, stall_s, partial)

    def send_file(
        self,
        header: bytes,
        file: int,
        runs: list[tuple[int, int]],
        deadline_s: float = 10,
        stall_s: float = 10,
        mapping: int = 0,
    ) -> bool:
        return self.engine.send(1, self.near.fileno(), header, file, mapping, runs, deadline_s, stall_s)

    def asked(self) -> None:
        got = b""
        while len(got) < len(REQUEST):
            got += self.far.recv(len(REQUEST) - len(got))
        assert got == REQUEST

    def end(self, job: int = 1, deadline_s: float = 10.0) -> End:
        statuses: dict[int, int] = {}
        digests: dict[int, bytes] = {}
        events = 0
        deadline = time.monotonic() + deadline_s
        while True:
            left = deadline - time.monotonic()
            assert left > 0, "the transfer does not end"
            select.select([self.engine.fd], [], [], left)
            for number, final, code, first, some, checksums, moved, waited_s, detail in self.engine.drain():
                assert number == job
                events += 1
                for i, status in enumerate(some):
                    assert first + i not in statuses, "reported twice"
                    statuses[first + i] = status
                    digests[first + i] = checksums[16 * i : 16 * i + 16]
                if final:
                    return End(Code(code), statuses, digests, moved, detail, events, waited_s)

    def send(self, data: bytes) -> None:
        self.far.sendall(data)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.close()


def got(*blocks: bytes | None, version: int = 1, kind: int = PeerType.GOT, lengths: list[int] | None = None) -> bytes:
    """GOT's header and records. ``lengths`` lies about them."""
    records = b""
    for i, content in enumerate(blocks):
        if content is None:
            records += GOT_RECORD.pack(Status.MISS, 0, 0, bytes(16))
        else:
            length = len(content) if lengths is None else lengths[i]
            records += GOT_RECORD.pack(Status.OK, length, 1, xxhash.xxh3_128_digest(content))
    return HEADER.pack(len(records), version, kind, 0, 0) + records


def contents(count: int, length: int = LENGTH) -> list[bytes]:
    return [os.urandom(length) for _ in range(count)]


def test_blocks_arrive_where_they_belong_with_their_checksums(bench: Bench) -> None:
    blocks = contents(5)
    bench.receive([LENGTH] * 5)
    bench.asked()
    bench.send(got(*blocks) + b"".join(blocks))
    end = bench.end()
    assert end.code is Code.OK and end.moved == 5 * LENGTH
    assert end.statuses == dict.fromkeys(range(5), Status.OK)
    assert end.digests == {i: xxhash.xxh3_128_digest(block) for i, block in enumerate(blocks)}
    assert bench.memory[: 5 * LENGTH] == b"".join(blocks)
    assert bench.memory[5 * LENGTH :] == b"\xee" * (len(bench.memory) - 5 * LENGTH)
    assert bench.engine.active == 0


def test_an_answer_byte_by_byte_is_an_answer(bench: Bench) -> None:
    blocks = contents(2, 100)
    bench.receive([100] * 2)
    bench.asked()
    for byte in got(*blocks) + b"".join(blocks):
        bench.send(bytes([byte]))
    assert bench.end().statuses == {0: Status.OK, 1: Status.OK}


def test_misses_have_no_payload(bench: Bench) -> None:
    blocks = contents(2)
    bench.receive([LENGTH] * 5)
    bench.asked()
    bench.send(got(None, blocks[0], None, blocks[1], None) + b"".join(blocks))
    end = bench.end()
    assert [end.statuses[i] for i in range(5)] == [1, 0, 1, 0, 1]
    assert bench.memory[LENGTH : 2 * LENGTH] == blocks[0]
    assert bench.memory[:LENGTH] == b"\xee" * LENGTH


def test_finished_blocks_are_told_while_the_rest_is_on_its_way(bench: Bench) -> None:
    blocks = contents(4)
    bench.receive([LENGTH] * 4, partial=LENGTH)
    bench.asked()
    bench.send(got(*blocks) + blocks[0] + blocks[1])
    assert select.select([bench.engine.fd], [], [], 10)[0]
    bench.send(blocks[2] + blocks[3])
    end = bench.end()
    assert end.events > 1 and end.statuses == dict.fromkeys(range(4), Status.OK)


def test_a_wrong_byte_rejects_its_block_alone(bench: Bench) -> None:
    blocks = contents(3)
    payload = bytearray(b"".join(blocks))
    payload[LENGTH + 5] ^= 1
    bench.receive([LENGTH] * 3)
    bench.asked()
    bench.send(got(*blocks) + payload)
    assert bench.end().statuses == {0: Status.OK, 1: Status.REJECTED, 2: Status.OK}


@pytest.mark.parametrize(
    "answer",
    [
        got(b"x" * 100, version=2),
        got(b"x" * 100, kind=PeerType.LETTER),
        got(b"x" * 100, b"y" * 100),
        got(),
        got(b"x" * 100, lengths=[99]),
        got(b"x" * 100, lengths=[101]),
        got(b"x" * 100, lengths=[0]),
        got(b"x" * 100, lengths=[0xFFFF_FFFF]),
        HEADER.pack(0xFFFF_FFFF, 1, PeerType.GOT, 0, 0),
        HEADER.pack(1 << 20, 1, PeerType.ERROR, 0, 0),
        HEADER.pack(32, 1, PeerType.GOT, 0, 0) + GOT_RECORD.pack(Status.MISS, 100, 0, bytes(16)),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
    ids=["version", "type", "too many", "none", "short", "long", "zero", "huge", "oversized", "oversized error",
         "miss with a length", "http"],
)  # fmt: skip
def test_an_answer_that_is_none_ends_the_transfer_and_writes_nothing(bench: Bench, answer: bytes) -> None:
    bench.receive([100])
    bench.asked()
    bench.send(answer + b"z" * 4096)
    end = bench.end()
    assert end.code is Code.PROTOCOL and end.detail and end.statuses == {}
    assert bench.memory == b"\xee" * len(bench.memory)


def test_a_status_that_nobody_knows_is_passed_on_as_it_is_and_is_not_ok(bench: Bench) -> None:
    bench.receive([100, 100])
    bench.asked()
    records = GOT_RECORD.pack(200, 0, 0, bytes(16)) + GOT_RECORD.pack(Status.BUSY, 0, 0, bytes(16))
    bench.send(HEADER.pack(64, 1, PeerType.GOT, 0, 0) + records)
    assert bench.end().statuses == {0: 200, 1: Status.BUSY}


def test_a_refusal_is_handed_on(bench: Bench) -> None:
    bench.receive([100])
    bench.asked()
    bench.send(CODEC.encode(PeerError("busy", "later")))
    end = bench.end()
    assert end.code is Code.REFUSED
    assert b"later" in end.detail


def test_a_refusal_longer_than_the_answer_would_be_is_handed_on(bench: Bench) -> None:
    bench.receive([100])
    bench.asked()
    bench.send(CODEC.encode(PeerError("busy", "later" * 50)))
    end = bench.end()
    assert end.code is Code.REFUSED
    assert b"later" * 50 in end.detail


def test_nothing_may_follow_a_refusal(bench: Bench) -> None:
    bench.receive([100] * 8)
    bench.asked()
    bench.send(CODEC.encode(PeerError("busy", "later")) + b"z" * 4096)
    assert bench.end().code is Code.PROTOCOL
    assert bench.memory == b"\xee" * len(bench.memory)


@pytest.mark.parametrize("cut", [0, 5, 12, 40, 75, 76, 100, 76 + LENGTH, 80 + LENGTH])
def test_an_answer_that_ends_early_is_closed_and_whole_blocks_count(bench: Bench, cut: int) -> None:
    blocks = contents(2)
    bench.receive([LENGTH] * 2)
    bench.asked()
    bench.send((got(*blocks) + b"".join(blocks))[:cut])
    bench.far.close()
    end = bench.end()
    assert end.code is Code.CLOSED
    assert end.statuses == ({0: Status.OK} if cut >= 76 + LENGTH else {})


def test_a_connection_that_is_dead_already_is_closed(bench: Bench) -> None:
    bench.far.close()
    bench.receive([100])
    assert bench.end().code is Code.CLOSED


@pytest.mark.parametrize(("deadline_s", "patience_s", "code"), [(0.1, 10, Code.TIMEOUT), (10, 0.1, Code.STALLED)])
@pytest.mark.parametrize("sent", [0, 20, 100, 76 + LENGTH + 10])
def test_silence_ends_a_transfer_in_time(
    bench: Bench, deadline_s: float, patience_s: float, code: Code, sent: int
) -> None:
    blocks = contents(2)
    bench.receive([LENGTH] * 2, deadline_s=deadline_s, first_byte_s=patience_s, stall_s=patience_s)
    bench.asked()
    bench.send((got(*blocks) + b"".join(blocks))[:sent])
    started = time.monotonic()
    end = bench.end()
    assert end.code is code
    assert time.monotonic() - started < 1.0
    assert end.statuses == ({0: Status.OK} if sent > LENGTH else {})
    assert bench.engine.active == 0


def test_who_has_begun_to_answer_is_waited_for_longer_or_shorter_than_who_has_not(bench: Bench) -> None:
    """A dead peer never begins; one that has begun is judged by its pauses."""
    [block] = contents(1)
    bench.receive([LENGTH], first_byte_s=0.1, stall_s=10)
    assert bench.end(deadline_s=3.0).code is Code.STALLED
    bench.far.close()
    bench.near.close()
    bench.near, bench.far = socket.socketpair()
    bench.near.setblocking(False)
    bench.far.settimeout(10)
    bench.receive([LENGTH], first_byte_s=1.0, stall_s=10)
    bench.asked()
    bench.send(got(block))
    threading.Event().wait(1.2)  # what is tested is that this time passes without an end
    bench.send(block)
    end = bench.end()
    assert end.code is Code.OK and 0 < end.waited_s < 1.0


def test_progress_keeps_a_stall_away_but_not_the_deadline(bench: Bench) -> None:
    [block] = contents(1)
    bench.receive([LENGTH], deadline_s=0.6, stall_s=0.3)
    bench.asked()
    bench.send(got(block))
    stop = threading.Event()

    def drip() -> None:
        for byte in block:
            if stop.wait(0.02):
                return
            try:
                bench.send(bytes([byte]))
            except OSError:
                return

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        assert bench.end().code is Code.TIMEOUT
    finally:
        stop.set()
        thread.join()


def test_a_deadline_that_has_passed_ends_at_once(bench: Bench) -> None:
    bench.receive([100], deadline_s=0.0)
    assert bench.end(deadline_s=2.0).code is Code.TIMEOUT


def test_cancelling_ends_a_transfer_and_nothing_is_written_afterwards(bench: Bench) -> None:
    blocks = contents(2)
    bench.receive([LENGTH] * 2)
    bench.asked()
    bench.send(got(*blocks) + blocks[0][:10])
    bench.engine.cancel(1)
    assert bench.end().code is Code.CANCELLED
    before = bytes(bench.memory)
    bench.send(blocks[0][10:] + blocks[1])
    bench.engine.stop()
    assert bench.memory == before


def test_cancelling_what_is_not_there_does_nothing(bench: Bench) -> None:
    bench.engine.cancel(12345)
    assert bench.engine.drain() == []


def test_stopping_ends_everything_and_takes_nothing_new() -> None:
    bench = Bench()
    pairs = [socket.socketpair() for _ in range(5)]
    try:
        for job, (near, _) in enumerate(pairs):
            near.setblocking(False)
            assert bench.begin(near.fileno(), [(bench.base, 100)], job)
        bench.engine.stop()
        ended = {job: Code(code) for job, final, code, *_ in bench.engine.drain() if final}
        assert ended == dict.fromkeys(range(5), Code.CANCELLED)
        assert not bench.begin(bench.near.fileno(), [(bench.base, 100)], 9)
        bench.engine.stop()
    finally:
        for near, far in pairs:
            near.close()
            far.close()
        bench.close()


def test_the_table_is_bounded_and_a_job_number_is_used_once() -> None:
    bench = Bench(transfers_max=2)
    pairs = [socket.socketpair() for _ in range(3)]
    try:

        def begin(job: int, pair: int) -> bool:
            return bench.begin(pairs[pair][0].fileno(), [(bench.base, 9)], job)

        for near, _ in pairs:
            near.setblocking(False)
        assert begin(1, 0)
        assert not begin(1, 1)
        assert begin(2, 1)
        assert not begin(3, 2)
    finally:
        bench.close()
        for near, far in pairs:
            near.close()
            far.close()


@pytest.mark.parametrize("path", ["", "/dev/null"])
def test_a_descriptor_that_is_no_socket_is_refused_or_ends_as_closed(bench: Bench, path: str) -> None:
    fd = os.open(path, os.O_RDWR) if path else -1
    try:
        if bench.begin(fd, [(bench.base, 9)]):
            assert bench.end().code is Code.CLOSED
    finally:
        if path:
            os.close(fd)


@pytest.mark.parametrize("by", ["reference", "copy"])
def test_a_file_is_sent_in_runs_behind_its_header(bench: Bench, by: str) -> None:
    fd = os.memfd_create("test-arena")
    data = os.urandom(3 << 20)
    os.write(fd, data)
    view = mmap.mmap(fd, len(data))
    mapping = _native.address_of(view) if by == "copy" else 0
    received = bytearray()

    def drink() -> None:
        while piece := bench.far.recv(65_536):
            received.extend(piece)

    thread = threading.Thread(target=drink)
    thread.start()
    try:
        runs = [(0, 10), (1 << 20, 1 << 20), (5, 0), (3 << 19, 12345)]
        assert bench.send_file(b"header", fd, runs, mapping=mapping)
        end = bench.end()
        bench.near.shutdown(socket.SHUT_WR)
        thread.join(10)
    finally:
        view.close()
        os.close(fd)
    expected = b"".join(data[offset : offset + length] for offset, length in runs)
    assert end.code is Code.OK and end.moved == len(expected)
    assert received == b"header" + expected


def test_a_run_behind_the_end_of_the_file_is_an_error(bench: Bench) -> None:
    fd = os.memfd_create("test-arena")
    os.write(fd, bytes(100))
    try:
        assert bench.send_file(b"", fd, [(50, 100)])
        assert bench.end().code is Code.PROTOCOL
    finally:
        os.close(fd)


@pytest.mark.parametrize(("deadline_s", "stall_s", "code"), [(0.2, 10, Code.TIMEOUT), (10, 0.2, Code.STALLED)])
def test_a_reader_that_does_not_read_is_given_up(bench: Bench, deadline_s: float, stall_s: float, code: Code) -> None:
    fd = os.memfd_create("test-arena")
    os.ftruncate(fd, 64 << 20)
    try:
        assert bench.send_file(b"", fd, [(0, 64 << 20)], deadline_s, stall_s)
        assert bench.end().code is code
    finally:
        os.close(fd)


def test_many_transfers_at_once_do_not_mix() -> None:
    bench = Bench(transfers_max=64)
    pairs = [socket.socketpair() for _ in range(40)]
    blocks = contents(40, 20_000)
    try:
        for job, (near, far) in enumerate(pairs):
            near.setblocking(False)
            at = bench.base + job * 20_000
            assert bench.begin(near.fileno(), [(at, 20_000)], job)
            far.sendall(got(blocks[job]))
        for (_, far), block in zip(pairs, blocks, strict=True):
            far.sendall(block)
        ended: dict[int, Code] = {}
        deadline = time.monotonic() + 20
        while len(ended) < 40 and time.monotonic() < deadline:
            select.select([bench.engine.fd], [], [], 1)
            ended |= {job: Code(code) for job, final, code, *_ in bench.engine.drain() if final}
        assert ended == dict.fromkeys(range(40), Code.OK)
        assert bench.memory[: 40 * 20_000] == b"".join(blocks)
    finally:
        bench.close()
        for near, far in pairs:
            near.close()
            far.close()


def test_records_are_as_long_as_both_sides_think() -> None:
    assert GOT_RECORD.size == 32 and HEADER.size == 12
    assert struct.calcsize("<IBBHI") == HEADER.size
