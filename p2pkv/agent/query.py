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
WEIGHTS: Final = (1.0, 0.8, 0.6, 0.4)
"""Of a block in HBM, DRAM, SSD, SHARED, in a score: llm-d's for its GPU and CPU tiers, and on in the same steps."""
_ROWS: Final = struct.Struct("<8I")
"""Of :attr:`p2pkv.index.prefix.Match.packed`."""


def known_layouts(agent: Agent) -> list[Layout]:
    """Layouts of this node, of every live peer, and of every remembered one, each once."""
    layouts = dict.fromkeys(agent.service.layouts)
    for peer in agent.network.peers():
        if peer.alive:
            layouts.update(dict.fromkeys(peer.card.layouts))
    layouts.update(dict.fromkeys(agent.remembered.layouts))
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


Conductor = dict[str, dict[str, dict[str, Any]]]
"""Tenant -> instance -> what it holds."""


def query_layouts(
    agent: Agent, asked: Iterable[tuple[Layout, bytes]], *, only: str | None = None
) -> tuple[Conductor, float]:
    """The conductor's answer for chains of packed index keys, each in its layout; of one instance or of all.

    And the age, in seconds, of the oldest word in it that is only remembered; 0 where all of it is current.
    """
    answer: Conductor = {}
    age_ms = 0.0
    node_at = agent.network.slot_node
    for layout, keys in asked:
        instances = answer.setdefault(layout.tenant or DEFAULT_TENANT, {})
        block_tokens = layout.block_tokens
        for slot, depth, hbm, dram, ssd, shared, _, _ in _ROWS.iter_unpack(agent.index.match(keys).packed):
            node = node_at(slot)
            if node is None or not depth:
                continue
            name, tokens = str(node), depth * block_tokens
            if only is not None and name != only:
                continue
            if name in instances and tokens <= instances[name]["longest_matched"]:
                continue
            instances[name] = _hit(tokens, hbm * block_tokens, dram * block_tokens, (ssd + shared) * block_tokens)
        for recalled, row in agent.remembered.match(keys):
            name, tokens = str(recalled.node), row.depth * block_tokens
            if only is not None and name != only:
                continue
            if tokens and (name not in instances or tokens > instances[name]["longest_matched"]):
                instances[name] = _hit(
                    tokens,
                    row.in_tier(Tier.HBM) * block_tokens,
                    row.in_tier(Tier.DRAM) * block_tokens,
                    (row.in_tier(Tier.SSD) + row.in_tier(Tier.SHARED)) * block_tokens,
                )
                age_ms = max(age_ms, recalled.age_ms)
    return answer, age_ms / 1e3


def _hit(tokens: int, gpu: int, cpu: int, disk: int) -> dict[str, Any]:
    return {"longest_matched": tokens, "GPU": gpu, "DP": {"0": gpu}, "CPU": cpu, "DISK": disk}


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
    having: list[tuple[str, float | None, bool, Iterable[Layout]]] = [(mine, 0.0, False, agent.service.layouts)]
    having += [(str(peer.node), peer.age_ms, False, peer.card.layouts) for peer in agent.network.peers() if peer.alive]
    having += [(str(each.node), each.age_ms, True, each.card.layouts) for each in agent.remembered]
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
        # What a remembered node had can be neither pulled by others nor relied on: it counts for that node alone.
        within = {recalled.node: row.held for recalled, row in agent.remembered.match(keys[: reach * KEY_BYTES])}
        for recalled, row in agent.remembered.match(keys):
            rows[str(recalled.node)] = row._replace(held=within.get(recalled.node, 0))
        for name, age_ms, remembered, layouts in having:
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
                fetch_blocks=max(0, reach - held),
                fetch_bytes=max(0, reach - held) * layout.block_bytes,
                compute_tokens=total - max(reach, depth) * layout.block_tokens,
                age_ms=age_ms,
                remembered=remembered,
            )
            if name not in best or _work(candidate) < _work(best[name]):
                best[name] = candidate
    return ScoreAnswer(longest, sorted(best.values(), key=lambda candidate: (*_work(candidate), candidate.node)))


def weighed(agent: Agent, asked: Iterable[tuple[Layout, bytes]]) -> tuple[dict[str, float], float]:
    """Blocks of the prefix per node's address, each counted by where it lies (:data:`WEIGHTS`), in the best layout.

    And the age, as :func:`query_layouts` has it.
    """
    addresses = {int(peer.node): peer.address for peer in agent.network.peers()}
    addresses[agent.node] = agent.network.card.address
    scores: dict[str, float] = {}
    age_ms = 0.0
    for _, keys in asked:
        rows = [(agent.network.slot_node(row.node), row) for row in agent.index.match(keys)]
        found = [(addresses.get(int(node)), row) for node, row in rows if node is not None]
        for recalled, row in agent.remembered.match(keys):
            found.append((recalled.card.address, row))
            age_ms = max(age_ms, recalled.age_ms if row.depth else 0.0)
        for address, row in found:
            if address is not None and row.depth:
                name = f"{address.host}:{address.port}"
                value = sum(weight * blocks for weight, blocks in zip(WEIGHTS, row.by_tier, strict=True))
                scores[name] = max(scores.get(name, 0.0), round(value, 3))
    return scores, age_ms / 1e3


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
                "remembered": False,
            }
        )
    for recalled, row in agent.remembered.match(index_keys(namespace, hashes)):
        nodes.append(
            {
                "node": str(recalled.node),
                "self": False,
                "depth": row.depth,
                "held": row.held,
                "tiers": {tier.name.lower(): row.in_tier(tier) for tier in Tier if tier is not Tier.GONE},
                "age_ms": recalled.age_ms,
                "remembered": True,
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
