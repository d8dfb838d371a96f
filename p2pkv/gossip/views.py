"""What is shown of a peer, and where its layouts conflict with ours."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from p2pkv.types import Layout, NodeId
from p2pkv.wire.peer import Address, Card


class State(enum.Enum):
    """What this node makes of a peer."""

    ALIVE = "alive"  # its stream is current: heard within the silence limit, checksum right
    UNREACHABLE = "unreachable"  # introduced, but its stream is not current: its entries are hidden
    LEFT = "left"  # said goodbye: its entries are gone


@dataclass(frozen=True, slots=True)
class PeerView:
    """One peer at one moment."""

    node: NodeId
    epoch: int
    address: Address
    state: State
    age_ms: float | None  # since something was last heard of its stream; None = never
    seq: int  # of its log, as far as read here
    entries: int  # of its in the index here
    card: Card
    rtt_ms: float | None
    conflicts: tuple[str, ...]  # layout fields that differ from ours where they must not
    slot: int | None  # in the index; None while it has none
    proven_ms: float | None  # since the entries here were last known to be its own set; None = never

    @property
    def alive(self) -> bool:
        """Whether its entries are shown."""
        return self.state is State.ALIVE

    @property
    def left(self) -> bool:
        """Whether it has said goodbye."""
        return self.state is State.LEFT


def layout_conflicts(ours: Iterable[Layout], theirs: Iterable[Layout]) -> tuple[tuple[str, ...], list[str]]:
    """Fields in which layouts of the same cache differ, sorted, and a line per pair of layouts that says how.

    Several layouts of one identity on one side (two engines with different block sizes, say) are each matched: there is
    no conflict with a layout that the other side has too.
    """
    mine: dict[tuple[object, ...], list[Layout]] = {}
    for layout in ours:
        mine.setdefault(layout.identity, []).append(layout)
    fields: set[str] = set()
    lines: list[str] = []
    for layout in theirs:
        candidates = mine.get(layout.identity, [])
        if not candidates or layout in candidates:
            continue
        # Against the nearest of ours: naming every pair would bury the field that matters.
        differing = min((own.conflicts(layout) for own in candidates), key=len)
        nearest = next(own for own in candidates if own.conflicts(layout) == differing)
        fields.update(differing)
        said = ", ".join(f"{f} is {getattr(layout, f)!r} there, {getattr(nearest, f)!r} here" for f in differing)
        lines.append(f"model {layout.model}: {said}; neither will see the other's blocks")
    return tuple(sorted(fields)), lines
