"""The contract every transport keeps, and what a transport may ask of its host process.

A *pull* moves blocks that a peer holds into slots of the local arena. Contract for implementors:

1. Destination pulls. Nothing is ever written into a peer's memory, and nobody writes into ours uninvited.
2. A block is reported ``Status.OK`` only when its xxh3_128 equals the one that the owner took at put time.
3. :meth:`Transport.pull` returns by its deadline, whatever the peer does, and never raises for a peer's failure:
   failures are statuses.
4. Slots of a pull that ended badly may still be written to if, and only if, the result names them in ``unsafe``; the
   caller parks these until ``cleared(token)`` is called.
5. The owner's blocks stay under a lease while they are read, and the lease is given back afterwards (or expires).
6. A pull's task is never cancelled. It ends by its deadline, when the transport is stopped, or soon after it was called
   off: when that is known to be the end of what it may write, or with the rest named in ``unsafe``.
7. All methods run on the event loop's thread and never block it for longer than a system call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from p2pkv.errors import DeadlineExceeded
from p2pkv.types import Status
from p2pkv.wire.fields import Extent


class HeldBlock(NamedTuple):
    """One pinned block of the local store: its place in the arena, its slot's generation, its checksum (16 bytes)."""

    offset: int
    length: int
    generation: int
    checksum: bytes


class Held(NamedTuple):
    """Answer to a pin: a lease (0 = nothing was pinned), its seconds to live, and per asked hash a block or None."""

    lease: int
    ttl_s: float
    blocks: Sequence[HeldBlock | None]


class BlockSource(Protocol):
    """What the serving half of a transport needs from the store."""

    def pin(self, namespace: int, hashes: Sequence[bytes], ttl_s: float, holder: int) -> Held:
        """Hold the blocks that are here for at most ``ttl_s``. ``holder``: the asking node, for its quota.

        Raises:
            Busy: the holder or the table is at its bound.
            LayoutMismatch, InvalidArgument: the namespace cannot be served, and why.
        """
        ...

    def release(self, lease: int, holder: int) -> bool:
        """End a holder's lease; True when it was in force all along."""
        ...


class ArenaMemory(Protocol):
    """The arena as a transport sees it: a descriptor and a mapping, both valid until the process ends."""

    @property
    def fd(self) -> int: ...
    @property
    def base_address(self) -> int: ...
    @property
    def capacity_bytes(self) -> int: ...


OnBlock = Callable[[int, Status, bytes], None]
"""(index into the request, status, xxh3_128). Called once per finished block, on the loop's thread, in any order."""


class CallOff:
    """How whoever asked for a pull ends it early: it is not needed any more, or somebody else would be quicker."""

    __slots__ = ("_ends", "called")

    def __init__(self) -> None:
        self.called = False
        self._ends: list[Callable[[], None]] = []

    def on_call(self, end: Callable[[], None]) -> None:
        """Have ``end`` called when the pull is called off: now, if it has been. It must do no harm after the pull."""
        if self.called:
            end()
        else:
            self._ends.append(end)

    def __call__(self) -> None:
        """Call the pull off. Once is enough."""
        ends, self._ends, self.called = self._ends, [], True
        for end in ends:
            end()


class PullRequest(NamedTuple):
    """Blocks wanted from one node. ``destinations[i]`` is where ``hashes[i]`` goes, its length what the layout says."""

    node: int
    namespace: int
    hashes: Sequence[bytes]
    destinations: Sequence[Extent]
    deadline_s: float  # from now
    on_block: OnBlock
    call_off: CallOff


class PullResult(NamedTuple):
    """How a pull ended. ``statuses`` has one entry per asked block; ``reason`` is for people and logs.

    ``unsafe``: indices whose destination may still be written to, until ``cleared`` is called with ``token``.
    ``waited_s``: from asking until the first byte came, or the answer without one; 0: none did. ``setup_s``: before
    that, until the node could be asked.
    """

    statuses: list[Status]
    bytes_moved: int
    reason: str = ""
    unsafe: frozenset[int] = frozenset()
    token: int = 0
    waited_s: float = 0.0
    setup_s: float = 0.0


def is_silence(error: BaseException) -> bool:
    """Whether an attempt failed because nothing came back at all: not a refusal, nor a connection that broke off."""
    return isinstance(error, DeadlineExceeded | TimeoutError) or isinstance(error.__cause__, TimeoutError)


class Transport(Protocol):
    """One way to pull blocks; see the contract at the top of this file."""

    @property
    def name(self) -> str: ...

    async def start(self) -> None:
        """Make ready to pull and to serve.

        Raises:
            TransportUnavailable: this host cannot run it; the hint says what is missing.
        """
        ...

    async def stop(self) -> None:
        """End every transfer and give back every resource; bounded in time."""
        ...

    async def pull(self, request: PullRequest) -> PullResult: ...

    def setup_s(self, node: int) -> float:
        """How long it will take until the node can be asked; 0: we are connected."""
        ...

    async def prepare(self, node: int) -> None:
        """Connect, if that can be had; bounded in time. That it could not is no error: the next pull tries itself."""
        ...

    def peer_gone(self, node: int) -> None:
        """The node is unreachable or has left: drop what is kept for it."""
        ...


class NullTransport:
    """A transport that never has anything: for agents that only serve local engines, and for tests."""

    name = "null"

    async def start(self) -> None:
        """Nothing to make ready."""

    async def stop(self) -> None:
        """Nothing to end."""

    async def pull(self, request: PullRequest) -> PullResult:
        """Every block is a miss, at once."""
        return PullResult([Status.MISS] * len(request.hashes), 0, "the null transport has nothing")

    def setup_s(self, node: int) -> float:
        """It is always ready."""
        return 0.0

    async def prepare(self, node: int) -> None:
        """Nothing to prepare."""

    def peer_gone(self, node: int) -> None:
        """Nothing is kept."""
