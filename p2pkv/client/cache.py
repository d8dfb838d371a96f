"""One namespace of the agent's store as an engine uses it: put, get, match, and regions of the engine's own memory.

Bytes never travel through the socket. ``get_into`` copies out of the agent's arena, mapped read-only here, while the
agent holds the blocks under a lease; ``put`` copies into a staging region that the agent reads; ``store`` and ``load``
make the agent copy from and to the engine's own shared memory.
"""

from __future__ import annotations

import enum
import mmap
import os
import threading
import time
from collections.abc import Sequence

from p2pkv import _native
from p2pkv.client.channel import to_error
from p2pkv.client.connection import Connection
from p2pkv.client.messages import (
    Done,
    EngineError,
    Load,
    MapRegion,
    Matched,
    MatchKeys,
    Ok,
    Prefetch,
    Replicate,
    Replicated,
    Store,
    UnmapRegion,
    decode,
)
from p2pkv.errors import (
    AgentUnavailable,
    DeadlineExceeded,
    InvalidArgument,
    P2PKVError,
    RemoteProtocolError,
    Unavailable,
)
from p2pkv.light import TYPE_CHECKING, Any, Final, NamedTuple
from p2pkv.types import BLOCK_HASH_BYTES_MAX, BLOCK_HASH_BYTES_MIN, MASK64, Layout, Status, Tier
from p2pkv.wire.engine_types import WARM_PROTOCOL, EngineType, Pace, Source
from p2pkv.wire.frame import Frame
from p2pkv.wire.limits import KEYS_MAX, REPLICAS_MAX

if TYPE_CHECKING:
    from p2pkv.client.client import AgentClient

PAGE: Final = 4096
U32_MAX: Final = 0xFFFFFFFF
DEADLINE_MS: Final = 2_000
PREFETCH_MS: Final = 60_000
LATE_S: Final = 1.0
"""The agent answers at its deadline; the answer may come a little later."""
STAGING_BYTES: Final = 32 << 20
"""Per cache, allocated at the first put: enough that one copy hides behind the other."""

UNKNOWN_PACE: Final = Pace()

_STORED: Final = frozenset({Status.OK, Status.EXISTS})


class End(enum.IntEnum):
    """How a get ended (``native/gets.hpp``)."""

    DONE = 0
    LATE = 1
    BROKEN = 2
    BUSY = 3
    REFUSED = 4
    NONSENSE = 5


class Match(NamedTuple):
    """Who holds how much of a chain. Counts are blocks from the beginning without a hole.

    ``local``: in this agent's store. ``anywhere``: by the best use of every live holder. ``nodes``: per node id (as 16
    hexadecimal digits) the depth in any tier (``Tier.GONE``) and in each.
    """

    local: int
    anywhere: int
    present: list[str | None]
    nodes: dict[str, dict[Tier, int]]


class Replica(NamedTuple):
    """What a node does about blocks that it was told to replicate: so many are there, so many it begins to pull;
    ``reason``: why it does not do more ("": it does all that its free memory allows)."""

    here: int
    begun: int
    reason: str


class Cache:
    """Made by :meth:`AgentClient.open`. Thread-safe.

    Keys are the engine's block hashes (8 to 64 bytes); buffers are anything with a contiguous buffer of exactly
    ``layout.block_bytes`` bytes: bytearray, memoryview, numpy arrays, torch CPU tensors.
    """

    def __init__(self, client: AgentClient, layout: Layout, namespace: int) -> None:
        self._client = client
        self.layout = layout
        self.namespace = namespace
        self._block_bytes = layout.block_bytes
        self._staging_lock = threading.Lock()
        self._staging: _Staging | None = None

    def forget(self) -> None:
        """The client is closed: let go of the staging memory; a put under way keeps it until it is done."""
        self._staging = None

    # --- blocking ---

    def put(self, keys: Sequence[bytes], buffers: Sequence[Any], *, deadline_ms: int = DEADLINE_MS) -> list[bool]:
        """Copy blocks into the agent's store. True where the block is there afterwards (also if it already was).

        The buffers are the caller's again on return. What does not fit, or is not done by the deadline, is False.

        Raises:
            InvalidArgument: keys or buffers are of the wrong number or size.
            AgentUnavailable: no agent.
        """
        _check_keys(keys, buffers)
        deadline_ms = checked_ms(deadline_ms)
        views = [_bytes_view(buffer, self.layout.block_bytes, writable=False) for buffer in buffers]
        deadline = time.monotonic() + deadline_ms / 1000
        stored: list[bool] = []
        if not self._staging_lock.acquire(timeout=deadline_ms / 1000):
            return [False] * len(keys)
        try:
            while len(stored) < len(keys):
                first = len(stored)
                try:
                    stored += self._put_window(keys[first:], views[first:], deadline)
                except DeadlineExceeded:
                    break
        finally:
            self._staging_lock.release()
        return stored + [False] * (len(keys) - len(stored))

    def _put_window(self, keys: Sequence[bytes], views: Sequence[memoryview], deadline: float) -> list[bool]:
        """Put as many of the blocks as fit into the staging region at once."""
        connection = self._client.connection(deadline)
        staging = self._staging
        if staging is None:
            staging = self._staging = _Staging(self, deadline)
        count = min(len(keys), staging.region.slots)
        for slot in range(count):
            staging.fill(slot, views[slot])
        left_ms = int(max(0.0, deadline - time.monotonic()) * 1000)
        request = Store(self.namespace, list(keys[:count]), staging.region.number, list(range(count)), left_ms)
        try:
            answer = connection.request(request, deadline=deadline + 0.05)
        except P2PKVError:
            # The agent may still be reading: this memory is never written to again, a new one is made when needed.
            self._staging = None
            staging.region.forget()
            raise
        if not isinstance(answer, Done):
            raise P2PKVError("unexpected answer to STORE", got=type(answer).__name__)
        return [status in _STORED for status in answer.statuses]

    def get_into(self, keys: Sequence[bytes], buffers: Sequence[Any], deadline_ms: int = DEADLINE_MS) -> list[bool]:
        """Read blocks, from this host or from peers, into the caller's buffers. True where the bytes are the block's.

        Where it is False the buffer's contents are undefined. No agent, no holder, too slow: all are misses.

        Raises:
            InvalidArgument: keys or buffers are of the wrong number or size.
        """
        if (connection := self._client.live) is not None:
            few = connection.gets.get_few(self.namespace, keys, buffers, self._block_bytes, deadline_ms)
            if type(few) is list:
                return few
            if few is not None:
                return [status == Status.OK for status in self._ended(connection, *few)]
        return [status == Status.OK for status in self._get(keys, buffers, deadline_ms)]

    def get_statuses(
        self, keys: Sequence[bytes], buffers: Sequence[Any], deadline_ms: int = DEADLINE_MS
    ) -> list[Status]:
        """Like :meth:`get_into`, saying why not."""
        return [Status(status) for status in self._get(keys, buffers, deadline_ms)]

    def _get(self, keys: Sequence[bytes], buffers: Sequence[Any], deadline_ms: int) -> bytes:
        """A status per key."""
        _check_keys(keys, buffers)
        block_bytes = self.layout.block_bytes
        views = [_bytes_view(buffer, block_bytes, writable=True) for buffer in buffers]
        deadline_ms = min(max(0, int(deadline_ms)), U32_MAX)
        deadline = time.monotonic() + deadline_ms / 1000
        try:
            connection = self._client.connection(deadline)
        except DeadlineExceeded:
            return bytes([Status.TIMEOUT]) * len(keys)
        except Unavailable:
            return bytes([Status.LOST]) * len(keys)
        ended = connection.gets.get(self.namespace, keys, views, block_bytes, deadline_ms, deadline)
        return self._ended(connection, *ended)

    def _ended(self, connection: Connection, end: int, statuses: bytes, detail: bytes) -> bytes:
        """What to make of how a get ended; a status per key."""
        if end == End.BROKEN:  # one does not come without the other
            connection.close(f"its socket for gets has ended: {detail.decode(errors='replace')}")
        if end == End.REFUSED:
            try:
                error = decode(Frame(EngineType.ERROR, 1, 0, detail))
                assert isinstance(error, EngineError)
                reason = to_error(error)
            except RemoteProtocolError as malformed:
                connection.close(str(malformed))
                reason = AgentUnavailable(malformed.message)
            if isinstance(reason, Unavailable):
                return bytes(status if status == Status.OK else Status.LOST for status in statuses)
            raise reason
        if end == End.NONSENSE:
            raise P2PKVError(detail.decode())
        return statuses

    def match(self, keys: Sequence[bytes], *, deadline_ms: int = DEADLINE_MS) -> Match:
        """Who holds this chain, by the agent's own index: no network.

        Raises:
            AgentUnavailable, DeadlineExceeded: no agent, or no answer in time.
        """
        _check_keys(keys)
        deadline = time.monotonic() + deadline_ms / 1000
        request = MatchKeys(self.namespace, list(keys), True)
        answer = self._client.connection(deadline).request(request, deadline=deadline)
        if not isinstance(answer, Matched):
            raise P2PKVError("unexpected answer to MATCH", got=type(answer).__name__)
        nodes = {
            f"{row.node:016x}": {
                Tier.GONE: row.depth,
                Tier.HBM: row.depth_hbm,
                Tier.DRAM: row.depth_dram,
                Tier.SSD: row.depth_ssd,
                Tier.SHARED: row.depth_shared,
            }
            for row in answer.nodes
        }
        names = {Source.NONE: None, Source.LOCAL: "local", Source.PEER: "peer"}
        return Match(answer.local, answer.anywhere, [names[Source(s)] for s in answer.present], nodes)

    def prefetch(self, keys: Sequence[bytes], *, deadline_ms: int = PREFETCH_MS) -> list[bool]:
        """Have blocks in the agent's store ahead of need. True where they are there. Comes behind all gets and loads.

        Raises:
            InvalidArgument: keys or a deadline that cannot be.
            AgentUnavailable, DeadlineExceeded: no agent, or no answer in time. Busy: it has too much to do.
        """
        _check_keys(keys)
        deadline_ms = checked_ms(deadline_ms)
        deadline = time.monotonic() + deadline_ms / 1000
        connection = self._client.connection(deadline).speaking(WARM_PROTOCOL)
        answer = connection.request(Prefetch(self.namespace, list(keys), deadline_ms), deadline=deadline + LATE_S)
        if not isinstance(answer, Done):
            raise P2PKVError("unexpected answer to PREFETCH", got=type(answer).__name__)
        return [status == Status.OK for status in answer.statuses]

    def replicate(
        self, keys: Sequence[bytes], nodes: Sequence[str], *, deadline_ms: int = DEADLINE_MS
    ) -> dict[str, Replica]:
        """Have other nodes (ids as :meth:`match` names them) pull blocks, into what memory they have free. They do so
        after they have answered; :meth:`match` shows when.

        Raises:
            InvalidArgument: not a node id, or too many of them.
            AgentUnavailable, DeadlineExceeded: no agent, or no answer in time.
        """
        _check_keys(keys)
        numbers = [_node_number(node) for node in nodes]
        if len(numbers) > REPLICAS_MAX:
            raise InvalidArgument(
                "too many nodes in one call", nodes=len(numbers), limit=REPLICAS_MAX, hint="Call it for some at a time."
            )
        if not numbers:
            return {}
        deadline = time.monotonic() + deadline_ms / 1000
        connection = self._client.connection(deadline).speaking(WARM_PROTOCOL)
        answer = connection.request(Replicate(self.namespace, list(keys), numbers), deadline=deadline)
        if not isinstance(answer, Replicated):
            raise P2PKVError("unexpected answer to REPLICATE", got=type(answer).__name__)
        rows = zip(nodes, answer.here, answer.begun, answer.reasons, strict=True)
        return {node: Replica(here, begun, reason) for node, here, begun, reason in rows}

    def map_region(
        self, fd: int, *, slots: int, slot_bytes: int = 0, offset: int = 0, deadline_ms: int = DEADLINE_MS
    ) -> Region:
        """Let the agent read and write the engine's own shared memory (a memfd, a file in /dev/shm), by descriptor.

        Slot ``i`` is the ``layout.block_bytes`` bytes at ``offset + i * slot_bytes``. The descriptor is duplicated.

        Raises:
            InvalidArgument: the file is smaller than that, or a slot is smaller than a block.
            AgentUnavailable, DeadlineExceeded: no agent, or no answer in time.
        """
        slot_bytes = slot_bytes or self.layout.block_bytes
        if not 0 <= slots <= U32_MAX or not 0 <= offset <= MASK64 - slots * slot_bytes:
            raise InvalidArgument("no file holds that", offset=offset, slots=slots, slot_bytes=slot_bytes)
        if slot_bytes < self.layout.block_bytes:
            raise InvalidArgument("a slot is smaller than a block", slot=slot_bytes, block=self.layout.block_bytes)
        deadline = time.monotonic() + deadline_ms / 1000
        connection = self._client.connection(deadline)
        region = Region(self._client, os.dup(fd), offset, slot_bytes, slots)
        try:
            region.announce(connection, deadline)
        except P2PKVError:
            region.forget()
            raise
        return region

    # --- jobs: wait for nobody ---

    def submit_match(self, keys: Sequence[bytes], *, deadline_ms: int = DEADLINE_MS, pace: Pace = UNKNOWN_PACE) -> int:
        """Ask who holds these blocks; the answer comes out of :meth:`AgentClient.poll`.

        ``pace``: what computing takes this engine, from the first key on. The keys are then a chain, and blocks that a
        peer has but that would come later than they are computed are answered as if nobody had them.

        Raises (all three submits):
            InvalidArgument: keys, slots, or a number that cannot be.
            Busy: too much is unanswered. AgentUnavailable: not connected (a connection is being made).
        """
        _check_keys(keys)
        _check_pace(pace)
        return self._client.submit(MatchKeys(self.namespace, list(keys), False, *pace), "match", len(keys), deadline_ms)

    def store(self, keys: Sequence[bytes], region: Region, slots: Sequence[int], *, deadline_ms: int = 10_000) -> int:
        """Copy slots of a region into the agent's store. They must not change until the job's result."""
        _check_keys(keys, slots)
        _check_slots(slots)
        deadline_ms = checked_ms(deadline_ms)
        request = Store(self.namespace, list(keys), region.number, list(slots), deadline_ms)
        return self._client.submit(request, "store", len(keys), deadline_ms)

    def load(
        self,
        keys: Sequence[bytes],
        region: Region,
        slots: Sequence[int],
        deadline_ms: int = DEADLINE_MS,
        *,
        pace: Pace = UNKNOWN_PACE,
    ) -> int:
        """Write blocks, from this host or from peers, into slots of a region. They are the agent's until the result.
        At most 4 MiB that are all in the agent's arena are copied before this returns.

        ``pace``: what computing takes this engine. What falls behind that is given up before the deadline, the rest of
        the chain with it.
        """
        here = region.here or region.loads_here()
        if here is not None and (job := here(self.namespace, self._block_bytes, keys, slots)) is not None:
            if self._client.jobs.sleepers:
                self._client.wake()
            return job
        _check_keys(keys, slots)
        _check_slots(slots)
        _check_pace(pace)
        deadline_ms = checked_ms(deadline_ms)
        request = Load(self.namespace, list(keys), region.number, list(slots), deadline_ms, pace.block_us, pace.more_ns)
        if len(slots) and max(slots) < region.slots and region.slot_bytes >= self.layout.block_bytes:
            job = self._client.load_here(request, region, self.layout.block_bytes)
            if job is not None:
                return job
        return self._client.submit(request, "load", len(keys), deadline_ms)


class Region:
    """Memory of this engine that its agent maps. Made by :meth:`Cache.map_region`."""

    def __init__(self, client: AgentClient, fd: int, offset: int, slot_bytes: int, slots: int) -> None:
        self._client = client
        self._fd = fd
        self.here: _native.LoadsHere | None = None
        self._memory: _native.Mapping | None = None
        self._unmappable = False
        self.offset = offset
        self.slot_bytes = slot_bytes
        self.slots = slots
        self.number = client.add_region(self)

    def memory(self) -> _native.Mapping | None:
        """The region as we write to it ourselves, mapped when first needed; None: it cannot be, or was given up."""
        if self._memory is None and self._fd >= 0 and not self._unmappable:
            try:
                self._memory = _native.Mapping(self._fd, self.offset + self.slots * self.slot_bytes, True)
            except OSError:
                self._unmappable = True
        return self._memory

    def loads_here(self) -> _native.LoadsHere | None:
        """:attr:`here`, made for the connection that there is: what loads at once what is in the agent's arena. None:
        there is no connection, or no memory."""
        connection, memory = self._client.live, self.memory()
        if connection is None or memory is None:
            return None
        self.here = self._client.jobs.loads_here(
            connection.gets, memory, memory.address + self.offset, self.slot_bytes, self.slots
        )
        return self.here

    def announce(self, connection: Connection, deadline: float) -> None:
        """Tell an agent of this region (again)."""
        self.here = None  # of the connection before
        request = MapRegion(self.number, self.offset, self.slot_bytes, self.slots)
        answer = connection.request(request, deadline=deadline, fds=(self._fd,))
        if not isinstance(answer, Ok):
            raise P2PKVError("unexpected answer to MAP_REGION", got=type(answer).__name__)

    def unmap(self, *, deadline_ms: int = DEADLINE_MS) -> None:
        """Take the memory back: returns once the agent neither reads nor writes it any more.

        Raises:
            DeadlineExceeded: the agent has not said so in time; the memory may still be in use.
        """
        deadline = time.monotonic() + deadline_ms / 1000
        self._unmappable = True
        self.here = self._memory = None  # what is being copied into it keeps it
        if (connection := self._client.live) is not None:
            connection.own_loads.call_off()
        try:
            self._client.connection(deadline).request(UnmapRegion(self.number), deadline=deadline)
        except AgentUnavailable:
            pass  # no agent, no use
        self.forget()

    def forget(self) -> None:
        """Drop our side without asking the agent; it unmaps when the connection ends."""
        self._client.drop_region(self.number)
        self.here = self._memory = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _Staging:
    """Shared memory that puts are copied through."""

    def __init__(self, cache: Cache, deadline: float) -> None:
        block_bytes = cache.layout.block_bytes
        slot_bytes = -(-block_bytes // PAGE) * PAGE
        slots = max(1, min(KEYS_MAX, STAGING_BYTES // slot_bytes))
        fd = os.memfd_create("p2pkv-staging", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, slots * slot_bytes)
            self._memory = memoryview(mmap.mmap(fd, slots * slot_bytes))
            left_ms = int(max(1.0, (deadline - time.monotonic()) * 1000))
            self.region = cache.map_region(fd, slots=slots, slot_bytes=slot_bytes, deadline_ms=left_ms)
        finally:
            os.close(fd)

    def fill(self, slot: int, view: memoryview) -> None:
        start = slot * self.region.slot_bytes
        _native.copy(self._memory[start : start + len(view)], view)


def _bytes_view(buffer: Any, length: int, *, writable: bool) -> memoryview:
    """Any contiguous buffer of ``length`` bytes as a flat view of bytes; torch CPU tensors too."""
    try:
        view = memoryview(buffer)
    except TypeError:
        view = memoryview(_tensor_bytes(buffer))
    if view.nbytes != length:
        raise InvalidArgument("a buffer is not as long as a block", bytes=view.nbytes, block=length)
    if not view.c_contiguous:
        raise InvalidArgument("a buffer is not contiguous", hint="Pass x.contiguous() and copy it back.")
    if writable and view.readonly:
        raise InvalidArgument("a buffer to read into is read-only")
    return view.cast("B") if view.ndim != 1 or view.format != "B" else view


def _tensor_bytes(tensor: Any) -> Any:
    """The memory of a torch CPU tensor, whatever its dtype (bfloat16 has no numpy twin), without copying it."""
    if not hasattr(tensor, "data_ptr"):
        raise InvalidArgument("not a buffer", type=type(tensor).__name__)
    if tensor.device.type != "cpu":
        raise InvalidArgument("a tensor is not in host memory", device=tensor.device)
    if not tensor.is_contiguous():
        raise InvalidArgument("a buffer is not contiguous", hint="Pass x.contiguous() and copy it back.")
    import ctypes

    size = tensor.numel() * tensor.element_size()
    return (ctypes.c_char * size).from_address(tensor.data_ptr())


def _check_keys(keys: Sequence[bytes], others: Sequence[Any] | None = None) -> None:
    if others is not None and len(others) != len(keys):
        raise InvalidArgument("as many keys as buffers or slots are needed", keys=len(keys), others=len(others))
    if len(keys) > KEYS_MAX:
        raise InvalidArgument("too many keys in one call", keys=len(keys), limit=KEYS_MAX)
    for key in keys:
        if not BLOCK_HASH_BYTES_MIN <= len(key) <= BLOCK_HASH_BYTES_MAX:
            raise InvalidArgument("a key is not 8 to 64 bytes", bytes=len(key))


def checked_ms(value: float, name: str = "deadline_ms") -> int:
    """A time as messages can say it; the agent gives a client up that says anything else, with all its jobs.

    Raises:
        InvalidArgument: it is negative, or more than seven weeks.
    """
    if not 0 <= value <= U32_MAX:
        raise InvalidArgument(f"{name} is not a time", value=value, limit=U32_MAX, hint="Milliseconds, from 0 on.")
    return int(value)


def _check_slots(slots: Sequence[int]) -> None:
    if len(slots) and not (min(slots) >= 0 and max(slots) <= U32_MAX):
        raise InvalidArgument("a slot's number is none", least=min(slots), most=max(slots), hint="They count from 0.")


def _check_pace(pace: Pace) -> None:
    if not (min(pace) >= 0 and max(pace) <= U32_MAX):
        raise InvalidArgument("not a pace", hint="Whole numbers from 0 (not known) on.", **pace._asdict())


def _node_number(node: str) -> int:
    try:
        number = int(node, 16)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number <= MASK64:
        raise InvalidArgument("not a node id", node=node, hint="They are 16 hexadecimal digits, as match() names them.")
    return number
