"""What engines import: talk to the agent on this host.

    client = AgentClient()                       # the agent's socket, or P2PKV_SOCKET
    cache  = client.open(Layout(...))            # one namespace
    cache.put(keys, buffers); cache.get_into(keys, buffers, deadline_ms=200)

Light on purpose (no torch, numpy, nixl, fastapi or zeroconf; under 50 ms to import). See ``docs/client.md``.
"""

from p2pkv.client.cache import Cache, Match, Region
from p2pkv.client.client import AgentClient
from p2pkv.client.jobs import JobResult
from p2pkv.types import Layout, Status, Tier

__all__ = ["AgentClient", "Cache", "JobResult", "Layout", "Match", "Region", "Status", "Tier"]
