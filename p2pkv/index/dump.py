"""A replica on disk: what a restarted agent or scheduler answers from until it has caught up.

    header    "p2pkvidx"   u32 version   u32 owners   f64 taken at, in Unix seconds
    owner     u64 node   u32 epoch   u32 zero   u64 seq   u64 checksum   f64 proven at, in Unix seconds
              u64 keys in each of HBM, DRAM, SSD, SHARED, and then these keys, u64 each
    trailer   XXH3-128 of all before it, 16 bytes as xxhash writes them

Little-endian throughout. A file is written beside its place and moved there when it is whole and on disk; it is read
twice, and counts only if its trailer fits. What it says of an owner is as old as ``proven_at`` tells: the last moment
at which the replica was known to be the owner's own set (:mod:`p2pkv.index.ownership`).
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterable
from typing import BinaryIO, Final, NamedTuple

import xxhash

from p2pkv.errors import IntegrityError, P2PKVError
from p2pkv.index.hashing import KEY_BYTES, entries_checksum
from p2pkv.index.prefix import Index
from p2pkv.types import Tier

MAGIC: Final = b"p2pkvidx"
VERSION: Final = 1
CHUNK_BYTES: Final = 8 << 20
"""Of keys read and applied at once; a multiple of a key."""

_HEADER: Final = struct.Struct("<8sIId")
_OWNER: Final = struct.Struct("<QIIQQd4Q")
_DIGEST_BYTES: Final = 16
_TIERS: Final = (Tier.HBM, Tier.DRAM, Tier.SSD, Tier.SHARED)


class Word(NamedTuple):
    """How far an owner's log had been followed: the set below is its own at (epoch, seq).

    ``proven_at``: Unix seconds.
    """

    node: int
    epoch: int
    seq: int
    proven_at: float


class Loaded(NamedTuple):
    """One owner of a dump, and how many of its entries are in the index now; 0 where no slot was given."""

    word: Word
    slot: int | None
    entries: int


class Dump(NamedTuple):
    """What a file held. ``taken_at``: Unix seconds."""

    taken_at: float
    owners: list[Loaded]


def dump(path: str, index: Index, owners: Iterable[tuple[int, Word]], *, taken_at: float) -> int:
    """Write the entries of these slots; returns how many. What was at ``path`` stays until all of it is on disk.

    Holds one owner's entries at a time, 8 bytes each. A writer of the index may go on meanwhile: each owner's set is
    that of one moment, and ``word`` has to be of that moment: call it from where the index is written.

    Raises:
        P2PKVError: the file cannot be written; what was there before is there still.
    """
    listed = list(owners)
    beside = f"{path}.{os.getpid()}.tmp"
    entries = 0
    try:
        with open(beside, "wb") as file:
            digest = xxhash.xxh3_128()

            def put(data: bytes) -> None:
                digest.update(data)
                file.write(data)

            put(_HEADER.pack(MAGIC, VERSION, len(listed), taken_at))
            for slot, word in listed:
                groups = dict(index.snapshot(slot))
                counts = [len(groups.get(tier, b"")) // KEY_BYTES for tier in _TIERS]
                checksum = 0
                for tier, keys in groups.items():
                    checksum ^= entries_checksum(keys, tier)
                put(_OWNER.pack(word.node, word.epoch, 0, word.seq, checksum, word.proven_at, *counts))
                for tier in _TIERS:
                    put(groups.get(tier, b""))
                entries += sum(counts)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        hint = "Free space there, or set another path."
        raise P2PKVError("the index cannot be dumped", path=path, reason=error.strerror, hint=hint) from error
    return entries


def load(path: str, index: Index, slot_of: Callable[[Word], int | None]) -> Dump:
    """Put what a file holds into an index: all of it, or after an error nothing.

    Args:
        slot_of: an empty slot for this owner, or None to leave it out.

    Raises:
        FileNotFoundError: there is none.
        IntegrityError: the file is damaged, unfinished, or of another version.
        OutOfSpace: it does not fit into the index.
    """
    used: list[int] = []
    with open(path, "rb") as file:
        _check_digest(path, file)
        taken_at, owners = _read_owners(path, file)
        try:
            loaded = [_load_owner(path, file, index, owner, slot_of(owner.word), used) for owner in owners]
        except BaseException:
            for slot in used:
                index.remove_node(slot)
            raise
    return Dump(taken_at, loaded)


class _Owner(NamedTuple):
    word: Word
    checksum: int
    counts: tuple[int, ...]
    at: int  # of its keys in the file

    @property
    def keys_bytes(self) -> int:
        return sum(self.counts) * KEY_BYTES


def _read_owners(path: str, file: BinaryIO) -> tuple[float, list[_Owner]]:
    """The header, and every owner's; that they fit the file's length exactly."""
    file.seek(0)
    end = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
    magic, version, count, taken_at = _HEADER.unpack(_exactly(path, file, _HEADER.size))
    if magic != MAGIC or version != VERSION:
        raise IntegrityError("this is no dump of an index that this version reads", path=path, version=version)
    owners: list[_Owner] = []
    at = _HEADER.size
    for _ in range(count):
        file.seek(at)
        node, epoch, _, seq, checksum, proven_at, *counts = _OWNER.unpack(_exactly(path, file, _OWNER.size))
        owner = _Owner(Word(node, epoch, seq, proven_at), checksum, tuple(counts), at + _OWNER.size)
        at = owner.at + owner.keys_bytes
        if at > end:
            raise IntegrityError("a dump of the index says that it holds more than it does", path=path)
        owners.append(owner)
    if at != end:
        raise IntegrityError("a dump of the index holds more than it says", path=path)
    return taken_at, owners


def _load_owner(path: str, file: BinaryIO, index: Index, owner: _Owner, slot: int | None, used: list[int]) -> Loaded:
    if slot is None:
        return Loaded(owner.word, None, 0)
    used.append(slot)
    file.seek(owner.at)
    for tier, count in zip(_TIERS, owner.counts, strict=True):
        for at in range(0, count * KEY_BYTES, CHUNK_BYTES):
            index.apply(slot, _exactly(path, file, min(CHUNK_BYTES, count * KEY_BYTES - at)), tier)
    if index.checksum(slot) != owner.checksum:
        node = f"{owner.word.node:016x}"
        raise IntegrityError("what a dump says of an owner is not what it was", path=path, node=node)
    return Loaded(owner.word, slot, index.count(slot))


def _check_digest(path: str, file: BinaryIO) -> None:
    left = os.fstat(file.fileno()).st_size - _DIGEST_BYTES
    digest = xxhash.xxh3_128()
    while left > 0:
        data = file.read(min(CHUNK_BYTES, left))
        if not data:
            break
        digest.update(data)
        left -= len(data)
    if left != 0 or file.read(_DIGEST_BYTES) != digest.digest():
        hint = "Remove it: it will be written anew."
        raise IntegrityError("a dump of the index is damaged or was never finished", path=path, hint=hint)


def _exactly(path: str, file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise IntegrityError("a dump of the index ends too early", path=path)
    return data
