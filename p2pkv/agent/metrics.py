"""Prometheus metrics, read from the parts when they are scraped: nothing is counted twice, nothing on a hot path."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

import p2pkv
from p2pkv import _native

if TYPE_CHECKING:
    from p2pkv.agent.daemon import Agent


class AgentCollector(Collector):
    """All metrics of one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterator[Metric]:
        """Yield every family with its current values."""
        yield from self._node()
        yield from self._cache()
        yield from self._store()
        yield from self._pulls()
        yield from self._cell()

    def _node(self) -> Iterator[Metric]:
        agent = self._agent
        yield InfoMetricFamily(
            "p2pkv_agent",
            "Who this agent is.",
            value={
                "version": p2pkv.__version__,
                "node": f"{agent.node:016x}",
                "epoch": str(agent.identity.epoch),
                "pages": agent.arena.backing.pages.value,
                "checksum": _native.HASH_IMPLEMENTATION,
                "transports": agent.transports.describe(),
            },
        )
        yield _gauge("p2pkv_ready", "1 while the agent takes requests.", int(agent.ready))
        yield _gauge("p2pkv_uptime_seconds", "Since the start.", time.monotonic() - agent.started_at)
        yield _gauge("p2pkv_engines", "Connected engine clients.", len(agent.engines.connections))
        yield _gauge("p2pkv_engine_requests_in_flight", "Requests of engines being worked on.", agent.engines.in_flight)
        yield _counter("p2pkv_engines_refused", "Engine connections over the bound.", agent.engines.refused)
        yield _counter("p2pkv_engine_protocol_errors", "Malformed frames of engines.", agent.engines.protocol_errors)

    def _cache(self) -> Iterator[Metric]:
        stats = self._agent.service.totals()
        blocks = CounterMetricFamily(
            "p2pkv_get_blocks", "Blocks engines asked for, by where they came from.", labels=["source"]
        )
        blocks.add_metric(["local"], stats.hits_local)
        blocks.add_metric(["peer"], stats.hits_peer)
        blocks.add_metric(["miss"], stats.misses)
        yield blocks
        got = CounterMetricFamily(
            "p2pkv_get_bytes", "Bytes given to engines, by where they came from.", labels=["source"]
        )
        got.add_metric(["local"], stats.bytes_local)
        got.add_metric(["peer"], stats.bytes_peer)
        yield got
        stored = CounterMetricFamily(
            "p2pkv_put_blocks", "Blocks engines stored, by what became of them.", labels=["result"]
        )
        stored.add_metric(["stored"], stats.stored)
        stored.add_metric(["known"], stats.stored_again)
        stored.add_metric(["failed"], stats.store_failed)
        yield stored
        counted = self._agent.lane.counters()
        short = CounterMetricFamily(
            "p2pkv_short_way_blocks", "Of the blocks, those answered without the event loop.", labels=["source"]
        )
        short.add_metric(["local"], counted["hits_local"])
        short.add_metric(["peer"], counted["hits_peer"])
        short.add_metric(["miss"], counted["misses"])
        yield short
        yield _counter(
            "p2pkv_neighbour_blocks",
            "Of the blocks given from peers, those read out of the memory of an agent of this host.",
            counted["hits_neighbour"],
        )
        yield _counter(
            "p2pkv_short_way_handed_over", "Gets that the event loop had to go on with.", counted["handed_over"]
        )
        yield _counter("p2pkv_put_bytes", "Bytes engines stored.", stats.bytes_stored)
        yield _counter(
            "p2pkv_put_discarded_blocks",
            "Copies that were not published: the engine had gone, or it was late.",
            stats.stores_discarded,
        )

    def _store(self) -> Iterator[Metric]:
        stats = self._agent.store.stats()
        yield _gauge("p2pkv_arena_bytes", "Size of the arena.", stats.capacity_bytes)
        used = GaugeMetricFamily("p2pkv_arena_used_bytes", "Bytes of the arena, by use.", labels=["use"])
        used.add_metric(["live"], stats.live_bytes)
        used.add_metric(["pinned"], stats.pinned_bytes)
        used.add_metric(["quarantined"], stats.quarantined_bytes)
        used.add_metric(["free"], stats.free_bytes)
        yield used
        yield _gauge("p2pkv_blocks", "Blocks in the store.", stats.blocks_live)
        yield _gauge("p2pkv_leases", "Leases in force.", stats.leases)
        yield _counter(
            "p2pkv_leases_expired", "Leases that ran out before they were given back.", stats.leases_expired_total
        )
        yield _counter("p2pkv_evictions", "Blocks evicted.", stats.evictions_total)
        yield _counter("p2pkv_no_space", "Blocks that found no slot.", stats.no_space_total)
        yield _counter(
            "p2pkv_quarantines",
            "Slots parked because a given-up transfer might still write to them.",
            stats.quarantines_total,
        )

    def _pulls(self) -> Iterator[Metric]:
        fetcher = self._agent.service.fetcher
        if fetcher is None:
            return
        stats = fetcher.stats
        yield _counter("p2pkv_pulled_blocks", "Blocks pulled from peers and proven.", stats.blocks_pulled)
        yield _counter("p2pkv_pulled_bytes", "Bytes of them.", stats.bytes_pulled)
        yield _counter(
            "p2pkv_rejected_blocks",
            "Blocks whose bytes failed their checksum and were discarded.",
            stats.blocks_rejected,
        )
        yield _counter(
            "p2pkv_pull_missing_blocks", "Blocks that a holder no longer had.", stats.blocks_missed_at_holder
        )
        yield _counter(
            "p2pkv_pull_failed_blocks", "Blocks that a pull did not bring, for whatever reason.", stats.blocks_failed
        )
        pulls = CounterMetricFamily("p2pkv_pulls", "Pulls, by how they ended.", labels=["result"])
        pulls.add_metric(["complete"], stats.pulls - stats.pulls_failed)
        pulls.add_metric(["incomplete"], stats.pulls_failed)
        yield pulls
        yield _counter("p2pkv_pulls_joined", "Blocks that waited for somebody else's pull.", stats.flights_joined)
        agent = self._agent
        worth = agent.service.worth
        yield _counter(
            "p2pkv_pulls_taken_over", "Pulls that were called off because others were quicker.", stats.pulls_taken_over
        )
        yield _counter(
            "p2pkv_overtaken_blocks", "Blocks given up because the engine computes them sooner.", stats.blocks_overtaken
        )
        yield _counter(
            "p2pkv_refused_blocks",
            "Blocks of peers that were not worth pulling.",
            worth.refused_blocks if worth is not None else 0,
        )
        ahead = CounterMetricFamily(
            "p2pkv_ahead_blocks", "Blocks pulled ahead of need, and wishes for them that failed.", labels=["result"]
        )
        for name, count in msgspec.structs.asdict(agent.ahead.stats).items():
            ahead.add_metric([name], count)
        yield ahead
        yield _gauge(
            "p2pkv_pulls_admitted_bytes", "Bytes that pulls may have on their way.", fetcher.admission.used_bytes
        )
        yield _gauge("p2pkv_pulls_waiting", "Requests that wait for their turn to pull.", fetcher.admission.waiting)
        yield _gauge("p2pkv_peers_not_asked", "Peers whose circuit breaker is open.", agent.sources.not_asked)
        yield _gauge("p2pkv_distrusted_blocks", "Blocks not asked of an owner again.", len(agent.suspicion.distrust))
        yield _counter("p2pkv_bad_blocks", "Own blocks that had gone bad when a peer asked.", agent.suspicion.told_bad)
        in_flight = fetcher.in_flight + self._agent.lane.blocks_in_flight
        yield _gauge("p2pkv_pulls_in_flight_blocks", "Blocks being pulled now.", in_flight)
        served = CounterMetricFamily("p2pkv_served_bytes", "Bytes sent to peers.", labels=["transport"])
        server = self._agent.transports.server
        served.add_metric(["tcp"], server.bytes_served)
        yield served
        yield _counter("p2pkv_served_blocks", "Blocks sent to peers over tcp.", server.blocks_served)
        yield _counter("p2pkv_served_requests", "Reads that peers asked for over tcp.", server.gets)
        yield _counter("p2pkv_served_pins", "Reads over nixl that peers asked to hold blocks for.", server.pins)
        yield _counter("p2pkv_served_busy", "Of them, refused: the peer held as much as it may.", server.refused)
        yield _counter(
            "p2pkv_served_cut_off", "Answers that a peer did not take before its lease was over.", server.cut_off
        )
        yield _counter(
            "p2pkv_data_protocol_errors", "Malformed frames on peers' data connections.", server.protocol_errors
        )
        yield _counter("p2pkv_data_refused", "Peers' data connections over the bound.", server.connections_refused)
        yield _gauge("p2pkv_data_connections", "Data connections of peers.", server.active)
        yield _gauge("p2pkv_served_leases", "Leases that peers hold by reads over tcp.", server.leases_held)
        nixl = self._agent.transports.nixl
        yield _gauge("p2pkv_nixl_ready", "1 while the NIXL process runs.", int(nixl is not None and nixl.ready))
        if nixl is not None:
            yield _counter("p2pkv_nixl_restarts", "Times the NIXL process was started again.", nixl.process.restarts)
            yield _gauge(
                "p2pkv_nixl_quarantined_bytes",
                "Bytes that given-up NIXL reads may still write.",
                nixl.process.quarantined_bytes,
            )

    def _cell(self) -> Iterator[Metric]:
        network = self._agent.network
        states: dict[str, int] = {}
        conflicts = 0
        for peer in network.peers():
            states[peer.state.name.lower()] = states.get(peer.state.name.lower(), 0) + 1
            conflicts += bool(peer.conflicts)
        peers = GaugeMetricFamily("p2pkv_peers", "Known peers, by state.", labels=["state"])
        for state, count in sorted(states.items()):
            peers.add_metric([state], count)
        yield peers
        yield _gauge("p2pkv_peers_with_other_layouts", "Peers that keep the same cache with another layout.", conflicts)
        index = self._agent.index.stats()
        yield _gauge("p2pkv_index_entries", "(node, block) entries in the index.", index.entries)
        yield _gauge("p2pkv_index_keys", "Blocks in the index.", index.keys)
        remembered = self._agent.remembered
        yield _gauge("p2pkv_remembered_nodes", "Nodes known from before the start that are not back.", len(remembered))
        yield _counter("p2pkv_index_dumps", "Times that what is known of peers was written down.", remembered.saves)
        yield _gauge("p2pkv_index_dump_bytes", "Length of the last one.", remembered.saved_bytes)
        yield _counter("p2pkv_index_dump_failures", "Dumps that could not be written or read.", remembered.failures)
        events = CounterMetricFamily(
            "p2pkv_cell_events", "What happened on the connections between agents.", labels=["event"]
        )
        for name, count in sorted(network.stats().items()):
            events.add_metric([name], count)
        yield events


def render(agent: Agent) -> bytes:
    """The text exposition of one agent's metrics."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(AgentCollector(agent))
    return generate_latest(registry)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)
