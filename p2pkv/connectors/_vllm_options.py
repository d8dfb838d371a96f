"""The options of the vLLM tier: what stands beside ``type`` and ``module_path`` in its entry of ``secondary_tiers``."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

import msgspec

from p2pkv.errors import ConfigError


class TierOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every option has a default that suits one engine beside one agent."""

    socket: str | None = None
    """The agent's Unix socket; default: P2PKV_SOCKET, then the agent's own default."""
    model: str | None = None
    """Share the cache under this model name instead of the one that vLLM was started with."""
    revision: str | None = None
    """Identity of the weights; default: the Hub's commit, or a fingerprint of a local model's files."""
    tenant: str = ""
    """Caches of different tenants never meet."""
    lookup_deadline_ms: int = 50
    """How long a request may wait for the agent's answer before its blocks count as misses. The answer comes from
    memory, typically within 1 ms; more patience only matters on a host without a free core."""
    lookup_wait_ms: float = 1.0
    """How long one step of vLLM's scheduler may wait, for all its new requests together, for answers that are just on
    their way: typically 0.2 ms. A request that is not answered then waits for a whole step more, ten times as long. 0:
    never wait."""
    load_deadline_ms: int = 2000
    """How long the agent may take to bring one request's blocks. Beyond it vLLM computes what is missing, so more than
    the prefill of a long prompt takes is wasted."""
    cost_aware: bool = True
    """Whether blocks are pulled from peers only as far as that is quicker than computing them, by what both are seen to
    take here. If not, whatever a peer has is pulled, within the deadline."""
    open_jobs_max: int = 1024
    """Loads and stores in flight; beyond it blocks are not stored, and loads fail at once."""
    new_weights_on_reset: bool = True
    """Whether a reset of vLLM's whole cache (a weight update, level-2 sleep) means new weights. If so, the engine
    shares only with engines that were reset as often; if not, with all that have the same revision."""


def parse_options(options: dict[str, Any]) -> TierOptions:
    """The tier's options from vLLM's configuration.

    Raises:
        ConfigError: an option is unknown (the nearest known one is named) or has the wrong type.
    """
    known = TierOptions.__struct_fields__
    for name in options:
        if name not in known:
            near: Collection[str] = get_close_matches(name, known, n=1) or known
            raise ConfigError(f"the p2pkv tier has no option {name!r}", hint="Did you mean " + " or ".join(near) + "?")
    try:
        return msgspec.convert(options, TierOptions)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the p2pkv tier's options: {error}") from error
