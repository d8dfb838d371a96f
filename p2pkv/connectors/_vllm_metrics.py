"""What the tier reports through vLLM's ``/metrics``: names, definitions, and the sums between two collections.

vLLM asks the tier's class for the definitions in its front-end process, and the tier for observations in the
scheduler's after every step, so nothing here is shared between processes.
"""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingHistogramMetadata,
    OffloadingMetricMetadata,
)

LOOKUP_BLOCKS = "vllm:p2pkv_lookup_blocks"
LOOKUP_FAILURES = "vllm:p2pkv_lookup_failures"
LOOKUP_SECONDS = "vllm:p2pkv_lookup_seconds"
LOAD_BLOCKS = "vllm:p2pkv_load_blocks"
LOAD_BYTES = "vllm:p2pkv_load_bytes"
LOAD_FAILURES = "vllm:p2pkv_load_failures"
LOAD_SECONDS = "vllm:p2pkv_load_seconds"
STORE_BLOCKS = "vllm:p2pkv_store_blocks"
STORE_BYTES = "vllm:p2pkv_store_bytes"
STORE_REJECTED = "vllm:p2pkv_store_rejected"
STORE_SECONDS = "vllm:p2pkv_store_seconds"
AGENT_CONNECTED = "vllm:p2pkv_agent_connected"

# From a local answer (tens of microseconds) to the deadlines (seconds).
_SECONDS = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


def definitions() -> dict[str, OffloadingMetricMetadata]:
    """Every metric that :class:`TierStats` can emit, by name."""
    return {
        LOOKUP_BLOCKS: OffloadingCounterMetadata(
            "KV blocks that the p2pkv agent was asked for, by answer: local, peer or miss.", ("result",)
        ),
        LOOKUP_FAILURES: OffloadingCounterMetadata(
            "KV blocks that counted as misses because no answer came, by reason: timeout, unavailable, busy or lost.",
            ("reason",),
        ),
        LOOKUP_SECONDS: OffloadingHistogramMetadata(
            "Time from a request's question to the agent until its answer was seen, in seconds.", buckets=_SECONDS
        ),
        LOAD_BLOCKS: OffloadingCounterMetadata(
            "KV blocks loaded through the p2pkv agent, by where they were: local or peer.", ("source",)
        ),
        LOAD_BYTES: OffloadingCounterMetadata(
            "Bytes loaded through the p2pkv agent, by where they were: local or peer.", ("source",)
        ),
        LOAD_FAILURES: OffloadingCounterMetadata(
            "KV blocks that were promised and not delivered (vLLM recomputes them), by reason: "
            "missing, unavailable, busy or lost.",
            ("reason",),
        ),
        LOAD_SECONDS: OffloadingHistogramMetadata("Duration of load jobs, in seconds.", buckets=_SECONDS),
        STORE_BLOCKS: OffloadingCounterMetadata("KV blocks handed to the p2pkv agent."),
        STORE_BYTES: OffloadingCounterMetadata("Bytes handed to the p2pkv agent."),
        STORE_REJECTED: OffloadingCounterMetadata(
            "KV blocks that the p2pkv agent did not take, by reason: refused, unavailable, busy or lost.", ("reason",)
        ),
        STORE_SECONDS: OffloadingHistogramMetadata("Duration of store jobs, in seconds.", buckets=_SECONDS),
        AGENT_CONNECTED: OffloadingGaugeMetadata("1 while the p2pkv agent is known to answer, else 0."),
    }


class TierStats:
    """Sums observations until vLLM takes them. For the scheduler's thread."""

    def __init__(self) -> None:
        self._stats = OffloadingConnectorStats()

    def count(self, name: str, value: int, label: str | None = None) -> None:
        """Add to a counter; nothing is recorded for 0."""
        if value:
            self._stats.increase_counter(name, value, (label,) if label is not None else ())

    def observe(self, name: str, seconds: float) -> None:
        """Add one duration to a histogram."""
        self._stats.observe_histogram(name, seconds)

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._stats.set_gauge(name, value)

    def take(self) -> OffloadingConnectorStats | None:
        """What was observed since the last call, or None."""
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, OffloadingConnectorStats()
        return stats
