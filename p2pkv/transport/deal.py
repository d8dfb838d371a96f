"""One fetch as it goes: who is asked for which blocks next, and when somebody else would be quicker. Pure.

The plan (:mod:`.plan`) deals all blocks out by what is expected of each source. What is expected turns out wrong, so a
source is asked for one *piece* of its share at a time, a tenth of a second's worth; and when a source has nothing
more to do while blocks are left, what nobody has been asked for is dealt out anew, by what has been learnt meanwhile.
In the end, when all has been asked for, whoever is idle takes over from whoever is late: the piece is called off and
its blocks are dealt out again ("backup tasks" of MapReduce, Dean and Ghemawat 2004, but moved, not doubled: a block's
slot can have one writer).

Per block, a source that failed or was late is not asked again; per fetch, one that broke off or was silent. A source
that said "busy" is asked again after a pause that doubles.

``now`` is in seconds, monotonic. Not thread-safe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from p2pkv.transport.plan import Estimate, Source, plan

PIECE_S: Final = 0.1
"""A piece is what a source is expected to send in this time: long beside what asking costs (0.3 ms and a round trip),
short beside what a person waits for."""
UNSURE_SPREAD: Final = 0.4
UNSURE_BYTES: Final = 8 << 20
"""A source that is little known shows itself on a small piece first."""
HORIZON_BLOCKS: Final = 1024
"""Blocks that are dealt out at once, the first of the chain: dealing costs a microsecond or two for each."""
TRIES_MAX: Final = 4
"""Times that a block is asked for and not given, each time by another source or after another pause."""
CALLED_OFF_MAX: Final = 3
"""Times that a block may be taken over from one that is late; these are no failures."""
BUSY_PAUSE_S: Final = 0.01
BUSY_PAUSES_MAX: Final = 6
"""Doubling from 10 ms: 0.6 s in all. Then a source that is still busy has failed, for this fetch."""
LATE_FACTOR: Final = 1.5
LATE_GRACE_S: Final = 0.01
"""A piece is late when whoever is idle could bring its rest in two thirds of the time, and 10 ms less than that."""


class Piece:
    """Blocks asked of one source in one request."""

    __slots__ = ("asked_at", "last_at", "left", "positions", "source")

    def __init__(self, source: Source, positions: list[int], now: float) -> None:
        self.source = source
        self.positions = positions
        self.left = set(positions)
        self.asked_at = now
        self.last_at = now  # when its latest block landed, or it was asked for


class _Node:
    """How a node has behaved in this fetch."""

    __slots__ = ("busy", "down", "not_before")

    def __init__(self) -> None:
        self.down = False
        self.busy = 0  # times it said so
        self.not_before = -math.inf

    def ready(self, now: float) -> bool:
        return not self.down and self.not_before <= now


class Deal:
    """See the module's docstring.

    Args:
        estimate: of a source, now.
        block_bytes: of each block.
        piece_bytes_max: asked for each piece: it is not larger, but of at least one block.
        salt: of this node; see :func:`p2pkv.transport.plan.plan`.
    """

    def __init__(
        self,
        estimate: Callable[[Source], Estimate],
        *,
        block_bytes: int,
        piece_bytes_max: Callable[[], int],
        salt: int = 0,
    ) -> None:
        self._estimate = estimate
        self._block_bytes = max(1, block_bytes)
        self._piece_bytes_max = piece_bytes_max
        self._salt = salt
        self._sources: dict[int, list[Source]] = {}  # of blocks that are not here yet: who is left to ask
        self._late: dict[int, list[Source]] = {}  # likewise, but it was called off there: only when nobody else is left
        self._unasked: set[int] = set()
        self._tries: dict[int, int] = {}
        self._called_off: dict[int, int] = {}
        self._nodes: dict[int, _Node] = {}
        self._flying: dict[Source, Piece] = {}
        self._runs: dict[Source, list[int]] = {}  # dealt out, not asked for; the next block last
        self._stale = True  # there is news that dealing out anew could make something of

    def offer(self, position: int, sources: Iterable[Source]) -> None:
        """A block is wanted, and these have it."""
        self._sources[position] = [source for source in sources if not self._node(source.node).down]
        self._unasked.add(position)
        self._stale = True

    def withdraw(self, position: int) -> None:
        """The block is here, or given up: nobody need be asked for it."""
        self._sources.pop(position, None)
        self._late.pop(position, None)
        if position in self._unasked:
            self._unasked.remove(position)
            self._stale = True  # there may be others behind it, beyond the horizon

    def exclude(self, node: int) -> None:
        """The node is not asked (any more) by this fetch."""
        self._node(node).down = True
        for position, sources in self._sources.items():
            self._sources[position] = [source for source in sources if source.node != node]
        self._stale = True

    # --- asking

    def hopeless(self) -> list[int]:
        """Blocks that nobody is left to be asked for. Comes before :meth:`next`."""
        for position in self._unasked & self._late.keys():
            if not self._sources[position]:
                late = self._late.pop(position)
                self._sources[position] = [source for source in late if not self._node(source.node).down]
                self._stale = True
        return [
            position
            for position in self._unasked
            if not self._sources[position] or self._tries.get(position, 0) >= TRIES_MAX
        ]

    def next(self, now: float) -> Piece | None:
        """A piece to ask for now; :meth:`asked` or :meth:`not_asked` follows at once."""
        for attempt in (False, True):
            for source in self._runs:
                if source in self._flying or not self._node(source.node).ready(now):
                    continue
                positions = self._take(source)
                if positions:
                    return Piece(source, positions, now)
            if attempt or not self._deal_out(now):
                break
        return None

    def asked(self, piece: Piece) -> None:
        """The piece has been asked for."""
        self._flying[piece.source] = piece
        for position in piece.positions:
            self._unasked.discard(position)
            self._tries[position] = self._tries.get(position, 0) + 1

    def not_asked(self, piece: Piece) -> None:
        """It could not be asked for now (no room): it comes again."""
        self._runs[piece.source] += reversed(piece.positions)

    def wake_at(self, now: float) -> float:
        """When to look again although nothing has happened: somebody may be late, or not busy any more."""
        pauses = [node.not_before for node in self._nodes.values() if not node.down and node.not_before > now]
        watch = now + PIECE_S / 2 if self._flying and len(self._flying) < len(self._usable()) else math.inf
        return min(pauses + [watch]) if self._unasked else watch

    # --- what came of it

    def landed(self, piece: Piece, position: int, now: float) -> None:
        """One of its blocks is here."""
        piece.left.discard(position)
        piece.last_at = now
        self.withdraw(position)

    def failed(self, piece: Piece, position: int) -> None:
        """The source did not give this block: others are asked for it."""
        piece.left.discard(position)
        sources = self._sources.get(position)
        if sources is not None:
            self._sources[position] = [source for source in sources if source.node != piece.source.node]
            self._unasked.add(position)

    def called_off(self, piece: Piece, position: int) -> None:
        """It has not come yet, and somebody else would be quicker: if there is somebody else."""
        if len({source.node for source in self._sources.get(position, ())}) > 1:
            self._late.setdefault(position, []).append(piece.source)
            self.failed(piece, position)
        else:
            piece.left.discard(position)
        if position in self._sources:
            self._unasked.add(position)
            self._tries[position] -= 1
            self._called_off[position] = self._called_off.get(position, 0) + 1

    def lost(self, piece: Piece, position: int) -> None:
        """It was lost on our side, and the source can be asked in another way: it may be asked again, at once."""
        piece.left.discard(position)
        if position in self._sources:
            self._unasked.add(position)

    def busy(self, piece: Piece, position: int, now: float) -> None:
        """The source has too much to do for this block."""
        piece.left.discard(position)
        if position in self._sources:
            self._unasked.add(position)
            self._tries[position] -= 1  # it was not tried, and the pauses are bounded
        node = self._node(piece.source.node)
        if node.not_before <= now:
            node.busy += 1
            node.not_before = now + BUSY_PAUSE_S * 2.0 ** (node.busy - 1)
            if node.busy > BUSY_PAUSES_MAX:
                self.exclude(piece.source.node)

    def ended(self, piece: Piece) -> None:
        """Nothing more comes of it; each of its blocks has been named to one of those above."""
        del self._flying[piece.source]
        self._stale = True

    def late(self, now: float) -> list[Piece]:
        """Pieces whose rest idle sources would bring sooner; the caller calls them off. Ask :meth:`next` first: what
        is idle after that has nothing else to do."""
        late = []
        for piece in self._flying.values():
            if any(self._called_off.get(position, 0) >= CALLED_OFF_MAX for position in piece.left):
                continue
            idle: set[Source] = set()
            blocks = 0
            for position in piece.left:
                others = [source for source in self._sources.get(position, ()) if self._is_idle(source, piece, now)]
                idle.update(others)
                blocks += bool(others)
            if not idle:
                continue
            estimates = [self._estimate(source) for source in idle]
            size = blocks * self._block_bytes
            elsewhere_s = min(known.start_s for known in estimates) + size / sum(
                known.bytes_per_s * (1.0 - known.failing) for known in estimates
            )
            if self._rest_s(piece, now) > LATE_FACTOR * elsewhere_s + LATE_GRACE_S:
                late.append(piece)
        return late

    def _is_idle(self, source: Source, beside: Piece, now: float) -> bool:
        return source not in self._flying and source.node != beside.source.node and self._node(source.node).ready(now)

    def _rest_s(self, piece: Piece, now: float) -> float:
        """How long its rest will take. What is overdue will probably take as long again as it is overdue."""
        known = self._estimate(piece.source)
        block_s = self._block_bytes / known.bytes_per_s
        begun_s = now - piece.last_at
        expected_s = block_s + (known.setup_s + known.first_byte_s if piece.last_at == piece.asked_at else 0.0)
        next_s = expected_s - begun_s if begun_s <= expected_s else begun_s - expected_s
        return next_s + (len(piece.left) - 1) * max(block_s, begun_s - expected_s)

    # --- dealing

    def _node(self, node: int) -> _Node:
        found = self._nodes.get(node)
        if found is None:
            found = self._nodes[node] = _Node()
        return found

    def _usable(self) -> set[Source]:
        return {source for sources in self._sources.values() for source in sources}

    def _take(self, source: Source) -> list[int]:
        """The next piece of its share."""
        run = self._runs[source]
        known = self._estimate(source)
        size = PIECE_S * known.bytes_per_s
        if known.spread >= UNSURE_SPREAD:
            size = min(size, UNSURE_BYTES)
        blocks = max(1, int(min(size, self._piece_bytes_max())) // self._block_bytes)
        positions: list[int] = []
        while run and len(positions) < blocks:
            position = run.pop()
            if position in self._unasked:
                positions.append(position)
        return positions

    def _deal_out(self, now: float) -> bool:
        """Deal out what nobody has been asked for, if that can bring anything new."""
        if not self._stale:
            return False
        self._stale = False
        positions: list[int] = []
        sources: list[Sequence[Source]] = []
        for position in sorted(self._unasked):
            usable = [source for source in self._sources[position] if self._node(source.node).ready(now)]
            self._stale |= len(usable) < len(self._sources[position])  # a pause will be over
            if usable and self._tries.get(position, 0) < TRIES_MAX:
                positions.append(position)
                sources.append(usable)
                if len(positions) == HORIZON_BLOCKS:
                    break
        self._runs = {}
        if not positions:
            return False
        dealt = plan(sources, self._estimate, block_bytes=self._block_bytes, deadline_s=math.inf, salt=self._salt)
        for run in dealt.runs:
            self._runs[run.source] = [positions[i] for i in reversed(run.positions)]
        return True
