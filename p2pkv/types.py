"""The words everything else is built from: tiers, layouts, slots, endpoints.

Values only: frozen, hashable, comparable; no I/O, no clocks. Engines import this: nothing here may cost much to import.
"""

from __future__ import annotations

import enum

from p2pkv import _native
from p2pkv.light import ClassVar, Final, Self, dataclass_transform

BLOCK_HASH_BYTES_MIN: Final = 8
BLOCK_HASH_BYTES_MAX: Final = 64
"""Engines use 16 to 32 bytes; the bounds leave room without letting a peer send megabytes as a key."""

BLOCK_BYTES_MAX: Final = 128 << 20
CHECKSUM_BYTES: Final = 16
"""xxh3_128 in canonical (big-endian) order, as ``xxhash.xxh3_128_digest`` gives it."""

MASK64: Final = (1 << 64) - 1


class Tier(enum.IntEnum):
    """Where a block lies, ordered by what it costs to read. GONE is only ever an event, never a place."""

    GONE = 0
    HBM = 1
    DRAM = 2
    SSD = 3
    SHARED = 4


class Status(enum.IntEnum):
    """What became of one block of a get, a put or a pull. Only OK means that bytes may be used."""

    OK = 0
    MISS = 1
    REJECTED = 2  # bytes came and failed their checksum
    TIMEOUT = 3
    UNREACHABLE = 4
    BUSY = 5
    NO_SPACE = 6
    EXISTS = 7
    LOST = 8  # the agent or the connection went away with the job in flight
    INVALID = 9


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Value:
    """Base of frozen values: keyword-only, compared and hashed by their fields, in the order of their annotations.

    As a frozen dataclass or a msgspec Struct would be, without the 10 to 20 ms that importing these costs an engine.
    Types are not checked here; what comes from outside is checked where it comes in.
    """

    FIELDS: ClassVar[tuple[str, ...]]
    DEFAULTS: ClassVar[dict[str, object]]

    def __init_subclass__(cls) -> None:
        cls.FIELDS = tuple(cls.__annotations__)
        cls.DEFAULTS = {name: vars(cls)[name] for name in cls.FIELDS if name in vars(cls)}

    def __init__(self, **given: object) -> None:
        fields = self.DEFAULTS | given
        if fields.keys() != set(self.FIELDS):
            unknown = [name for name in given if name not in self.FIELDS]
            missing = [name for name in self.FIELDS if name not in fields]
            said = f"has no field {unknown[0]!r}" if unknown else f"needs {missing[0]!r}"
            raise TypeError(f"{type(self).__name__} {said}")
        vars(self).update((name, fields[name]) for name in self.FIELDS)

    def replace(self, **changes: object) -> Self:
        """The same value but for these fields."""
        return type(self)(**(vars(self) | changes))

    def asdict(self) -> dict[str, object]:
        """Every field by its name, in order."""
        return dict(vars(self))

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen", name=name, obj=self)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen", name=name, obj=self)


class Layout(Value):
    """What must be equal for the bytes of two blocks with the same hash to be interchangeable.

    Two engines whose layouts differ in any field never see each other's blocks: the fingerprint of all fields is the
    :attr:`namespace`. A field that an engine cannot fill must make its connector refuse, never be guessed.
    """

    model: str
    revision: str
    kv_dtype: str
    block_tokens: int
    block_bytes: int
    rank: int = 0
    world: int = 1
    order: str = ""  # of layers, heads and tensors inside a block, e.g. "NHD/layer-major"
    hash_algo: str = ""
    hash_seed: str = ""  # what the chain of hashes starts from, in hexadecimal (vLLM's NONE_HASH), or a name for it
    hash_block_tokens: int = 0  # tokens per hashed block where a block is made of several; 0 = block_tokens
    engine: str = ""
    engine_format: str = ""
    group: int = 0  # KV-cache group of a hybrid model
    tenant: str = ""
    lora: str = ""
    cache_salt: str = ""

    @property
    def namespace(self) -> int:
        """64-bit fingerprint of every field: what block hashes are qualified with, everywhere."""
        import hashlib  # 3 ms that an engine need not pay for importing the client

        digest = hashlib.blake2b(_native.pack(list(vars(self).values())), digest_size=8)
        return int.from_bytes(digest.digest(), "little")

    @property
    def identity(self) -> tuple[object, ...]:
        """The fields that say *which* cache this is; the others say how its bytes are laid out."""
        return tuple(getattr(self, name) for name in LAYOUT_IDENTITY)

    def conflicts(self, other: Layout) -> tuple[str, ...]:
        """Names of the fields that differ although both describe the same cache; empty when there is no conflict."""
        if self.identity != other.identity:
            return ()
        return tuple(
            name for name in self.FIELDS if name not in LAYOUT_IDENTITY and getattr(self, name) != getattr(other, name)
        )

    def problems(self) -> list[str]:
        """What makes this layout unusable, in words; empty when it is fine."""
        found = []
        for name in ("model", "revision", "kv_dtype"):
            if not getattr(self, name):
                found.append(f"{name} is empty")
        if not 1 <= self.block_tokens <= 1 << 20:
            found.append(f"block_tokens is {self.block_tokens}, not within 1..1048576")
        if not 1 <= self.block_bytes <= BLOCK_BYTES_MAX:
            found.append(f"block_bytes is {self.block_bytes}, not within 1..{BLOCK_BYTES_MAX}")
        if not 0 <= self.hash_block_tokens <= self.block_tokens or self.block_tokens % (self.hash_block_tokens or 1):
            found.append(f"hash_block_tokens {self.hash_block_tokens} does not divide block_tokens {self.block_tokens}")
        if not 0 <= self.rank < self.world:
            found.append(f"rank {self.rank} is not below world {self.world}")
        for name in self.FIELDS:
            value = getattr(self, name)
            if isinstance(value, str) and len(value) > 512:
                found.append(f"{name} is longer than 512 characters")
        return found


LAYOUT_IDENTITY: Final = (
    "model", "revision", "kv_dtype", "rank", "world", "engine", "group", "tenant", "lora", "cache_salt",
)  # fmt: skip


class NodeId(int):
    """A node's 64-bit identity; prints as 16 hexadecimal digits."""

    _text = ""

    def __str__(self) -> str:
        if not self._text:  # once: an answer may name a thousand nodes
            self._text = f"{int(self):016x}"
        return self._text


def index_hash(block_hash: bytes | memoryview) -> int:
    """First 8 bytes of an engine's block hash as a little-endian integer: the hash that the index keeps."""
    return int.from_bytes(block_hash[:8], "little")


def mix64(x: int) -> int:
    """Finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection on 64 bits that spreads every input bit."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def namespace_salt(namespace: int) -> int:
    """What a namespace's index hashes are XORed with, so that one index serves every namespace."""
    return mix64(namespace)


def index_key(namespace: int, block_hash: bytes | memoryview) -> int:
    """The key of a block in the prefix index and on the wire: its index hash, qualified by its namespace."""
    return index_hash(block_hash) ^ namespace_salt(namespace)
