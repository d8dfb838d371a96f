"""A member of the cell that keeps no blocks: it has the whole index, and whoever asks it asks a local call.

For schedulers and tools. It tells everybody an empty log, so that it is heard of and told everything; it answers no
requests and hands over no data connections.
"""

from __future__ import annotations

import secrets
from types import TracebackType

from p2pkv.config import Peer as PeerSettings
from p2pkv.gossip.driver import PeerNetwork
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import NodeId
from p2pkv.wire.peer import Address, Card


class Observer:
    """``network``: who is there; ``index``: who holds what, by slots that ``network.slot_node`` translates.

    An async context manager, on one event loop. A new identity at every start.

    Args:
        settings: the configuration's ``peer`` section; its port 0 (any free one) suits an observer.
    """

    def __init__(self, settings: PeerSettings) -> None:
        self.index = PrefixIndex()
        self.network = PeerNetwork(
            settings=settings,
            cell=settings.cell,
            card=Card(secrets.randbits(63) | 1, 1, Address("", 0), "", "", [], []),
            log=OwnershipLog(1),
            index=self.index,
        )

    async def __aenter__(self) -> Observer:
        await self.network.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.network.stop()

    def holders(self, keys: bytes) -> dict[NodeId, int]:
        """How many blocks of a chain (packed index keys), from its beginning, each node holds."""
        slot_node = self.network.slot_node
        return {node: row.depth for row in self.index.match(keys) if (node := slot_node(row.node)) is not None}
