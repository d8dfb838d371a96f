"""The member table together with what hangs on its rows: streams, index slots, layout conflicts. No I/O.

A row's entries are in the index under its slot, hidden exactly while the row is not ALIVE. Connections are the
protocol's: whoever voids a row closes them first.
"""

from __future__ import annotations

from collections import Counter

from p2pkv.gossip.effects import Changed
from p2pkv.gossip.membership import MemberTable, Row, State, Verdict
from p2pkv.gossip.outbox import Outbox
from p2pkv.gossip.streams import OwnerStream
from p2pkv.gossip.views import PeerView, at, layout_conflicts, view_of
from p2pkv.index.prefix import Index
from p2pkv.types import NodeId
from p2pkv.wire.peer import Card


class Roster:
    """Rows, their streams and their entries. Not thread-safe."""

    def __init__(self, table: MemberTable, index: Index, out: Outbox, counters: Counter[str]) -> None:
        self.table = table
        self._index = index
        self._out = out
        self._counters = counters
        self._streams: dict[NodeId, OwnerStream] = {}

    def judge(self, card: Card) -> Verdict:
        """What an introduction means: the table's verdict, and a life that has left does not come back."""
        verdict = self.table.judge(card)
        if verdict is Verdict.KNOWN and self.table.left(card.node, card.epoch):
            return Verdict.STALE
        return verdict

    def refusal(self, verdict: Verdict, card: Card) -> tuple[str, str]:
        """Code and words for a node that is not welcome."""
        row = self.table.get(card.node)
        known = f"epoch {row.card.epoch} at {at(row.card.address)}, {row.state.value}" if row else ""
        match verdict:
            case Verdict.SELF:
                return "self", "is this node itself"
            case Verdict.TWIN:
                return "duplicate", f"has this node's own id; epoch {card.epoch} there, {self.table.own.epoch} here"
            case Verdict.DUPLICATE:
                return "duplicate", f"has an id and epoch that are taken: {known}"
            case Verdict.STALE:
                return "stale", f"is epoch {card.epoch} of a node that is known as {known}"
            case _:
                return "busy", "finds the member table full"

    def add(self, now: float, card: Card) -> Row:
        """A row for a NEW node."""
        row, victim = self.table.add(now, card)
        if victim is not None:
            self.release(victim)
        self._out.say("info", f"met {row.node} epoch {card.epoch} at {at(card.address)}")
        self.check_layouts(row)
        return row

    def renew(self, now: float, row: Row, card: Card) -> None:
        """A newer life: what the earlier one had is void. Its connections are closed already."""
        self._counters["renewed"] += 1
        self._out.say("info", f"{row.node} is back as epoch {card.epoch} (was {row.card.epoch})")
        self.void(now, row, State.UNREACHABLE, "restarted")
        row.rtt_s = row.last_heard = None
        self.update(row, card)

    def update(self, row: Row, card: Card) -> None:
        """The same life says something else of itself."""
        if row.card != card:
            row.card = card
            self.check_layouts(row)
            self._out.put(Changed(row.node))

    def void(self, now: float, row: Row, state: State, reason: str) -> None:
        """Forget a life's entries."""
        self.hide(now, row, reason)
        self.release(row)
        row.state, row.since = state, now
        self._out.put(Changed(row.node))

    def release(self, row: Row) -> None:
        """Take a row's entries out of the index and give its slot back."""
        self._streams.pop(row.node, None)
        if row.slot is not None:
            self._index.remove_node(row.slot)
            self.table.free_slot(row)

    def stream(self, row: Row) -> OwnerStream:
        """The stream that a row's entries come from."""
        return self._streams[row.node]

    def open_stream(self, now: float, row: Row) -> None:
        """A connection to the owner is up: its entries stay hidden until the stream is current."""
        if row.node not in self._streams:
            self._streams[row.node] = OwnerStream(self._index, self.table.take_slot(row), now)
        assert row.slot is not None and row.hidden
        self._index.hide(row.slot, True)

    def show(self, now: float, row: Row) -> None:
        """The stream is current."""
        if row.hidden and row.slot is not None:
            row.hidden, row.state, row.since = False, State.ALIVE, now
            self._index.hide(row.slot, False)
            self._counters["shown"] += 1
            self._out.say("info", f"{row.node} is current: {self._index.count(row.slot)} entries shown")
            self._out.put(Changed(row.node))

    def hide(self, now: float, row: Row, reason: str) -> None:
        """The stream is not current (any more)."""
        if not row.hidden and row.slot is not None:
            row.hidden, row.state, row.since = True, State.UNREACHABLE, now
            self._index.hide(row.slot, True)
            self._counters["hidden"] += 1
            self._out.say("warning", f"entries of {row.node} hidden: {reason}")
            self._out.put(Changed(row.node))

    def check_layouts(self, row: Row) -> None:
        """Find the fields in which a peer's layouts conflict with ours; loud once per change."""
        conflicts, lines = layout_conflicts(self.table.own.layouts, row.card.layouts)
        if conflicts != row.conflicts:
            row.conflicts = conflicts
            for line in lines:
                self._counters["layout_conflicts"] += 1
                self._out.say("error", f"layout conflict with {row.node} at {at(row.card.address)}: {line}")
            self._out.put(Changed(row.node))

    def purge(self, now: float, purge_s: float) -> list[Row]:
        """Drop what has not been current for too long; returns the rows that are forgotten altogether."""
        forgotten = []
        for row in list(self.table.rows.values()):
            if row.state is State.ALIVE or row.owner_conn is not None or now - row.since <= purge_s:
                continue
            if row.slot is not None:
                self._counters["purged"] += 1
                self._out.say("info", f"entries of {row.node} dropped: not current for {purge_s:g} s")
                self.release(row)
                self._out.put(Changed(row.node))
            if not row.connected:
                del self.table.rows[row.node]
                forgotten.append(row)
        return forgotten

    def view(self, now: float, row: Row) -> PeerView:
        """What is shown of a row."""
        return view_of(row, self._streams.get(row.node), now)
