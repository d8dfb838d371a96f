"""Stub of the C++ extension (sources in ``p2pkv/native``). Lengths are in bytes; digests are 16 bytes each."""

from collections.abc import Sequence

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

def run_now(work: int, items: Sequence[tuple[int, int, int]], deadline_s: float = -1.0) -> tuple[bytes, bytes]:
    """Run (dst, src, length) items in this thread: 0 copy, 1 copy and hash, 2 hash src. Returns ok bytes and digests.

    Nothing is written once ``deadline_s`` from now has passed (looked at every 256 KiB); negative = no deadline.
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

class Server:
    """A thread that answers peers' GETs from the arena. ``fd`` becomes readable when :meth:`drain` has something.

    ``arena_fd`` and the mapping at ``arena_base_address`` stay valid until :meth:`stop` has returned.
    """

    fd: int
    active: int
    bytes_served: int
    blocks_served: int
    gets: int
    refused: int
    protocol_errors: int
    cut_off: int
    connections_refused: int
    leases_given: int
    leases_held: int
    def __init__(
        self, store: Store, arena_fd: int, arena_base_address: int, lease_ttl_s: float, connections_max: int
    ) -> None: ...
    def add(self, fd: int, node: int, same_host: bool = False, leftover: bytes = b"") -> bool:
        """Serve a connected, non-blocking socket, of which ``leftover`` has been read already; the descriptor is the
        server's from here on. False: there are too many, or it was stopped; the descriptor is closed."""

    def drain(self) -> list[tuple[int, str]]:
        """(node, what it did wrong) for the log; at most some hundred are kept."""

    def stop(self) -> None:
        """Close every connection, give every lease back, join the thread."""
