"""Regions that are not what an engine says they are, and memory that goes away under a copy."""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pkv.types import Status
from p2pkv.wire import engine
from tests.cluster.agents import AgentProcess, Cluster, eventually, make_layout, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.raw import RawConnection, engine_connection

pytestmark = [pytest.mark.cluster]

BLOCK = 1 << 20
LAYOUT = make_layout(BLOCK)
NAMESPACE = LAYOUT.namespace
SLOTS = 4


@pytest.fixture
def connection(pair: list[AgentProcess]) -> Iterator[RawConnection]:
    with engine_connection(pair[0], layout=LAYOUT) as made:
        yield made
    assert pair[0].alive


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("test-region")
    os.ftruncate(fd, SLOTS * BLOCK)
    yield fd
    os.close(fd)


def refused(answer: object, *words: str) -> None:
    assert isinstance(answer, engine.EngineError) and answer.code == "invalid", answer
    assert all(word in answer.message for word in words), answer.message


@pytest.mark.parametrize(
    ("offset", "slot_bytes", "slots"),
    [
        (0, BLOCK, SLOTS + 1),
        (4096, BLOCK, SLOTS),
        (1 << 62, BLOCK, SLOTS),
        (0, 1 << 62, SLOTS),
        (0, (1 << 64) - 1, (1 << 32) - 1),
        (0, BLOCK, 0),
        (0, 0, SLOTS),
    ],
)
def test_a_region_that_is_smaller_than_it_says_is_refused(
    connection: RawConnection, memory: int, offset: int, slot_bytes: int, slots: int
) -> None:
    refused(connection.ask(engine.MapRegion(1, offset, slot_bytes, slots), (memory,)), "smaller than it says")


def test_a_region_that_does_not_begin_at_a_page_is_refused(connection: RawConnection, memory: int) -> None:
    refused(connection.ask(engine.MapRegion(1, 100, BLOCK, SLOTS - 1), (memory,)), "page size")


def test_a_region_must_be_memory(connection: RawConnection, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    directory = os.open(tmp_path, os.O_RDONLY)
    device = os.open("/dev/zero", os.O_RDWR)
    event = os.eventfd(0)
    try:
        for fd in (read_end, write_end, directory, device, event, connection.sock.fileno()):
            refused(connection.ask(engine.MapRegion(1, 0, BLOCK, 1), (fd,)))
    finally:
        for fd in (read_end, write_end, directory, device, event):
            os.close(fd)


def test_a_region_that_can_only_be_read_is_refused(connection: RawConnection, tmp_path: Path) -> None:
    path = tmp_path / "region"
    path.write_bytes(bytes(SLOTS * BLOCK))
    with open(path, "rb") as file:
        refused(connection.ask(engine.MapRegion(1, 0, BLOCK, SLOTS), (file.fileno(),)), "reading and writing")


def test_a_number_that_is_taken_is_refused_and_the_first_region_stays(connection: RawConnection, memory: int) -> None:
    assert isinstance(connection.ask(engine.MapRegion(1, 0, BLOCK, SLOTS), (memory,)), engine.Ok)
    refused(connection.ask(engine.MapRegion(1, 0, BLOCK, 1), (memory,)), "taken")
    stored = connection.ask(engine.Store(NAMESPACE, new_keys(1), 1, [SLOTS - 1], 5000))
    assert isinstance(stored, engine.Done) and stored.statuses == bytes([Status.OK])


def test_regions_are_bounded(connection: RawConnection, memory: int) -> None:
    for number in range(64):
        assert isinstance(connection.ask(engine.MapRegion(number, 0, BLOCK, SLOTS), (memory,)), engine.Ok)
    answer = connection.ask(engine.MapRegion(64, 0, BLOCK, SLOTS), (memory,))
    assert isinstance(answer, engine.EngineError) and answer.code == "busy"


def test_descriptors_that_nobody_asked_for_are_closed(pair: list[AgentProcess], memory: int) -> None:
    def count() -> int:
        return len(os.listdir(f"/proc/{pair[0].pid}/fd"))

    with engine_connection(pair[0], layout=LAYOUT) as connection:
        before = count()
        for _ in range(50):
            answer = connection.ask(engine.MatchKeys(NAMESPACE, new_keys(1), False), (memory,) * 4)
            assert isinstance(answer, engine.Matched)
        eventually(lambda: count() <= before, why="they are closed")


@pytest.mark.parametrize("slots", [[SLOTS], [0, 0xFFFF_FFFF], [0]])
def test_slots_outside_the_region_are_refused(connection: RawConnection, memory: int, slots: list[int]) -> None:
    """The last case: as many slots as keys."""
    connection.ask(engine.MapRegion(1, 0, BLOCK, SLOTS), (memory,))
    keys = new_keys(2 if slots == [0] else len(slots))
    refused(connection.ask(engine.Store(NAMESPACE, keys, 1, slots, 1000)))
    refused(connection.ask(engine.Load(NAMESPACE, keys, 1, slots, 1000)))


def test_a_region_whose_slots_are_smaller_than_a_block_is_refused(connection: RawConnection, memory: int) -> None:
    connection.ask(engine.MapRegion(1, 0, BLOCK // 2, SLOTS), (memory,))
    refused(connection.ask(engine.Store(NAMESPACE, new_keys(1), 1, [0], 1000)), "smaller than a block")
    refused(connection.ask(engine.Load(NAMESPACE, new_keys(1), 1, [0], 1000)), "smaller than a block")


def test_a_region_that_was_unmapped_is_gone(connection: RawConnection, memory: int) -> None:
    connection.ask(engine.MapRegion(1, 0, BLOCK, SLOTS), (memory,))
    assert isinstance(connection.ask(engine.UnmapRegion(1)), engine.Ok)
    assert isinstance(connection.ask(engine.UnmapRegion(1)), engine.Ok)
    refused(connection.ask(engine.Store(NAMESPACE, new_keys(1), 1, [0], 1000)), "no such region")


def test_memory_that_is_cut_off_under_a_store_fails_only_the_blocks_behind_the_cut(
    pair: list[AgentProcess], connection: RawConnection, memory: int
) -> None:
    """SIGBUS would end the agent; the guard makes it a status."""
    keys = new_keys(SLOTS)
    with mmap.mmap(memory, SLOTS * BLOCK) as view:
        for slot, key in enumerate(keys):
            view[slot * BLOCK : (slot + 1) * BLOCK] = block_of(key, BLOCK)
    connection.ask(engine.MapRegion(1, 0, BLOCK, SLOTS), (memory,))
    os.ftruncate(memory, 2 * BLOCK)
    done = connection.ask(engine.Store(NAMESPACE, keys, 1, list(range(SLOTS)), 5000))
    assert isinstance(done, engine.Done)
    assert list(done.statuses) == [Status.OK, Status.OK, Status.INVALID, Status.INVALID]
    cache = pair[0].open(LAYOUT)
    out = [bytearray(BLOCK) for _ in keys]
    assert cache.get_into(keys, out, deadline_ms=1000) == [True, True, False, False]
    assert out[:2] == blocks_of(keys[:2], BLOCK)


def test_memory_that_is_cut_off_under_a_load_fails_only_the_blocks_behind_the_cut(
    pair: list[AgentProcess], connection: RawConnection, memory: int
) -> None:
    keys = new_keys(SLOTS)
    assert all(pair[0].open(LAYOUT).put(keys, blocks_of(keys, BLOCK)))
    connection.ask(engine.MapRegion(1, 0, BLOCK, SLOTS), (memory,))
    os.ftruncate(memory, 2 * BLOCK)
    done = connection.ask(engine.Load(NAMESPACE, keys, 1, list(range(SLOTS)), 5000))
    assert isinstance(done, engine.Done)
    assert list(done.statuses) == [Status.OK, Status.OK, Status.INVALID, Status.INVALID]
    assert os.pread(memory, 2 * BLOCK, 0) == b"".join(blocks_of(keys[:2], BLOCK))


def test_a_load_from_a_peer_into_memory_that_is_cut_off_keeps_the_pulled_blocks(
    pair: list[AgentProcess], connection: RawConnection, memory: int
) -> None:
    keys = new_keys(2)
    assert all(pair[1].open(LAYOUT).put(keys, blocks_of(keys, BLOCK)))
    here = pair[0].open(LAYOUT)
    visible(here, keys)
    connection.ask(engine.MapRegion(1, 0, BLOCK, SLOTS), (memory,))
    os.ftruncate(memory, BLOCK)
    done = connection.ask(engine.Load(NAMESPACE, keys, 1, [0, 1], 5000))
    assert isinstance(done, engine.Done)
    assert list(done.statuses) == [Status.OK, Status.INVALID]
    assert here.match(keys).local == 2
    out = [bytearray(BLOCK) for _ in keys]
    assert here.get_into(keys, out) == [True, True]
    assert out == blocks_of(keys, BLOCK)


def test_an_engine_that_leaves_in_mid_store_publishes_nothing(pair: list[AgentProcess], memory: int) -> None:
    """Its slots may change from that moment on."""
    keys = new_keys(SLOTS)
    connection = engine_connection(pair[0], layout=LAYOUT)
    connection.ask(engine.MapRegion(1, 0, BLOCK, SLOTS), (memory,))
    connection.send(engine.CODEC.encode(engine.Store(NAMESPACE, keys, 1, list(range(SLOTS)), 5000), 77))
    connection.sock.close()
    cache = pair[0].open(LAYOUT)
    out = [bytearray(BLOCK) for _ in keys]
    got = cache.get_into(keys, out, deadline_ms=200)
    for there, content in zip(got, out, strict=True):
        assert not there or content == bytes(BLOCK)


def test_a_region_is_never_another_ones_memory(cluster: Cluster) -> None:
    """The descriptor of a MAP_REGION that was refused must not be taken for that of the next one."""
    [agent] = cluster.start(1, http_on=False, settings={"engine.in_flight_max": 1})
    refused_fd, fd = os.memfd_create("refused"), os.memfd_create("mapped")
    try:
        for each, byte in ((refused_fd, b"R"), (fd, b"M")):
            os.write(each, byte * BLOCK)
        with engine_connection(agent, layout=LAYOUT) as connection:
            # One write, so that the second request is looked at while the first is still being worked on.
            ahead = engine.CODEC.encode(engine.Get(NAMESPACE, new_keys(1), 100), 101)
            ahead += engine.CODEC.encode(engine.MapRegion(1, 0, BLOCK, 1), 102)
            socket.send_fds(connection.sock, [ahead], [refused_fd])
            answers = {}
            while len(answers) < 2:
                frame = connection.receive()
                assert frame is not None
                answers[frame.request_id] = engine.CODEC.decode(frame)
            assert isinstance(answers[102], engine.EngineError) and answers[102].code == "busy"
            # The refused one's neighbour is done when it is answered, or a moment later.
            map_again = engine.MapRegion(2, 0, BLOCK, 1)
            eventually(lambda: isinstance(connection.ask(map_again, (fd,)), engine.Ok), why="the region is mapped")
            [key] = new_keys(1)
            done = connection.ask(engine.Store(NAMESPACE, [key], 2, [0], 5000))
            assert isinstance(done, engine.Done) and done.statuses == bytes([Status.OK])
        out = bytearray(BLOCK)
        assert agent.open(LAYOUT).get_into([key], [out]) == [True]
        assert out == b"M" * BLOCK, "the block holds the memory of a region that was refused"
    finally:
        os.close(refused_fd)
        os.close(fd)


def test_a_stray_descriptor_is_not_taken_for_a_regions(pair: list[AgentProcess], memory: int) -> None:
    with engine_connection(pair[0], layout=LAYOUT) as connection:
        assert isinstance(connection.ask(engine.MatchKeys(NAMESPACE, new_keys(1), False), (memory,)), engine.Matched)
        refused(connection.ask(engine.MapRegion(1, 0, BLOCK, SLOTS)), "descriptor")
