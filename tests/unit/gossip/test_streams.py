"""The ends of an ownership stream: a reader that joins at any moment ends up with the owner's set."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv.gossip import streams
from p2pkv.gossip.streams import Feed, Heard, OwnerStream
from p2pkv.index.hashing import unpack_keys
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier
from p2pkv.wire.frame import FrameDecoder
from p2pkv.wire.peer import CODEC, Delta, Snapshot


class Reader:
    def __init__(self, feed: Feed) -> None:
        self.index = PrefixIndex(max_nodes=4, max_entries=1 << 20)
        self.stream = OwnerStream(self.index, 1, 0.0)
        self.heard = Heard.OPEN
        self.hear(feed.catch_up())

    def hear(self, frames: list[bytes]) -> None:
        for data in frames:
            for frame in FrameDecoder().feed(data):
                message = CODEC.decode(frame)
                assert isinstance(message, Delta | Snapshot)
                self.heard = self.stream.hear(message, 0.0)

    def entries(self) -> set[tuple[int, int]]:
        return {(k, int(t)) for t, packed in self.index.snapshot(1) for k in unpack_keys(packed)}


def entries_of(log: OwnershipLog) -> set[tuple[int, int]]:
    return {
        (k, tier)
        for part in log.snapshot()
        for tier, packed in enumerate(part.keys_by_tier)
        for k in unpack_keys(packed)
    }


@settings(deadline=None)
@given(seed=st.integers(0, 1 << 32), changes=st.integers(1, 40), tail_bytes=st.sampled_from((0, 200, 1 << 20)))
def test_readers_that_join_whenever_end_up_with_the_owners_set(seed: int, changes: int, tail_bytes: int) -> None:
    rng = random.Random(seed)
    log = OwnershipLog(1, hold_ms=0)
    streams.TAIL_BYTES_MIN, kept = tail_bytes, streams.TAIL_BYTES_MIN  # type: ignore[misc]
    try:
        feed, readers = Feed(log), []
        for _ in range(changes):
            log.record([rng.randrange(30) for _ in range(rng.randrange(1, 6))], Tier(rng.randrange(5)), 0.0)
            frames = feed.flush(0.0)
            for reader in readers:
                reader.hear(frames)
            if rng.random() < 0.3:
                readers.append(Reader(feed))
        readers.append(Reader(feed))
    finally:
        streams.TAIL_BYTES_MIN = kept  # type: ignore[misc]
    for reader in readers:
        reader.hear([feed.heartbeat()])
        assert reader.heard is Heard.CURRENT
        assert reader.entries() == entries_of(log)


def test_a_thousand_readers_share_one_checkpoint() -> None:
    log = OwnershipLog(1, hold_ms=0)
    log.record(range(50_000), Tier.DRAM, 0.0)
    feed = Feed(log)
    feed.flush(0.0)
    first = feed.catch_up()
    for i in range(1_000):
        log.record([100_000 + i], Tier.DRAM, 0.0)
        feed.flush(0.0)
        assert feed.catch_up()[0] is first[0]


def test_the_tail_is_never_much_longer_than_the_checkpoint() -> None:
    log = OwnershipLog(1, hold_ms=0)
    feed = Feed(log)
    for i in range(1, 401):
        log.record(range(i * 100, i * 100 + 100), Tier.DRAM, 0.0)
        log.record(range(i * 100 - 100, i * 100), Tier.GONE, 0.0)
        feed.flush(0.0)
        assert sum(map(len, feed.catch_up())) < streams.TAIL_BYTES_MIN * 1.2


def test_a_full_index_is_an_overflow_and_not_an_exception() -> None:
    log = OwnershipLog(1, hold_ms=0)
    log.record(range(100), Tier.DRAM, 0.0)
    feed = Feed(log)
    feed.flush(0.0)
    stream = OwnerStream(PrefixIndex(max_nodes=2, max_entries=10), 1, 0.0)
    messages = [CODEC.decode(f) for data in feed.catch_up() for f in FrameDecoder().feed(data)]
    assert isinstance(messages[0], Snapshot) and stream.hear(messages[0], 0.0) is Heard.OVERFLOW
