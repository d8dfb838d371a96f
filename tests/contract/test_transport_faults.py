"""The contract when the owner dies, stands still, or the wire lies: real processes, signals, and a proxy that
tampers.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from p2pkv import _native
from p2pkv.transport.base import CallOff
from p2pkv.types import Status
from tests.cluster.agents import AgentProcess, Cluster, make_layout
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.proxy import Proxy
from tests.contract.node import Node, Pulled, until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120)]

HAVE_NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))
NIXL_MARKS = [
    pytest.mark.nixl,
    pytest.mark.skipif(not HAVE_NIXL, reason="NIXL IS NOT INSTALLED (make nixl): its faults are not tested"),
]
TCP = "tcp"
NIXL = pytest.param("nixl", marks=NIXL_MARKS)
NIXL_TCP = pytest.param("nixl-tcp", marks=NIXL_MARKS)
SLACK_S = 0.5
STALL_S = 0.4
MIB = make_layout(1 << 20)
COUNT = 40
ATTEMPTS = 6
"""A read may be over before the signal arrives: then it is read again."""


def owner_options(kind: str) -> dict[str, object]:
    over_tcp = {"transport.nixl_tls": "tcp", "transport.nixl_devices": "lo"}
    return {
        "transport": kind.partition("-")[0],
        "capacity": "192MiB",
        "http_on": False,
        "settings": over_tcp if kind == "nixl-tcp" else {},
    }


class Scene:
    """A real agent that owns blocks, and a bare node in this process that reads them."""

    def __init__(self, kind: str, cluster: Cluster) -> None:
        self.kind = kind
        self.cluster = cluster
        self.reader = Node(kind, stall_s=STALL_S)
        self.keys = new_keys(COUNT)
        self.call_off = CallOff()

    async def set_up(self) -> None:
        await self.reader.start()
        loop = asyncio.get_running_loop()
        self.owner: AgentProcess = (
            await loop.run_in_executor(None, lambda: self.cluster.start(1, **owner_options(self.kind)))
        )[0]
        await loop.run_in_executor(None, self._put)
        await self.reader.meet(self.node, ("127.0.0.1", self.owner.peer_port))

    def _put(self) -> None:
        cache = self.owner.open(MIB)
        assert all(cache.put(self.keys, blocks_of(self.keys, MIB.block_bytes), deadline_ms=20_000))

    @property
    def node(self) -> int:
        return int(self.owner.node, 16)

    async def pull(self, deadline_s: float = 20.0, count: int = COUNT) -> Pulled:
        keys = self.keys[:count]
        return await self.reader.pull(self.node, MIB, keys, deadline_s=deadline_s, call_off=self.call_off)

    def right(self, pulled: Pulled) -> list[int]:
        """Indices that are OK; their bytes are looked at."""
        good = [i for i, status in enumerate(pulled.statuses) if status is Status.OK]
        for i in good:
            assert self.reader.bytes_at(pulled.places[i]) == block_of(self.keys[i], MIB.block_bytes), "WRONG BYTES"
        reported = {i: checksum for i, status, checksum in pulled.reports if status is Status.OK}
        assert sorted(reported) == good
        assert all(_native.xxh3_128(block_of(self.keys[i], MIB.block_bytes)) == c for i, c in reported.items())
        return good

    async def interrupted(self, interrupt: object, deadline_s: float) -> Pulled:
        """A pull during which, after its first block and before its last, ``interrupt()`` was called."""
        for _ in range(ATTEMPTS):
            reports: list[int] = []
            self.call_off = CallOff()
            task = asyncio.create_task(self._pull_into(reports, deadline_s))
            await until(lambda r=reports, t=task: r or t.done())  # type: ignore[misc]
            interrupt()  # type: ignore[operator]
            pulled = await task
            if len(self.right(pulled)) < COUNT:
                return pulled
            self.owner.continue_tree()
            self.reader.forget(pulled)
        pytest.skip(f"{ATTEMPTS} reads were over before they could be interrupted")

    async def _pull_into(self, reports: list[int], deadline_s: float) -> Pulled:
        original = self.reader.transport.pull

        async def watched(request: object) -> object:
            on_block = request.on_block  # type: ignore[attr-defined]

            def on_block_too(index: int, status: Status, checksum: bytes) -> None:
                reports.append(index)
                on_block(index, status, checksum)

            return await original(request._replace(on_block=on_block_too))  # type: ignore[attr-defined]

        self.reader.transport.pull = watched  # type: ignore[method-assign, assignment]
        try:
            return await self.pull(deadline_s)
        finally:
            self.reader.transport.pull = original  # type: ignore[method-assign]


@pytest_asyncio.fixture
async def scene(request: pytest.FixtureRequest, cluster: Cluster) -> AsyncIterator[Scene]:
    made = Scene(request.param, cluster)
    try:
        await made.set_up()
        yield made
    finally:
        for agent in cluster.agents:
            agent.end()
        await made.reader.stop()


@pytest.mark.parametrize("scene", [TCP, NIXL, NIXL_TCP], indirect=True)
async def test_an_owner_that_was_killed_is_a_miss_well_before_the_deadline(scene: Scene) -> None:
    first = await scene.pull(count=4)
    assert len(scene.right(first)) == 4
    scene.owner.kill()
    second = await scene.pull(deadline_s=10.0)
    assert set(second.statuses) <= {Status.UNREACHABLE, Status.TIMEOUT}
    assert second.seconds < 2.0
    third = await scene.pull(deadline_s=10.0)
    assert Status.OK not in third.statuses
    assert third.seconds < 0.1 + SLACK_S


@pytest.mark.parametrize("scene", [TCP, NIXL, NIXL_TCP], indirect=True)
async def test_an_owner_that_is_killed_in_mid_read_gives_no_wrong_byte(scene: Scene) -> None:
    pulled = await scene.interrupted(scene.owner.kill, 5.0)
    assert pulled.seconds < 5.0 + SLACK_S
    assert {Status.OK, Status.UNREACHABLE, Status.TIMEOUT, Status.REJECTED} >= set(pulled.statuses)
    if pulled.result.unsafe:
        await until(lambda: pulled.result.token in scene.reader.cleared, 15.0)


@pytest.mark.parametrize("scene", [TCP, NIXL, NIXL_TCP], indirect=True)
async def test_an_owner_that_stands_still_costs_no_more_than_the_deadline(scene: Scene) -> None:
    assert len(scene.right(await scene.pull(count=2))) == 2
    scene.owner.stop_tree()
    pulled = await scene.pull(deadline_s=1.0)
    scene.right(pulled)
    assert pulled.seconds < 1.0 + SLACK_S
    scene.owner.continue_tree()


@pytest.mark.parametrize("scene", [TCP, NIXL_TCP], indirect=True)
async def test_an_owner_that_stops_in_mid_read_and_goes_on_later_writes_into_nothing_that_is_used_again(
    scene: Scene,
) -> None:
    """Issue 2, done when 9. The reader's slots are filled anew as soon as the transport calls them safe."""
    reader = scene.reader
    pulled = await scene.interrupted(scene.owner.stop_tree, 1.0)
    assert pulled.seconds < 1.0 + SLACK_S
    unsafe = pulled.result.unsafe
    assert not unsafe & set(scene.right(pulled))
    mark = b"\x77" * MIB.block_bytes
    for i, place in enumerate(pulled.places):
        if i not in unsafe:
            reader.arena.view(place.offset, place.length)[:] = mark
    scene.owner.continue_tree()
    if unsafe:
        await until(lambda: pulled.result.token in reader.cleared, 30.0)
        for i in unsafe:
            reader.arena.view(pulled.places[i].offset, MIB.block_bytes)[:] = mark
    await until(lambda: (peer := reader.network.peer(scene.node)) is not None and peer.alive, 15.0)
    again = await scene.pull()  # what was still on its way has come before the last byte of this
    assert len(scene.right(again)) == COUNT, again.result.reason
    assert [i for i, place in enumerate(pulled.places) if reader.bytes_at(place) != mark] == []


@pytest.mark.parametrize("scene", [TCP, NIXL_TCP], indirect=True)
async def test_a_pull_that_is_called_off_ends_soon_and_its_slots_are_safe_or_named(scene: Scene) -> None:
    """The owner stands still: nothing but the calling off ends the pull before its stall time is over."""
    reader, loop = scene.reader, asyncio.get_running_loop()
    called_at = 0.0

    def stop_and_call_off() -> None:
        nonlocal called_at
        scene.owner.stop_tree()
        called_at = loop.time()
        scene.call_off()

    pulled = await scene.interrupted(stop_and_call_off, 20.0)
    assert loop.time() - called_at < STALL_S * 0.75
    unsafe = pulled.result.unsafe
    assert not unsafe & set(scene.right(pulled))
    mark = b"\x77" * MIB.block_bytes
    for i, place in enumerate(pulled.places):
        if i not in unsafe:
            reader.arena.view(place.offset, place.length)[:] = mark
    scene.owner.continue_tree()
    if unsafe:
        await until(lambda: pulled.result.token in reader.cleared, 30.0)
    await until(lambda: (peer := reader.network.peer(scene.node)) is not None and peer.alive, 15.0)
    scene.call_off = CallOff()
    again = await scene.pull()
    assert len(scene.right(again)) == COUNT, again.result.reason
    safe = [place for i, place in enumerate(pulled.places) if i not in unsafe]
    assert all(reader.bytes_at(place) == mark for place in safe)


@pytest.mark.parametrize("scene", [NIXL_TCP], indirect=True)
async def test_slots_that_are_called_unsafe_are_written_to_by_a_source_that_goes_on(scene: Scene) -> None:
    """The guard of the test above taken out: its slots filled anew at once. So there is something to guard against."""
    reader = scene.reader
    mark = b"\x77" * MIB.block_bytes
    for _ in range(ATTEMPTS):
        pulled = await scene.interrupted(scene.owner.stop_tree, 1.0)
        for place in pulled.places:
            reader.arena.view(place.offset, place.length)[:] = mark
        scene.owner.continue_tree()
        if pulled.result.unsafe:
            await until(lambda p=pulled: p.result.token in reader.cleared, 30.0)  # type: ignore[misc]
        written = {i for i, place in enumerate(pulled.places) if reader.bytes_at(place) != mark}
        assert written <= pulled.result.unsafe
        if written:
            return
        reader.forget(pulled)
        await until(lambda: (peer := reader.network.peer(scene.node)) is not None and peer.alive, 15.0)
    pytest.fail("nothing arrived late: this test cannot see what it is about")


async def test_a_byte_that_changes_on_the_wire_is_rejected(cluster: Cluster) -> None:
    """One bit of the third block; its neighbours arrive, and the next pull of it is right."""
    loop = asyncio.get_running_loop()
    reader = Node("tcp", stall_s=0.5)
    with Proxy() as proxy:
        try:
            await reader.start()
            options = owner_options("tcp") | {"settings": {"peer.advertise": proxy.address}}
            [owner] = await loop.run_in_executor(None, lambda: cluster.start(1, **options))
            proxy.target = owner.peer_port
            layout = make_layout(65_536)
            keys = new_keys(5)

            def put() -> None:
                assert all(owner.open(layout).put(keys, blocks_of(keys, layout.block_bytes)))

            await loop.run_in_executor(None, put)
            await reader.meet(int(owner.node, 16), ("127.0.0.1", proxy.port))
            # The owner's data stream: WELCOME (some hundred bytes), GOT, then the payloads: this is in the third block.
            proxy.flip_at = 2 * 65_536 + 32_768
            pulled = await reader.pull(int(owner.node, 16), layout, keys)
            assert proxy.flipped == 1
            assert pulled.statuses == [Status.OK, Status.OK, Status.REJECTED, Status.OK, Status.OK]
            again = await reader.pull(int(owner.node, 16), layout, [keys[2]])
            assert again.statuses == [Status.OK]
            assert reader.bytes_at(again.places[0]) == block_of(keys[2], layout.block_bytes)
        finally:
            for agent in cluster.agents:
                agent.end()
            await reader.stop()


async def test_a_connection_that_is_cut_in_mid_answer_keeps_what_came_whole(cluster: Cluster) -> None:
    loop = asyncio.get_running_loop()
    reader = Node("tcp", stall_s=0.5)
    with Proxy() as proxy:
        try:
            await reader.start()
            options = owner_options("tcp") | {"settings": {"peer.advertise": proxy.address}}
            [owner] = await loop.run_in_executor(None, lambda: cluster.start(1, **options))
            proxy.target = owner.peer_port
            keys = new_keys(8)

            def put() -> None:
                assert all(owner.open(MIB).put(keys, blocks_of(keys, MIB.block_bytes)))

            await loop.run_in_executor(None, put)
            await reader.meet(int(owner.node, 16), ("127.0.0.1", proxy.port))
            proxy.cut_after = 3 << 20
            pulled = await reader.pull(int(owner.node, 16), MIB, keys, deadline_s=5.0)
            assert proxy.cut >= 1
            good = [i for i, status in enumerate(pulled.statuses) if status is Status.OK]
            assert len(good) < 8 and set(pulled.statuses) == {Status.OK, Status.UNREACHABLE}
            for i in good:
                assert reader.bytes_at(pulled.places[i]) == block_of(keys[i], MIB.block_bytes)
            assert pulled.seconds < 5.0
            proxy.cut_after = None
            again = await reader.pull(int(owner.node, 16), MIB, keys)
            assert again.statuses == [Status.OK] * 8
        finally:
            for agent in cluster.agents:
                agent.end()
            await reader.stop()
