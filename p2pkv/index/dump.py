"""A replica on disk: what a restarted agent or scheduler answers from until it has caught up.

    header    "p2pkvidx"   u32 version   u32 owners   f64 taken at, in Unix seconds
    owner     u64 node   u32 epoch   u32 bytes of its note   u64 seq   f64 proven at, in Unix seconds   the note
    pages     records as ``core/dump.cpp`` has them; an owner is its number above
    end       8 zero bytes
    trailer   XXH3-128 of all before it, 16 bytes as xxhash writes them

Little-endian throughout. A file is written beside its place and moved there when it is whole and on disk; it is read
twice, and counts only if its trailer fits. The index is walked once, while it is in use, so what an owner changed
meanwhile may be in it or not: a dump is a hint of what was, about as old as ``proven_at`` tells, and nothing that an
ownership log could be continued from.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterable
from typing import BinaryIO, Final, NamedTuple

import xxhash

from p2pkv.errors import IntegrityError, InvalidArgument, P2PKVError
from p2pkv.index.prefix import NODES_MAX, PrefixIndex

MAGIC: Final = b"p2pkvidx"
VERSION: Final = 1
CHUNK_BYTES: Final = 4 << 20
"""Written, or read, at once."""
NOTE_BYTES_MAX: Final = 1 << 20

_HEADER: Final = struct.Struct("<8sIId")
_OWNER: Final = struct.Struct("<QIIQd")
_END: Final = bytes(8)
_DIGEST_BYTES: Final = 16
_RECORD_BYTES_MAX: Final = 8 + 64 * 8 + NODES_MAX * 4 * 12


class Word(NamedTuple):
    """How far an owner's log had been followed.

    ``proven_at``: Unix seconds, of the last moment at which the replica was known to be the owner's own set. ``note``:
    whatever the caller wants to know of it again, at most :data:`NOTE_BYTES_MAX`.
    """

    node: int
    epoch: int
    seq: int
    proven_at: float
    note: bytes = b""


class Dump(NamedTuple):
    """What a file held: each owner, with its slot in the index now, or None. ``taken_at``: Unix seconds."""

    taken_at: float
    owners: list[tuple[Word, int | None]]


class Interrupted(P2PKVError):
    """Somebody asked for an end before the work was done."""


def _never() -> bool:
    return False


def dump(
    path: str,
    index: PrefixIndex,
    owners: Iterable[tuple[int, Word]],
    *,
    taken_at: float,
    over: Callable[[], bool] = _never,
) -> int:
    """Write what is in the index under these slots; returns the file's length in bytes.

    What was at ``path`` stays until all of it is on disk. Holds :data:`CHUNK_BYTES` at a time; the index may be used
    and written meanwhile, by other threads. One dump to a path at a time.

    Args:
        over: asked every few milliseconds; true ends it.

    Raises:
        InvalidArgument: a note that is too long, a slot out of range or twice.
        Interrupted: ``over`` said so; what was there before is there still.
        P2PKVError: the file cannot be written; what was there before is there still.
    """
    listed = list(owners)
    slots = [slot for slot, _ in listed]
    if any(len(word.note) > NOTE_BYTES_MAX for _, word in listed):
        raise InvalidArgument("a note is too long", limit=NOTE_BYTES_MAX)
    beside = f"{path}.tmp"
    digest = xxhash.xxh3_128()
    try:
        with open(beside, "wb") as file:

            def put(data: bytes) -> None:
                if over():
                    raise Interrupted("the index was not dumped: it was to end", path=path)
                digest.update(data)
                file.write(data)

            put(_HEADER.pack(MAGIC, VERSION, len(listed), taken_at))
            for _, word in listed:
                put(_OWNER.pack(word.node, word.epoch, len(word.note), word.seq, word.proven_at) + word.note)
            piece, start = index.dump_pages(slots, bytes_most=CHUNK_BYTES)
            put(piece)
            while start:
                piece, start = index.dump_pages(slots, start=start, bytes_most=CHUNK_BYTES)
                put(piece)
            put(_END)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(beside, path)
    except OSError as error:
        hint = "Free space there, or set another path."
        raise P2PKVError("the index cannot be dumped", path=path, reason=error.strerror, hint=hint) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(beside)
    return size


def load(
    path: str,
    index: PrefixIndex,
    slot_of: Callable[[Word], int | None],
    *,
    over: Callable[[], bool] = _never,
) -> Dump:
    """Put what a file holds into an index: all of it, or after an error nothing.

    Args:
        slot_of: an empty slot for this owner, or None to leave it out.
        over: asked every few tens of milliseconds; true ends it.

    Raises:
        Interrupted: ``over`` said so.
        FileNotFoundError: there is none.
        IntegrityError: the file is damaged, unfinished, or of another version.
        OutOfSpace: it does not fit into the index.
    """
    owners: list[tuple[Word, int | None]] = []
    with open(path, "rb") as file:
        _check_digest(path, file, over)
        try:
            taken_at, words = _read_words(path, file)
            owners += [(word, slot_of(word)) for word in words]
            _read_pages(path, file, index, [-1 if slot is None else slot for _, slot in owners], over)
        except BaseException:
            for _, slot in owners:
                if slot is not None:
                    index.remove_node(slot)
            raise
    return Dump(taken_at, owners)


def _read_words(path: str, file: BinaryIO) -> tuple[float, list[Word]]:
    file.seek(0)
    magic, version, count, taken_at = _HEADER.unpack(_exactly(path, file, _HEADER.size))
    if magic != MAGIC or version != VERSION:
        raise IntegrityError("this is no dump of an index that this version reads", path=path, version=version)
    words = []
    for _ in range(count):
        node, epoch, note, seq, proven_at = _OWNER.unpack(_exactly(path, file, _OWNER.size))
        if note > NOTE_BYTES_MAX:
            raise IntegrityError("a dump of the index has a note that is too long", path=path)
        words.append(Word(node, epoch, seq, proven_at, _exactly(path, file, note)))
    return taken_at, words


def _read_pages(path: str, file: BinaryIO, index: PrefixIndex, slots: list[int], over: Callable[[], bool]) -> None:
    left = _length(file) - file.tell()
    data = b""
    while left > 0:
        if over():
            raise Interrupted("a dump of the index was not read: it was to end", path=path)
        piece = file.read(min(CHUNK_BYTES, left))
        left -= len(piece)
        data += piece
        try:
            used = index.load_pages(data, slots)
        except InvalidArgument as error:
            raise IntegrityError(
                "what a dump of the index says makes no sense", path=path, reason=str(error)
            ) from error
        data = data[used:]
        if not piece or len(data) > _RECORD_BYTES_MAX + CHUNK_BYTES or (data[:8] == _END and (left or data != _END)):
            break
    if data != _END or left:
        raise IntegrityError("a dump of the index holds less or more than it says", path=path)


def _length(file: BinaryIO) -> int:
    """Of all but the trailer."""
    return os.fstat(file.fileno()).st_size - _DIGEST_BYTES


def _check_digest(path: str, file: BinaryIO, over: Callable[[], bool]) -> None:
    left = _length(file)
    digest = xxhash.xxh3_128()
    while left > 0:
        if over():
            raise Interrupted("a dump of the index was not read: it was to end", path=path)
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
