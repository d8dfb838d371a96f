"""Datagrams that only members of the cell can make, read, or use twice. Sans-IO.

    offset  size  field
    0       1     version of this format
    1       1     flags (none defined yet; receivers ignore what they do not know)
    2       4     id of the cell key
    6       8     node
    14      4     epoch
    18      8     instance: drawn at random at every start of the node
    26      8     counter: grows with every frame of this (node, epoch, instance), and is never used twice
    34      n     AES-256-GCM of the payload; the 34 bytes before it are its associated data
    34 + n  16    tag

Little-endian. A frame is sealed once, whoever it is sent to. The AES key is derived from the cell key, the cell's name
and (node, epoch, instance) by HKDF-SHA256 (RFC 5869), and the nonce is the counter: so no two frames ever share both,
although all members share the cell key, and although a copied state directory may make two processes the same node and
epoch.

Whoever has the cell key can claim to be any node: members are trusted. Others can neither read, change, make nor repeat
a frame. They can drop them, and they can send what is not one: that costs an HMAC each at most, bounded per second.
"""

from __future__ import annotations

import enum
import struct
from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from p2pkv.errors import InvalidArgument, LocalProtocolError
from p2pkv.gossip._gossip import FrameCounter, ReplayWindow
from p2pkv.gossip.keyring import Key, Keyring

VERSION: Final = 1
HEADER: Final = struct.Struct("<BBIQIQQ")
TAG_BYTES: Final = 16
FRAME_BYTES_MAX: Final = 1_400
"""Fits the MTU of any network that a cell is built on, tunnels included."""
PAYLOAD_BYTES_MAX: Final = FRAME_BYTES_MAX - HEADER.size - TAG_BYTES
COUNTER_MAX: Final = (1 << 64) - 1
WINDOW: Final = ReplayWindow.FRAMES
"""How far behind the youngest frame one may come, in frames of its sender: two seconds of a busy one."""
SENDERS_MAX: Final = 8_192
"""Lives that are remembered; those that were heard least recently give way. Twice a full cell's."""
VOICES_MAX: Final = 8
"""Keys, and flags, under which one life is remembered."""
STRANGERS_PER_S: Final = 2_000.0
"""Frames of lives not heard of before that are looked at; a whole cell may start within a second."""

_NONCE: Final = struct.Struct("<4xQ")
_BEGINNING: Final = HEADER.size - 8
_SALT: Final = b"p2pkv frame 1"


class Life(NamedTuple):
    """One run of a node."""

    node: int
    epoch: int
    instance: int


def cipher(key: Key, cell: str, life: Life) -> AESGCM:
    """What seals the frames of one life under one cell key."""
    info = struct.pack("<QIQ", *life) + cell.encode()
    return AESGCM(HKDF(SHA256(), 32, _SALT, info).derive(key.secret))


class Sealer:
    """Seals what one life of this node sends. Not thread-safe: a counter must not be used twice.

    Args:
        keyring: may be replaced at any time; the next frame is sealed with its key in use.
        first: the first counter; only tests start elsewhere.
    """

    def __init__(self, keyring: Keyring, cell: str, life: Life, *, first: int = 0) -> None:
        self.keyring = keyring
        self._cell = cell
        self._life = life
        self._counter = FrameCounter(first)
        self._key: Key | None = None
        self._cipher: AESGCM

    def begin(self, life: Life) -> None:
        """Another life of this node; its counters begin anew, under a key of its own."""
        self._life = life
        self._counter = FrameCounter(0)
        self._key = None

    def seal(self, payload: bytes) -> bytes:
        """One frame.

        Raises:
            InvalidArgument: the payload is longer than a frame's.
            LocalProtocolError: 2^64 - 1 frames have been sealed.
        """
        if len(payload) > PAYLOAD_BYTES_MAX:
            raise InvalidArgument("too much for a frame", bytes=len(payload), limit=PAYLOAD_BYTES_MAX)
        if self._counter.taken >= COUNTER_MAX:
            raise LocalProtocolError("no counter is left: this node must start anew")
        key = self.keyring.in_use
        if key != self._key:
            self._key, self._cipher = key, cipher(key, self._cell, self._life)
        counter = self._counter.take()
        header = HEADER.pack(VERSION, 0, key.id, *self._life, counter)
        return header + self._cipher.encrypt(_NONCE.pack(counter), payload, header)


class Refusal(enum.Enum):
    """Why a datagram is not believed."""

    MALFORMED = "malformed"  # no frame at all
    VERSION = "version"
    UNKNOWN_KEY = "unknown_key"  # sealed with a key that is not in the ring
    FORGED = "forged"  # not sealed with the key that it names, for this cell; or changed on its way
    REPLAYED = "replayed"  # its counter has been used, or is too far behind
    FLOODED = "flooded"  # of a stranger, while too many strangers knock


class Opened(NamedTuple):
    """A frame that its sender made, once, and that nobody changed."""

    life: Life
    counter: int
    payload: bytes


class _Sender:
    """A life that has proven itself, and the counters that it has used."""

    __slots__ = ("heard", "life", "voices", "window")

    def __init__(self, life: Life) -> None:
        self.life = life
        self.window = ReplayWindow()
        self.heard = 0.0
        self.voices: list[bytes] = []


class _Voice:
    """One sender under one key: frames that begin like one of it that was believed."""

    __slots__ = ("decrypt", "sender")

    def __init__(self, sender: _Sender, made: AESGCM) -> None:
        self.sender = sender
        self.decrypt = made.decrypt


class Opener:
    """Opens what others have sealed. ``now`` is in seconds, monotonic. Not thread-safe.

    Says who sealed a frame and that it is no repetition, not whether that life is the node's latest: that is the
    protocol's to judge.

    Args:
        keyring: frames of all its keys are opened. Replace it with :meth:`rekey`.
    """

    def __init__(self, keyring: Keyring, cell: str, now: float) -> None:
        self.refused: Counter[Refusal] = Counter()
        self._keyring = keyring
        self._cell = cell
        self._senders: dict[Life, _Sender] = {}
        self._voices: dict[bytes, _Voice] = {}  # by what a frame begins with, up to its counter
        self._allowance = STRANGERS_PER_S
        self._allowance_at = now

    def rekey(self, keyring: Keyring) -> None:
        """Another keyring; what was sealed with a key that is not in it is refused from now on."""
        self._keyring = keyring
        self._forget_voices(self._senders.values())

    def open(self, datagram: bytes, now: float) -> Opened | Refusal:
        """What a datagram says, or why it is not believed; counted in ``refused``."""
        voice = self._voices.get(datagram[:_BEGINNING])
        outcome = self._open(datagram, voice, now) if voice is not None else self._open_first(datagram, now)
        if isinstance(outcome, Refusal):
            self.refused[outcome] += 1
        return outcome

    def _open(self, datagram: bytes, voice: _Voice, now: float) -> Opened | Refusal:
        """The short way: five thousand times a second in a cell of a thousand."""
        if not HEADER.size + TAG_BYTES <= len(datagram) <= FRAME_BYTES_MAX:
            return Refusal.MALFORMED
        header = datagram[: HEADER.size]
        counter = int.from_bytes(header[_BEGINNING:], "little")
        if counter == COUNTER_MAX:
            return Refusal.MALFORMED
        sender = voice.sender
        window = sender.window
        if not window.fresh(counter):
            return Refusal.REPLAYED
        try:
            payload = voice.decrypt(_NONCE.pack(counter), datagram[HEADER.size :], header)
        except InvalidTag:
            return Refusal.FORGED
        # Proven: only now may anything be kept of it.
        window.use(counter)
        sender.heard = now
        return Opened(sender.life, counter, payload)

    def _open_first(self, datagram: bytes, now: float) -> Opened | Refusal:
        """Nothing that began like this has been believed yet."""
        if not HEADER.size + TAG_BYTES <= len(datagram) <= FRAME_BYTES_MAX:
            return Refusal.MALFORMED
        version, _, key_id, node, epoch, instance, _ = HEADER.unpack_from(datagram)
        if version != VERSION:
            return Refusal.VERSION
        key = self._keyring.get(key_id)
        if key is None:
            return Refusal.UNKNOWN_KEY
        life = Life(node, epoch, instance)
        sender = self._senders.get(life)
        if sender is None and not self._may_knock(now):
            return Refusal.FLOODED
        voice = _Voice(sender or _Sender(life), cipher(key, self._cell, life))
        outcome = self._open(datagram, voice, now)
        if isinstance(outcome, Opened):
            self._keep(datagram[:_BEGINNING], voice)
        return outcome

    def _keep(self, beginning: bytes, voice: _Voice) -> None:
        sender = voice.sender
        if sender.life not in self._senders:
            if len(self._senders) >= SENDERS_MAX:  # many at once, so that one more costs little
                oldest = sorted(self._senders.values(), key=lambda sender: sender.heard)[: max(1, SENDERS_MAX // 16)]
                self._forget_voices(oldest)
                for old in oldest:
                    del self._senders[old.life]
            self._senders[sender.life] = sender
        if len(sender.voices) >= VOICES_MAX:
            self._forget_voices([sender])
        sender.voices.append(beginning)
        self._voices[beginning] = voice

    def _forget_voices(self, senders: Iterable[_Sender]) -> None:
        for sender in senders:
            for beginning in sender.voices:
                del self._voices[beginning]
            sender.voices.clear()

    def _may_knock(self, now: float) -> bool:
        """One more stranger's frame may be looked at: a token bucket of a second."""
        self._allowance = min(STRANGERS_PER_S, self._allowance + (now - self._allowance_at) * STRANGERS_PER_S)
        self._allowance_at = now
        if self._allowance < 1.0:
            return False
        self._allowance -= 1.0
        return True
