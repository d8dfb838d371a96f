"""Who holds how much of a prompt: the answers of the HTTP endpoint, as plain values. No network, no FastAPI.

``/query`` and ``/query_by_hash`` answer in the shape of Mooncake's conductor indexer (its RFC 1403): per tenant and
instance how many *tokens* of the prefix it holds, and in which kind of memory. An instance is a node's id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from p2pkv.errors import InvalidArgument
from p2pkv.index.hashing import LoraAdapter, VllmHasher, coarser, index_keys
from p2pkv.types import Layout, NodeId, Tier

if TYPE_CHECKING:
    from p2pkv.agent.daemon import Agent

TOKENS_MAX = 1 << 21
HASHES_MAX = 1 << 16
DEFAULT_TENANT = "default"


def known_layouts(agent: Agent) -> list[Layout]:
    """Layouts of this node and of every live peer, each once."""
    layouts = dict.fromkeys(agent.service.layouts)
    for peer in agent.network.peers():
        if peer.alive:
            layouts.update(dict.fromkeys(peer.card.layouts))
    return list(layouts)


def select_layouts(
    agent: Agent,
    *,
    model: str,
    tenant: str = "",
    lora: str = "",
    cache_salt: str = "",
    block_tokens: int | None = None,
) -> list[Layout]:
    """The layouts that a question is about: one rank of one model's full-attention group, of one tenant.

    LoRA and salt are part of vLLM's hashes already, so a layout that leaves them empty is meant too.
    """
    tenant = "" if tenant == DEFAULT_TENANT else tenant
    return [
        layout
        for layout in known_layouts(agent)
        if layout.model == model
        and layout.tenant == tenant
        and layout.rank == 0
        and layout.group == 0
        and layout.lora in ("", lora)
        and layout.cache_salt in ("", cache_salt)
        and (block_tokens is None or layout.block_tokens % block_tokens == 0)
    ]


def hashes_of_tokens(
    layout: Layout, tokens: Sequence[int], *, block_tokens: int | None, lora: str, cache_salt: str
) -> list[bytes]:
    """The block hashes that engines of this layout give these tokens.

    Raises:
        InvalidArgument: this agent does not know the layout's hash algorithm.
    """
    hashed = block_tokens or layout.hash_block_tokens or layout.block_tokens
    try:
        none_hash = bytes.fromhex(layout.hash_seed) if layout.hash_seed else None
    except ValueError:
        raise InvalidArgument(
            "this layout does not tell what its hashes start from", hash_seed=layout.hash_seed
        ) from None
    hasher = VllmHasher(layout.hash_algo, none_hash=none_hash)
    adapter = LoraAdapter(lora, "") if lora else None
    fine = hasher.block_hashes(tokens, hashed, lora=adapter, cache_salt=cache_salt or None)
    return coarser(fine, layout.block_tokens // hashed)


def query_layouts(agent: Agent, asked: Iterable[tuple[Layout, Sequence[bytes]]]) -> dict[str, dict[str, Any]]:
    """The conductor's answer for chains of hashes, each in its layout."""
    answer: dict[str, dict[str, Any]] = {}
    for layout, hashes in asked:
        instances = answer.setdefault(layout.tenant or DEFAULT_TENANT, {})
        for row in agent.index.match(index_keys(layout.namespace, hashes)):
            node = agent.network.slot_node(row.node) if row.node else NodeId(agent.node)
            tokens = row.depth * layout.block_tokens
            if node is None or not tokens or tokens <= instances.get(str(node), {}).get("longest_matched", 0):
                continue
            by_tier = [blocks * layout.block_tokens for blocks in row.by_tier]
            gpu, cpu, ssd, shared = by_tier
            instances[str(node)] = {
                "longest_matched": tokens,
                "GPU": gpu,
                "DP": {"0": gpu},
                "CPU": cpu,
                "DISK": ssd + shared,
            }
    return answer


def lookup(agent: Agent, namespace: int, hashes: Sequence[bytes]) -> dict[str, Any]:
    """Depth per node and tier, in blocks, with the age of each owner's word."""
    ages = {int(peer.node): peer.age_ms for peer in agent.network.peers()}
    nodes = []
    for row in agent.index.match(index_keys(namespace, hashes), beyond=True):
        node = agent.network.slot_node(row.node) if row.node else NodeId(agent.node)
        if node is None:
            continue
        nodes.append(
            {
                "node": str(node),
                "self": row.node == 0,
                "depth": row.depth,
                "held": row.held,
                "tiers": {tier.name.lower(): row.in_tier(tier) for tier in Tier if tier is not Tier.GONE},
                "age_ms": 0.0 if row.node == 0 else ages.get(int(node)),
            }
        )
    matched = agent.service.match(namespace, hashes, detail=False)
    return {
        "namespace": f"{namespace:016x}",
        "blocks": len(hashes),
        "local": matched.local,
        "anywhere": matched.anywhere,
        "nodes": nodes,
    }


def parse_hashes(texts: Sequence[str | int]) -> list[bytes]:
    """Block hashes from hexadecimal strings, or from integers (taken as 8 bytes, little-endian).

    Raises:
        InvalidArgument: naming the first that is neither.
    """
    if len(texts) > HASHES_MAX:
        raise InvalidArgument("too many hashes", count=len(texts), limit=HASHES_MAX)
    hashes = []
    for i, text in enumerate(texts):
        try:
            value = text.to_bytes(8, "little") if isinstance(text, int) else bytes.fromhex(text)
        except (ValueError, OverflowError):
            value = b""
        if not 8 <= len(value) <= 64:
            raise InvalidArgument(
                "a hash is neither 8 to 64 bytes in hexadecimal nor an unsigned 64-bit integer", position=i
            )
        hashes.append(value)
    return hashes
