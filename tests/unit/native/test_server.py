"""The native server against raw sockets: what is answered, and how long blocks are held for it."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from p2pkv import _native
from p2pkv.store.base import LeaseLimits
from p2pkv.types import Status
from p2pkv.wire.peer import CODEC, Get, Release
from tests.unit.native.serving import BLOCK, NODE, Owner, layout_of, until

LAYOUT = layout_of()
SPACE = LAYOUT.namespace
MIB = layout_of(1 << 20)


@pytest.fixture
def owner() -> Iterator[Owner]:
    with Owner() as made:
        yield made
        until(made.idle)
        made.store.check_integrity()


@pytest.mark.parametrize("same_host", [False, True])
@pytest.mark.parametrize("block_bytes", [4096, BLOCK, (5 << 20) + 13])
def test_every_byte_of_every_block_is_sent(owner: Owner, same_host: bool, block_bytes: int) -> None:
    layout = layout_of(block_bytes)
    blocks = owner.put(layout, 3)
    with owner.connect(same_host=same_host) as reader:
        answer = reader.get(layout.namespace, list(blocks))
    assert answer.payloads == list(blocks.values())
    assert [r.checksum for r in answer.records] == [_native.xxh3_128(content) for content in blocks.values()]
    assert all(r.status == Status.OK and r.length == block_bytes and r.generation for r in answer.records)
    until(lambda: owner.server.blocks_served == 3)  # counted when all is in the socket
    assert (owner.server.gets, owner.server.bytes_served) == (1, 3 * block_bytes)


def test_what_is_not_there_is_a_miss_and_does_not_shift_its_neighbours(owner: Owner) -> None:
    blocks = owner.put(LAYOUT, 2)
    first, last = blocks
    with owner.connect() as reader:
        answer = reader.get(SPACE, [os.urandom(16), first, os.urandom(64), last, os.urandom(8)])
        assert [r.status for r in answer.records] == [Status.MISS, Status.OK] * 2 + [Status.MISS]
        assert answer.payloads == [None, blocks[first], None, blocks[last], None]
        assert answer.records[0] == (Status.MISS, 0, 0, bytes(16))
        for unknown in (reader.get(SPACE ^ 1, [first, last]), reader.get(SPACE, [os.urandom(16)] * 300)):
            assert {r.status for r in unknown.records} == {Status.MISS} and owner.leases == 0
        assert reader.get(SPACE, []).records == []
    assert owner.server.leases_given == 1


def test_the_same_block_twice_is_sent_twice(owner: Owner) -> None:
    [(key, content)] = owner.put(LAYOUT).items()
    with owner.connect() as reader:
        assert reader.get(SPACE, [key, key]).payloads == [content, content]


def test_a_get_byte_by_byte_is_a_get(owner: Owner) -> None:
    [(key, content)] = owner.put(LAYOUT).items()
    with owner.connect() as reader:
        reader.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in CODEC.encode(Get(SPACE, [key], 1000)):
            reader.sock.send(bytes([byte]))
        assert reader.answer().payloads == [content]


def test_what_was_read_from_the_socket_before_counts(owner: Owner) -> None:
    [(key, content)] = owner.put(LAYOUT).items()
    get = CODEC.encode(Get(SPACE, [key], 1000))
    with owner.connect(leftover=get) as reader:
        assert reader.answer().payloads == [content]
    with owner.connect(leftover=get[:20]) as reader:
        reader.sock.sendall(get[20:])
        assert reader.answer().payloads == [content]


def test_requests_sent_ahead_are_answered_one_after_the_other(owner: Owner) -> None:
    blocks = owner.put(LAYOUT, 16)
    with owner.connect() as reader:
        reader.sock.sendall(b"".join(CODEC.encode(Get(SPACE, [key], 1000)) for key in blocks))
        assert [reader.answer().payloads for _ in blocks] == [[content] for content in blocks.values()]
        reader.sock.sendall(CODEC.encode(Release(0)) + CODEC.encode(Get(SPACE, list(blocks)[:2], 1000)))
        assert reader.answer().payloads == list(blocks.values())[:2]


def test_answers_larger_than_a_turn_sent_ahead_are_all_given(owner: Owner) -> None:
    blocks = owner.put(MIB, 6)
    with owner.connect() as reader:
        get = CODEC.encode(Get(MIB.namespace, list(blocks), 10_000))
        reader.sock.sendall(get * 4)
        for _ in range(4):
            assert reader.answer().payloads == list(blocks.values())


def test_the_largest_lawful_request_is_answered(owner: Owner) -> None:
    keys = [os.urandom(64) for _ in range(16_384)]
    with owner.connect() as reader:
        assert len(reader.get(SPACE, keys).records) == 16_384


# ---- leases


def test_blocks_are_held_from_get_until_release(owner: Owner) -> None:
    blocks = owner.put(LAYOUT, 2)
    with owner.connect() as reader:
        reader.get(SPACE, list(blocks))
        assert owner.leases == owner.server.leases_held == 1
        reader.release()
        until(lambda: owner.leases == 0)
        assert reader.get(SPACE, list(blocks)).payloads == list(blocks.values())


def test_the_next_get_releases_what_the_last_one_held(owner: Owner) -> None:
    blocks = owner.put(LAYOUT, 2)
    with owner.connect() as reader:
        for _ in range(5):
            reader.get(SPACE, list(blocks))
            assert owner.leases == 1
        reader.get(SPACE, [os.urandom(16)])
        assert owner.leases == 0
    assert owner.server.leases_given == 5


def test_the_end_of_the_connection_releases(owner: Owner) -> None:
    blocks = owner.put(LAYOUT, 2)
    with owner.connect() as reader:
        reader.get(SPACE, list(blocks))
    until(owner.idle, 2.0)


def test_the_end_of_a_connection_in_mid_answer_releases(owner: Owner) -> None:
    blocks = owner.put(MIB, 8)
    with owner.connect(narrow=True) as reader:
        reader.ask(MIB.namespace, list(blocks))
        reader.exactly(1000)
        assert owner.leases == 1
    until(owner.idle, 2.0)
    assert 0 < owner.server.bytes_served < 8 << 20 and owner.server.blocks_served == 0


def test_a_lease_that_runs_out_after_the_answer_is_given_back_and_the_connection_stays(owner: Owner) -> None:
    blocks = owner.put(LAYOUT, 2)
    with owner.connect() as reader:
        started = time.monotonic()
        reader.get(SPACE, list(blocks), ttl_ms=100)
        until(lambda: owner.leases == 0, 2.0)
        assert time.monotonic() - started >= 0.1
        assert reader.get(SPACE, list(blocks)).payloads == list(blocks.values())
    assert owner.server.cut_off == 0


@pytest.mark.parametrize("same_host", [False, True])
def test_a_reader_that_stops_reading_is_cut_off_when_its_lease_runs_out(owner: Owner, same_host: bool) -> None:
    blocks = owner.put(MIB, 8)
    with owner.connect(narrow=True, same_host=same_host) as stuck, owner.connect() as other:
        started = time.monotonic()
        stuck.ask(MIB.namespace, list(blocks), ttl_ms=300)
        assert other.get(MIB.namespace, list(blocks)).payloads == list(blocks.values())
        other.release()
        until(lambda: owner.server.cut_off == 1, 2.0)
        assert time.monotonic() - started >= 0.3
        until(lambda: owner.leases == 0)
        assert len(stuck.rest()) < 8 << 20
        assert other.get(MIB.namespace, list(blocks)).payloads == list(blocks.values())


def test_a_reader_that_does_not_read_misses_either_is_cut_off() -> None:
    """Nothing is held for it, but it would keep the answer for ever."""
    with Owner(lease_ttl_s=0.3) as owner, owner.connect(narrow=True) as stuck:
        stuck.ask(SPACE, [os.urandom(16)] * 16_384)
        until(lambda: owner.server.active == 1)
        until(lambda: owner.server.cut_off == 1, 3.0)
        until(owner.idle)


def test_the_owner_bounds_what_a_reader_asks_for() -> None:
    with Owner(lease_ttl_s=0.2) as owner, owner.connect() as reader:
        blocks = owner.put(LAYOUT)
        reader.get(SPACE, list(blocks), ttl_ms=0xFFFF_FFFF)
        until(lambda: owner.leases == 0, 1.0)


def test_a_slow_reader_gets_all_and_the_blocks_stay_held_meanwhile(owner: Owner) -> None:
    blocks = owner.put(MIB, 4)
    with owner.connect(narrow=True) as reader:
        reader.ask(MIB.namespace, list(blocks))
        got = bytearray()
        want = 12 + 4 * 32 + (4 << 20)
        until(lambda: owner.leases == 1)
        while len(got) < want:
            assert owner.leases == 1
            got += reader.exactly(min(256 << 10, want - len(got)))
        assert bytes(got[12 + 4 * 32 :]) == b"".join(blocks.values())
        assert owner.leases == 1
        reader.release()
        until(lambda: owner.leases == 0)


def test_a_reader_that_holds_as_much_as_it_may_is_told_busy() -> None:
    with Owner(leases=LeaseLimits(bytes_per_holder_max=2 * BLOCK)) as owner:
        blocks = owner.put(LAYOUT, 3)
        keys = list(blocks)
        with owner.connect() as one, owner.connect() as two, owner.connect(node=NODE + 1) as other:
            one.get(SPACE, keys[:2])
            refused = two.get(SPACE, keys[2:])
            assert refused.error is not None and refused.error.code == "busy"
            assert owner.server.refused == 1
            assert other.get(SPACE, keys[2:]).payloads == [blocks[keys[2]]]
            one.release()
            until(lambda: owner.leases == 1)
            assert two.get(SPACE, keys[2:]).payloads == [blocks[keys[2]]]
            two.release()
            until(lambda: owner.leases == 1)
            some = one.get(SPACE, keys)
            assert [r.status for r in some.records] == [Status.OK, Status.OK, Status.MISS]


# ---- many, and the end


def test_a_hundred_connections_at_once_do_not_mix(owner: Owner) -> None:
    blocks = owner.put(LAYOUT, 100)
    readers = [owner.connect(node=i + 1, same_host=i % 2 == 0) for i in range(100)]
    try:
        for reader, key in zip(readers, blocks, strict=True):
            reader.ask(SPACE, [key])
        for reader, content in zip(readers, blocks.values(), strict=True):
            assert reader.answer().payloads == [content]
        assert owner.server.active == owner.leases == 100
    finally:
        for reader in readers:
            reader.sock.close()


def test_a_connection_over_the_bound_is_closed() -> None:
    with Owner(connections_max=2) as owner:
        [(key, content)] = owner.put(LAYOUT).items()
        with owner.connect() as one, owner.connect() as two:
            with owner.connect() as three:
                assert three.rest() == b""
            assert owner.server.connections_refused == 1
            for reader in (one, two):
                assert reader.get(SPACE, [key]).payloads == [content]
        until(owner.idle)
        with owner.connect() as four:
            assert four.get(SPACE, [key]).payloads == [content]


def test_stop_under_load_ends_everything_and_gives_every_lease_back() -> None:
    with Owner() as owner:
        blocks = owner.put(MIB, 8)
        keys = list(blocks)
        answered = threading.Semaphore(0)

        def read(reader_no: int) -> None:
            with owner.connect(node=reader_no + 1, narrow=reader_no % 2 == 0) as reader:
                try:
                    while True:
                        assert reader.get(MIB.namespace, keys).payloads == list(blocks.values())
                        answered.release()
                except (EOFError, ConnectionError):
                    return

        threads = [threading.Thread(target=read, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(8):
            assert answered.acquire(timeout=30)
        started = time.monotonic()
        owner.server.stop()
        assert time.monotonic() - started < 1.0
        assert owner.idle() and owner.server.leases_held == 0
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
        with owner.connect() as late:
            assert late.rest() == b""
        owner.server.stop()
        owner.store.check_integrity()
