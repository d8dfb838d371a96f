"""The prefix index: for a chain of blocks, which nodes hold how much of it, and in which tier.

A thin typed face of the C++ core. Exact, holes included, and a *hint*: the owner's answer to a pin is the truth.

Words: a **chain** is the index keys of a prompt's blocks, in order. A node's **depth** is the length of the contiguous
run of the chain, from its beginning, that the node holds (in any tier): the first hole ends it. A **slot** is the small
integer by which the index knows a node; who hands out slots maps them to node ids, and may give a slot to another node
after :meth:`PrefixIndex.remove_node`.

Threads: readers run beside each other and beside a writer (the GIL is released); writers wait for each other. A reader
can see part of a batch that is being written.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from p2pkv.errors import InvalidArgument, OutOfSpace
from p2pkv.index import _core
from p2pkv.types import MASK64, Tier

if TYPE_CHECKING:
    from typing_extensions import Buffer

NODES_MAX: Final = 65_536
"""Slots of one index: 60 times a full cell. Bounds what a wrong slot number can make us allocate (1.5 MiB)."""

ENTRIES_MAX: Final = 1 << 28
"""(node, key) entries of one index: 10,000 nodes at 25,000 blocks each. A bound on memory, not a size to plan with."""

HOLDERS_MAX: Final = 16
"""Owners per key that :meth:`PrefixIndex.holders` gives by default: more than a pull is ever split over."""

_ROW_WORDS: Final = 8
_ROW_BYTES: Final = 4 * _ROW_WORDS


class NodeMatch(NamedTuple):
    """What one node holds of a chain. Counts are blocks; positions count from 0.

    ``by_tier`` splits the prefix by where each block lies (its cheapest tier there): index 0 = HBM, 1 = DRAM,
    2 = SSD, 3 = SHARED; the four add up to ``depth``. ``held`` and ``resume`` say what lies behind the first hole, when
    that was asked for (``beyond=True``): ``held`` is the number of all positions that the node holds, ``resume`` the
    first one after the hole that it holds again, or the length of the chain. Otherwise they are ``depth`` and that
    length.
    """

    node: int
    depth: int
    by_tier: tuple[int, int, int, int]
    held: int
    resume: int

    def in_tier(self, tier: Tier) -> int:
        """Blocks of the prefix that lie in ``tier``."""
        return self.by_tier[tier - 1]

    def up_to(self, tier: Tier) -> int:
        """Blocks of the prefix that lie in ``tier`` or a cheaper one."""
        return sum(self.by_tier[:tier])


class Match:
    """The nodes that hold something of a chain, deepest first, then by slot. Rows are built when looked at.

    Owns its bytes; immutable; equal when the rows are.
    """

    __slots__ = ("chain", "packed")

    def __init__(self, packed: bytes, chain: int) -> None:
        self.packed = packed
        """Rows of eight little-endian u32: node, depth, blocks in HBM, DRAM, SSD, SHARED, held, resume."""
        self.chain = chain
        """Length of the chain that was asked for."""

    @property
    def _words(self) -> memoryview[int]:
        return memoryview(self.packed).cast("I")

    def __len__(self) -> int:
        return len(self.packed) // _ROW_BYTES

    def __getitem__(self, i: int) -> NodeMatch:
        n = len(self)
        if not -n <= i < n:
            raise IndexError(i)
        at = i % n * _ROW_WORDS
        node, depth, hbm, dram, ssd, shared, held, resume = self._words[at : at + _ROW_WORDS]
        return NodeMatch(node, depth, (hbm, dram, ssd, shared), held, resume)

    def __iter__(self) -> Iterator[NodeMatch]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Match):
            return NotImplemented
        return self.packed == other.packed and self.chain == other.chain

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Match(chain={self.chain}, {list(self)})"

    @property
    def depth(self) -> int:
        """Depth of the deepest node; 0 when no node holds the first block."""
        return self._words[1] if self.packed else 0

    @property
    def best(self) -> NodeMatch | None:
        """The deepest node (the lowest slot of several); ``None`` when no node holds anything that was asked for."""
        return self[0] if self.packed else None

    def of(self, node: int) -> NodeMatch | None:
        """One node's row; ``None`` when it has none. Reads the rows one by one."""
        for i, slot in enumerate(self._words[::_ROW_WORDS].tolist()):
            if slot == node:
                return self[i]
        return None


class Holder(NamedTuple):
    """A node that holds a block, and the tier it holds it in."""

    node: int
    tier: Tier


class Holders:
    """For each key of a chain, in order, who holds it. A lazy view; owns its bytes; immutable."""

    __slots__ = ("_entries", "_offsets", "packed")

    def __init__(self, packed: bytes, keys: int) -> None:
        words = memoryview(packed).cast("I")
        self.packed = packed
        """``keys + 1`` little-endian u32 offsets into the entries that follow; an entry is ``node << 8 | tier``."""
        self._offsets = words[: keys + 1]
        self._entries = words[keys + 1 :]

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: int) -> tuple[Holder, ...]:
        n = len(self)
        if not -n <= i < n:
            raise IndexError(i)
        i %= n
        entries = self._entries[self._offsets[i] : self._offsets[i + 1]]
        return tuple(Holder(entry >> 8, Tier(entry & 0xFF)) for entry in entries)

    def __iter__(self) -> Iterator[tuple[Holder, ...]]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Holders):
            return NotImplemented
        return self.packed == other.packed

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Holders({list(self)})"


class IndexStats(NamedTuple):
    """Size of an index. ``nodes`` hold at least one entry; ``pages`` have 64 keys at most each."""

    nodes: int
    hidden_nodes: int
    keys: int
    entries: int
    pages: int
    capacity_keys: int
    memory_bytes: int


class Index(Protocol):
    """What the core and the reference both are. All keys are packed u64 (see :func:`p2pkv.index.hashing.pack_keys`).

    Every method raises InvalidArgument for a slot or tier out of range and for a buffer that is no packed keys.
    """

    def apply(self, node: int, keys: Buffer, tier: Tier | int) -> int:
        """``node`` now has these keys in ``tier`` (GONE: no longer has them). Returns how many entries changed.

        Later keys win over equal earlier ones. Raises OutOfSpace at the bound on entries: keys before the one that was
        refused have been applied.
        """
        ...

    def replace(self, node: int, groups: Iterable[tuple[Tier | int, Buffer]]) -> int:
        """``node``'s whole set becomes these (tier, keys). Returns how many entries changed.

        New entries come first, then the others go: what the node has before and after never disappears in between.
        """
        ...

    def remove_node(self, node: int) -> int:
        """Forget all that ``node`` has, and that it was hidden: its slot is free for another node.

        Returns how many entries it had.
        """
        ...

    def hide(self, node: int, hidden: bool) -> None:
        """Keep ``node``'s entries up to date, but out of every answer (or show them again)."""
        ...

    def match(self, keys: Buffer, *, beyond: bool = False) -> Match:
        """Who holds how much of this chain. See :class:`NodeMatch`.

        Without ``beyond`` the walk ends where the last node drops out, and only nodes that hold the first block have a
        row. With it the whole chain is read, and every visible node that holds any of it has one.
        """
        ...

    def holders(self, keys: Buffer, *, limit: int = HOLDERS_MAX, start: int | None = None) -> Holders:
        """Who holds each key, at most ``limit`` (1..256) each, in ring order of slots from ``start`` upwards.

        One start for the whole chain, so that neighbouring keys name the same owners and runs stay long. Without
        ``start`` each call begins at the next slot, so that no owner of a hot block is asked more than the others.
        """
        ...

    def contains_any(self, keys: Buffer) -> bytes:
        """One byte per key: 1 when a visible node has it, else 0."""
        ...

    def reach(self, keys: Buffer) -> int:
        """Length of the prefix that the visible nodes hold together: what a stitched pull can get at most."""
        ...

    def snapshot(self, node: int) -> list[tuple[Tier, bytes]]:
        """All that ``node`` has (hidden or not), grouped by tier, in no particular order of keys."""
        ...

    def checksum(self, node: int) -> int:
        """XOR of :func:`p2pkv.index.hashing.entry_checksum` over ``node``'s entries. O(1)."""
        ...

    def count(self, node: int) -> int:
        """How many entries ``node`` has. O(1)."""
        ...


class PrefixIndex:
    """The C++ core as an :class:`Index`; every method is documented there.

    Args:
        max_nodes: slots are 0..max_nodes - 1.
        max_entries: bound on (node, key) entries of all nodes together.
    """

    __slots__ = ("_core", "_turn")

    def __init__(self, max_nodes: int = NODES_MAX, max_entries: int = ENTRIES_MAX) -> None:
        try:
            self._core = _core.PrefixIndex(max_nodes, max_entries)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error
        self._turn = itertools.count()

    def apply(self, node: int, keys: Buffer, tier: Tier | int) -> int:
        try:
            return self._core.apply(node, keys, tier)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error
        except _core.IndexFull as error:
            raise _full(error) from error

    def replace(self, node: int, groups: Iterable[tuple[Tier | int, Buffer]]) -> int:
        try:
            return self._core.replace(node, groups)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error
        except _core.IndexFull as error:
            raise _full(error) from error

    def remove_node(self, node: int) -> int:
        try:
            return self._core.remove_node(node)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error

    def hide(self, node: int, hidden: bool) -> None:
        try:
            self._core.hide(node, hidden)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error

    def match(self, keys: Buffer, *, beyond: bool = False) -> Match:
        try:
            return Match(*self._core.match(keys, beyond))
        except ValueError as error:
            raise InvalidArgument(str(error)) from error

    def match_tokens(
        self, tokens: Buffer, block_tokens: int, *, namespace: int, seed: int = 0, beyond: bool = False
    ) -> Match:
        """Hash and :meth:`match` in one call: of :func:`~p2pkv.index.hashing.token_chain`'s hashes in ``namespace``.

        ``chain`` of the answer is the number of full blocks.
        """
        if not (0 <= seed <= MASK64 and 0 <= namespace <= MASK64):
            raise InvalidArgument("seed and namespace must be unsigned 64-bit integers")
        try:
            return Match(*self._core.match_tokens(tokens, block_tokens, namespace, seed, beyond))
        except ValueError as error:
            raise InvalidArgument(str(error)) from error

    @property
    def lookup(self) -> object:
        """For native code: a capsule through which it asks this index without Python (``core/lookup.hpp``)."""
        return self._core.lookup

    @property
    def entries(self) -> object:
        """For native code: a capsule through which it writes this index without Python (``core/entries.hpp``).

        Keep the index for as long as it is used.
        """
        return self._core.entries

    def holders(self, keys: Buffer, *, limit: int = HOLDERS_MAX, start: int | None = None) -> Holders:
        if start is None:
            start = next(self._turn) % max(1, self._core.top)
        try:
            packed = self._core.holders(keys, limit, start)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error
        return Holders(packed, _key_count(keys))

    def contains_any(self, keys: Buffer) -> bytes:
        try:
            return self._core.contains_any(keys)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error

    def reach(self, keys: Buffer) -> int:
        try:
            return self._core.reach(keys)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error

    def snapshot(self, node: int) -> list[tuple[Tier, bytes]]:
        try:
            return [(Tier(tier), keys) for tier, keys in self._core.snapshot(node)]
        except ValueError as error:
            raise InvalidArgument(str(error)) from error

    def checksum(self, node: int) -> int:
        try:
            return self._core.checksum(node)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error

    def count(self, node: int) -> int:
        try:
            return self._core.count(node)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error

    def dump_pages(self, slots: Sequence[int], *, start: int = 0, bytes_most: int) -> tuple[bytes, int]:
        """A piece of all that these nodes have (hidden or not), and where the next piece starts; 0 after the last one.

        The records are in ``core/dump.cpp``; in them a node is its number in ``slots``. A piece is at least
        ``bytes_most`` long, by a few records, unless it is the last. Writers go on between the pieces, and within them:
        what changes meanwhile may be as before or as after, and what lies beside removed entries missing or twice.
        """
        try:
            return self._core.dump_pages(slots, start, bytes_most)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error

    def load_pages(self, data: Buffer, slots: Sequence[int]) -> int:
        """Add what whole records at the beginning of ``data`` say; returns how many bytes they are.

        ``slots``: by a node's number; -1 leaves it out. An end mark (8 zero bytes) is no record. After an error some
        of it may have been added. Raises InvalidArgument (no such records) and OutOfSpace.
        """
        try:
            return self._core.load_pages(data, slots)
        except ValueError as error:
            raise InvalidArgument(str(error)) from error
        except _core.IndexFull as error:
            raise _full(error) from error

    def stats(self) -> IndexStats:
        """Sizes, for metrics. ``memory_bytes`` is what the core asked the allocator for."""
        return IndexStats(**self._core.stats())


def _full(error: Exception) -> OutOfSpace:
    return OutOfSpace(str(error), hint="Raise the index's max_entries, or let fewer nodes into the cell.")


def _key_count(keys: Buffer) -> int:
    """Number of keys in a buffer that the core has accepted."""
    return (len(keys) if isinstance(keys, bytes) else memoryview(keys).nbytes) >> 3
