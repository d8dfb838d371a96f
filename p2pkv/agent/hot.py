"""What peers used last, asked of several of them side by side; and what we used last, for those who ask.

Pages of all peers together are ranked: what more of them have comes first, then what they used later. Within a page a
prefix comes before what follows it, as it does at each of them, so that what is pulled before memory or time runs out
is of use.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from p2pkv.errors import Busy, InvalidArgument, P2PKVError, RemoteProtocolError
from p2pkv.gossip.driver import PeerNetwork
from p2pkv.store.dram import DramStore
from p2pkv.types import NodeId, mix64
from p2pkv.wire.peer import HOT_MAX, Hot, HotKeys

log = logging.getLogger(__name__)

FEATURE: Final = "hot"
"""In the card of a node that understands HOT and REPLICATE."""
PEERS_MAX: Final = 8
"""Asked by one node: more would know little more, and a cell that starts anew asks everybody."""
ASK_S: Final = 2.0
MARKS: Final = 256
"""Blocks looked at in one turn of the event loop, with the store locked: some 50 us."""
MARKS_AGAIN_S: Final = 5.0


def rank(pages: Sequence[Sequence[bytes]]) -> list[bytes]:
    """Each key once: what is in more pages first, then by its best place in any of them."""
    count: dict[bytes, int] = {}
    place: dict[bytes, int] = {}
    for page in pages:
        for position, key in enumerate(dict.fromkeys(page)):
            count[key] = count.get(key, 0) + 1
            place[key] = min(position, place.get(key, position))
    return sorted(count, key=lambda key: (-count[key], place[key]))


class HotAnswers:
    """The owner's half. On the event loop's thread."""

    def __init__(self, store: DramStore, network: PeerNetwork, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._clock = clock
        self._counted_at: dict[int, float] = {}
        network.on(Hot, self._on_hot)

    async def _on_hot(self, asker: object, hot: msgspec.Struct) -> HotKeys:
        assert isinstance(hot, Hot)
        if not hot.after:
            await self._count_marks(hot.namespace)
        return HotKeys((await self._next(hot.namespace, hot.after))[: hot.blocks_max])

    async def _next(self, namespace: int, after: bytes) -> list[bytes]:
        """What comes after a key; none: that was all. Other namespaces' blocks between are passed over, look by look.

        Raises:
            InvalidArgument: the key is not here any more, so nobody knows what comes after it.
            Busy: blocks are used so fast that there is no getting past them.
        """
        store = self._store
        begin = place = store.place_of(namespace, after) if after else b""
        blocks = sum(store.count(layout.namespace) for layout in store.layouts())
        for _ in range(2 + 2 * blocks // HOT_MAX):  # a look is at HOT_MAX blocks or more: all of them, twice
            look = store.look_hot(namespace, HOT_MAX, place)
            if look is None and place == begin:
                raise InvalidArgument("the block to go on from is not here any more", hint="Ask from the beginning.")
            if look is not None and (look.keys or not look.place):
                return look.keys
            place = begin if look is None else look.place
            await asyncio.sleep(0)
        raise Busy("what was used last changes faster than it can be told")

    async def _count_marks(self, namespace: int) -> None:
        """Engines read by themselves and only leave a mark; that is a use like any other."""
        now = self._clock()
        if not self._store.block_bytes(namespace) or now - self._counted_at.get(namespace, -1e9) < MARKS_AGAIN_S:
            return
        self._counted_at[namespace] = now
        step = b""
        while step := self._store.count_marks(namespace, step, MARKS, now):
            await asyncio.sleep(0)


class HotPeers:
    """The asker's half, for one namespace: page after page of what its peers used last."""

    def __init__(self, network: PeerNetwork, namespace: int, usable: Callable[[int], bool], salt: int) -> None:
        self._network = network
        self._namespace = namespace
        having = [
            int(peer.node)
            for peer in network.peers()
            if peer.alive
            and FEATURE in peer.card.features
            and usable(int(peer.node))
            and any(layout.namespace == namespace for layout in peer.card.layouts)
        ]
        self._after = dict.fromkeys(sorted(having, key=lambda node: mix64(node ^ salt))[:PEERS_MAX], b"")
        self._again: set[int] = set()
        self.asked = len(self._after)
        """Peers that were to be asked."""

    @property
    def left(self) -> int:
        """Peers that may have more."""
        return len(self._after)

    async def page(self) -> list[bytes]:
        """What comes next, ranked; none, and no peer :attr:`left`: that was all.

        A peer that does not answer is not asked again. One that has lost its place begins anew, once.
        """
        pages = await asyncio.gather(*(self._ask(node) for node in list(self._after)))
        return rank(pages)

    async def _ask(self, node: int) -> list[bytes]:
        try:
            link = await self._network.reach(node, ASK_S)
            answer = await link.request(Hot(self._namespace, HOT_MAX, self._after[node]), ASK_S)
        except P2PKVError as error:
            log.info("%s does not say what it used last: %s", NodeId(node), error)
            if isinstance(error, RemoteProtocolError) and self._after[node] and node not in self._again:
                self._again.add(node)  # it has answered: what we went on from may have gone there
                self._after[node] = b""
                return []
            answer = None
        if not isinstance(answer, HotKeys) or not answer.hashes:
            del self._after[node]
            return []
        self._after[node] = answer.hashes[-1]
        return answer.hashes
