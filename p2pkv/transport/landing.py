"""The local store and the cell, as a fetch sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from p2pkv.transport.base import Transport
from p2pkv.transport.plan import Source
from p2pkv.types import Status


class Place(Protocol):
    """A reserved slot: where a block's bytes go."""

    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...


P = TypeVar("P", bound=Place)


class Landing(Protocol[P]):
    """The local store as the fetcher sees it. All calls return at once."""

    def block_bytes(self, namespace: int) -> int:
        """Of each of a namespace's blocks; 0: the namespace is not known here."""
        ...

    def reserve(self, namespace: int, key: bytes) -> P | Status:
        """A slot to write into; EXISTS when the block is here, BUSY when it is being written, NO_SPACE."""
        ...

    def commit(self, place: P, checksum: bytes) -> None: ...
    def abort(self, place: P) -> None: ...
    def quarantine(self, place: P, token: tuple[str, int]) -> None: ...


HoldersOf = Callable[[int, Sequence[bytes]], Sequence[Sequence[Source]]]
"""(namespace, hashes) -> per hash where live peers have it, ourselves excluded; the local index's word."""

PickTransport = Callable[[int], Transport]
"""node -> the transport to pull from it with."""

OnFetched = Callable[[int, Status], None]
"""(index into the asked hashes, OK when the block is in the local store now). Called once per hash."""
