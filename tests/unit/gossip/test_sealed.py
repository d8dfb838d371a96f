"""Sealed datagrams: what a member made once is opened once, and nothing else ever is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv.errors import InvalidArgument, LocalProtocolError
from p2pkv.gossip import sealed
from p2pkv.gossip._gossip import ReplayWindow
from p2pkv.gossip.keyring import Key, Keyring
from p2pkv.gossip.sealed import (
    COUNTER_MAX,
    FRAME_BYTES_MAX,
    HEADER,
    PAYLOAD_BYTES_MAX,
    SENDERS_MAX,
    STRANGERS_PER_S,
    WINDOW,
    Life,
    Opened,
    Opener,
    Refusal,
    Sealer,
)

A, B = (Key(bytes([n]) * 32) for n in (1, 2))
ONE, BOTH, TURNED, OTHER = Keyring([A]), Keyring([A, B]), Keyring([B, A]), Keyring([B])
ME = Life(7, 3, 99)


def pair(ring: Keyring = ONE, *, life: Life = ME, first: int = 0) -> tuple[Sealer, Opener]:
    return Sealer(ring, "cell", life, first=first), Opener(ring, "cell", 0.0)


@given(st.lists(st.binary(max_size=PAYLOAD_BYTES_MAX), min_size=1, max_size=20), st.integers(0, 1 << 62))
def test_what_is_sealed_is_opened(payloads: list[bytes], first: int) -> None:
    sealer, opener = pair(first=first)
    frames = [sealer.seal(payload) for payload in payloads]
    assert [opener.open(frame, 0.0) for frame in frames] == [Opened(ME, first + i, p) for i, p in enumerate(payloads)]
    assert max(map(len, frames)) <= FRAME_BYTES_MAX and not opener.refused


@settings(max_examples=200)
@given(st.binary(max_size=60), st.data())
def test_a_changed_bit_anywhere_is_refused(payload: bytes, data: st.DataObject) -> None:
    sealer, opener = pair()
    frame = bytearray(sealer.seal(payload))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    assert isinstance(opener.open(bytes(frame), 0.0), Refusal)
    frame[bit // 8] ^= 1 << bit % 8
    assert opener.open(bytes(frame), 0.0) == Opened(ME, 0, payload), "what was refused has used nothing up"


@settings(max_examples=300)
@given(st.binary(max_size=1_500))
def test_any_bytes_are_refused(data: bytes) -> None:
    _, opener = pair()
    assert isinstance(opener.open(data, 0.0), Refusal)
    assert sum(opener.refused.values()) == 1


def test_every_length_but_the_right_one_is_refused() -> None:
    sealer, opener = pair()
    frame = sealer.seal(b"payload")
    for length in range(len(frame)):
        assert isinstance(opener.open(frame[:length], 0.0), Refusal)
    assert isinstance(opener.open(frame + b"x", 0.0), Refusal)
    assert isinstance(opener.open(frame, 0.0), Opened)


def test_a_frame_is_opened_once() -> None:
    sealer, opener = pair()
    frames = [sealer.seal(bytes([i])) for i in range(5)]
    assert all(isinstance(opener.open(frame, 0.0), Opened) for frame in frames)
    assert [opener.open(frame, 0.0) for frame in frames] == [Refusal.REPLAYED] * 5


@given(st.permutations(range(40)), st.integers(0, 3))
def test_frames_may_come_in_any_order(order: list[int], lost: int) -> None:
    sealer, opener = pair()
    frames = [sealer.seal(bytes([i])) for i in range(40)]
    arrived = order[lost:]
    assert [opener.open(frames[i], 0.0) for i in arrived] == [Opened(ME, i, bytes([i])) for i in arrived]
    assert {opener.open(frames[i], 0.0) for i in arrived} == {Refusal.REPLAYED}


def test_what_is_too_far_behind_is_taken_for_a_replay() -> None:
    sealer, opener = pair()
    frames = [sealer.seal(b"") for _ in range(3 * WINDOW)]
    assert isinstance(opener.open(frames[WINDOW + 5], 0.0), Opened)
    assert isinstance(opener.open(frames[6], 0.0), Opened), "the last one within the window"
    assert opener.open(frames[5], 0.0) is Refusal.REPLAYED
    assert isinstance(opener.open(frames[-1], 0.0), Opened), "a jump past the window"
    assert opener.open(frames[WINDOW + 5], 0.0) is Refusal.REPLAYED
    assert isinstance(opener.open(frames[-2], 0.0), Opened)


@given(st.lists(st.integers(0, 3 * WINDOW), max_size=200))
def test_the_window_says_what_a_set_would(counters: list[int]) -> None:
    window = ReplayWindow()
    used: set[int] = set()
    for counter in counters:
        behind = max(used, default=-1) - counter
        assert window.fresh(counter) == (counter not in used and behind < WINDOW)
        if window.fresh(counter):
            window.use(counter)
            used.add(counter)
    assert not window.fresh(COUNTER_MAX), "the one after it would be the first again"


def test_counters_are_never_used_twice() -> None:
    ring_of = [ONE, BOTH, TURNED, OTHER]
    sealer, _ = pair()
    seen = set()
    for i in range(400):
        sealer.keyring = ring_of[i // 100]  # a rotation does not begin anew
        seen.add(HEADER.unpack(sealer.seal(b"same")[: HEADER.size])[-1])
    assert len(seen) == 400
    last = Sealer(ONE, "cell", ME, first=COUNTER_MAX - 1)
    last.seal(b"")
    with pytest.raises(LocalProtocolError, match="no counter"):
        last.seal(b"")


def test_two_processes_of_one_identity_do_not_share_a_key() -> None:
    """Else they would use each counter twice under it: from two such frames the payloads can be had."""
    ours, theirs = (Sealer(ONE, "cell", ME._replace(instance=n)) for n in (1, 2))
    assert ours.seal(bytes(64))[HEADER.size :] != theirs.seal(bytes(64))[HEADER.size :]


def test_another_key_or_cell_is_refused_and_told_apart() -> None:
    sealer, _ = pair()
    frame = sealer.seal(b"secret")
    assert Opener(OTHER, "cell", 0.0).open(frame, 0.0) is Refusal.UNKNOWN_KEY
    assert Opener(ONE, "other", 0.0).open(frame, 0.0) is Refusal.FORGED
    assert b"secret" not in frame


def test_a_node_cannot_speak_as_another_by_changing_the_header() -> None:
    sealer, opener = pair()
    frame = sealer.seal(b"")
    for at, field in ((6, 8), (14, 4), (18, 8), (26, 8)):
        forged = frame[:at] + bytes(b ^ 1 for b in frame[at : at + field]) + frame[at + field :]
        assert opener.open(forged, 0.0) is Refusal.FORGED


def test_lives_are_told_apart_each_with_its_own_window() -> None:
    """Which of them is the node's latest is the protocol's to judge: an earlier one must be told."""
    opener = Opener(ONE, "cell", 0.0)
    lives = [Life(7, 3, 1), Life(7, 4, 2), Life(7, 4, 3)]
    sealers = [Sealer(ONE, "cell", life) for life in lives]
    for _ in range(3):
        frames = [sealer.seal(b"") for sealer in sealers]
        assert [opener.open(frame, 0.0).life for frame in frames] == lives  # type: ignore[union-attr]
        assert {opener.open(frame, 0.0) for frame in frames} == {Refusal.REPLAYED}


def test_a_later_life_has_to_prove_itself_first() -> None:
    opener = Opener(ONE, "cell", 0.0)
    ours = Sealer(ONE, "cell", ME)
    assert isinstance(opener.open(ours.seal(b""), 0.0), Opened)
    forged = bytearray(ours.seal(b""))
    forged[14:18] = (100).to_bytes(4, "little")  # an epoch that would make the node's own frames stale
    assert opener.open(bytes(forged), 0.0) is Refusal.FORGED
    assert isinstance(opener.open(ours.seal(b""), 0.0), Opened)


def test_keys_rotate_without_a_frame_lost() -> None:
    """Each member goes through the three steps at a time of its own; at every moment all frames are opened."""
    steps = [ONE, BOTH, TURNED, OTHER]
    lives = [Life(n, 1, n) for n in range(4)]
    sealers = [Sealer(ONE, "cell", life) for life in lives]
    openers = [Opener(ONE, "cell", 0.0) for _ in lives]
    rng = random.Random(1)

    def talk() -> None:
        for sealer in sealers:
            frame = sealer.seal(b"now")
            assert all(isinstance(opener.open(frame, 0.0), Opened) for opener in openers)

    for step in steps:
        for n in rng.sample(range(4), 4):
            sealers[n].keyring = step
            openers[n].rekey(step)
            talk()
    old = Sealer(ONE, "cell", lives[0], first=1_000)
    assert openers[1].open(old.seal(b""), 0.0) is Refusal.UNKNOWN_KEY, "whatever was kept of it"


def test_strangers_are_looked_at_so_many_a_second() -> None:
    opener = Opener(ONE, "cell", 0.0)
    most = int(STRANGERS_PER_S)
    known = Sealer(ONE, "cell", ME)
    assert isinstance(opener.open(known.seal(b""), 0.0), Opened)
    forged = [HEADER.pack(1, 0, A.id, node + 100, 1, 1, 0) + bytes(16) for node in range(most + 10)]
    found = [opener.open(frame, 0.0) for frame in forged]
    assert found == [Refusal.FORGED] * (most - 1) + [Refusal.FLOODED] * 11
    assert isinstance(opener.open(known.seal(b""), 0.0), Opened), "who is known is heard meanwhile"
    assert opener.open(forged[-1], 0.5) is Refusal.FORGED
    assert len(opener._senders) == 1, "nothing is kept of them"


def test_senders_are_bounded_and_who_was_heard_longest_ago_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed, "SENDERS_MAX", 3)
    opener = Opener(ONE, "cell", 0.0)
    sealers = [Sealer(ONE, "cell", Life(n, 1, 1)) for n in range(4)]
    firsts = [sealer.seal(b"") for sealer in sealers]
    for now, frame in enumerate((firsts[0], firsts[1], firsts[2], sealers[0].seal(b""), firsts[3])):
        assert isinstance(opener.open(frame, float(now)), Opened)
    assert {life.node for life in opener._senders} == {0, 2, 3} and len(opener._voices) == 3
    assert opener.open(firsts[0], 9.0) is Refusal.REPLAYED
    assert SENDERS_MAX >= 1_024


def test_what_is_kept_of_one_sender_is_bounded() -> None:
    opener = Opener(ONE, "cell", 0.0)
    made = sealed.cipher(A, "cell", ME)
    for counter, flags in enumerate([*range(100), 0]):
        header = HEADER.pack(1, flags, A.id, *ME, counter)
        frame = header + made.encrypt(sealed._NONCE.pack(counter), b"", header)
        assert isinstance(opener.open(frame, 0.0), Opened)
        assert opener.open(frame, 0.0) is Refusal.REPLAYED
    assert len(opener._senders) == 1 and 1 <= len(opener._voices) <= sealed.VOICES_MAX


def test_another_life_of_this_node_begins_with_counters_and_a_key_of_its_own() -> None:
    sealer, opener = pair()
    first = sealer.seal(b"same")
    sealer.begin(ME._replace(epoch=ME.epoch + 1, instance=99))
    second = sealer.seal(b"same")
    assert HEADER.unpack(second[: HEADER.size])[-1] == HEADER.unpack(first[: HEADER.size])[-1]
    assert first[HEADER.size :] != second[HEADER.size :]
    assert isinstance(opener.open(second, 0.0), Opened)


def test_a_payload_that_is_too_long_is_refused() -> None:
    sealer, _ = pair()
    with pytest.raises(InvalidArgument, match="too much"):
        sealer.seal(bytes(PAYLOAD_BYTES_MAX + 1))
