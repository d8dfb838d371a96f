"""What this agent thinks of its peers as sources: what to expect of each, and which ones are not asked now.

Brings together the estimates and the circuit breakers, gives both the time, and has peers tried out again in the
background: no caller's request is ever the probe.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable

from p2pkv.transport.breaker import Breakers, Fault, State
from p2pkv.transport.estimates import Estimates, Kept, Moved
from p2pkv.transport.plan import Estimate, Source


class Peers:
    """One per agent; on the event loop's thread.

    Args:
        stranger: what to expect of a source that nothing is known of.
        heard_at: when (on ``clock``) something was last heard from a node, apart from answers to pulls.
        on_open: called with a node whose breaker has opened.
        on_estimate: called with a source of which something has been learnt.
        setup_s: until a node can be asked; 0: now.
        load_bytes: what a node is giving to all others and us, by its own word.
    """

    def __init__(
        self,
        stranger: Callable[[Source], Estimate],
        *,
        heard_at: Callable[[int], float],
        on_open: Callable[[int], None] = lambda node: None,
        on_estimate: Callable[[Source], None] = lambda source: None,
        setup_s: Callable[[int], float] = lambda node: 0.0,
        load_bytes: Callable[[int], int] = lambda node: 0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self.estimates = Estimates(stranger)
        self.breakers = Breakers(rng or random.Random())
        self._heard_at = heard_at
        self._on_open = on_open
        self._on_estimate = on_estimate
        self._setup_s = setup_s
        self._load_bytes = load_bytes
        self._clock = clock

    def estimate(self, source: Source) -> Estimate:
        """What to expect of a source now."""
        known = self.estimates.of(source, self._clock())
        # It gives to others, too: what was asked of it before us comes first, ours among it.
        others_s = max(0.0, self._load_bytes(source.node) / known.bytes_per_s - known.busy_s)
        return known._replace(setup_s=self._setup_s(source.node), busy_s=known.busy_s + others_s)

    def age_s(self, source: Source) -> float:
        """Since something was learnt of the source; infinite: nothing was."""
        return self.estimates.age_s(source, self._clock())

    def usable(self, node: int) -> bool:
        """Whether the node may be asked by who needs something of it."""
        return self.breakers.state(node, self._clock()) is State.CLOSED

    def worth_a_probe(self, node: int) -> bool:
        """Whether the node may be tried out now; :meth:`good`, :meth:`silent` or :meth:`failed` follows."""
        self.breakers.heard(node, self._heard_at(node))
        return self.breakers.allows(node, self._clock())

    def kept(self) -> list[Kept]:
        """What is worth writing down."""
        return self.estimates.kept(self._clock())

    def restore(self, kept: Iterable[Kept]) -> int:
        """Take over what was written down; of how many sources."""
        return self.estimates.restore(kept, self._clock())

    # --- transfers

    def began(self, source: Source, size: int) -> None:
        """So many bytes are asked of it."""
        self.estimates.begin(source, size, self._clock())

    def landed(self, source: Source, size: int) -> None:
        """So many of them have come."""
        self.estimates.landed(source, size)

    def ended(self, source: Source, size: int, moved: Moved) -> None:
        """The other ``size`` will not; ``moved``: the whole transfer."""
        self.estimates.end(source, size, moved, self._clock())
        self._on_estimate(source)

    def answered(self, source: Source, asked: int, failed: int) -> None:
        """Of so many blocks asked of it, so many did not come for a reason that is the source's."""
        if asked:
            self.estimates.answered(source, asked, failed, self._clock())

    # --- behaviour

    def good(self, node: int) -> None:
        """It gave what it was asked for."""
        self.breakers.good(node)

    def silent(self, node: int) -> None:
        """It said nothing at all in its time."""
        self._bad(node, Fault.SILENT)

    def failed(self, node: int) -> None:
        """It refused, closed, or broke off."""
        self._bad(node, Fault.FAILED)

    def wrong(self, node: int) -> None:
        """It gave bytes that failed their checksum."""
        self._bad(node, Fault.WRONG)

    def forget(self, node: int) -> None:
        """The node has gone, or another life of it has come."""
        self.estimates.forget(node)
        self.breakers.forget(node)

    def _bad(self, node: int, fault: Fault) -> None:
        if self.breakers.bad(node, fault, self._clock()):
            self._on_open(node)
