"""The protocol core against what a hostile or broken cell may say: counted, dropped, never believed, bounded."""

from __future__ import annotations

import random
import struct
from typing import Final

import pytest

from p2pkv.gossip._gossip import Gossip
from p2pkv.gossip.sealed import Life
from p2pkv.index.hashing import entries_checksum, pack_keys
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier

OWN: Final = Life(1, 5, 11)
PEER: Final = Life(2, 1, 21)
ADDRESS: Final = "10.0.0.2:1"


def hello(
    echo: int = OWN.instance, *, known: bool = True, ask: bool = False, address: str = ADDRESS, most: int = 3
) -> bytes:
    head = struct.pack("<BBBBQI", 2, 2, most, ask | known << 1, echo, 1)
    return head + bytes([len(address)]) + address.encode() + b"\4\0card"


def delta(seq: int, checksum: int, keys: list[int] | None = None, tier: Tier = Tier.DRAM) -> bytes:
    counts = [len(keys or []) if t == tier else 0 for t in range(5)]
    return struct.pack("<BQQI5H", 1, seq, checksum, 1, *counts) + pack_keys(keys or [])


def sum_of(keys: list[int], tier: Tier = Tier.DRAM) -> int:
    return entries_checksum(pack_keys(keys), tier)


class Node:
    """A core, and what it says."""

    def __init__(self, **settings: object) -> None:
        self.now = 100.0
        self.index = PrefixIndex(max_nodes=64, max_entries=1 << 16)
        self.log = OwnershipLog(OWN.epoch, hold_ms=0)
        self.core = Gossip(
            {"members_max": 8, **settings}, *OWN, "10.0.0.1:1", self.index.entries, self.log.entries, 1, self.now
        )
        self.core.set_card(self.now, 1, b"card")

    def hear(self, payload: bytes, life: Life = PEER, source: str = ADDRESS) -> None:
        self.core.on_frame(self.now, *life, source, payload)

    def read(self, payload: bytes, life: Life = PEER) -> None:
        self.core.on_letter(self.now, *life, payload)

    def wait(self, seconds: float, step_s: float = 0.05) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step_s)
            self.core.on_timer(self.now)

    def said(self, kind: int) -> list[bytes]:
        frames, letters, _ = self.core.take()
        return [payload for payload, _ in frames + letters if payload[0] == kind]  # type: ignore[operator]

    def visible(self, keys: list[int]) -> int:
        return sum(self.index.contains_any(pack_keys(keys)))

    def count(self, name: str) -> int:
        return self.core.counts[name]


@pytest.fixture
def node() -> Node:
    made = Node()
    made.hear(hello())
    made.hear(delta(0, 0))
    assert made.core.alive == 1
    return made


def test_a_sequence_that_goes_back_is_ignored(node: Node) -> None:
    node.hear(delta(1, sum_of([7]), [7]))
    node.hear(delta(2, sum_of([7, 8]), [8]))
    node.hear(delta(1, sum_of([9]), [9]))
    assert node.visible([7, 8]) == 2 and node.visible([9]) == 0 and node.core.member(2)[9] == 2  # type: ignore[index]


def test_a_set_without_the_owners_checksum_is_hidden_and_asked_for(node: Node) -> None:
    node.hear(delta(1, sum_of([7]), [7]))
    node.hear(delta(2, 12345, [8]))
    assert node.visible([7, 8]) == 0 and node.core.alive == 0
    node.wait(0.1)
    assert len(node.said(17)) == 1, "WANT"


def snapshot(keys: list[int], seq: int, checksum: int, *, owner: Life = PEER, part: int = 0, parts: int = 1) -> bytes:
    head = struct.pack("<BQIQQQII5I", 18, *owner, seq, checksum, part, parts, 0, 0, len(keys), 0, 0)
    return head + pack_keys(keys)


def test_a_snapshot_whose_checksum_lies_is_refused_whoever_it_is_from(node: Node) -> None:
    node.hear(delta(200, sum_of([7, 8])))
    node.read(snapshot([7, 9], 200, sum_of([7, 8])))  # not the sum of what is in it
    node.read(snapshot([7, 9], 200, sum_of([7, 9])))  # not what the owner says
    assert node.visible([7, 8, 9]) == 0 and node.count("snapshots_refused") == 2
    node.read(snapshot([7, 8], 200, sum_of([7, 8])))
    assert node.visible([7, 8]) == 2 and node.visible([9]) == 0


def test_a_snapshot_that_is_ahead_of_its_owner_waits_for_the_owners_word(node: Node) -> None:
    node.hear(delta(1, sum_of([7]), [7]))
    node.read(snapshot([7, 8], 5, sum_of([7, 8])))
    assert node.visible([7]) == 1 and node.visible([8]) == 0
    node.hear(delta(5, sum_of([7, 8])))
    assert node.visible([7, 8]) == 2


def relay(body: bytes, owner: Life = PEER) -> bytes:
    return struct.pack("<BQIQ", 4, *owner) + body[1:]


def test_what_others_repeat_is_shown_when_the_owner_has_named_that_point(node: Node) -> None:
    third = Life(3, 1, 31)
    node.hear(hello(address="10.0.0.3:1"), third, "10.0.0.3:1")
    node.hear(relay(delta(1, sum_of([7]), [7])), third)
    assert node.visible([7]) == 0
    node.hear(relay(delta(1, sum_of([9]), [9])), Life(4, 1, 41))
    assert node.count("unintroduced") == 1, "from whom nobody knows"
    node.hear(delta(1, sum_of([7])))
    assert node.visible([7]) == 1


def test_an_owner_over_its_quota_loses_all_and_says_so() -> None:
    node = Node(entries_per_owner_max=100)
    node.hear(hello())
    node.hear(delta(1, sum_of(list(range(100))), list(range(100))))
    assert node.visible(list(range(100))) == 100
    node.hear(delta(2, sum_of(list(range(101))), [100]))
    assert node.visible(list(range(101))) == 0 and node.count("over_quota") == 1 and node.index.stats().entries == 0


def test_an_earlier_epoch_and_a_second_process_are_told_and_change_nothing(node: Node) -> None:
    node.hear(delta(1, sum_of([7]), [7]))
    node.core.take()
    for life in (PEER._replace(epoch=0, instance=9), PEER._replace(instance=9)):
        node.hear(hello(), life, "10.0.0.9:1")
        node.hear(delta(1, sum_of([8]), [8]), life, "10.0.0.9:1")
    assert [struct.unpack("<BQIQI", text)[:4] for text in node.said(6)] == [(6, 9, 1, 21)] * 4
    assert node.visible([7]) == 1 and node.visible([8]) == 0
    assert node.count("stale") == 2 and node.count("duplicate") == 2


def test_hellos_that_do_not_repeat_our_instance_make_nobody_a_member() -> None:
    node = Node()
    for echo in (0, 10, OWN.instance + 1):
        node.hear(hello(echo, ask=True))
        node.hear(delta(1, sum_of([7]), [7]))
    assert node.core.members() == [] and node.visible([7]) == 0


def test_another_protocol_is_refused(node: Node) -> None:
    node.hear(struct.pack("<BBBB", 2, 9, 12, 0) + hello()[4:], Life(7, 1, 71))
    assert node.count("protocol") == 1 and node.core.slot_of(7) == 0


def test_a_million_fake_members_are_bounded_by_the_tables() -> None:
    """By a member that has gone mad: digests of lives that are nowhere, and HELLOs of lives that it makes up."""
    node = Node(members_max=64)
    node.hear(hello())
    rng = random.Random(1)
    named = 0
    while named < 1_000_000:
        entries = []
        for i in range(4_000):
            address = f"10.{(named + i) >> 16}.{(named + i) >> 8 & 255}.{(named + i) & 255}:1".encode()
            entries.append(struct.pack("<QIQQI", rng.getrandbits(63), 1, 1, 5, 0) + bytes([len(address)]) + address)
        named += len(entries)
        node.read(struct.pack("<BBI", 16, 0, len(entries)) + b"".join(entries))
        node.core.take()
    for i in range(20_000):
        life = Life(1_000 + i, 1, 7)
        node.hear(hello(address=f"10.9.{i >> 8}.{i & 255}:1"), life, f"10.9.{i >> 8}.{i & 255}:1")
        node.hear(delta(0, 0), life)
    node.core.take()
    assert len(node.core.members()) <= 64 and node.core.contacts <= 2 * 64 + 64
    assert node.count("contacts_full") > 900_000
    assert node.core.slot_of(PEER.node), "who was there stays"


def test_answers_to_strangers_are_bounded_per_second() -> None:
    node = Node(members_max=1_024)
    for i in range(10_000):
        node.hear(hello(0, ask=True, address=f"10.1.{i >> 8}.{i & 255}:1"), Life(50 + i, 1, 1), f"10.1.{i % 64}.1:1")
    assert 0 < len(node.said(2)) <= 4_001 and node.count("hellos_suppressed") >= 5_000


@pytest.mark.parametrize("jump_s", [-1e6, -10.0, 3_600.0, 1e9])
def test_a_clock_that_jumps_hides_nobody_for_longer_than_it_takes_to_hear_them(node: Node, jump_s: float) -> None:
    """Monotonic clocks do not, but machines are suspended, and hypervisors lie."""
    node.hear(delta(1, sum_of([7]), [7]))
    node.now += jump_s
    node.core.on_timer(node.now)
    assert node.visible([7]) == 1, "it stood still itself: nobody is judged yet"
    node.hear(delta(1, sum_of([7])))
    for _ in range(40):
        node.wait(0.1)
        node.hear(delta(1, sum_of([7])))
    assert node.visible([7]) == 1 and node.core.alive == 1


@pytest.mark.parametrize("kind", range(24))
def test_truncated_and_oversized_messages_are_counted_and_dropped(node: Node, kind: int) -> None:
    rng = random.Random(kind)
    members = len(node.core.members())
    for length in (0, 1, 2, 7, 30, 60, 1_350, 5_000):
        payload = bytes([kind]) + rng.randbytes(length)
        if kind == 5 and length == 0:
            continue  # that is LEAVE
        node.hear(payload)
        node.read(payload)
        node.hear(payload, Life(77, 1, 1))
    node.core.take()
    assert len(node.core.members()) == members and node.count("malformed") > 0
    assert node.visible([7]) == 0
