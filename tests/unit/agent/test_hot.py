"""How what several peers used last becomes one list, and how each of them tells it to the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.agent.hot import FEATURE, HotAnswers, HotPeers, rank
from p2pkv.errors import InvalidArgument, P2PKVError
from p2pkv.gossip.link import peer_error, refusal
from p2pkv.store.base import Reservation
from p2pkv.store.dram import DramStore
from p2pkv.types import Layout, NodeId
from p2pkv.wire.peer import HOT_MAX, Hot, HotKeys

A, B, C, D = (bytes([i]) * 8 for i in range(4))


def test_what_more_peers_have_comes_first_then_what_they_used_later() -> None:
    assert rank([[A, B, C], [B, D]]) == [B, A, D, C]
    assert rank([]) == rank([[], []]) == []


def test_naming_a_block_twice_does_not_make_it_two_peers() -> None:
    assert rank([[A, A, B], [B]]) == [B, A]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_a_prefix_comes_before_what_follows_it(depths: list[int]) -> None:
    chain = [i.to_bytes(8, "little") for i in range(12)]
    ranked = rank([chain[:depth] for depth in depths])
    assert ranked == chain[: max(depths)]


PAGE = 4096
LAYOUT = Layout(model="m", revision="r", kv_dtype="bf16", block_tokens=16, block_bytes=PAGE, world=8)
PEER = 7


def keys_of(name: str, count: int) -> list[bytes]:
    return [f"{name}-{i:08}".encode() for i in range(count)]


class Owner:
    """An owner's half over a store, and a network of one through which an asker's half speaks to it."""

    def __init__(self, slots: int) -> None:
        self.store = DramStore(slots * PAGE)
        self.namespace = self.store.register(LAYOUT)
        self.others = self.store.register(LAYOUT.replace(rank=1))
        self.asked: list[Hot] = []
        self.before_answer: Callable[[Hot], None] = lambda hot: None
        self._handlers: dict[type[msgspec.Struct], Callable[[object, msgspec.Struct], Any]] = {}
        peer = SimpleNamespace(node=PEER, alive=True, card=SimpleNamespace(features=[FEATURE], layouts=[LAYOUT]))
        network: Any = SimpleNamespace(on=self._handlers.__setitem__, peers=lambda: [peer], reach=self._reach)
        HotAnswers(self.store, network)
        self.peers = HotPeers(network, LAYOUT.namespace, lambda node: True, 1)

    async def _reach(self, node: int, deadline_s: float) -> Owner:
        return self

    async def request(self, hot: Hot, deadline_s: float) -> HotKeys:
        """As over the wire: an error becomes what the asker's link makes of it."""
        self.asked.append(hot)
        self.before_answer(hot)
        try:
            return await self.answer(hot.after, hot.blocks_max)
        except P2PKVError as error:
            raise refusal(peer_error(error), NodeId(PEER)) from error

    async def answer(self, after: bytes = b"", blocks_max: int = HOT_MAX) -> HotKeys:
        answer = await self._handlers[Hot](self, Hot(self.namespace, blocks_max, after))
        assert isinstance(answer, HotKeys)
        return answer

    def put(self, keys: Sequence[bytes], namespace: int) -> None:
        """The last one is the one used last."""
        for key in keys:
            place = self.store.reserve(namespace, key, 0.0)
            assert isinstance(place, Reservation)
            self.store.commit(place, bytes(16), 0.0)

    async def told(self) -> list[bytes]:
        """All that an asker hears, page after page, in order."""
        keys: list[bytes] = []
        while self.peers.left:
            keys += await self.peers.page()
        return keys


async def test_the_end_is_told_at_the_end_however_much_other_namespaces_have_between() -> None:
    owner = Owner(10_000)
    old, new = keys_of("old", 300), keys_of("new", 3)
    owner.put(old, owner.namespace)
    owner.put(keys_of("between", 5_000), owner.others)
    owner.put(new, owner.namespace)
    owner.put(keys_of("above", 3_000), owner.others)
    assert await owner.told() == new[::-1] + old[::-1]
    assert (await owner.answer(new[0], 2)).hashes == old[:-3:-1], "no more than was asked for"
    assert (await owner.answer(old[0])).hashes == []


async def test_a_namespace_that_has_nothing_is_told_so_after_one_way_through() -> None:
    owner = Owner(10_000)
    assert (await owner.answer()).hashes == []
    owner.put(keys_of("others", 5_000), owner.others)
    assert (await owner.answer()).hashes == []


async def test_others_have_their_turn_while_an_owner_passes_over_what_is_between() -> None:
    owner = Owner(10_000)
    owner.put(keys_of("mine", 1), owner.namespace)
    owner.put(keys_of("between", 8_000), owner.others)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.ensure_future(count())
    assert (await owner.answer()).hashes == keys_of("mine", 1)
    counting.cancel()
    assert turns >= 7


async def test_a_place_between_that_goes_meanwhile_is_not_the_end() -> None:
    owner = Owner(10_000)
    owner.put(keys_of("mine", 1), owner.namespace)
    owner.put(between := keys_of("between", 4_000), owner.others)
    asking = asyncio.ensure_future(owner.answer())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not asking.done()
    for key in between[1_000:]:
        owner.store.delete(owner.others, key)
    assert (await asking).hashes == keys_of("mine", 1)


async def test_where_an_owner_cannot_go_on_from_it_says_so() -> None:
    owner = Owner(100)
    owner.put(keys_of("mine", 3), owner.namespace)
    with pytest.raises(InvalidArgument):
        await owner.answer(b"never was here")
    owner.put(keys_of("others", 1), owner.others)
    with pytest.raises(InvalidArgument):
        await owner.answer(keys_of("others", 1)[0])


async def test_an_owner_that_has_lost_its_place_is_asked_from_the_beginning_once() -> None:
    owner = Owner(2_000)
    mine = keys_of("mine", 1_000)
    owner.put(mine, owner.namespace)
    lost: list[bytes] = []

    def lose(hot: Hot) -> None:
        if hot.after and not lost:
            lost.append(hot.after)
            owner.store.delete(owner.namespace, hot.after)

    owner.before_answer = lose
    assert set(await owner.told()) == set(mine)
    assert [hot.after for hot in owner.asked].count(b"") == 2


async def test_an_owner_that_loses_its_place_every_time_is_not_asked_for_ever() -> None:
    owner = Owner(2_000)
    owner.put(keys_of("mine", 1_000), owner.namespace)

    def lose(hot: Hot) -> None:
        owner.store.delete(owner.namespace, hot.after)

    owner.before_answer = lose
    await owner.told()
    assert [bool(hot.after) for hot in owner.asked] == [False, True, False, True]
