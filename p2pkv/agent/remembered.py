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

from p2pkv.errors import RemoteProtocolError
from p2pkv.gossip.views import PeerView
from p2pkv.index.dump import NOTE_BYTES_MAX, Interrupted, Word, dump, load
from p2pkv.index.prefix import NodeMatch, PrefixIndex
from p2pkv.types import Layout, NodeId
from p2pkv.wire.codec import pack
from p2pkv.wire.peer import Card, unpack_card

FILE: Final = "index.dump"
AGE_MAX_S: Final = 3_600.0
"""What is older is not worth an answer: caches have turned over many times."""
END_S: Final = 0.5
POLL_S: Final = 0.005

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
        self.saved_bytes = 0
        self.failures = 0
        """Dumps that could not be written, or read."""
        self._index: PrefixIndex | None = None
        self._slots: dict[int, Recalled] = {}
        # Not for longer than the next dump could wait: until nobody is remembered, none is written.
        self._until = time.monotonic() + min(purge_s, AGE_MAX_S / 2)
        self._loaded = not path
        self._worker: threading.Thread | None = None
        self._over = threading.Event()

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
            await self._work(lambda: load(self.path, index, slot_of, over=self._over.is_set))
        except (FileNotFoundError, Interrupted):
            return
        except Exception as error:
            self._failed("what was known before the start is not remembered", error)
            return
        finally:
            self._loaded = True
        self._index, self._slots = index, slots
        log.info("remembered: %d nodes with %d entries, until they are back", len(slots), index.stats().entries)
        for peer in known():
            self.heard(peer)

    def heard(self, peer: PeerView) -> None:
        """A node's state is known from itself: alive, gone for good, or another life of it, or in its place."""
        for slot, recalled in list(self._slots.items()):
            if recalled.card.node == peer.node:
                gone = peer.alive or peer.left or peer.epoch != recalled.card.epoch
            else:
                gone = peer.alive and peer.address == recalled.card.address
            if gone:
                self._forget(slot)

    def tick(self) -> None:
        """Forget whoever has not come back in time."""
        if self._slots and time.monotonic() >= self._until:
            log.info("remembered no longer: %d nodes that did not come back", len(self._slots))
            self._slots, self._index = {}, None

    async def save(self, index: PrefixIndex, peers: Iterable[PeerView]) -> None:
        """Write down what is known now. Not while anybody is remembered: then the file says more than this node knows.

        An error is logged and counted, and what was there before is there still.
        """
        if not self.path or not self._loaded or self._slots or self._worker is not None:
            return
        try:
            now = time.time()
            owners = list(_owners(peers, now))
            self.saved_bytes = await self._work(
                lambda: dump(self.path, index, owners, taken_at=now, over=self._over.is_set)
            )
            self.saves += 1
        except Exception as error:
            self._failed("what is known of peers was not written down", error)

    async def stop(self, deadline_s: float) -> None:
        """Wait for a dump that is being written, and end it when it is not done by then; end the reading of one.

        Nothing begins afterwards.
        """
        if not self._loaded:
            self._over.set()
        deadline = time.monotonic() + deadline_s
        while self._worker is not None and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        self._over.set()
        # At its next look, in milliseconds: native code must not come back from its work into an interpreter that ends.
        # Whoever hangs in the disk is not waited for any longer, and hangs in no such code.
        deadline = time.monotonic() + END_S
        while self._worker is not None and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        self.path = ""

    async def _work(self, work: Callable[[], _T]) -> _T:
        """Run in a thread that the interpreter does not wait for at its end."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[_T] = loop.create_future()

        def finish(result: _T | None, error: BaseException | None) -> None:
            self._worker = None
            if done.done():  # nobody waits any more
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

        self._worker = threading.Thread(target=run, name="p2pkv-dump", daemon=True)
        try:
            self._worker.start()
        except BaseException:
            self._worker = None
            raise
        return await done

    def _failed(self, what: str, error: Exception) -> None:
        self.failures += 1
        log.warning("%s: %s", what, error)

    def _forget(self, slot: int) -> None:
        del self._slots[slot]
        if self._index is not None:
            self._index.hide(slot, True)  # taking the entries out, one by one, is not worth it
        if not self._slots:
            self._index = None


def _owners(peers: Iterable[PeerView], now: float) -> Iterator[tuple[int, Word]]:
    """Slot and word of every peer that something is known of."""
    for peer in peers:
        if peer.slot is None or peer.proven_ms is None or not peer.entries:
            continue
        note = _note(peer.card)
        if len(note) > NOTE_BYTES_MAX:
            log.warning("what %s holds is not written down: its card has %d bytes", peer.node, len(note))
            continue
        yield peer.slot, Word(int(peer.node), peer.epoch, peer.seq, now - peer.proven_ms / 1e3, note)


def _note(card: Card) -> bytes:
    return pack(card)


def _card(note: bytes) -> Card | None:
    with contextlib.suppress(RemoteProtocolError):
        return unpack_card(note)
    return None
