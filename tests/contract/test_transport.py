"""One suite over every transport: what :mod:`p2pkv.transport.base` promises, whoever keeps it.

``nixl`` is NIXL as it comes (one system call from memory to memory on one host), ``nixl-tcp`` is NIXL made to use its
TCP, where the owner's process has to take part in every read.
"""

from __future__ import annotations

import asyncio
import importlib.util
import socket
import time
from collections.abc import AsyncIterator, Sequence

import pytest
import pytest_asyncio

from p2pkv import _native
from p2pkv.transport.tcp import TcpTransport
from p2pkv.types import Status
from p2pkv.wire.frame import HEADER
from p2pkv.wire.peer import CODEC, GOT_RECORD, Get, Release
from tests.cluster.agents import make_layout
from tests.cluster.blocks import block_of, new_keys
from tests.contract.node import Node, Pulled, meeting, until

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(90)]

HAVE_NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))
NIXL_MARKS = [
    pytest.mark.nixl,
    pytest.mark.skipif(not HAVE_NIXL, reason="NIXL IS NOT INSTALLED (make nixl): the contract is not tested over it"),
]
KINDS = ["tcp", pytest.param("nixl", marks=NIXL_MARKS), pytest.param("nixl-tcp", marks=NIXL_MARKS)]
SLACK_S = 0.5
"""On a machine whose cores are all busy; the promise itself is some milliseconds."""

SMALL = make_layout(4_096)
MIDDLE = make_layout(65_536)
MIB = make_layout(1 << 20)
ODD = make_layout((5 << 20) + 13)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def nodes(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Node, Node]]:
    """An owner and a reader that is connected to it."""
    async with meeting(Node(request.param), Node(request.param)) as both:
        yield both


@pytest.fixture
def owner(nodes: tuple[Node, Node]) -> Node:
    return nodes[0]


@pytest.fixture
def reader(nodes: tuple[Node, Node]) -> Node:
    return nodes[1]


def put(owner: Node, layout: object, count: int) -> list[bytes]:
    keys = new_keys(count)
    for key in keys:
        owner.put(layout, key, block_of(key, layout.block_bytes))  # type: ignore[arg-type, attr-defined]
    return keys


def drop(owner: Node, layout: object, keys: Sequence[bytes]) -> None:
    for key in keys:
        owner.store.delete(layout.namespace, key)  # type: ignore[attr-defined]


def all_right(reader: Node, keys: Sequence[bytes], pulled: Pulled) -> bool:
    """Every block OK, reported once with its checksum, and its bytes there."""
    expected = [block_of(key, place.length) for key, place in zip(keys, pulled.places, strict=True)]
    assert pulled.statuses == [Status.OK] * len(keys), (pulled.statuses, pulled.result.reason)
    reported = {index: checksum for index, status, checksum in pulled.reports if status is Status.OK}
    assert sorted(index for index, *_ in pulled.reports) == list(range(len(keys)))
    assert reported == {i: _native.xxh3_128(content) for i, content in enumerate(expected)}
    assert not pulled.result.unsafe
    assert pulled.result.bytes_moved == sum(map(len, expected))
    return [reader.bytes_at(place) for place in pulled.places] == expected


@pytest.mark.parametrize(
    ("layout", "count"),
    [(SMALL, 1), (SMALL, 300), (MIDDLE, 1), (MIDDLE, 65), (MIB, 1), (MIB, 16), (ODD, 1), (ODD, 5)],
    ids=["4KiB", "4KiB-x300", "64KiB", "64KiB-x65", "1MiB", "1MiB-x16", "5MiB+13", "5MiB+13-x5"],
)
async def test_a_pull_brings_every_byte_of_every_block(owner: Node, reader: Node, layout: object, count: int) -> None:
    keys = put(owner, layout, count)
    pulled = await reader.pull(owner.id, layout, keys)  # type: ignore[arg-type]
    assert all_right(reader, keys, pulled)
    reader.forget(pulled)
    drop(owner, layout, keys)


async def test_blocks_that_the_owner_does_not_have_are_misses(owner: Node, reader: Node) -> None:
    owner.namespace(MIDDLE)
    pulled = await reader.pull(owner.id, MIDDLE, new_keys(5))
    assert pulled.statuses == [Status.MISS] * 5
    assert not any(status is Status.OK for _, status, _ in pulled.reports)
    assert owner.source.leases == 0
    reader.forget(pulled)


async def test_a_miss_does_not_shift_its_neighbours(owner: Node, reader: Node) -> None:
    held, absent = put(owner, MIDDLE, 4), new_keys(4)
    keys = [key for both in zip(absent, held, strict=True) for key in both]
    pulled = await reader.pull(owner.id, MIDDLE, keys)
    assert pulled.statuses == [Status.MISS, Status.OK] * 4
    for key, place in list(zip(keys, pulled.places, strict=True))[1::2]:
        assert reader.bytes_at(place) == block_of(key, MIDDLE.block_bytes)
    reader.forget(pulled)
    drop(owner, MIDDLE, held)


async def test_a_namespace_that_the_owner_does_not_know_gives_nothing(owner: Node, reader: Node) -> None:
    pulled = await reader.pull(owner.id, make_layout(65_536, model="nobody has this"), new_keys(3))
    assert Status.OK not in pulled.statuses and not pulled.result.unsafe
    reader.forget(pulled)


@pytest.mark.parametrize("length", [4_096, 131_072])
async def test_a_block_of_another_length_is_not_taken(owner: Node, reader: Node, length: int) -> None:
    """And nothing is written outside the destination, nor is the owner unusable afterwards."""
    keys = put(owner, MIDDLE, 2)
    pulled = await reader.pull(owner.id, MIDDLE, keys, length=length)
    assert Status.OK not in pulled.statuses, pulled.statuses
    assert not [report for report in pulled.reports if report[1] is Status.OK]
    again = await reader.pull(owner.id, MIDDLE, keys)
    assert all_right(reader, keys, again)
    reader.forget(pulled)
    reader.forget(again)
    drop(owner, MIDDLE, keys)


async def test_a_busy_owner_says_so_and_can_be_asked_again(owner: Node, reader: Node) -> None:
    """Busy: this reader holds as much as it may."""
    keys = put(owner, MIDDLE, 3)
    await until(lambda: owner.source.leases == 0, 5.0)  # what the test before held would come free meanwhile
    with owner.spent(reader.id, MIDDLE, keys[0]):
        refused = await reader.pull(owner.id, MIDDLE, keys)
    assert refused.statuses == [Status.BUSY] * 3
    assert refused.seconds < SLACK_S
    again = await reader.pull(owner.id, MIDDLE, keys)
    assert all_right(reader, keys, again)
    reader.forget(refused)
    reader.forget(again)
    drop(owner, MIDDLE, keys)


async def test_a_byte_that_changed_after_put_is_rejected_and_its_neighbours_are_not(owner: Node, reader: Node) -> None:
    keys = new_keys(5)
    places = [owner.put(MIDDLE, key, block_of(key, MIDDLE.block_bytes)) for key in keys]
    owner.arena.view(places[2].offset + 40_000, 1)[0] ^= 1
    pulled = await reader.pull(owner.id, MIDDLE, keys)
    assert pulled.statuses == [Status.OK, Status.OK, Status.REJECTED, Status.OK, Status.OK]
    assert [index for index, status, _ in pulled.reports if status is Status.OK] == [0, 1, 3, 4]
    reader.forget(pulled)
    drop(owner, MIDDLE, keys)


async def test_a_slot_that_is_reused_behind_the_lease_is_rejected(owner: Node, reader: Node) -> None:
    """What an expired lease looks like: the answer names a block, the bytes are another's by then."""
    keys = new_keys(4)
    places = [owner.put(MIDDLE, key, block_of(key, MIDDLE.block_bytes)) for key in keys]
    with owner.overwritten(places[1::2]):
        pulled = await reader.pull(owner.id, MIDDLE, keys)
    assert pulled.statuses == [Status.OK, Status.REJECTED] * 2
    reader.forget(pulled)
    drop(owner, MIDDLE, keys)


async def test_blocks_are_held_while_they_are_read_and_let_go_afterwards(owner: Node, reader: Node) -> None:
    keys = put(owner, MIDDLE, 8)
    seen: list[int] = []
    owner.source.on_pin = lambda _: seen.append(owner.store.stats().leases)
    given = 0 if owner.server is None else owner.server.leases_given
    try:
        pulled = await reader.pull(owner.id, MIDDLE, keys)
    finally:
        owner.source.on_pin = lambda _: None
    assert all_right(reader, keys, pulled)
    if owner.server is None:
        assert seen == [1]
    else:
        assert owner.server.leases_given - given == 1
    before = time.monotonic()
    await until(lambda: owner.source.leases == 0, 5.0)
    assert time.monotonic() - before < 2.0, "the lease was left to run out"
    reader.forget(pulled)
    drop(owner, MIDDLE, keys)


async def test_blocks_are_held_for_as_long_as_a_slow_reader_takes(owner: Node, reader: Node) -> None:
    """Its pulls are over before anybody could look, so a socket reads for it."""
    if owner.server is None:
        pytest.skip("over NIXL the owner does not see how far a read is; the test above has looked at its lease")
    assert isinstance(owner.transport, TcpTransport)
    keys = put(owner, MIB, 8)
    want = HEADER.size + 8 * GOT_RECORD.size + 8 * MIB.block_bytes
    loop = asyncio.get_running_loop()
    here, there = socket.socketpair()
    with here:
        here.setblocking(False)
        there.setblocking(False)
        owner.transport.accept(there, reader.id)
        await loop.sock_sendall(here, CODEC.encode(Get(MIB.namespace, keys, 10_000)))
        got = await loop.sock_recv(here, 1)
        while len(got) < want:
            assert owner.store.stats().leases == 1
            got += await loop.sock_recv(here, 1 << 20)
        assert got[-MIB.block_bytes :] == block_of(keys[-1], MIB.block_bytes)
        assert owner.store.stats().leases == 1, "what was sent may lie in the socket by reference"
        await loop.sock_sendall(here, CODEC.encode(Release(0)))
        await until(lambda: owner.store.stats().leases == 0, 2.0)
    drop(owner, MIB, keys)


async def test_a_pull_without_time_ends_at_once(owner: Node, reader: Node) -> None:
    keys = put(owner, MIB, 8)
    pulled = await reader.pull(owner.id, MIB, keys, deadline_s=0.0001)
    assert pulled.seconds < SLACK_S
    assert len(pulled.statuses) == 8
    ok = {index for index, status, _ in pulled.reports if status is Status.OK}
    for index in ok:
        assert reader.bytes_at(pulled.places[index]) == block_of(keys[index], MIB.block_bytes)
    if pulled.result.unsafe:
        await until(lambda: pulled.result.token in reader.cleared)
    again = await reader.pull(owner.id, MIB, keys)
    assert all_right(reader, keys, again)
    reader.forget(pulled)
    reader.forget(again)
    drop(owner, MIB, keys)


async def test_what_is_not_called_unsafe_is_not_written_to_after_the_pull(owner: Node, reader: Node) -> None:
    """Pulls that run out of time at every point of their way; their slots are filled anew and must stay so."""
    keys = put(owner, MIB, 24)
    for deadline_s in (0.001, 0.002, 0.004, 0.008, 0.016, 0.032):
        pulled = await reader.pull(owner.id, MIB, keys, deadline_s=deadline_s)
        assert pulled.seconds < deadline_s + SLACK_S
        assert not {i for i, status in enumerate(pulled.statuses) if status is Status.OK} & pulled.result.unsafe
        safe = [place for i, place in enumerate(pulled.places) if i not in pulled.result.unsafe]
        for place in safe:
            reader.arena.view(place.offset, place.length)[:] = b"\x77" * place.length
        again = await reader.pull(owner.id, MIB, keys)  # whatever was on its way has had the time to come
        assert all_right(reader, keys, again)
        for place in safe:
            assert reader.bytes_at(place) == b"\x77" * place.length, "written to after the pull had ended"
        if pulled.result.unsafe:
            await until(lambda p=pulled: p.result.token in reader.cleared)  # type: ignore[misc]
        reader.forget(again)
        reader.forget(pulled)
    drop(owner, MIB, keys)


async def test_many_pulls_at_once_do_not_mix(owner: Node, reader: Node) -> None:
    groups = [put(owner, MIDDLE, 8) for _ in range(24)]
    done = await asyncio.gather(*(reader.pull(owner.id, MIDDLE, keys) for keys in groups))
    for keys, pulled in zip(groups, done, strict=True):
        assert all_right(reader, keys, pulled)
        reader.forget(pulled)
        drop(owner, MIDDLE, keys)
    await until(lambda: owner.source.leases == 0, 5.0)


async def test_the_same_block_can_be_asked_for_twice(owner: Node, reader: Node) -> None:
    [key] = put(owner, MIDDLE, 1)
    pulled = await reader.pull(owner.id, MIDDLE, [key, key])
    assert all_right(reader, [key, key], pulled)
    reader.forget(pulled)
    drop(owner, MIDDLE, [key])


async def test_both_can_read_each_other_at_the_same_time(owner: Node, reader: Node) -> None:
    await owner.meet(reader.id, ("127.0.0.1", reader.network.port))
    there, here = put(owner, MIDDLE, 32), put(reader, MIDDLE, 32)
    to_here, to_there = await asyncio.gather(reader.pull(owner.id, MIDDLE, there), owner.pull(reader.id, MIDDLE, here))
    assert all_right(reader, there, to_here)
    assert all_right(owner, here, to_there)
    reader.forget(to_here)
    owner.forget(to_there)
    drop(owner, MIDDLE, there)
    drop(reader, MIDDLE, here)


async def test_a_node_that_nobody_knows_is_unreachable_at_once(reader: Node) -> None:
    pulled = await reader.pull(12_345, MIDDLE, new_keys(2))
    assert pulled.statuses == [Status.UNREACHABLE] * 2
    assert pulled.seconds < SLACK_S
    reader.forget(pulled)


async def test_forgetting_a_peer_costs_only_a_new_connection(owner: Node, reader: Node) -> None:
    keys = put(owner, MIDDLE, 2)
    for _ in range(3):
        pulled = await reader.pull(owner.id, MIDDLE, keys)
        assert all_right(reader, keys, pulled)
        reader.forget(pulled)
        reader.transport.peer_gone(owner.id)
    drop(owner, MIDDLE, keys)


async def test_what_connecting_costs_is_expected_beforehand_and_told_apart_afterwards(
    owner: Node, reader: Node
) -> None:
    transport, keys = reader.transport, put(owner, MIDDLE, 1)
    transport.peer_gone(owner.id)
    expected_s = transport.setup_s(owner.id)
    assert 0.0 < expected_s < 1.0
    pulled = await reader.pull(owner.id, MIDDLE, keys)
    assert all_right(reader, keys, pulled)
    first, gone_s = pulled.result, pulled.seconds
    assert 0.0 < first.setup_s < gone_s and 0.0 < first.waited_s <= gone_s - first.setup_s
    assert transport.setup_s(owner.id) == 0.0
    reader.forget(pulled)
    transport.peer_gone(owner.id)
    assert 0.0 < transport.setup_s(owner.id) != expected_s, "what was seen has been learnt"
    await transport.prepare(owner.id)
    assert transport.setup_s(owner.id) == 0.0
    pulled = await reader.pull(owner.id, MIDDLE, keys)
    assert all_right(reader, keys, pulled)
    assert pulled.result.setup_s < 0.1 * first.setup_s + 0.005
    reader.forget(pulled)
    drop(owner, MIDDLE, keys)


async def test_preparing_for_a_node_that_cannot_be_reached_does_no_harm(reader: Node) -> None:
    await reader.transport.prepare(12_345)
    assert reader.transport.setup_s(12_345) > 0


async def test_nothing_is_left_behind(owner: Node, reader: Node) -> None:
    """Last of the module: every slot, lease and reservation has been given back by the tests before."""
    await until(lambda: owner.source.leases == 0, 12.0)
    for node in (owner, reader):
        stats = node.store.stats()
        assert (stats.blocks_writing, stats.blocks_unlisted, stats.blocks_quarantined) == (0, 0, 0)
        node.store.check_integrity()


async def test_the_null_transport_answers_that_it_has_nothing() -> None:
    null = await Node("null").start()
    try:
        pulled = await null.pull(1, MIDDLE, new_keys(3), deadline_s=0.0)
        assert pulled.statuses == [Status.MISS] * 3
        assert not pulled.reports and not pulled.result.unsafe and pulled.result.bytes_moved == 0
        null.transport.peer_gone(1)
    finally:
        await null.stop()
