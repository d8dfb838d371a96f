"""The member table: who is there, judged only by what was heard from the node itself.

Pure: no I/O, no clock. A row is made when a node introduces itself (HELLO or WELCOME), never by hearsay. The table is
bounded by ``members_max``; rows that nothing depends on give way first.

    ABSENT --introduced--> UNREACHABLE --stream current--> ALIVE --silence / loss--> UNREACHABLE --purge_s--> ABSENT
                                                             \\--LEAVE--> LEFT --purge_s--> ABSENT

Index slots: a node gets a small integer for its entries in the prefix index. A slot is given out again only after the
index has forgotten the node (:meth:`MemberTable.free_slot`), and the longest-free slot goes first, so that an answer
that was computed a moment ago does not name the wrong node.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import Final

import msgspec

from p2pkv.types import NodeId
from p2pkv.wire.peer import Address, Card, Member

WILDCARDS: Final = frozenset({"", "*", "0.0.0.0", "::"})
"""Hosts that say "any of my addresses": the receiver takes the one that it sees."""
OWN_SLOT: Final = 0
"""The local node's slot in the index."""


class State(enum.Enum):
    """What this node makes of a peer."""

    ALIVE = "alive"  # its stream is current: heard within the silence limit, checksum right
    UNREACHABLE = "unreachable"  # introduced, but its stream is not current: its entries are hidden
    LEFT = "left"  # said goodbye: its entries are gone


class Verdict(enum.Enum):
    """What to do with a node that introduces itself."""

    NEW = "new"
    KNOWN = "known"
    RENEWED = "renewed"  # restarted: everything known of its earlier life is void
    SELF = "self"  # it is this very process
    TWIN = "twin"  # another process claims this node's own id
    STALE = "stale"  # a newer epoch of that node is known
    DUPLICATE = "duplicate"  # that node id and epoch are taken by another living process
    FULL = "full"

    @property
    def welcome(self) -> bool:
        """Whether the node may stay."""
        return self in (Verdict.NEW, Verdict.KNOWN, Verdict.RENEWED)


@dataclass(slots=True)
class Row:
    """One peer. ``reader_conns``: control connections it dialed (it reads us); ``owner_conn``: the one we dialed."""

    card: Card
    state: State
    since: float  # of the state, seconds
    last_heard: float | None = None  # on the stream that we read from it
    slot: int | None = None
    hidden: bool = True
    owner_conn: int | None = None
    reader_conns: tuple[int, ...] = ()
    rtt_s: float | None = None
    conflicts: tuple[str, ...] = ()

    @property
    def node(self) -> NodeId:
        """The peer's identity."""
        return NodeId(self.card.node)

    @property
    def connected(self) -> bool:
        """Whether any control connection with it is up."""
        return self.owner_conn is not None or bool(self.reader_conns)


class MemberTable:
    """Rows by node id. Not thread-safe."""

    def __init__(self, own: Card, members_max: int) -> None:
        self.own = own
        self.rows: dict[NodeId, Row] = {}
        self._members_max = members_max
        self._slots: deque[int] = deque(range(1, members_max + 1))
        self._nodes_by_slot: dict[int, NodeId] = {OWN_SLOT: NodeId(own.node)}

    def judge(self, card: Card) -> Verdict:
        """What an introduction means. Changes nothing."""
        own = self.own
        if card.node == own.node:
            return Verdict.SELF if _life(card) == _life(own) else Verdict.TWIN
        row = self.rows.get(NodeId(card.node))
        if row is None:
            full = len(self.rows) >= self._members_max and self._least_needed() is None
            return Verdict.FULL if full else Verdict.NEW
        known = row.card
        if _life(card) == _life(known):
            return Verdict.KNOWN
        if card.epoch != known.epoch:
            return Verdict.RENEWED if card.epoch > known.epoch else Verdict.STALE
        # The same epoch drawn by two processes: either its identity file was lost, or it was copied.
        return Verdict.DUPLICATE if row.state is State.ALIVE or row.connected else Verdict.RENEWED

    def add(self, now: float, card: Card) -> tuple[Row, Row | None]:
        """Make a row for a NEW node; returns it and the row that had to give way, whose slot the caller frees."""
        victim = None
        if len(self.rows) >= self._members_max:
            victim = self._least_needed()
            assert victim is not None, "judge() said FULL"
            del self.rows[victim.node]
        row = Row(card=card, state=State.UNREACHABLE, since=now)
        self.rows[row.node] = row
        return row, victim

    def get(self, node: int) -> Row | None:
        """The row of a node, if it has one."""
        return self.rows.get(NodeId(node))

    def take_slot(self, row: Row) -> int:
        """The index slot of a row; gives it one if it has none."""
        if row.slot is None:
            row.slot = self._slots.popleft()
            self._nodes_by_slot[row.slot] = row.node
        return row.slot

    def free_slot(self, row: Row) -> None:
        """Give a row's slot back. Only after the index has forgotten the node."""
        if row.slot is not None:
            del self._nodes_by_slot[row.slot]
            self._slots.append(row.slot)
            row.slot = None

    def node_at(self, slot: int) -> NodeId | None:
        """Which node's entries are under an index slot."""
        return self._nodes_by_slot.get(slot)

    def connected_members(self) -> list[Member]:
        """What is told to others: the members that a connection proves."""
        return [
            Member(row.card.node, row.card.epoch, row.card.address)
            for row in self.rows.values()
            if row.connected and row.state is not State.LEFT
        ]

    def left(self, node: int, epoch: int) -> bool:
        """Whether that life of a node has said goodbye."""
        row = self.rows.get(NodeId(node))
        return row is not None and row.state is State.LEFT and row.card.epoch >= epoch

    def _least_needed(self) -> Row | None:
        """A row that nothing depends on: the longest gone of those without a connection."""
        idle = (row for row in self.rows.values() if not row.connected and row.state is not State.ALIVE)
        return min(idle, key=lambda row: (row.state is not State.LEFT, row.since), default=None)

    def check_integrity(self) -> None:
        """Assert what must hold between calls; for tests."""
        assert len(self.rows) <= self._members_max
        taken = {row.slot: row.node for row in self.rows.values() if row.slot is not None}
        assert {s: n for s, n in self._nodes_by_slot.items() if s != OWN_SLOT} == taken
        assert len(self._slots) + len(taken) == self._members_max
        for row in self.rows.values():
            assert row.state is not State.ALIVE or (row.owner_conn is not None and not row.hidden)
            assert row.hidden == (row.state is not State.ALIVE)


def _life(card: Card) -> tuple[int, int]:
    return card.epoch, card.instance


def observed(card: Card, host: str) -> Card:
    """The card with the host that its connection came from, where it names none that could be dialed."""
    if card.address.host not in WILDCARDS:
        return card
    return msgspec.structs.replace(card, address=Address(host, card.address.port))
