"""What the HTTP endpoint takes and gives: one struct per body. They check requests, and they are the OpenAPI schema."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, field

TOKENS_MAX: Final = 1 << 21
HASHES_MAX: Final = 1 << 16
CANDIDATES_MAX: Final = 1 << 16
PROMPT_CHARS_MAX: Final = 1 << 20

Token = Annotated[int, Meta(ge=0, lt=1 << 32)]
Tokens = Annotated[list[Token], Meta(max_length=TOKENS_MAX)]
# What a hash must be is only described (`complete`): p2pkv.index.hashing.parse_hashes checks it, faster than a pattern.
_HASH: Final = {
    "anyOf": [
        {"type": "string", "pattern": "^([0-9a-fA-F]{2}){8,64}$", "description": "8 to 64 bytes in hexadecimal."},
        {"type": "integer", "minimum": 0, "maximum": (1 << 64) - 1, "description": "8 bytes, little-endian."},
    ]
}
Hashes = Annotated[list[str | int], Meta(max_length=HASHES_MAX)]
Name = Annotated[str, Meta(max_length=512)]
Node = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
Tenant = Annotated[Name | None, Meta(description='Missing or "default": no tenant.')]
BlockSize = Annotated[
    Annotated[int, Meta(ge=1, le=1 << 20)] | None, Meta(description="Tokens per hashed block; missing: the layout's.")
]


Age = Annotated[float | None, Meta(description="Since its word was last heard; null: never.")]
Remembered = Annotated[bool, Meta(description="From before this agent's start, and not heard from since.")]


class _Asked(msgspec.Struct, kw_only=True):
    model: Annotated[str, Meta(max_length=512, description="Model name as the engines' layouts have it.")]
    lora_name: Name | None = None
    tenant_id: Tenant = None
    block_size: BlockSize = None
    cache_salt: Name | None = None


class QueryByTokens(_Asked, kw_only=True):
    """The conductor's ``POST /query``."""

    token_ids: Tokens
    instance_id: Annotated[Name | None, Meta(description="Only this node (16 hexadecimal digits).")] = None


class QueryByHash(_Asked, kw_only=True):
    """The conductor's ``POST /query_by_hash``: the engine's own block hashes."""

    seq_hashes: Hashes
    instance_id: Annotated[Name | None, Meta(description="Only this node (16 hexadecimal digits).")] = None


class Score(_Asked, kw_only=True):
    """``POST /v1/score``: a prompt, as token ids or as block hashes (one of the two), and who could serve it."""

    token_ids: Tokens | msgspec.UnsetType = msgspec.UNSET
    hashes: Hashes | msgspec.UnsetType = msgspec.UNSET
    candidates: Annotated[
        Annotated[list[Node], Meta(max_length=CANDIDATES_MAX)] | None,
        Meta(description="Nodes to be judged; missing: every live one that has such a layout."),
    ] = None


class PlanQuestion(_Asked, kw_only=True):
    """``POST /v1/plan``: a prompt, as token ids or as block hashes (one of the two), as this node would get it."""

    token_ids: Tokens | msgspec.UnsetType = msgspec.UNSET
    hashes: Hashes | msgspec.UnsetType = msgspec.UNSET
    prefill_ms: Annotated[
        Annotated[float, Meta(gt=0, le=1e9)] | None,
        Meta(description="What computing one block takes; missing: what an engine here has said last, if any has."),
    ] = None


class ScoreCompletions(_Asked, kw_only=True):
    """llm-d's ``POST /score_completions``: a text, of a model whose tokenizer is configured (``http.tokenizers``)."""

    prompt: Annotated[str, Meta(max_length=PROMPT_CHARS_MAX)]


class Lookup(msgspec.Struct, kw_only=True):
    """``POST /v1/lookup``: a chain of block hashes within one namespace."""

    namespace: Node
    hashes: Hashes


class Problem(msgspec.Struct):
    """Why a request was refused."""

    error: str
    hint: str = ""


class Readiness(msgspec.Struct):
    """Whether the agent takes requests."""

    state: Annotated[str, Meta(description="starting, ready or draining")]


class ConductorHit(msgspec.Struct):
    """Tokens of the prefix that one instance holds, and in which kind of memory."""

    longest_matched: int
    GPU: int
    DP: dict[str, int]
    CPU: int
    DISK: int


Conductor = dict[str, dict[str, ConductorHit]]
"""Tenant -> instance -> hit."""


Scores = dict[str, float]
"""``host:port`` of an agent -> score."""


class Tiers(msgspec.Struct):
    """Blocks in each kind of memory."""

    hbm: int
    dram: int
    ssd: int
    shared: int


class LookupRow(msgspec.Struct, kw_only=True):
    """What one node holds of a chain: ``depth`` blocks from its beginning, ``held`` blocks of all of it."""

    node: Node
    me: bool = field(name="self")
    depth: int
    held: int
    tiers: Tiers
    age_ms: Age
    remembered: Remembered


class LookupAnswer(msgspec.Struct):
    """Depths are blocks. ``anywhere``: by the best use of every live holder."""

    namespace: Node
    blocks: int
    local: int
    anywhere: int
    nodes: list[LookupRow]


class Candidate(msgspec.Struct, kw_only=True):
    """What a node would have to do to serve a prompt.

    ``depth`` blocks of its beginning are there, in these tiers. ``fetch_blocks`` of what is behind them, of
    ``fetch_bytes``, others hold, without a gap; ``compute_tokens`` nobody holds.
    """

    node: Node
    me: bool = field(name="self")
    namespace: Node
    blocks: int
    block_tokens: int
    depth: int
    tiers: Tiers
    fetch_blocks: int
    fetch_bytes: int
    compute_tokens: int
    age_ms: Age
    remembered: Remembered


class ScoreAnswer(msgspec.Struct):
    """Candidates, the one with the least to do first: to compute, then to fetch. ``tokens``: of the prompt."""

    tokens: int
    candidates: list[Candidate]


class PlanRun(msgspec.Struct, kw_only=True):
    """Blocks that one source would be asked for: the ``first`` of them by its place in the chain, and how many."""

    node: Node
    me: bool = field(name="self")
    tier: str
    first: int
    blocks: int
    ends_ms: float


class PlanSource(msgspec.Struct, kw_only=True):
    """What is expected of a source now. ``setup_ms``: connecting to it comes first. ``spread``: of its pace, as a
    fraction; ``failing``: the share of its blocks that do not come, or come wrong; ``age_s``: since it last showed."""

    node: Node
    tier: str
    blocks: int
    bytes_per_s: float
    first_byte_ms: float
    busy_ms: float
    setup_ms: float
    spread: float
    failing: float
    age_s: float | None
    answers: bool


class PlanAnswer(msgspec.Struct, kw_only=True):
    """The first ``stop`` of ``blocks`` would be pulled by ``runs``, which takes ``pull_ms``; computing the others takes
    ``rest_ms``, computing all ``without_ms`` (null: what computing takes is not known). ``why``: it goes no further."""

    namespace: Node
    blocks: int
    block_bytes: int
    block_tokens: int
    stop: int
    why: str
    pull_ms: float
    rest_ms: float | None
    without_ms: float | None
    runs: list[PlanRun]
    sources: list[PlanSource]


class Myself(msgspec.Struct):
    """This node."""

    node: Node
    epoch: int
    address: str
    socket: str
    transports: list[str]
    why_no_nixl: str
    arena_bytes: int
    live_bytes: int
    blocks: int
    engines: list[str]


class PeerRow(msgspec.Struct):
    """A peer, as seen from here."""

    node: Node
    epoch: int
    address: str
    http: str
    state: str
    age_ms: float | None
    rtt_ms: float | None
    seq: int
    entries: int
    transports: list[str]
    transport: str
    layout_conflicts: list[str]
    remembered: Remembered


class Nodes(msgspec.Struct, kw_only=True):
    """Who is there."""

    me: Myself = field(name="self")
    peers: list[PeerRow]


class NamespaceBlocks(msgspec.Struct):
    """This node's blocks of one namespace; at most as many hashes as were asked for."""

    namespace: Node
    layout: dict[str, Any]
    count: int
    hashes: list[str]


class Blocks(msgspec.Struct):
    """This node's blocks."""

    node: Node
    namespaces: list[NamespaceBlocks]


def complete(schemas: dict[str, Any]) -> None:
    """Add to the structs' JSON schemas, by name, what annotations cannot say."""
    for name, hashes in (
        ("QueryByHash", "seq_hashes"),
        ("Score", "hashes"),
        ("Lookup", "hashes"),
        ("PlanQuestion", "hashes"),
    ):
        schemas[name]["properties"][hashes]["items"] = _HASH
    for name in ("Score", "PlanQuestion"):
        schemas[name]["oneOf"] = [{"required": ["token_ids"]}, {"required": ["hashes"]}]
