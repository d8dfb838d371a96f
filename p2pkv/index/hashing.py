"""Hashes: tokens to an engine's block hashes, block hashes to index keys, and the checksum of a set of entries.

vLLM's four recipes are reproduced byte for byte (0.32.0; ``tests/unit/index/vectors`` holds vectors, and an end-to-end
test compares them with a real vLLM), so that an HTTP caller who only has token ids finds what an engine stored:

    NONE_HASH = H(seed)
    h_i       = H((h_(i-1), tuple(tokens of block i), extra keys or None))        full blocks only; h_(-1) = NONE_HASH

Pure. ``cbor2`` and ``xxhash`` are imported only when a recipe needs them.
"""

from __future__ import annotations

import hashlib
import itertools
import pickle  # dumps only, never loads: vLLM defines its default recipe over the pickled bytes
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from p2pkv.errors import InvalidArgument
from p2pkv.index import _core
from p2pkv.types import MASK64, Tier, index_hash, index_key, mix64, namespace_salt

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "DYNAMO_SEED", "VLLM_ALGORITHMS", "VLLM_DEFAULT_SEED", "DynamoHashes", "LoraAdapter", "MultiModalSpan",
    "VllmHasher", "coarser", "dynamo_hashes", "entries_checksum", "entry_checksum", "index_hash", "index_key",
    "index_keys", "mix64", "mooncake_hashes", "namespace_salt", "pack_keys", "parse_hashes", "salted",
    "sglang_event_hash", "sglang_page_hashes", "token_chain", "unpack_keys", "vllm_event_hash",
]  # fmt: skip

KEY_BYTES: Final = 8

DYNAMO_SEED: Final = 1337

VLLM_ALGORITHMS: Final = ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")

VLLM_DEFAULT_SEED: Final = "vllm-none-hash"
"""vLLM's seed for the sha256 recipes when PYTHONHASHSEED is unset. The xxhash ones get a random one per process."""

_PICKLE_PROTOCOL: Final = 5
"""vLLM asks for HIGHEST_PROTOCOL, which is 5 on every Python it runs on."""


# --- index keys ---------------------------------------------------------------------------------------------------


def index_keys(namespace: int, hashes: Sequence[bytes]) -> bytes:
    """Packed index keys of a chain: what :class:`~p2pkv.index.prefix.PrefixIndex` takes. Batch form of ``index_key``.

    Raises:
        InvalidArgument: a hash is shorter than 8 bytes, or the namespace is not a u64.
    """
    if not 0 <= namespace <= MASK64:
        raise InvalidArgument("namespace must be an unsigned 64-bit integer")
    try:
        return _core.index_keys(namespace, hashes)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error


def parse_hashes(hashes: Sequence[str | int]) -> bytes:
    """Packed hashes, 8 bytes each, of what people write: hexadecimal (8 to 64 bytes), or unsigned 64-bit integers.

    Raises:
        InvalidArgument: naming the first that is neither.
    """
    try:
        return _core.parse_hashes(hashes)
    except ValueError as error:
        raise InvalidArgument(
            "a hash is neither 8 to 64 bytes in hexadecimal nor an unsigned 64-bit integer", position=int(str(error))
        ) from error


def salted(hashes: Buffer, namespace: int) -> bytes:
    """Packed index keys of packed hashes (see :func:`parse_hashes`) in a namespace."""
    return _core.salted(hashes, namespace)


def pack_keys(keys: Iterable[int]) -> bytes:
    """u64 keys as the index and the wire want them: 8 bytes each, little-endian."""
    try:
        return array("Q", keys).tobytes()
    except OverflowError as error:
        raise InvalidArgument("keys must be unsigned 64-bit integers") from error


def unpack_keys(keys: Buffer) -> memoryview[int]:
    """View of packed keys as integers; borrows ``keys``."""
    view = memoryview(keys)
    if not view.c_contiguous or view.nbytes % KEY_BYTES:
        raise InvalidArgument("packed keys must be contiguous and a multiple of 8 bytes long", bytes=view.nbytes)
    return view.cast("B").cast("Q")


def token_chain(tokens: Buffer, block_tokens: int, *, seed: int = 0) -> bytes:
    """Packed chained hashes of a prompt's full blocks, by p2pkv's own recipe: for callers who have no engine's hashes.

        h_i = XXH3-64(h_(i-1) || tokens of block i), little-endian, 8 bytes and 4 bytes per token; h_(-1) = seed

    Args:
        tokens: a contiguous buffer of 32- or 64-bit integers; every id is within 0..2^32 - 1.
        seed: a u64; chains of different seeds have nothing in common.

    Raises:
        InvalidArgument: not such a buffer, an id out of range, or ``block_tokens`` below 1.
    """
    if not 0 <= seed <= MASK64:
        raise InvalidArgument("seed must be an unsigned 64-bit integer")
    try:
        return _core.token_chain(tokens, block_tokens, seed)
    except ValueError as error:
        raise InvalidArgument(str(error)) from error


class DynamoHashes(NamedTuple):
    """Packed u64 hashes of a prompt's full blocks: of each block alone, and of each with all before it."""

    local: bytes
    sequence: bytes


def dynamo_hashes(tokens: Buffer, block_tokens: int, *, seed: int = DYNAMO_SEED) -> DynamoHashes:
    """The hashes that NVIDIA Dynamo's router and its events use. ``tests/unit/index/vectors`` holds vectors.

        l_i = XXH3-64(tokens of block i, little-endian u32; seed)
        s_i = XXH3-64(s_(i-1) || l_i; 1337)        s_0 = l_0

    Args:
        tokens: as :func:`token_chain` takes them.
        seed: of the local hashes; Dynamo derives another one where there is an adapter or a cache namespace.

    Raises:
        InvalidArgument: as :func:`token_chain`.
    """
    if not 0 <= seed <= MASK64:
        raise InvalidArgument("seed must be an unsigned 64-bit integer")
    try:
        return DynamoHashes(*_core.dynamo_hashes(tokens, block_tokens, seed))
    except ValueError as error:
        raise InvalidArgument(str(error)) from error


def mooncake_hashes(tokens: Buffer, block_tokens: int, *, salt: str = "") -> bytes:
    """Packed rolling u64 hashes that Mooncake's conductor gives a prompt's full blocks, by its own recipe.

        h_i = XXH64(h_(i-1) || tokens of block i, little-endian u32)        h_(-1) = XXH64(salt)

    ``tests/unit/index/vectors`` holds vectors. Conductors of 2026 use vLLM's recipes instead (:class:`VllmHasher`) and
    index them as :func:`vllm_event_hash` does.

    Args:
        tokens: as :func:`token_chain` takes them.
        salt: the context's additional salt.

    Raises:
        InvalidArgument: as :func:`token_chain`.
    """
    import xxhash

    try:
        return _core.mooncake_chain(tokens, block_tokens, xxhash.xxh64_intdigest(salt.encode()))
    except ValueError as error:
        raise InvalidArgument(str(error)) from error


# --- set checksums ------------------------------------------------------------------------------------------------


def entry_checksum(key: int, tier: Tier | int) -> int:
    """What one (key, tier) adds, by XOR, to the checksum of its owner's set.

    XOR makes the checksum of a set independent of order and updatable in O(1). It finds accidents (a lost or repeated
    change), not an owner who lies: owners can only lie about themselves, and the pin shows it.
    """
    return mix64(key ^ mix64(tier))


def entries_checksum(keys: Buffer, tier: Tier | int) -> int:
    """XOR of :func:`entry_checksum` over packed keys that are all in ``tier``.

    Raises:
        InvalidArgument: not packed keys, or a tier that entries cannot be in.
    """
    try:
        return _core.entries_checksum(keys, int(tier))
    except ValueError as error:
        raise InvalidArgument(str(error)) from error


# --- vLLM's block hashes ------------------------------------------------------------------------------------------


class LoraAdapter(NamedTuple):
    """The adapter of a request, as its engine knows it. vLLM hashes name and path."""

    name: str
    path: str


class MultiModalSpan(NamedTuple):
    """Where the placeholder tokens of one multimodal item lie in the prompt: [offset, offset + length)."""

    identifier: str
    offset: int
    length: int


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _pickled(value: object) -> bytes:
    return pickle.dumps(value, protocol=_PICKLE_PROTOCOL)


def _recipe(algorithm: str) -> Callable[[object], bytes]:
    """H of the module's docstring: serialize, then digest."""
    if algorithm not in VLLM_ALGORITHMS:
        raise InvalidArgument(
            "unknown hash algorithm", algorithm=algorithm, hint=f"vLLM has {', '.join(VLLM_ALGORITHMS)}."
        )
    digest: Callable[[bytes], bytes] = _sha256
    serialize: Callable[[object], bytes] = _pickled
    if algorithm.startswith("xxhash"):
        import xxhash

        digest = xxhash.xxh3_128_digest
    if algorithm.endswith("_cbor"):
        try:
            import cbor2
        except ImportError as error:
            raise InvalidArgument(
                "this hash algorithm needs cbor2", algorithm=algorithm, hint="Install p2pkv[cbor]."
            ) from error
        dumps = cbor2.dumps

        def serialize(value: object) -> bytes:
            data: bytes = dumps(value, canonical=True)
            return data

    return lambda value: digest(serialize(value))


def _fresh(text: str) -> str:
    """An equal string that is nobody else's object.

    Pickle writes the second occurrence of the *same object* as a reference. In vLLM the strings of a request come
    out of a decoder, each an object of its own; here a caller may pass one literal twice, and would get another hash.
    """
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogatepass")


def _token_list(tokens: Sequence[int] | Buffer) -> list[int]:
    """Plain ints: a numpy integer or a bool is equal to an int but is pickled differently, and would never match."""
    ids: list[Any] = tokens.tolist() if hasattr(tokens, "tolist") else list(tokens)  # type: ignore[arg-type]
    odd = set(map(type, ids)) - {int}
    if odd:
        raise InvalidArgument("token ids must be plain integers", types=sorted(t.__name__ for t in odd))
    return ids


class VllmHasher:
    """Block hashes as one vLLM deployment computes them. Immutable after construction: any thread may use it.

    Args:
        algorithm: vLLM's ``--prefix-caching-hash-algo``: one of ``VLLM_ALGORITHMS``.
        seed: the engines' PYTHONHASHSEED; ``None`` when it is unset there.
        none_hash: what the chains start from, instead of the seed's hash: what a layout's ``hash_seed`` tells.

    Raises:
        InvalidArgument: unknown algorithm; or no seed with a recipe for which vLLM then draws a random one.
    """

    def __init__(self, algorithm: str = "sha256", seed: str | None = None, *, none_hash: bytes | None = None) -> None:
        if seed is None and none_hash is None and algorithm.startswith("xxhash"):
            raise InvalidArgument(
                "this hash algorithm has no default seed", algorithm=algorithm,
                hint="vLLM draws one per process then: set PYTHONHASHSEED to one value on every engine, and here.",
            )  # fmt: skip
        self.algorithm = algorithm
        self.seed = VLLM_DEFAULT_SEED if seed is None else seed
        self._hash = _recipe(algorithm)
        self.none_hash = self._hash(self.seed) if none_hash is None else none_hash

    def block_hashes(
        self,
        tokens: Sequence[int] | Buffer,
        block_tokens: int,
        *,
        lora: LoraAdapter | None = None,
        cache_salt: str | None = None,
        mm: Sequence[MultiModalSpan] = (),
    ) -> list[bytes]:
        """One chained hash per full block of ``tokens`` (32 bytes with the sha256 recipes, 16 with xxhash).

        Prompts given as embeddings are not covered: vLLM hashes the tensors, which never come here.

        Args:
            tokens: plain integers, or an array of integers with ``tolist``.
            block_tokens: tokens per hashed block (vLLM's hash block size; for larger chunks see :func:`coarser`).
            lora: as in the request.
            cache_salt: as in the request; it enters the first block only, and all others through the chain.
            mm: as in the request, ascending by offset, not overlapping.
        """
        if block_tokens < 1:
            raise InvalidArgument("block_tokens must be at least 1", block_tokens=block_tokens)
        if any(a.offset + a.length > b.offset for a, b in itertools.pairwise(mm)):
            raise InvalidArgument("multimodal spans must ascend by offset and not overlap")
        ids = _token_list(tokens)
        parent = self.none_hash
        hashes = []
        for start in range(0, len(ids) - block_tokens + 1, block_tokens):
            end = start + block_tokens
            extra: list[tuple[str | int, ...]] = []
            if lora is not None:
                extra.append(("lora", _fresh(lora.name), _fresh(lora.path)))
            extra += [
                ("mm", _fresh(span.identifier), span.offset - start)
                for span in mm
                if span.offset < end and start < span.offset + span.length
            ]
            if start == 0 and cache_salt:
                extra.append(("cache_salt", _fresh(cache_salt)))
            parent = self._hash((parent, tuple(ids[start:end]), tuple(extra) if extra else None))
            hashes.append(parent)
        return hashes


# --- SGLang's page hashes -----------------------------------------------------------------------------------------


def sglang_page_hashes(tokens: Sequence[int] | Buffer, page_tokens: int, *, parent: bytes = b"") -> list[bytes]:
    """SGLang's HiCache chain: 32 bytes per full page.

        h_i = SHA-256(h_(i-1) || tokens of page i, 4 bytes each, little-endian)        h_(-1) = nothing

    ``tests/unit/index/vectors`` holds vectors. Bigram pages (EAGLE) and extra keys are not covered.

    Args:
        tokens: plain integers within 0..2^32 - 1, or an array of integers with ``tolist``.
        page_tokens: tokens per page (SGLang's ``--page-size``).
        parent: the hash of the page before, for the rest of a longer prompt.
    """
    if page_tokens < 1:
        raise InvalidArgument("page_tokens must be at least 1", page_tokens=page_tokens)
    ids = _token_list(tokens)
    try:
        packed = struct.pack(f"<{len(ids)}I", *ids)
    except struct.error as error:
        raise InvalidArgument("token ids must be within 0..2^32 - 1") from error
    hashes = []
    page_bytes = 4 * page_tokens
    for at in range(0, len(packed) - page_bytes + 1, page_bytes):
        parent = _sha256(parent + packed[at : at + page_bytes])
        hashes.append(parent)
    return hashes


def sglang_event_hash(page_hash: bytes) -> int:
    """A page hash as SGLang's KV events carry it: the first 8 bytes as a big-endian number, signed."""
    return int.from_bytes(page_hash[:8], "big", signed=True)


def coarser(hashes: Sequence[bytes], blocks_per_chunk: int) -> list[bytes]:
    """Hashes of chunks of several hashed blocks.

    A chained hash covers all before it, so a chunk's is that of its last block. An unfinished chunk has none.
    """
    if blocks_per_chunk < 1:
        raise InvalidArgument("blocks_per_chunk must be at least 1", blocks_per_chunk=blocks_per_chunk)
    return list(hashes[blocks_per_chunk - 1 :: blocks_per_chunk])


def vllm_event_hash(block_hash: bytes) -> int:
    """A block hash as vLLM's KV events carry it by default: the low 64 bits of the big-endian number."""
    return int.from_bytes(block_hash, "big") & MASK64
