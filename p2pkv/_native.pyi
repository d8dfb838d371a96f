"""Stub of the C++ extension (sources in ``p2pkv/native``). Lengths are in bytes; digests are 16 bytes each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, SupportsIndex

from typing_extensions import Buffer

HASH_IMPLEMENTATION: str

def xxh3_128(data: Buffer) -> bytes: ...
def copy(dst: Buffer, src: Buffer) -> bool:
    """Copy without the GIL; False when a page of either side is gone. Raises ValueError when the lengths differ."""

def copy_hash(dst: Buffer, src: Buffer) -> bytes | None:
    """Copy and checksum in one pass; the digest is of what was written. None when a page of either side is gone."""

def address_of(buffer: Buffer) -> int:
    """Address of a buffer's first byte; the caller keeps the buffer alive while it uses it."""

def populate(address: int, length: int) -> int:
    """Fault pages in, writable. 0 or an errno (EINVAL where the kernel is too old)."""

def collapse(address: int, length: int) -> int:
    """Have the whole huge pages of this range be huge pages (MADV_COLLAPSE); how many bytes are now. Keeps what is in
    them; blocks without the GIL, some ms for each 64 MiB."""

def send_to_all(fd: int, frame: bytes, addresses: bytes, address_bytes: int) -> int:
    """Sends a datagram to each of the packed socket addresses; returns how many the socket took. Never blocks."""

def receive_all(fd: int, most: int) -> list[tuple[bytes, bytes]]:
    """Datagrams that have come, each with its packed socket address; each cut off behind 2,048 bytes. Never blocks."""

class Mapping:
    """The first ``length`` bytes of a file, shared, as a buffer; unmapped with the last reference to it or its buffers.

    Begins at a multiple of 2 MiB, so that huge pages are mapped as such.

    Raises:
        OSError: the kernel refuses."""

    address: int
    def __init__(self, fd: int, length: int, writable: bool) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def run_now(work: int, items: Sequence[tuple[int, int, int]], deadline_s: float = -1.0) -> tuple[bytes, bytes]:
    """Run (dst, src, length) items in this thread: 0 copy, 1 copy and hash, 2 hash src. Returns ok bytes and digests.

    Nothing is written once ``deadline_s`` from now has passed (looked at every 256 KiB); negative = no deadline.
    """

def pack(value: object) -> bytes:
    """MessagePack of None, booleans, integers of 64 bits, floats, text, byte strings, lists, tuples and dicts.

    Raises:
        TypeError: something else. OverflowError: a larger integer. ValueError: nested deeper than 16.
    """

class Shape:
    """What a MessagePack value must be, and what is made of it. Immutable; made once for all values of its kind.

    Integers are taken in their unsigned forms only; arrays become tuples. Nothing is allocated by what an input claims.
    """

    @staticmethod
    def uint(most: int) -> Shape: ...
    @staticmethod
    def boolean() -> Shape: ...
    @staticmethod
    def text(chars_max: int) -> Shape: ...
    @staticmethod
    def binary(bytes_max: int) -> Shape: ...
    @staticmethod
    def array(items: Shape, items_max: int) -> Shape: ...
    @staticmethod
    def record(type: type[tuple[Any, ...]], fields: Sequence[Shape], defaults: tuple[object, ...] = ()) -> Shape:
        """An array of one value per field, as a ``type``: a tuple, or a NamedTuple.

        More values at the end are skipped; the last ones may be missing where there are defaults for them.
        """

    def unpack(self, data: bytes) -> Any:
        """Read one value.

        Raises:
            ValueError: ``data`` is malformed, or not of this shape, or goes on behind the value.
        """

class Hasher:
    """xxh3_128 taken piece by piece from the arena's memory, without the GIL. Not thread-safe."""

    def __init__(self) -> None: ...
    def update(self, address: int, length: int) -> None: ...
    def digest(self) -> bytes: ...

class Workers:
    """Threads that copy and hash. ``fd`` becomes readable when :meth:`drain` has something."""

    fd: int
    queued: int
    def __init__(self, threads: int) -> None: ...
    def submit(self, job: int, work: int, items: Sequence[tuple[int, int, int]], deadline_s: float = -1.0) -> None:
        """Queue (dst, src, length) items; see :func:`run_now`. Memory stays in use until the job is drained."""

    def drain(self) -> list[tuple[int, bytes, bytes]]:
        """(job, ok bytes, digests) of every finished job."""

    def stop(self) -> None: ...

class IoEngine:
    """A thread that moves blocks between sockets and memory. ``fd`` becomes readable when :meth:`drain` has something.

    The caller keeps socket and memory alive until a job's final event, and uses neither meanwhile.
    """

    fd: int
    active: int
    def __init__(self, transfers_max: int) -> None: ...
    def receive(
        self,
        job: int,
        fd: int,
        request: bytes,
        blocks: Sequence[tuple[int, int]],
        deadline_s: float,
        first_byte_s: float,
        stall_s: float,
        partial_bytes: int,
    ) -> bool:
        """Send ``request`` and receive GOT into (address, length) blocks. False: the table is full."""

    def send(
        self,
        job: int,
        fd: int,
        header: bytes,
        file: int,
        mapping: int,
        runs: Sequence[tuple[int, int]],
        deadline_s: float,
        stall_s: float,
    ) -> bool:
        """Send ``header`` and then (offset, length) runs of descriptor ``file``: by reference, or (``mapping``: its
        address here, not 0) by copying. False: nothing was started."""

    def cancel(self, job: int) -> None: ...
    def drain(self) -> list[tuple[int, bool, int, int, bytes, bytes, int, float, bytes]]:
        """(job, final, code, first block, statuses, digests, payload bytes so far, seconds until the answer's first
        byte, detail) in order."""

    def stop(self) -> None:
        """End every transfer as cancelled and join the thread."""

class Pool:
    """Idle data connections to peers, by node and by the node's slot in the index. Thread-safe; owns what it gets."""

    def __init__(self, per_node: int, ceiling_s: float) -> None: ...
    def give(self, node: int, slot: int, fd: int) -> None:
        """Keep a connection; the oldest of the node's is closed when there are too many. ``slot`` 0: none."""

    def take(self, node: int) -> int:
        """A connection that is the caller's from now on, or -1."""

    def drop(self, node: int) -> None: ...
    def expect(self, node: int, first_byte_s: float, byte_s: float) -> None:
        """What is expected of the node, by which native code chooses among holders."""

    def learn(self, node: int, waited_s: float) -> None:
        """The node's first byte came after this long; 0 says nothing. Of nodes that have a connection here."""

    def is_near(self, node: int) -> bool:
        """Whether it answers in less time than it takes to wake a thread or two. For tests."""

    def shun(self, slot: int, shunned: bool) -> None:
        """Whether the node in this slot of the index is not to be asked."""

    def shunned(self, slot: int) -> bool:
        """For tests."""

    def clear(self) -> None: ...
    def idle(self) -> int: ...
    def idle_at(self, node: int) -> int: ...

def many_processors() -> bool:
    """Whether this process may use four processors or more (``native/placement.hpp``)."""

class Placement:
    """On which processors the stages of a read run, where there are two (``native/placement.hpp``)."""

    def __init__(self) -> None: ...
    def arrange(self, engine: int, reader: int, checker: int) -> None: ...
    def give_up(self) -> None: ...

class NixlReads:
    """One-sided reads by the NIXL process for the lane (``native/nixl_reads.hpp``). ``fd``: :meth:`drain` has
    something.

    The arena at ``arena`` stays mapped until :meth:`stop` has returned."""

    fd: int
    bell: int
    reads: int
    bytes_read: int
    def __init__(self, store: Store, arena: int, partial_bytes: int) -> None: ...
    def attach(self, fd: int, process: int) -> None:
        """A NIXL process is ready; takes its (not blocking) socket over. ``process``: its id, or 0."""

    def detach(self) -> None:
        """That process has been reaped: nothing it had begun can land any more."""

    def want(self, node: int, wanted: bool) -> None:
        """Whether a node is to be read one-sided: if so, native code never reads it in another way."""

    def set_peer(self, node: int, endpoint: str) -> None: ...
    def drop_peer(self, node: int) -> None: ...
    def reads_from(self, node: int) -> bool: ...
    def drain(self) -> list[tuple[int, int, int]]:
        """(kind, read id or node, bytes)."""

    def stop(self) -> None:
        """End every read, join the thread."""

LaneEvent = tuple[
    int,
    int,
    int,
    int,
    list[bytes],
    bytes,
    bytes,
    float,
    float,
    int,
    int,
    bool,
    int,
    int,
    int,
    int,
    int,
    float,
    float,
    list[bytes],
    bytes,
]

class DirectoryReader:
    """Copies blocks out of an arena by its directory (``native/directory_reader.hpp``). Thread-safe.

    ``unchecked``: without looking afterwards whether the block was there all along. For tests.

    Raises:
        ValueError: not a directory, or of another version."""

    def __init__(self, table: Buffer, marks: Buffer, arena: Buffer, unchecked: bool = False) -> None: ...
    def copy(self, namespace: int, key: bytes, out: Buffer) -> bool:
        """False: it is not there, is not as long as ``out``, or went meanwhile."""

    def copy_proven(self, namespace: int, key: bytes, out: Buffer) -> int:
        """0: its bytes, by its checksum. 1: it is not there, or went meanwhile. 2: it is there, with other bytes."""

class Gets:
    """An engine's GETs on a socket of their own (``native/gets.hpp``). Thread-safe.

    ``fd``: connected, and this object's from now on. ``arena``: the agent's, held for as long as this lives. So are
    ``table`` and ``marks``, its directory: what is in the arena is then copied out without asking. ``look_s``: who
    waits looks for so long before it sleeps, each time; negative: as long as pays on this host.
    """

    broken: str | None
    def __init__(
        self,
        fd: int,
        arena: Buffer,
        table: Buffer | None = None,
        marks: Buffer | None = None,
        *,
        look_s: float = -1.0,
    ) -> None: ...
    def get(
        self,
        namespace: int,
        keys: Sequence[bytes],
        buffers: Sequence[Buffer],
        block_bytes: int,
        deadline_ms: int,
        deadline: float,
    ) -> tuple[int, bytes, bytes]:
        """Read blocks into writable buffers of ``block_bytes`` bytes each, until ``deadline`` (``time.monotonic()``).

        Returns how it ended (:class:`p2pkv.client.cache.End`), a :class:`p2pkv.types.Status` per key, and a detail.

        Raises:
            ValueError: a buffer is of another length.
            KeyboardInterrupt: and whatever else a signal handler raises.
        """

    copied_fd: int
    """Readable when :meth:`copied` has something; -1 without a directory."""

    def copy_here(
        self, job: int, namespace: int, keys: list[bytes], to: Sequence[int], block_bytes: int
    ) -> bytes | bool | None:
        """Copy blocks to these addresses, if all of them are in the arena; None, and nothing was done, if not.

        Up to 4 MiB are copied now: per key 1 where the block's bytes are there. More goes on (True): the memory has to
        stay until the job has come out of :meth:`copied`, or :meth:`call_off_copies` or :meth:`end_copies` has
        returned. None as well after :meth:`end_copies`, and where the system gives no thread."""

    def copied(self) -> list[tuple[int, bytes]]:
        """Jobs that are done: per key 1 where the block's bytes are there."""

    def call_off_copies(self) -> None:
        """Give up what is not begun and wait for what is, a block per thread; not for what begins meanwhile."""

    def end_copies(self) -> None:
        """Likewise, and nothing is begun any more: then nothing is copied."""

    def wake_copied(self) -> None:
        """Wake whoever watches :attr:`copied_fd`, with a job of number 0 that does not exist."""

    def get_few(
        self, namespace: int, keys: Sequence[bytes], buffers: Sequence[Any], block_bytes: int, deadline_ms: int
    ) -> list[bool] | tuple[int, bytes, bytes] | None:
        """The whole get of up to 64 keys: per key whether its block has come.

        None: an argument is not as it should be, or there is no agent any more; nothing was done. What :meth:`get`
        returns: it did not end well."""

    def close(self, reason: str) -> None:
        """Break it: whoever waits is told so."""

class LoadsHere:
    """Loads of what is in the arena into slots of the memory at ``base``, over when they return.

    ``gets`` and ``memory`` are held for as long as this lives. ``next``: numbers of jobs. ``finished``: what is given
    a ``result``: a :class:`p2pkv.client.jobs.JobResult`.
    """

    def __init__(
        self,
        gets: Gets,
        memory: object,
        base: int,
        slot_bytes: int,
        slots: int,
        next: Iterator[int],
        finished: Callable[[Any], None],
        result: type,
    ) -> None: ...
    def __call__(self, namespace: int, block_bytes: int, keys: Sequence[bytes], slots: Sequence[int]) -> int | None:
        """The job's number, if all of them are in the arena, at most 64 and 4 MiB.

        None: it was not so, or an argument is not as it should be (a list of bytes, and one of slots that there are);
        slots may have been written to."""

class InlineReads:
    """READs of the agent's native code, done by native code in the NIXL process (``native/inline_reads.hpp``).

    ``fd``: a socket that is not blocking; ``bell``: the eventfd beside it. The four callables are NIXL's."""

    reads: int
    bytes_read: int
    def __init__(
        self,
        fd: int,
        bell: int,
        descriptors: Callable[[list[tuple[int, int, int]]], object],
        create: Callable[[object, object, str], int],
        post: Callable[[int], SupportsIndex],
        release: Callable[[int], object],
        base: int,
        arena_bytes: int,
    ) -> None: ...
    def add_peer(self, name: str, base: int, arena_bytes: int) -> None: ...
    def remove_peer(self, name: str) -> None: ...
    def serve(
        self, seconds: float, other_fd: int, other_full: bool, pieces: int
    ) -> tuple[list[tuple[int, bytes, int, int | None, int, Exception | None]], bool]:
        """Wait, then read. Returns reads to be gone on with, and whether ``other_fd`` has something (or room, when it
        was full).

        Raises:
            RuntimeError: the agent is gone, or does not keep to the protocol.
        """

    def send(self, frame: bytes) -> None: ...

class Lane:
    """GETs of engines, served without Python where that is possible (``native/lane.hpp``). ``fd``: :meth:`drain` has
    something."""

    fd: int
    in_flight: int
    blocks_in_flight: int
    def __init__(
        self,
        store: Store,
        receiver: IoEngine,
        pool: Pool,
        nixl: NixlReads | None,
        lookup: object,
        arena: int,
        lease_ttl_s: float,
        stall_s: float,
        stream_bytes: int,
        streams: int,
        partial_bytes: int,
        ahead_bytes: int,
        one_sided_min: int,
        neighbour_max: int,
        spread_bytes: int,
        in_flight_max: int,
    ) -> None: ...
    def add(self, connection: int, fd: int, holder: int) -> None: ...
    def allow(self, connection: int, namespace: int, salt: int) -> None: ...
    def send(self, connection: int, frame: bytes) -> bool: ...
    def close(self, connection: int) -> None: ...
    def watch(self, namespace: int, key: bytes) -> bool: ...
    def distrust(self, namespace: int, key: bytes, distrusted: bool) -> None:
        """Whether GETs of this block are handed over, because a holder of it sent something else."""

    def set_neighbour(
        self,
        node: int,
        arena_fd: int,
        arena_bytes: int,
        table_fd: int,
        table_bytes: int,
        marks_fd: int,
        marks_bytes: int,
    ) -> None:
        """Read this node's small blocks out of its memory (``native/neighbours.hpp``). The descriptors stay the
        caller's.

        Raises:
            OSError: they cannot be mapped. ValueError: not a directory, of another version, or of another arena."""

    def drop_neighbour(self, node: int) -> None: ...
    def set_draining(self, draining: bool) -> None: ...
    def drain(self) -> list[LaneEvent]: ...
    def counters(self) -> dict[str, int]: ...
    def stop(self) -> None: ...

class Server:
    """A thread that answers peers' GETs from the arena. ``fd`` becomes readable when :meth:`drain` has something.

    ``arena_fd`` and the mapping at ``arena_base_address`` stay valid until :meth:`stop` has returned.
    """

    fd: int
    active: int
    bytes_served: int
    blocks_served: int
    gets: int
    pins: int
    refused: int
    protocol_errors: int
    cut_off: int
    connections_refused: int
    leases_given: int
    leases_held: int
    def __init__(
        self,
        store: Store,
        arena_fd: int,
        arena_base_address: int,
        lease_ttl_s: float,
        connections_max: int,
        bytes_per_s: float = 0.0,
    ) -> None:
        """``bytes_per_s``: of answers; beyond that readers are told "busy". 0: any."""

    def may_send(self, bytes: int) -> bool:
        """Whether so many bytes may be read from here now; they are counted if so. Thread-safe."""

    def add(self, fd: int, node: int, same_host: bool = False, leftover: bytes = b"") -> bool:
        """Serve a connected, non-blocking socket, of which ``leftover`` has been read already; the descriptor is the
        server's from here on. False: there are too many, or it was stopped; the descriptor is closed."""

    def drain(self) -> list[tuple[int, str]]:
        """(node, what it did wrong) for the log; at most some hundred are kept."""

    def set_endpoint(self, name: str) -> None:
        """The NIXL agent that readers have to be connected to; "": there is none now, and PIN is refused."""

    def stop(self) -> None:
        """Close every connection, give every lease back, join the thread."""

class Block:
    """One occupancy of one slot, from reservation to reuse. Owned by the store, and read-only.

    Compared and hashed by identity: as long as somebody has it, one block is one object. ``state``, ``pins`` and
    ``used_at`` may be another thread's doing a moment later.
    """

    @property
    def namespace(self) -> int: ...
    @property
    def key(self) -> bytes: ...
    @property
    def offset(self) -> int:
        """Where its bytes lie in the arena, in bytes."""
    @property
    def length(self) -> int:
        """In bytes."""
    @property
    def generation(self) -> int:
        """Differs between any two occupancies in one arena's life, so (offset, generation) names these bytes."""
    @property
    def used_at(self) -> float:
        """When it was last reserved, committed, pinned or touched, on the caller's clock (seconds)."""
    @property
    def state(self) -> int:
        """A value of ``p2pkv.store.base.BlockState``."""
    @property
    def pins(self) -> int:
        """How many leases hold it; a key named twice under one lease counts twice."""
    @property
    def checksum(self) -> bytes:
        """xxh3_128 of its bytes, 16 bytes; empty until committed."""

class Store:
    """The DRAM tier's books; see ``p2pkv/store/dram.py`` for what the calls mean. Thread-safe.

    Calls keep the GIL, except ``drop``, ``keys``, ``index_keys``, ``check_integrity`` and ``stress_for_tests``.
    """

    def __init__(
        self,
        *,
        capacity_bytes: int,
        extent_bytes: int,
        evict: bool,
        ttl_min_s: float,
        ttl_max_s: float,
        leases_max: int,
        leases_per_holder_max: int,
        bytes_per_holder_max: int,
        pinned_bytes_max: int,
        quarantine_bytes_max: int,
        lease_seed: int | None = None,
    ) -> None:
        """Raises ValueError: the sizes do not fit each other."""

    def publish(self, table_fd: int, marks_fd: int, entries: int) -> None:
        """Keep a directory of the arena in these two files, for engines. Before anything is in it. Raises OSError."""

    def read_unasked(self) -> tuple[int, int]:
        """Blocks and bytes that engines have read by the directory, as they say."""

    def open(self, namespace: int, block_bytes: int, salt: int, slot_bytes: int) -> bool:
        """False: one block is larger than the arena."""

    def drop(self, namespace: int) -> int: ...
    def pin(
        self, namespace: int, keys: Sequence[bytes], ttl_s: float, now: float, holder: int
    ) -> tuple[int, float, float, list[Block | None], int]:
        """The fields of ``p2pkv.store.base.Pinned``."""

    def release(self, lease_id: int, now: float, holder: int | None = None) -> bool: ...
    def release_holder(self, holder: int) -> int: ...
    def expire(self, now: float) -> int: ...
    def reserve(self, namespace: int, key: bytes, now: float) -> Block | int:
        """A block, or why not: 1 exists, 2 busy, 3 no space, 4 invalid."""

    def commit(self, block: Block, checksum: Buffer, now: float) -> int:
        """0 done, 1 the namespace was dropped, 2 the reservation was over already. ValueError: not 16 bytes."""

    def abort(self, block: Block) -> int:
        """As :meth:`commit`."""

    def park(self, block: Block, token: int) -> int:
        """As :meth:`commit`. Tokens from 2**63 on are those of ``p2pkv.store.dram``."""

    def clear(self, token: int) -> int: ...
    @property
    def quarantine_full(self) -> bool: ...
    def lookup(self, namespace: int, key: bytes) -> Block | None: ...
    def lookup_many(self, namespace: int, keys: Sequence[bytes]) -> list[Block | None]: ...
    def present(self, namespace: int, keys: Sequence[bytes]) -> bytes: ...
    def writing(self, namespace: int, key: bytes) -> bool: ...
    def touch(self, namespace: int, keys: Sequence[bytes], now: float) -> int: ...
    def delete(self, namespace: int, key: bytes) -> bool: ...
    def count(self, namespace: int) -> int: ...
    def keys(self, namespace: int, limit: int) -> list[bytes]: ...
    def hot(self, namespace: int, limit: int, after: bytes) -> list[bytes]: ...
    def count_marks(self, namespace: int, from_key: bytes, most: int, now: float) -> bytes:
        """The key to go on from, or nothing."""
    def take_events(self) -> tuple[bytes, bytes]:
        """Packed 64-bit index keys, and one tier byte each, oldest first."""

    def take_changes(self) -> tuple[bytes, bytes] | None:
        """Packed index keys whose last word is GONE, and those whose last word is DRAM; None: nothing changed."""

    def index_keys(self) -> bytes:
        """Packed 64-bit index keys of all listed blocks."""

    def stats(self) -> dict[str, int]:
        """The fields of ``p2pkv.store.base.StoreStats``."""

    @property
    def extents_waiting(self) -> bool: ...
    def take_extents(self) -> list[tuple[int, int]]:
        """(offset, length) of memory assigned to a slot size since the last call."""

    def check_integrity(self) -> None:
        """Raises AssertionError: the books disagree."""

    def ignore_leases_for_tests(self, ignore: bool) -> None:
        """From now on a lease does not hold its blocks in their slots: takes rule 1's guard out."""

    def stress_for_tests(
        self, namespaces: Sequence[int], threads: int, rounds: int, seed: int, hear: bool = True
    ) -> dict[str, int | str]:
        """Use the store from several native threads at once; ``problem`` says what went wrong, "" = nothing.

        ``hear``: take the events and check them too, which allows of no other use of the store meanwhile.
        """
