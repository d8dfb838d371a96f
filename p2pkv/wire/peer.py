"""What agents say to each other over TCP. One struct per message; ``CODEC`` frames and checks them.

Who dials says HELLO, the other answers WELCOME; each proves by a *ticket* that it has the cell's key and is the life
that it says. On a ``control`` connection the dialer asks (PIN, RELEASE, NIXL_CONNECT), and both send LETTERs of the
gossip core (:mod:`p2pkv.gossip`, docs/protocol.md), whose bodies are not this module's business. On a ``data``
connection the reader sends GET and the owner answers with GOT: a frame of fixed binary records (:data:`GOT_RECORD`),
followed by the payloads of the blocks that were hit, in the order they were asked for, with nothing in between.
"""

from __future__ import annotations

import enum
import struct
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from p2pkv.types import BLOCK_HASH_BYTES_MAX, Layout
from p2pkv.wire.codec import Codec, Unpacker
from p2pkv.wire.fields import U16, U32, U64, BlockHash, Extent, FieldNames, Hashes, Name, Text
from p2pkv.wire.limits import KEYS_MAX, NO_PROCESSOR

LAYOUTS_MAX: Final = 1_024

Ticket = Annotated[bytes, Meta(max_length=256)]
"""A sealed frame (:mod:`p2pkv.gossip.sealed`) that is of use for one connection between two lives."""


class PeerType(enum.IntEnum):
    """Message types between agents."""

    HELLO = 1
    WELCOME = 2
    LETTER = 3
    BYE = 4
    PIN = 8
    PINNED = 9
    RELEASE = 10
    RELEASED = 11
    GET = 12
    GOT = 13
    NIXL_CONNECT = 14
    NIXL_ENDPOINT = 15
    SUSPECT = 16
    SUSPECTED = 17
    HOT = 18
    HOT_KEYS = 19
    REPLICATE = 20
    REPLICATED = 21
    ERROR = 31


class Address(msgspec.Struct, frozen=True, array_like=True):
    """Where a node's peer port is: a name or IP address, and a TCP port."""

    host: Name
    port: U16


class NixlEndpoint(msgspec.Struct, frozen=True, array_like=True):
    """What a NIXL process needs to read from another's: agent name, UCX metadata, arena base and size (bytes)."""

    name: Name
    metadata: Annotated[bytes, Meta(max_length=65_536)]
    base: U64
    arena_bytes: U64


class Card(msgspec.Struct, frozen=True, array_like=True):
    """How a node introduces itself: who it is, where it listens, what it keeps, how it can be read."""

    node: U64
    epoch: U32
    address: Address
    http: Name
    host_id: Name  # equal on two agents of one machine (boot id and network namespace): same-host transports apply
    layouts: Annotated[list[Layout], Meta(max_length=LAYOUTS_MAX)]
    transports: Annotated[list[Name], Meta(max_length=8)]
    instance: U64 = 0  # drawn at random at every start: tells a node from a second one that took its id and epoch
    features: Annotated[list[Name], Meta(max_length=32)] = []  # what it understands beyond its protocol version
    rack: Name = ""  # label of what it shares its uplink with; "" = not told
    link_mbps: U32 = 0  # of its network or RDMA ports; 0 = not known
    socket: Name = (
        ""  # path of its engines' socket, for agents of the same host that may read its memory; "" = none may
    )


HOT_MAX: Final = 256
"""Blocks of one HOT_KEYS or REPLICATE: the owner has its store to itself while it looks for them."""
SUSPECTS_MAX: Final = 64
"""Blocks of one SUSPECT: each is read once by the owner to look at it."""


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """First frame of a connection, from the dialer. ``role`` is "control" or "data"."""

    protocol_min: U16
    protocol_max: U16
    cell: Name
    role: Name
    card: Card
    ticket: Ticket = b""


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """The answer to HELLO: the protocol that both will speak, and who answers."""

    protocol: U16
    card: Card
    cell: Name = ""
    ticket: Ticket = b""


class Bye(msgspec.Struct, frozen=True, array_like=True):
    """The sender closes a control connection that nobody needs: no sign of its death."""


class Pin(msgspec.Struct, frozen=True, array_like=True):
    """Hold these blocks where they are for ``ttl_ms`` and say where that is.

    ``serve``: the reads that follow need the owner's NIXL process to keep progressing (no RDMA, not the same host).
    """

    namespace: U64
    hashes: Hashes
    ttl_ms: U32
    serve: bool = False


class Pinned(msgspec.Struct, frozen=True, array_like=True):
    """Answer to PIN. Lists have one entry per asked hash; misses have length 0; ``lease`` 0: nothing was pinned."""

    lease: U64
    ttl_ms: U32
    statuses: Annotated[bytes, Meta(max_length=KEYS_MAX)]
    extents: Annotated[list[Extent], Meta(max_length=KEYS_MAX)]
    generations: Annotated[list[U64], Meta(max_length=KEYS_MAX)]
    checksums: Annotated[bytes, Meta(max_length=KEYS_MAX * 16)]
    nixl: Name  # name of the owner's NIXL process at this moment


class Release(msgspec.Struct, frozen=True, array_like=True):
    """The reader is done. On a data connection lease 0 means "whatever this connection still holds"; not answered."""

    lease: U64


class Released(msgspec.Struct, frozen=True, array_like=True):
    """``held``: the lease was in force from PINNED until now, so what was read between was the pinned blocks."""

    held: bool


class Get(msgspec.Struct, frozen=True, array_like=True):
    """Pin these blocks and send them; the answer is GOT and then the payloads.

    ``processor``: where the thread runs that waits for them, so that an owner on the same host can send from another.
    """

    namespace: U64
    hashes: Hashes
    ttl_ms: U32
    processor: U16 = NO_PROCESSOR


class NixlConnect(msgspec.Struct, frozen=True, array_like=True):
    """The reader's NIXL process is about to connect: the owner answers NIXL_ENDPOINT and serves for ``serve_ms``."""

    endpoint: NixlEndpoint
    serve_ms: U32


class NixlEndpointReply(msgspec.Struct, frozen=True, array_like=True):
    """The owner's NIXL endpoint now; ``None`` while it has none."""

    endpoint: NixlEndpoint | None


class Suspect(msgspec.Struct, frozen=True, array_like=True):
    """What the owner sent for these blocks failed their checksums. Whether it keeps them right is for it to find out.

    Only to owners that understand it (``Card.features``)."""

    namespace: U64
    hashes: Annotated[list[BlockHash], Meta(min_length=1, max_length=SUSPECTS_MAX)]


class Suspected(msgspec.Struct, frozen=True, array_like=True):
    """Answer to SUSPECT, a status per hash: OK: the block is good here; MISS: it is not here, or not any more."""

    statuses: Annotated[bytes, Meta(max_length=SUSPECTS_MAX)]


class Hot(msgspec.Struct, frozen=True, array_like=True):
    """Which of its blocks the owner used last, that first, and a prefix before what follows it -> HOT_KEYS.

    ``after``: a key of the answer before, to go on from; empty: from the beginning. Only to owners that understand it
    (``Card.features``)."""

    namespace: U64
    blocks_max: U32
    after: Annotated[bytes, Meta(max_length=BLOCK_HASH_BYTES_MAX)] = b""


class HotKeys(msgspec.Struct, frozen=True, array_like=True):
    """Answer to HOT. None: that was all."""

    hashes: Annotated[list[BlockHash], Meta(max_length=HOT_MAX)]


class Replicate(msgspec.Struct, frozen=True, array_like=True):
    """The receiver is to pull these blocks, from whoever it likes, when it has nothing better to do -> REPLICATED.

    Only to nodes that understand it (``Card.features``)."""

    namespace: U64
    hashes: Annotated[list[BlockHash], Meta(min_length=1, max_length=HOT_MAX)]


class Replicated(msgspec.Struct, frozen=True, array_like=True):
    """Answer to REPLICATE, at once: how many of them are there already, and how many it begins to pull."""

    here: U32
    begun: U32


class PeerError(msgspec.Struct, frozen=True, array_like=True):
    """Why a request (its id) or the connection (id 0) was refused.

    ``code`` is one of "busy", "layout", "namespace", "protocol", "cell", "key" (the ticket is not good), "draining",
    "stale" (another life of this node is known), "unsupported", "internal".
    """

    code: Name
    message: Text
    fields: FieldNames = []


CODEC: Final = Codec(
    {
        PeerType.HELLO: Hello,
        PeerType.WELCOME: Welcome,
        PeerType.BYE: Bye,
        PeerType.PIN: Pin,
        PeerType.PINNED: Pinned,
        PeerType.RELEASE: Release,
        PeerType.RELEASED: Released,
        PeerType.GET: Get,
        PeerType.NIXL_CONNECT: NixlConnect,
        PeerType.NIXL_ENDPOINT: NixlEndpointReply,
        PeerType.SUSPECT: Suspect,
        PeerType.SUSPECTED: Suspected,
        PeerType.HOT: Hot,
        PeerType.HOT_KEYS: HotKeys,
        PeerType.REPLICATE: Replicate,
        PeerType.REPLICATED: Replicated,
        PeerType.ERROR: PeerError,
    }
)

unpack_card: Final = Unpacker(Card)
"""A card as :func:`p2pkv.wire.codec.pack` writes it."""

GOT_RECORD: Final = struct.Struct("<B3xIQ16s")
"""status u8, 3 bytes of zero, payload length u32, slot generation u64, xxh3_128 (16 bytes): 32 bytes per asked block.
The reader of these bytes is p2pkv/native/transfer.cpp; keep both in step."""
