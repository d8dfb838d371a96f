"""What this node knew of the others before it was started anew: kept in its state directory, asked until they are back.

Only questions over HTTP are answered from it, each answer with its age: a pull needs a peer that lives. A node is
forgotten when it is heard from (its own stream says more, and better), and all of them ``purge_s`` after the start, as
any node is that is not heard from for so long.

One event loop's; files are read and written by threads of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple, TypeVar

from p2pkv.errors import P2PKVError, RemoteProtocolError
from p2pkv.gossip.views import PeerView
from p2pkv.index.dump import NOTE_BYTES_MAX, Word, dump, load
from p2pkv.index.prefix import NodeMatch, PrefixIndex
from p2pkv.types import Layout, NodeId
from p2pkv.wire.frame import FrameDecoder
from p2pkv.wire.peer import CODEC, Advert, Card

FILE: Final = "index.dump"
AGE_MAX_S: Final = 3_600.0
"""What is older is not worth an answer: caches have turned over many times."""

log = logging.getLogger("p2pkv.agent")
_T = TypeVar("_T")


class Recalled(NamedTuple):
    """One node as it was known. ``proven_at``: Unix seconds at which that was last known to be so."""

    card: Card
    proven_at: float

    @property
    def node(self) -> NodeId:
        """Its identity."""
        return NodeId(self.card.node)

    @property
    def age_ms(self) -> float:
        """Of what is known of it."""
        return max(0.0, time.time() - self.proven_at) * 1e3


class Remembered:
    """Nodes that were known before, and what they held.

    Args:
        path: of the dump; empty: nothing is remembered.
        purge_s: how long after the start a node that does not come back is remembered.
    """

    def __init__(self, path: str, *, purge_s: float) -> None:
        self.path = path
        self.saves = 0
        self.failures = 0
        """Dumps that could not be written, or read."""
        self.saved_bytes = 0
        self._index: PrefixIndex | None = None
        self._slots: dict[int, Recalled] = {}
        self._until = time.monotonic() + purge_s
        self._saving = False

    def __len__(self) -> int:
        """How many nodes are remembered."""
        return len(self._slots)

    def __iter__(self) -> Iterator[Recalled]:
        return iter(self._slots.values())

    @property
    def layouts(self) -> Iterable[Layout]:
        """Of the nodes that are remembered, in no particular order."""
        return {layout: None for recalled in self for layout in recalled.card.layouts}

    def match(self, keys: bytes) -> Iterator[tuple[Recalled, NodeMatch]]:
        """Who held how much of a chain of packed index keys (holes are looked behind)."""
        if self._index is not None:
            for row in self._index.match(keys, beyond=True):
                if recalled := self._slots.get(row.node):
                    yield recalled, row

    async def load(self, known: Callable[[], Iterable[PeerView]]) -> None:
        """Read the dump; ``known``: the peers, asked when that is done. A dump that cannot be read is only logged."""
        if not self.path:
            return
        index, slots = PrefixIndex(), dict[int, Recalled]()

        def slot_of(word: Word) -> int | None:
            card = _card(word.note)
            if card is None or not 0 <= time.time() - word.proven_at <= AGE_MAX_S:
                return None
            slots[len(slots)] = Recalled(card, word.proven_at)
            return len(slots) - 1

        try:
            await _in_thread(lambda: load(self.path, index, slot_of))
        except FileNotFoundError:
            return
        except (P2PKVError, OSError) as error:
            self.failures += 1
            log.warning("what was known before the start is not remembered: %s", error)
            return
        self._index, self._slots = index, slots
        log.info("remembered: %d nodes with %d entries, until they are back", len(slots), index.stats().entries)
        for peer in known():
            self.heard(peer)

    def heard(self, peer: PeerView) -> None:
        """A node's state is known from itself: alive, gone for good, or another life of it."""
        for slot, recalled in list(self._slots.items()):
            same = recalled.card.node == peer.node
            if same and (peer.alive or peer.left or peer.epoch != recalled.card.epoch):
                self._forget(slot)

    def tick(self) -> None:
        """Forget whoever has not come back in time."""
        if self._slots and time.monotonic() >= self._until:
            log.info("remembered no longer: %d nodes that did not come back", len(self._slots))
            self._slots, self._index = {}, None

    async def save(self, index: PrefixIndex, peers: Iterable[PeerView]) -> None:
        """Write down what is known now. Not while anybody is remembered: then the file says more than this node knows.

        An error is only logged: what was there before is there still.
        """
        if not self.path or self._slots or self._saving:
            return
        now = time.time()
        owners = [
            (peer.slot, Word(int(peer.node), peer.epoch, peer.seq, now - peer.age_ms / 1e3, _note(peer.card)))
            for peer in peers
            if peer.slot is not None and peer.age_ms is not None
        ]
        self._saving = True
        try:
            self.saved_bytes = await _in_thread(lambda: dump(self.path, index, owners, taken_at=now))
            self.saves += 1
        except P2PKVError as error:
            self.failures += 1
            log.warning("%s", error)
        finally:
            self._saving = False

    def _forget(self, slot: int) -> None:
        del self._slots[slot]
        if self._index is not None:
            self._index.hide(slot, True)  # taking the entries out, one by one, is not worth it
        if not self._slots:
            self._index = None


def _note(card: Card) -> bytes:
    return CODEC.encode(Advert(card))


def _card(note: bytes) -> Card | None:
    with contextlib.suppress(RemoteProtocolError):
        for frame in FrameDecoder(NOTE_BYTES_MAX).feed(note):
            message = CODEC.decode(frame)
            if isinstance(message, Advert):
                return message.card
    return None


async def _in_thread(work: Callable[[], _T]) -> _T:
    """Run in a thread that nobody waits for at the end: a disk that hangs must not keep the process from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[_T] = loop.create_future()

    def finish(result: _T | None, error: BaseException | None) -> None:
        if done.done():
            return
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failed = None, None
        try:
            result = work()
        except BaseException as error:
            failed = error
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(finish, result, failed)

    threading.Thread(target=run, name="p2pkv-dump", daemon=True).start()
    return await done
