"""Which layouts this node keeps blocks of: those of its engines, and those that were adopted from peers ahead of them.

An engine's own layout goes before an adopted one: if the two describe the same cache differently, what was pulled by
the adopted one is dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from p2pkv.errors import InvalidArgument, LayoutMismatch
from p2pkv.store.dram import DramStore
from p2pkv.types import Layout


class Layouts:
    """On the event loop's thread.

    Args:
        on_change: called when the set of layouts in the store has changed, so that the node's card can be told again.
        on_dropped: called after blocks were dropped.
    """

    def __init__(self, store: DramStore, on_change: Callable[[], None], on_dropped: Callable[[], None]) -> None:
        self._store = store
        self._on_change = on_change
        self._on_dropped = on_dropped
        self._open: Counter[Layout] = Counter()  # that live engines use
        self._adopted: set[Layout] = set()

    def open(self, layout: Layout) -> int:
        """An engine begins to use a layout; returns its namespace.

        Raises:
            LayoutMismatch: a live engine of this node keeps the same cache with another layout.
            InvalidArgument: the layout is impossible, or does not fit the arena.
        """
        if problems := layout.problems():
            raise InvalidArgument("the layout is impossible: " + "; ".join(problems))
        for other in self._open:
            if fields := layout.conflicts(other):
                said = ", ".join(f"{f} is {getattr(layout, f)!r}, but {getattr(other, f)!r} there" for f in fields)
                raise LayoutMismatch(
                    f"another engine of this node keeps this cache with another layout: {said}",
                    fields=fields,
                    hint="Start both engines with the same settings, or tell them apart by revision or tenant.",
                )
        for other in [other for other in self._adopted if layout.conflicts(other)]:
            self._adopted.discard(other)
            self._store.drop_namespace(other.namespace)
            self._on_dropped()
        namespace = self._register(layout)
        self._adopted.discard(layout)
        self._open[layout] += 1
        return namespace

    def close(self, layout: Layout) -> None:
        """An engine has gone. Its blocks stay."""
        self._open[layout] -= 1
        if self._open[layout] <= 0:
            del self._open[layout]

    def adopt(self, layout: Layout) -> int:
        """Keep blocks of a layout that a peer has told of, before an engine here uses it; returns its namespace.

        Raises:
            LayoutMismatch, InvalidArgument, OutOfSpace: it cannot be kept here.
        """
        if layout not in self._store.layouts():
            self._adopted.add(layout)
        try:
            return self._register(layout)
        except BaseException:
            self._adopted.discard(layout)
            raise

    def _register(self, layout: Layout) -> int:
        known = layout in self._store.layouts()
        namespace = self._store.register(layout)
        if not known:
            self._on_change()
        return namespace
