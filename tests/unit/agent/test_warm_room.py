"""What peers propose and tell of: it fills memory that is free, and one layout in the way does not end it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from p2pkv.agent.hot import FEATURE
from p2pkv.agent.layouts import Layouts
from p2pkv.agent.warm import BATCH_BYTES, Ahead
from p2pkv.store.base import Reservation
from p2pkv.store.dram import DramStore
from p2pkv.types import Layout, Status
from p2pkv.wire.engine import Warm, Warming
from p2pkv.wire.peer import HOT_MAX, Hot, HotKeys, Replicate, Replicated

MIB = 1 << 20
LAYOUT = Layout(model="m", revision="r", kv_dtype="bf16", block_tokens=16, block_bytes=MIB)
PEER = 7


def keys_of(name: str, count: int) -> list[bytes]:
    return [f"{name}-{i:08}".encode() for i in range(count)]


class Fetches:
    """A fetcher whose blocks all come, a turn of the loop after a slot was found; it evicts, as the agent's does."""

    def __init__(self, store: DramStore) -> None:
        self._store = store
        self.sizes: list[int] = []
        self.let: asyncio.Event = asyncio.Event()
        self.let.set()

    def fetch(
        self,
        namespace: int,
        hashes: Sequence[bytes],
        deadline_s: float,
        on_fetched: Callable[[int, Status], None],
        *,
        background: bool = False,
    ) -> asyncio.Task[None]:
        assert background and deadline_s > 0
        self.sizes.append(len(hashes))

        async def run() -> None:
            for position, key in enumerate(hashes):
                await self.let.wait()
                place = self._store.reserve(namespace, key, 0.0)
                await asyncio.sleep(0)
                if isinstance(place, Reservation):
                    self._store.commit(place, bytes(16), 0.0)
                on_fetched(position, Status.OK if isinstance(place, Reservation) else place)

        return asyncio.get_running_loop().create_task(run())


class Scene:
    """A node with an arena of so many MiB, and one peer that tells of these keys by their layout."""

    def __init__(self, capacity_mib: int, told: dict[Layout, list[bytes]]) -> None:
        self.store = DramStore(capacity_mib * MIB, extent_bytes=MIB)
        self.fetches = Fetches(self.store)
        self._layouts = Layouts(self.store, lambda: None, lambda: None)
        self._told = {layout.namespace: keys for layout, keys in told.items()}
        self._handlers: dict[type[msgspec.Struct], Callable[[object, msgspec.Struct], Any]] = {}
        card = SimpleNamespace(features=[FEATURE], layouts=list(told))
        self._peer = SimpleNamespace(node=PEER, alive=True, card=card)
        service: Any = SimpleNamespace(
            node=1,
            store=self.store,
            fetcher=self.fetches,
            adopt=self._layouts.adopt,
            block_bytes=self.store.block_bytes,
        )
        service.layouts = []
        network: Any = SimpleNamespace(on=self._handlers.__setitem__, peers=lambda: [self._peer], reach=self._reach)
        self.ahead = Ahead(service, network, usable=lambda node: True)

    async def _reach(self, node: int, deadline_s: float) -> Scene:
        return self

    async def request(self, hot: Hot, deadline_s: float) -> HotKeys:
        keys = self._told[hot.namespace]
        first = keys.index(hot.after) + 1 if hot.after else 0
        return HotKeys(keys[first : first + hot.blocks_max])

    def put(self, keys: Sequence[bytes]) -> None:
        namespace = self._layouts.adopt(LAYOUT)
        for key in keys:
            place = self.store.reserve(namespace, key, 0.0)
            assert isinstance(place, Reservation)
            self.store.commit(place, bytes(16), 0.0)

    def here(self, keys: Sequence[bytes], layout: Layout = LAYOUT) -> int:
        return sum(self.store.present(layout.namespace, keys))

    def propose(self, keys: Sequence[bytes]) -> Replicated:
        answer = self._handlers[Replicate](self, Replicate(LAYOUT.namespace, list(keys)))
        assert isinstance(answer, Replicated)
        return answer

    async def idle(self) -> None:
        """Wait until all that was proposed is over."""
        while self.ahead._replicating:
            await asyncio.wait(self.ahead._replicating)

    async def warmed(self, top_bytes: int = 1 << 40) -> Warming:
        self.ahead.warm(Warm(top_bytes, 60_000))
        task = self.ahead._warming
        assert task is not None
        await task
        return self.ahead.warm(Warm(0, 0))


async def test_proposals_in_many_parts_take_what_is_free_once_and_push_nothing_out() -> None:
    scene = Scene(1000, {LAYOUT: []})
    mine, proposed = keys_of("mine", 724), keys_of("proposed", 16 * HOT_MAX)
    scene.put(mine)
    answers = [scene.propose(proposed[first : first + HOT_MAX]) for first in range(0, len(proposed), HOT_MAX)]
    room = 1000 - 724 - 20  # a fiftieth is kept free
    assert sum(answer.begun for answer in answers) == room
    await scene.idle()
    assert scene.here(mine) == len(mine)
    assert scene.here(proposed) == room == scene.ahead.stats.replicated


async def test_room_that_others_have_taken_since_a_proposal_came_is_not_taken_from_them() -> None:
    scene = Scene(300, {LAYOUT: []})
    mine, proposed = keys_of("mine", 250), keys_of("proposed", HOT_MAX)
    scene.put([])
    scene.fetches.let.clear()
    assert scene.propose(proposed).begun == HOT_MAX
    await asyncio.sleep(0)  # the first batch is on its way
    scene.put(mine)
    scene.fetches.let.set()
    await scene.idle()
    assert max(scene.fetches.sizes) <= BATCH_BYTES // MIB, "no more than a batch is begun before the room is looked at"
    assert scene.here(mine) == len(mine)
    assert scene.here(proposed) == 300 - 250 - 6
    for key in mine:
        scene.store.delete(LAYOUT.namespace, key)
    assert scene.propose(proposed).begun == HOT_MAX - 44, "what had no room is promised to nobody any more"
    await scene.idle()


async def test_what_was_promised_is_free_again_when_a_proposal_is_over() -> None:
    scene = Scene(300, {LAYOUT: []})
    scene.put([])
    first, second = keys_of("first", 200), keys_of("second", 200)
    assert (scene.propose(first).begun, scene.propose(second).begun) == (200, 94)
    await scene.idle()
    for key in first:
        scene.store.delete(LAYOUT.namespace, key)
    assert scene.propose(second) == Replicated(94, 106)
    await scene.idle()
    assert scene.here(second) == 200


async def test_a_proposal_and_a_warm_up_do_not_take_the_same_room() -> None:
    told = keys_of("told", HOT_MAX)
    scene = Scene(300, {LAYOUT: told})
    mine, proposed = keys_of("mine", 250), keys_of("proposed", HOT_MAX)
    scene.put(mine)
    scene.propose(proposed)
    state = await scene.warmed()
    await scene.idle()
    assert state.why == "there is no free memory left"
    assert scene.here(mine) == len(mine)
    assert scene.here(told) + scene.here(proposed) == 300 - 250 - 6


@pytest.mark.parametrize(
    "odd", [LAYOUT.replace(engine_format="older"), LAYOUT.replace(model="big", block_bytes=MIB * 99)]
)
async def test_a_layout_that_cannot_be_kept_is_left_out_of_a_warm_up_and_named(odd: Layout) -> None:
    other = LAYOUT.replace(model="another")
    told = {LAYOUT: keys_of("a", 3), odd: keys_of("odd", 3), other: keys_of("b", 3)}
    scene = Scene(64, told)
    state = await scene.warmed()
    assert (state.complete, state.blocks_pulled) == (True, 6)
    assert scene.here(told[LAYOUT]) == scene.here(told[other], other) == 3
    assert state.why.startswith("that is all that peers have; 1 of their layouts cannot be kept here: ")


async def test_a_warm_up_of_which_nothing_can_be_kept_is_not_complete() -> None:
    big = LAYOUT.replace(block_bytes=MIB * 99)
    state = await Scene(64, {big: keys_of("a", 3)}).warmed()
    assert (state.complete, state.blocks_pulled) == (False, 0)
    assert "does not fit" in state.why
