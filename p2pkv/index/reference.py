"""The prefix index again, written to be obviously right: the oracle of the property tests.

One dictionary per node, every answer straight from its definition in :class:`p2pkv.index.prefix.Index`. Slow: never
used by an agent.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import lru_cache, reduce
from operator import xor
from typing import TYPE_CHECKING

from p2pkv.errors import InvalidArgument, OutOfSpace
from p2pkv.index.hashing import entry_checksum, pack_keys, unpack_keys
from p2pkv.index.prefix import ENTRIES_MAX, HOLDERS_MAX, NODES_MAX, Holders, Match, NodeMatch
from p2pkv.types import Tier

if TYPE_CHECKING:
    from typing_extensions import Buffer

_entry_checksum = lru_cache(1 << 16)(entry_checksum)  # tests ask for the same few again and again


class ReferenceIndex:
    """See :class:`p2pkv.index.prefix.Index`. Not thread-safe."""

    def __init__(self, max_nodes: int = NODES_MAX, max_entries: int = ENTRIES_MAX) -> None:
        self._max_nodes = max_nodes
        self._max_entries = max_entries
        self._sets: dict[int, dict[int, Tier]] = {}
        self._hidden: set[int] = set()
        self._turn = 0

    # --- writing

    def apply(self, node: int, keys: Buffer, tier: Tier | int) -> int:
        self._check_node(node)
        if not Tier.GONE <= tier <= Tier.SHARED:
            raise InvalidArgument("tier out of range", tier=tier)
        mine = self._sets.setdefault(node, {})
        changed = 0
        for key in unpack_keys(keys):
            if mine.get(key, Tier.GONE) == tier:
                continue
            if tier == Tier.GONE:
                del mine[key]
            elif key not in mine and sum(map(len, self._sets.values())) >= self._max_entries:
                raise OutOfSpace("the index is full")
            else:
                mine[key] = Tier(tier)
            changed += 1
        return changed

    def replace(self, node: int, groups: Iterable[tuple[Tier | int, Buffer]]) -> int:
        self._check_node(node)
        groups = list(groups)
        if any(not Tier.HBM <= tier <= Tier.SHARED for tier, _ in groups):
            raise InvalidArgument("tier out of range")
        changed = sum(self.apply(node, keys, tier) for tier, keys in groups)
        wanted = {key for _, keys in groups for key in unpack_keys(keys)}
        surplus = self._sets.get(node, {}).keys() - wanted
        return changed + self.apply(node, pack_keys(surplus), Tier.GONE)

    def remove_node(self, node: int) -> int:
        self._check_node(node)
        self._hidden.discard(node)
        return len(self._sets.pop(node, {}))

    def hide(self, node: int, hidden: bool) -> None:
        self._check_node(node)
        (self._hidden.add if hidden else self._hidden.discard)(node)

    # --- reading

    def match(self, keys: Buffer, *, beyond: bool = False) -> Match:
        chain = list(unpack_keys(keys))
        rows = [self._match_node(node, chain, beyond) for node in self._visible()]
        rows = [row for row in rows if row.held > 0]
        rows.sort(key=lambda row: (-row.depth, row.node))
        packed = b"".join(struct.pack("<8I", r.node, r.depth, *r.by_tier, r.held, r.resume) for r in rows)
        return Match(packed, len(chain))

    def _match_node(self, node: int, chain: list[int], beyond: bool) -> NodeMatch:
        mine = self._sets[node]
        holds = [key in mine for key in chain]
        depth = (holds + [False]).index(False)
        tiers = [mine[key] for key in chain[:depth]]
        by_tier = (tiers.count(Tier.HBM), tiers.count(Tier.DRAM), tiers.count(Tier.SSD), tiers.count(Tier.SHARED))
        if not beyond:
            return NodeMatch(node, depth, by_tier, depth, len(chain))
        resume = next((i for i in range(depth, len(chain)) if holds[i]), len(chain))
        return NodeMatch(node, depth, by_tier, sum(holds), resume)

    def holders(self, keys: Buffer, *, limit: int = HOLDERS_MAX, start: int | None = None) -> Holders:
        if start is None:
            start = self._turn % (max(self._sets, default=0) + 1)
            self._turn += 1
        self._check_node(start)
        if not 1 <= limit <= 256:
            raise InvalidArgument("limit out of range", limit=limit)
        ring = sorted(self._visible(), key=lambda node: (node < start, node))
        chain = unpack_keys(keys)
        offsets, entries = [0], list[int]()
        for key in chain:
            entries += [node << 8 | self._sets[node][key] for node in ring if key in self._sets[node]][:limit]
            offsets.append(len(entries))
        return Holders(struct.pack(f"<{len(offsets) + len(entries)}I", *offsets, *entries), len(chain))

    def contains_any(self, keys: Buffer) -> bytes:
        return bytes(any(key in self._sets[node] for node in self._visible()) for key in unpack_keys(keys))

    def reach(self, keys: Buffer) -> int:
        return (self.contains_any(keys) + b"\0").index(0)

    def snapshot(self, node: int) -> list[tuple[Tier, bytes]]:
        self._check_node(node)
        groups: dict[Tier, list[int]] = {}
        for key, tier in self._sets.get(node, {}).items():
            groups.setdefault(tier, []).append(key)
        return [(tier, pack_keys(groups[tier])) for tier in sorted(groups)]

    def checksum(self, node: int) -> int:
        self._check_node(node)
        return reduce(xor, (_entry_checksum(key, tier) for key, tier in self._sets.get(node, {}).items()), 0)

    def count(self, node: int) -> int:
        self._check_node(node)
        return len(self._sets.get(node, {}))

    def _visible(self) -> list[int]:
        return [node for node in self._sets if node not in self._hidden]

    def _check_node(self, node: int) -> None:
        if not 0 <= node < self._max_nodes:
            raise InvalidArgument("node out of range", node=node)
