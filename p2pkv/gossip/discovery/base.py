"""Discovery finds *seeds*: addresses worth dialing. It never says who is alive; only the peer itself does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Protocol

from p2pkv.wire.peer import Address

SEEDS_MAX: Final = 1_024
"""Addresses taken from one source."""

Found = Callable[[str, Iterable[Address]], None]
"""``found(source, addresses)``: everything the source names now, replacing what it named before."""


class Discovery(Protocol):
    """One way of finding seeds. Used from the event loop's thread only.

    Implementors: :meth:`start` returns quickly and keeps looking in the background; a failure to look is logged and
    retried, and what was found before stays; :meth:`stop` ends every task and socket. Secrets are never published.
    """

    @property
    def source(self) -> str:
        """A short name, unique among the sources of one agent."""
        ...

    async def start(self, found: Found) -> None:
        """Begin to look; call ``found`` whenever what is named changes."""
        ...

    async def stop(self) -> None:
        """Stop looking."""
        ...
