"""What an engine's client and its local agent say over the Unix socket. Payload bytes never travel through it.

Descriptors ride beside frames as SCM_RIGHTS ancillary data: the agent's arena (read-only) beside READY, and a region
beside MAP_REGION. Every request has a non-zero request id and gets exactly one answer: the message named in its
docstring, or ERROR.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
from msgspec import Meta

from p2pkv.types import Layout
from p2pkv.wire.codec import Codec
from p2pkv.wire.engine_types import EngineType
from p2pkv.wire.fields import U16, U32, U64, Extent, FieldNames, Hashes, Name, Text
from p2pkv.wire.limits import KEYS_MAX, NO_PROCESSOR, NODES_MAX, REPLICAS_MAX

REGIONS_MAX: Final = 64
Slots = Annotated[list[U32], Meta(max_length=KEYS_MAX)]
PerKey = Annotated[bytes, Meta(max_length=KEYS_MAX)]


class Attach(msgspec.Struct, frozen=True, array_like=True):
    """First request of a connection -> READY."""

    protocol_min: U32
    protocol_max: U32
    name: Name
    pid: U32


class Ready(msgspec.Struct, frozen=True, array_like=True):
    """Who the agent is; its arena's descriptor comes along, read-only."""

    protocol: U32
    node: U64
    epoch: U32
    arena_bytes: U64
    lease_ttl_ms: U32


class Open(msgspec.Struct, frozen=True, array_like=True):
    """Use this layout's namespace on this connection -> OPENED, or ERROR "layout" naming the fields."""

    layout: Layout


class Opened(msgspec.Struct, frozen=True, array_like=True):
    """The namespace to name in later requests."""

    namespace: U64


class MapRegion(msgspec.Struct, frozen=True, array_like=True):
    """Shared memory of the engine, by descriptor: ``slots`` slots of ``slot_bytes`` bytes from ``offset`` on -> OK."""

    region: U32
    offset: U64
    slot_bytes: U64
    slots: U32


class UnmapRegion(msgspec.Struct, frozen=True, array_like=True):
    """Forget a region -> OK once nothing reads or writes it any more."""

    region: U32


class Store(msgspec.Struct, frozen=True, array_like=True):
    """Copy these slots of a region into the agent's store within the deadline -> DONE.

    The slots must not change until then, or until the engine has closed the connection: the agent publishes nothing
    that it finished copying after that.
    """

    namespace: U64
    keys: Hashes
    region: U32
    slots: Slots
    deadline_ms: U32


class Load(msgspec.Struct, frozen=True, array_like=True):
    """Write these blocks into slots of a region, from here or from peers, within the deadline -> DONE.

    ``prefill_us``: what computing the first of these blocks takes the engine, ``prefill_more_ns`` how much more each
    further one; a pull that is overtaken by that is given up. 0: not known, and whatever comes in time is welcome.
    """

    namespace: U64
    keys: Hashes
    region: U32
    slots: Slots
    deadline_ms: U32
    prefill_us: U32 = 0
    prefill_more_ns: U32 = 0


class Done(msgspec.Struct, frozen=True, array_like=True):
    """Per key: a :class:`~p2pkv.types.Status` and a ``Source``; and how many bytes each kind of source gave."""

    statuses: PerKey
    sources: PerKey
    bytes_local: U64
    bytes_peer: U64


class Get(msgspec.Struct, frozen=True, array_like=True):
    """Hold these blocks in the arena, pulled from peers if need be, within the deadline -> one or more GOT.

    ``processor``: where the thread runs that asks and will copy, so that nobody who works for it is put there.
    ``unleased``: blocks need not be held, since the client reads them by the arena's directory, and asks again for what
    has gone by then.
    """

    namespace: U64
    keys: Hashes
    deadline_ms: U32
    processor: U16 = NO_PROCESSOR
    unleased: bool = False


class Got(msgspec.Struct, frozen=True, array_like=True):
    """Part of the answer to GET: blocks that can be read in the arena, or have failed. ``more``: another part follows.

    ``indices`` says which of the asked keys the lists are about. The extents are held under ``lease`` until ``ttl_ms``
    after the request reached the agent; misses have length 0. Lease 0: nothing is held, and what is OK is to be read by
    the directory, which says whether it still is (only if GET was ``unleased``).
    """

    lease: U64
    ttl_ms: U32
    indices: Slots
    statuses: PerKey
    sources: PerKey
    extents: Annotated[list[Extent], Meta(max_length=KEYS_MAX)]
    more: bool


class Ahead(msgspec.Struct, frozen=True, array_like=True):
    """Between the parts of an answer to GET: the first ``length`` bytes of key ``index`` have landed at ``offset``.

    They are not proven. A client may copy them already; they count only if a GOT of this answer says OK and names the
    same place. ``length`` 0: forget everything that was told ahead; its bytes are not the block's.
    """

    index: U32
    offset: U64
    length: U64


class ReleaseLease(msgspec.Struct, frozen=True, array_like=True):
    """The client is done with a GOT. Not answered."""

    lease: U64


class MatchKeys(msgspec.Struct, frozen=True, array_like=True):
    """Who holds these blocks, by the local index alone -> MATCHED.

    ``prefill_us``: what computing the first of these blocks takes the engine, ``prefill_more_ns`` how much more each
    further one, ``overhead_us`` what a pull costs it besides waiting. The keys are then a chain, and blocks of peers
    that it would compute sooner than they come are answered as if nobody had them. 0: all blocks are named.
    """

    namespace: U64
    keys: Hashes
    detail: bool
    prefill_us: U32 = 0
    prefill_more_ns: U32 = 0
    overhead_us: U32 = 0


class NodeMatch(msgspec.Struct, frozen=True, array_like=True):
    """How much of the chain one node holds, in blocks: any tier, then per tier (HBM, DRAM, SSD, SHARED)."""

    node: U64
    depth: U32
    depth_hbm: U32
    depth_dram: U32
    depth_ssd: U32
    depth_shared: U32


class Matched(msgspec.Struct, frozen=True, array_like=True):
    """Per key a ``Source``; the longest prefix here and anywhere, in blocks; per node when asked for."""

    present: PerKey
    local: U32
    anywhere: U32
    nodes: Annotated[list[NodeMatch], Meta(max_length=NODES_MAX)]


class Prefetch(msgspec.Struct, frozen=True, array_like=True):
    """Have these blocks here, pulled from peers behind all that anybody waits for, within the deadline -> DONE."""

    namespace: U64
    keys: Hashes
    deadline_ms: U32


class Replicate(msgspec.Struct, frozen=True, array_like=True):
    """Have these nodes pull these blocks, behind all that anybody waits for there -> REPLICATED."""

    namespace: U64
    keys: Hashes
    nodes: Annotated[list[U64], Meta(min_length=1, max_length=REPLICAS_MAX)]


class Replicated(msgspec.Struct, frozen=True, array_like=True):
    """Per node: blocks that are there already, blocks that it begins to pull, and why it does not ("": it does)."""

    here: Annotated[list[U32], Meta(max_length=REPLICAS_MAX)]
    begun: Annotated[list[U32], Meta(max_length=REPLICAS_MAX)]
    reasons: Annotated[list[Text], Meta(max_length=REPLICAS_MAX)]


class Warm(msgspec.Struct, frozen=True, array_like=True):
    """Pull what peers used last, ``top_bytes`` of it, into what memory is free, by the deadline -> WARMING, at once.

    0 bytes: only tell how the last one goes or went. ``stop``: end it."""

    top_bytes: U64
    deadline_ms: U32
    stop: bool = False


class Warming(msgspec.Struct, frozen=True, array_like=True):
    """How warming up goes, or how the last one went. Of the ``top_bytes`` asked for, ``seen_bytes`` have been looked at
    so far; of these blocks some were here, some were pulled, and some did not come. ``why`` it ended; ``complete``:
    there was no more to do, as all of it is there, or peers have no more, or no memory is free."""

    running: bool
    complete: bool
    peers: U32
    top_bytes: U64
    seen_bytes: U64
    blocks_here: U64
    blocks_pulled: U64
    blocks_failed: U64
    bytes_pulled: U64
    took_ms: U64
    why: Text


class Ok(msgspec.Struct, frozen=True, array_like=True):
    """Done, nothing to say."""


class EngineError(msgspec.Struct, frozen=True, array_like=True):
    """Why a request was refused. ``code``: "layout", "invalid", "busy", "protocol", "draining"."""

    code: Name
    message: Text
    fields: FieldNames = []


CODEC: Final = Codec(
    {
        EngineType.ATTACH: Attach,
        EngineType.READY: Ready,
        EngineType.OPEN: Open,
        EngineType.OPENED: Opened,
        EngineType.MAP_REGION: MapRegion,
        EngineType.UNMAP_REGION: UnmapRegion,
        EngineType.STORE: Store,
        EngineType.LOAD: Load,
        EngineType.DONE: Done,
        EngineType.GET: Get,
        EngineType.GOT: Got,
        EngineType.RELEASE: ReleaseLease,
        EngineType.MATCH: MatchKeys,
        EngineType.MATCHED: Matched,
        EngineType.OK: Ok,
        EngineType.AHEAD: Ahead,
        EngineType.PREFETCH: Prefetch,
        EngineType.REPLICATE: Replicate,
        EngineType.REPLICATED: Replicated,
        EngineType.WARM: Warm,
        EngineType.WARMING: Warming,
        EngineType.ERROR: EngineError,
    }
)
