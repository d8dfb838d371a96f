"""Peers as sources, on this host: what a stranger is worth, and trying out again those that are not asked.

A peer whose circuit breaker is open gets a tiny request of ours now and then, when its pause is over or its heartbeat
is heard again; whoever needs a block is never the probe.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Final

from p2pkv.agent.topology import BITS
from p2pkv.agent.transports import Transports, link_bytes_per_s
from p2pkv.gossip.driver import PeerNetwork
from p2pkv.transport.base import CallOff, PullRequest
from p2pkv.transport.peers import Peers
from p2pkv.transport.plan import Estimate, Source
from p2pkv.transport.strangers import Place, expected
from p2pkv.types import Status
from p2pkv.wire.fields import Extent

log = logging.getLogger(__name__)

LOOK_S: Final = 0.1
"""How often it is looked whether a peer is worth a probe; only while one is not asked."""
PROBE_S: Final = 0.5


class Sources:
    """See the module's docstring. On the event loop."""

    def __init__(self, network: PeerNetwork, transports: Transports, host: str) -> None:
        self._network = network
        self._transports = transports
        self._probing: dict[int, asyncio.Task[None]] = {}
        self._shunned: dict[int, int] = {}  # of those, by node: the slot of the index
        self.link_bytes_per_s = link_bytes_per_s(host, transports.rdma)
        """What this host's own link can receive, as far as is known."""
        self.peers = Peers(
            self.stranger,
            heard_at=self._heard_at,
            on_open=self._on_open,
            on_estimate=self._tell_native,
            setup_s=transports.setup_s,
            load_bytes=network.load_of,
        )

    def stranger(self, source: Source) -> Estimate:
        """What to expect of a source that nothing was pulled from yet."""
        card, peer = self._network.card, self._network.peer(source.node)
        ours = Place(card.host_id, card.rack, self.link_bytes_per_s)
        if peer is None:
            return expected(ours, None, rtt_s=0.0)
        theirs = Place(peer.card.host_id, peer.card.rack, peer.card.link_mbps * 1e6 / BITS)
        return expected(ours, theirs, rtt_s=(peer.rtt_ms or 0.0) / 1000)

    @property
    def not_asked(self) -> int:
        """Peers whose breaker is open."""
        return len(self._probing)

    def gone(self, node: int) -> None:
        """The peer is unreachable or has left."""
        self.peers.forget(node)
        self._shun(node, None)
        task = self._probing.pop(node, None)
        if task is not None:
            task.cancel()

    async def stop(self) -> None:
        """End every probe."""
        tasks = list(self._probing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _heard_at(self, node: int) -> float:
        peer = self._network.peer(node)
        if peer is None or peer.age_ms is None:
            return float("-inf")
        return time.monotonic() - peer.age_ms / 1000

    def _tell_native(self, source: Source) -> None:
        """Native code chooses among the holders of small gets by this."""
        known = self.peers.estimate(source)
        self._transports.tcp.pool.expect(source.node, known.first_byte_s, known.times / known.bytes_per_s)

    def _hidden(self, node: int) -> bool:
        """Whether nothing of it is shown: nobody asks it, and nobody else would end its probe if it never came back."""
        peer = self._network.peer(node)
        return peer is None or not peer.alive

    def _on_open(self, node: int) -> None:
        self._transports.tcp.pool.drop(node)  # what is idle there will not answer either
        if self._hidden(node):  # a pull from before that; when the node is back, it is asked as any other
            self.peers.forget(node)
        elif node not in self._probing:
            log.warning("%016x does not answer pulls; it is not asked before a probe has gone through", node)
            task = asyncio.get_running_loop().create_task(self._probe(node))
            self._probing[node] = task
            self._shun(node, self._network.node_slot(node))
            task.add_done_callback(lambda done: self._probed(node, done))

    def _probed(self, node: int, task: asyncio.Task[None]) -> None:
        if self._probing.get(node) is task:
            del self._probing[node]
            self._shun(node, None)

    def _shun(self, node: int, slot: int | None) -> None:
        """Native code asks whoever is in this slot of the index for nothing; ``None``: it may be asked again."""
        pool = self._transports.tcp.pool
        if slot is not None:
            self._shunned[node] = slot
            pool.shun(slot, True)
        elif (shunned := self._shunned.pop(node, None)) is not None:
            pool.shun(shunned, False)

    async def _probe(self, node: int) -> None:
        while not self.peers.usable(node):
            await asyncio.sleep(LOOK_S)
            if self._hidden(node):
                self.peers.forget(node)
                return
            if not self.peers.worth_a_probe(node):
                continue
            if await self._try_out(node) in (Status.TIMEOUT, Status.UNREACHABLE, Status.LOST):
                self.peers.silent(node)
            else:  # any answer will do; that it does not have the block is the one expected
                self.peers.good(node)
                log.info("%016x answers again", node)

    async def _try_out(self, node: int) -> Status:
        """What comes of a tiny request."""
        request = PullRequest(node, 0, [os.urandom(16)], [Extent(0, 0)], PROBE_S, _ignore, CallOff())
        try:
            return (await self._transports.pick(node).pull(request)).statuses[0]
        except Exception:  # a bug in a transport: without a probe that goes on, the node would never be asked again
            log.exception("the probe of %016x failed", node)
            return Status.LOST


def _ignore(index: int, status: Status, checksum: bytes) -> None:
    """Of a probe nothing comes."""
