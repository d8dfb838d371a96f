"""What agents say to each other over TCP. One struct per message; ``CODEC`` frames and checks them.

The *reader* dials, the *owner* answers. On a ``control`` connection the owner streams its ownership log (SNAPSHOT,
then DELTA; an empty DELTA is its heartbeat; now and then a DIGEST) and answers PIN and RELEASE. On a ``data``
connection the reader sends GET and the owner answers with GOT: a frame of fixed binary records (:data:`GOT_RECORD`),
followed by the payloads of the blocks that were hit, in the order they were asked for, with nothing in between.
"""

from __future__ import annotations

import enum
import struct
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from p2pkv.types import Layout
from p2pkv.wire.codec import Codec
from p2pkv.wire.fields import U16, U32, U64, Extent, FieldNames, Hashes, Name, Text
from p2pkv.wire.limits import KEYS_MAX

MEMBERS_MAX: Final = 4_096
DELTA_KEYS_BYTES_MAX: Final = 65_536 * 8
LAYOUTS_MAX: Final = 1_024

PackedKeys = Annotated[bytes, Meta(max_length=DELTA_KEYS_BYTES_MAX)]


class PeerType(enum.IntEnum):
    """Message types between agents."""

    HELLO = 1
    WELCOME = 2
    SNAPSHOT = 3
    DELTA = 4
    RESYNC = 5
    LEAVE = 6
    ADVERT = 7
    PIN = 8
    PINNED = 9
    RELEASE = 10
    RELEASED = 11
    GET = 12
    GOT = 13
    NIXL_CONNECT = 14
    NIXL_ENDPOINT = 15
    DIGEST = 16
    ERROR = 31


class Address(msgspec.Struct, frozen=True, array_like=True):
    """Where a node's peer port is: a name or IP address, and a TCP port."""

    host: Name
    port: U16


class Member(msgspec.Struct, frozen=True, array_like=True):
    """One row of the member table that WELCOME carries."""

    node: U64
    epoch: U32
    address: Address


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


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """First frame of a connection, from the dialer. ``role`` is "control" or "data"."""

    protocol_min: U16
    protocol_max: U16
    cell: Name
    role: Name
    card: Card


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """The owner's answer to HELLO: the protocol both will speak, its own card, and the members it knows."""

    protocol: U16
    card: Card
    members: Annotated[list[Member], Meta(max_length=MEMBERS_MAX)]
    cell: Name = ""


class Digest(msgspec.Struct, frozen=True, array_like=True):
    """Members the sender is connected to, to one reader at a time: addresses to try, never a word on who is alive."""

    members: Annotated[list[Member], Meta(max_length=MEMBERS_MAX)]


class Advert(msgspec.Struct, frozen=True, array_like=True):
    """A node's card has changed (a layout was opened, a transport came or went). Either direction, any time."""

    card: Card


class Snapshot(msgspec.Struct, frozen=True, array_like=True):
    """A part of an owner's log at (epoch, seq). ``checksum`` is the whole set's; keys are packed little-endian u64."""

    epoch: U32
    seq: U64
    checksum: U64
    part: U32
    parts: U32
    keys_by_tier: Annotated[list[PackedKeys], Meta(max_length=8)]  # index = Tier


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """The next batch of an owner's log; empty = heartbeat. ``checksum`` is that of the set after the batch."""

    epoch: U32
    seq: U64
    checksum: U64
    keys_by_tier: Annotated[list[PackedKeys], Meta(max_length=8)]  # index = Tier; 0 = gone


class Resync(msgspec.Struct, frozen=True, array_like=True):
    """The reader saw a gap or a wrong checksum and asks for a snapshot."""

    seq: U64
    reason: Name


class Leave(msgspec.Struct, frozen=True, array_like=True):
    """The sender is going away on purpose; its entries can be dropped at once."""

    epoch: U32


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
    """Pin these blocks and send them; the answer is GOT and then the payloads."""

    namespace: U64
    hashes: Hashes
    ttl_ms: U32


class NixlConnect(msgspec.Struct, frozen=True, array_like=True):
    """The reader's NIXL process is about to connect: the owner answers NIXL_ENDPOINT and serves for ``serve_ms``."""

    endpoint: NixlEndpoint
    serve_ms: U32


class NixlEndpointReply(msgspec.Struct, frozen=True, array_like=True):
    """The owner's NIXL endpoint now; ``None`` while it has none."""

    endpoint: NixlEndpoint | None


class PeerError(msgspec.Struct, frozen=True, array_like=True):
    """Why a request (its id) or the connection (id 0) was refused.

    ``code`` is one of "busy", "layout", "namespace", "protocol", "cell", "self", "draining", "stale" (a newer epoch of
    this node is known), "duplicate" (this node id and epoch are taken), "unsupported", "internal".
    """

    code: Name
    message: Text
    fields: FieldNames = []


CODEC: Final = Codec(
    {
        PeerType.HELLO: Hello,
        PeerType.WELCOME: Welcome,
        PeerType.SNAPSHOT: Snapshot,
        PeerType.DELTA: Delta,
        PeerType.RESYNC: Resync,
        PeerType.LEAVE: Leave,
        PeerType.ADVERT: Advert,
        PeerType.PIN: Pin,
        PeerType.PINNED: Pinned,
        PeerType.RELEASE: Release,
        PeerType.RELEASED: Released,
        PeerType.GET: Get,
        PeerType.NIXL_CONNECT: NixlConnect,
        PeerType.NIXL_ENDPOINT: NixlEndpointReply,
        PeerType.DIGEST: Digest,
        PeerType.ERROR: PeerError,
    }
)

GOT_RECORD: Final = struct.Struct("<B3xIQ16s")
"""status u8, 3 bytes of zero, payload length u32, slot generation u64, xxh3_128 (16 bytes): 32 bytes per asked block.
The reader of these bytes is p2pkv/native/transfer.cpp; keep both in step."""
