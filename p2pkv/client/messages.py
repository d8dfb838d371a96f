"""What the client says to its agent and hears from it: the messages of :mod:`p2pkv.wire.engine`, without msgspec.

Importing msgspec would cost an engine more than all of this package. Names, numbers, fields and bounds are the same as
there, which is where each message is described; ``tests/unit/client/test_messages.py`` holds the two together. Answers
are checked field by field while they are read; requests are checked by the agent that gets them.

What travels on the socket for GETs is not here: native code writes and reads it (``native/gets.hpp``).

Annotations are objects here, not text: the shapes that answers are read by are made of them.
"""

from collections.abc import Sequence

from p2pkv._native import Shape, pack
from p2pkv.errors import RemoteProtocolError
from p2pkv.light import Annotated, Final, NamedTuple
from p2pkv.types import MASK64
from p2pkv.wire.engine_types import EngineType
from p2pkv.wire.frame import Frame
from p2pkv.wire.frame import encode as encode_frame
from p2pkv.wire.limits import ERROR_FIELDS_MAX, KEYS_MAX, NAME_CHARS_MAX, NODES_MAX, REPLICAS_MAX, TEXT_CHARS_MAX


def _shape(message: type[NamedTuple]) -> Shape:
    """That of a message whose fields are annotated with theirs; fields with a default may be missing."""
    fields = [annotation.__metadata__[0] for annotation in message.__annotations__.values()]
    return Shape.record(message, fields, tuple(message._field_defaults.values()))


_u32 = Shape.uint(0xFFFFFFFF)
_u64 = Shape.uint(MASK64)
_name = Shape.text(NAME_CHARS_MAX)

U32 = Annotated[int, _u32]
U64 = Annotated[int, _u64]
Bool = Annotated[bool, Shape.boolean()]
Name = Annotated[str, _name]
Text = Annotated[str, Shape.text(TEXT_CHARS_MAX)]
Names = Annotated[tuple[str, ...], Shape.array(_name, ERROR_FIELDS_MAX)]
PerKey = Annotated[bytes, Shape.binary(KEYS_MAX)]


# --- requests ---


class Attach(NamedTuple):
    """-> :class:`Ready`."""

    protocol_min: int
    protocol_max: int
    name: str
    pid: int


class Open(NamedTuple):
    """-> :class:`Opened`. ``layout``: its fields by name."""

    layout: dict[str, object]


class MapRegion(NamedTuple):
    """-> :class:`Ok`. The region's descriptor goes along."""

    region: int
    offset: int
    slot_bytes: int
    slots: int


class UnmapRegion(NamedTuple):
    """-> :class:`Ok`."""

    region: int


class Store(NamedTuple):
    """-> :class:`Done`."""

    namespace: int
    keys: Sequence[bytes]
    region: int
    slots: Sequence[int]
    deadline_ms: int


class Load(NamedTuple):
    """-> :class:`Done`."""

    namespace: int
    keys: Sequence[bytes]
    region: int
    slots: Sequence[int]
    deadline_ms: int
    prefill_us: int = 0
    prefill_more_ns: int = 0


class MatchKeys(NamedTuple):
    """-> :class:`Matched`."""

    namespace: int
    keys: Sequence[bytes]
    detail: bool
    prefill_us: int = 0
    prefill_more_ns: int = 0
    overhead_us: int = 0


class Prefetch(NamedTuple):
    """-> :class:`Done`."""

    namespace: int
    keys: Sequence[bytes]
    deadline_ms: int


class Replicate(NamedTuple):
    """-> :class:`Replicated`."""

    namespace: int
    keys: Sequence[bytes]
    nodes: Sequence[int]


class Warm(NamedTuple):
    """-> :class:`Warming`."""

    top_bytes: int
    deadline_ms: int
    stop: bool = False


# --- answers ---


class Ready(NamedTuple):
    """With it come two descriptors, the arena's and that of a socket for GET, or four: those of the arena's directory
    (table and marks) too."""

    protocol: U32
    node: U64
    epoch: U32
    arena_bytes: U64
    lease_ttl_ms: U32


class Opened(NamedTuple):
    """The namespace to name in later requests."""

    namespace: U64


class Done(NamedTuple):
    """Per key what became of it and where its bytes came from."""

    statuses: PerKey
    sources: PerKey
    bytes_local: U64
    bytes_peer: U64


class NodeMatch(NamedTuple):
    """How much of the chain one node holds."""

    node: U64
    depth: U32
    depth_hbm: U32
    depth_dram: U32
    depth_ssd: U32
    depth_shared: U32


class Matched(NamedTuple):
    """Who holds how much of the chain."""

    present: PerKey
    local: U32
    anywhere: U32
    nodes: Annotated[tuple[NodeMatch, ...], Shape.array(_shape(NodeMatch), NODES_MAX)]


class Replicated(NamedTuple):
    """Per node how many blocks are there, how many it begins to pull, and why it does not."""

    here: Annotated[tuple[int, ...], Shape.array(_u32, REPLICAS_MAX)]
    begun: Annotated[tuple[int, ...], Shape.array(_u32, REPLICAS_MAX)]
    reasons: Annotated[tuple[str, ...], Shape.array(Shape.text(TEXT_CHARS_MAX), REPLICAS_MAX)]


class Warming(NamedTuple):
    """How warming up goes, or how the last one went."""

    running: Bool
    complete: Bool
    peers: U32
    top_bytes: U64
    seen_bytes: U64
    blocks_here: U64
    blocks_pulled: U64
    blocks_failed: U64
    bytes_pulled: U64
    took_ms: U64
    why: Text


class Ok(NamedTuple):
    """Done, nothing to say."""


class EngineError(NamedTuple):
    """Why a request was refused."""

    code: Name
    message: Text
    fields: Names = ()


Request = Attach | Open | MapRegion | UnmapRegion | Store | Load | MatchKeys | Prefetch | Replicate | Warm
Answer = Ready | Opened | Done | Matched | Replicated | Warming | Ok | EngineError

REQUESTS: Final[dict[type[Request], EngineType]] = {
    Attach: EngineType.ATTACH,
    Open: EngineType.OPEN,
    MapRegion: EngineType.MAP_REGION,
    UnmapRegion: EngineType.UNMAP_REGION,
    Store: EngineType.STORE,
    Load: EngineType.LOAD,
    MatchKeys: EngineType.MATCH,
    Prefetch: EngineType.PREFETCH,
    Replicate: EngineType.REPLICATE,
    Warm: EngineType.WARM,
}
ANSWERS: Final[dict[int, type[Answer]]] = {
    EngineType.READY: Ready,
    EngineType.OPENED: Opened,
    EngineType.DONE: Done,
    EngineType.MATCHED: Matched,
    EngineType.REPLICATED: Replicated,
    EngineType.WARMING: Warming,
    EngineType.OK: Ok,
    EngineType.ERROR: EngineError,
}
_NUMBERS: Final = {
    request: int(number) for request, number in REQUESTS.items()
}  # a header of plain ints is made faster
_SHAPES: Final = {number: _shape(answer) for number, answer in ANSWERS.items()}


def encode(message: Request, request_id: int = 0) -> bytes:
    """A request as a whole frame."""
    return encode_frame(_NUMBERS[type(message)], pack(message), request_id)


def decode(frame: Frame) -> Answer:
    """Read an answer.

    Raises:
        RemoteProtocolError: an agent does not say that, or not like that.
    """
    shape = _SHAPES.get(frame.type)
    if shape is None:
        raise RemoteProtocolError("unknown message type", type=frame.type)
    try:
        answer: Answer = shape.unpack(frame.body)
    except ValueError as error:
        raise RemoteProtocolError("malformed message", type=frame.type, reason=str(error)) from error
    return answer
