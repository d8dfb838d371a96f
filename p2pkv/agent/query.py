"""Who holds how much of a prompt: the answers of the HTTP endpoint, as plain values. No network, no FastAPI.

``/query`` and ``/query_by_hash`` answer in the shape of Mooncake's conductor indexer (its RFC 1403): per tenant and
instance how many *tokens* of the prefix it holds, and in which kind of memory. An instance is a node's id.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from p2pkv.agent.http_types import Candidate, ScoreAnswer, Tiers
from p2pkv.errors import InvalidArgument
from p2pkv.index.hashing import KEY_BYTES, LoraAdapter, VllmHasher, coarser, index_keys
from p2pkv.types import Layout, NodeId, Tier

if TYPE_CHECKING:
    from p2pkv.agent.daemon import Agent

DEFAULT_TENANT: Final = "default"
_ROWS: Final = struct.Struct("<8I")
"""Of :attr:`p2pkv.index.prefix.Match.packed`."""


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


def query_layouts(agent: Agent, asked: Iterable[tuple[Layout, bytes]]) -> dict[str, dict[str, Any]]:
    """The conductor's answer for chains of packed index keys, each in its layout."""
    answer: dict[str, dict[str, Any]] = {}
    node_at = agent.network.slot_node
    for layout, keys in asked:
        instances = answer.setdefault(layout.tenant or DEFAULT_TENANT, {})
        block_tokens = layout.block_tokens
        for slot, depth, hbm, dram, ssd, shared, _, _ in _ROWS.iter_unpack(agent.index.match(keys).packed):
            node = node_at(slot)
            if node is None or not depth:
                continue
            name, tokens = str(node), depth * block_tokens
            if name in instances and tokens <= instances[name]["longest_matched"]:
                continue
            gpu = hbm * block_tokens
            instances[name] = {
                "longest_matched": tokens,
                "GPU": gpu,
                "DP": {"0": gpu},
                "CPU": dram * block_tokens,
                "DISK": (ssd + shared) * block_tokens,
            }
    return answer


def score(
    agent: Agent, asked: Iterable[tuple[Layout, bytes]], *, tokens: int | None, candidates: Sequence[str] | None
) -> ScoreAnswer:
    """What each candidate would have to do for a prompt; each in the layout, of those it has, that suits it best.

    Args:
        asked: chains of packed index keys, each in its layout.
        tokens: of the prompt; None: its blocks are all there is of it.
        candidates: only these nodes; None: all that live.
    """
    wanted = None if candidates is None else set(candidates)
    mine = str(NodeId(agent.node))
    having: list[tuple[str, float | None, Iterable[Layout]]] = [(mine, 0.0, agent.service.layouts)]
    having += [(str(peer.node), peer.age_ms, peer.card.layouts) for peer in agent.network.peers() if peer.alive]
    best: dict[str, Candidate] = {}
    longest = 0
    for layout, keys in asked:
        total = len(keys) // KEY_BYTES * layout.block_tokens if tokens is None else tokens
        longest = max(longest, total)
        reach = agent.index.reach(keys)
        rows = {}
        for row in agent.index.match(keys[: reach * KEY_BYTES], beyond=True):
            if (node := agent.network.slot_node(row.node)) is not None:
                rows[str(node)] = row
        for name, age_ms, layouts in having:
            if (wanted is not None and name not in wanted) or layout not in layouts:
                continue
            known = rows.get(name)
            depth, held, by_tier = (known.depth, known.held, known.by_tier) if known else (0, 0, (0, 0, 0, 0))
            candidate = Candidate(
                node=name,
                me=name == mine,
                namespace=f"{layout.namespace:016x}",
                blocks=len(keys) // KEY_BYTES,
                block_tokens=layout.block_tokens,
                depth=depth,
                tiers=Tiers(*by_tier),
                fetch_blocks=reach - held,
                fetch_bytes=(reach - held) * layout.block_bytes,
                compute_tokens=total - reach * layout.block_tokens,
                age_ms=age_ms,
            )
            if name not in best or _work(candidate) < _work(best[name]):
                best[name] = candidate
    return ScoreAnswer(longest, sorted(best.values(), key=lambda candidate: (*_work(candidate), candidate.node)))


def _work(candidate: Candidate) -> tuple[int, int]:
    return candidate.compute_tokens, candidate.fetch_bytes


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


def whole_hashes(texts: Sequence[str | int]) -> list[bytes]:
    """Block hashes from hexadecimal strings, or from integers (taken as 8 bytes, little-endian).

    Raises:
        InvalidArgument: naming the first that is neither.
    """
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
