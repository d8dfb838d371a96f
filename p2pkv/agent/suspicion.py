"""What failed its checksum: not asked of that owner again, and the owner is told, who looks for itself.

Reader's half: :meth:`Suspicion.rejected`. Owner's half: the handler of SUSPECT, which reads its copy once more; a block
that has gone bad in this node's memory is dropped, and with that the cell hears that it is gone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from p2pkv.errors import Busy, P2PKVError
from p2pkv.gossip.driver import PeerNetwork
from p2pkv.store.arena import Arena
from p2pkv.store.dram import DramStore
from p2pkv.transport.distrust import Distrust
from p2pkv.transport.movers import Movers, Work
from p2pkv.types import NodeId, Status
from p2pkv.wire.peer import SUSPECTS_MAX, Suspect, Suspected

log = logging.getLogger(__name__)

FEATURE: Final = "suspect"
"""In the card of a node that understands SUSPECT."""
TELL_S: Final = 2.0
TELL_AGAIN_S: Final = (0.0, 0.3, 1.0, 5.0)
"""Pauses before each attempt."""
TELLING_MAX: Final = 64
"""Messages on their way; beyond that owners are not told, which costs them only what they might have learnt."""
LOOK_S: Final = 1.0
HOLDER: Final = (1 << 64) - 1
"""Whom the leases of our own looking belong to: no node and no connection has this number."""


class Suspicion:
    """See the module's docstring. On the event loop's thread.

    Args:
        on_change: told when a block becomes distrusted, or nobody's copy of it is any more.
        on_dropped: called after blocks of our own were dropped.
    """

    def __init__(
        self,
        *,
        store: DramStore,
        arena: Arena,
        movers: Movers,
        network: PeerNetwork,
        on_change: Callable[[int, bytes, bool], None],
        on_dropped: Callable[[], None],
        lease_ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.distrust = Distrust()
        self.told_bad = 0
        """Blocks of ours that were bad when a reader had us look."""
        self._store = store
        self._arena = arena
        self._movers = movers
        self._network = network
        self._on_change = on_change
        self._on_dropped = on_dropped
        self._lease_ttl_s = lease_ttl_s
        self._clock = clock
        self._telling: set[asyncio.Task[None]] = set()
        self._looking = False
        network.on(Suspect, self._on_suspect)

    async def stop(self) -> None:
        """End what is under way."""
        for task in self._telling:
            task.cancel()
        await asyncio.gather(*self._telling, return_exceptions=True)

    def tick(self) -> None:
        """Now and then: forget what is old."""
        for _, namespace, key in self.distrust.expire(self._clock()):
            self._lifted(namespace, key)

    # --- reader

    def distrusted(self, node: int, namespace: int, key: bytes) -> bool:
        """Whether the node is not to be asked for this block."""
        return self.distrust.has(node, namespace, key)

    def rejected(self, node: int, namespace: int, keys: Sequence[bytes]) -> None:
        """What a node sent for these failed the checksum."""
        now = self._clock()
        for key in keys:
            oldest = self.distrust.add(node, namespace, key, now)
            self._on_change(namespace, key, True)
            if oldest is not None:
                self._lifted(*oldest[1:])
        peer = self._network.peer(node)
        if peer is None or FEATURE not in peer.card.features or len(self._telling) >= TELLING_MAX:
            return
        for first in range(0, len(keys), SUSPECTS_MAX):
            task = asyncio.get_running_loop().create_task(
                self._tell(node, Suspect(namespace, list(keys[first : first + SUSPECTS_MAX])))
            )
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell(self, node: int, suspect: Suspect) -> None:
        answer: object = None
        for pause_s in TELL_AGAIN_S:
            await asyncio.sleep(pause_s)
            try:
                link = await self._network.reach(node, TELL_S)
                answer = await link.request(suspect, TELL_S)
                break
            except P2PKVError as error:
                log.info("%s was not told of %d bad block(s): %s", NodeId(node), len(suspect.hashes), error)
        if not isinstance(answer, Suspected) or len(answer.statuses) != len(suspect.hashes):
            return
        good = [key for key, status in zip(suspect.hashes, answer.statuses, strict=True) if status == Status.OK]
        for key in good:
            self.distrust.lift(node, suspect.namespace, key)
            self._lifted(suspect.namespace, key)
        if good:
            log.warning("%d block(s) of %s are good there: they were spoilt on the way", len(good), NodeId(node))

    def _lifted(self, namespace: int, key: bytes) -> None:
        if not self.distrust.anybody(namespace, key):
            self._on_change(namespace, key, False)

    # --- owner

    async def _on_suspect(self, asker: object, suspect: msgspec.Struct) -> Suspected:
        assert isinstance(suspect, Suspect)
        if self._looking:
            raise Busy("another peer's suspicion is being looked into")
        self._looking = True
        try:
            return Suspected(bytes(await self._look(suspect)))
        finally:
            self._looking = False

    async def _look(self, suspect: Suspect) -> list[Status]:
        """Checksum the blocks once more, where they lie."""
        now, store = self._clock(), self._store
        pinned = store.pin(suspect.namespace, suspect.hashes, self._lease_ttl_s, now, HOLDER)
        here = [(i, block) for i, block in enumerate(pinned.blocks) if block is not None]
        statuses = [Status.MISS] * len(suspect.hashes)
        try:
            base = self._arena.base_address
            items = [(0, base + block.offset, block.length) for _, block in here]
            hashed = await self._movers.copy(Work.HASH, items, deadline_s=LOOK_S)
            bad = 0
            for n, (i, block) in enumerate(here):
                if not hashed.ok[n]:
                    continue  # no time: it stays, and stays distrusted there
                if hashed.digest(n) == block.checksum:
                    statuses[i] = Status.OK
                else:
                    bad += store.delete(suspect.namespace, suspect.hashes[i])
        finally:
            if pinned.lease_id:
                store.release(pinned.lease_id, self._clock(), HOLDER)
        if bad:
            self.told_bad += bad
            self._on_dropped()
            log.error("%d block(s) had gone bad in this node's memory and were dropped: check its DIMMs", bad)
        return statuses
