"""All the other nodes of a cell in one process: real sockets, real seals, the real core, and nobody behind them."""

from __future__ import annotations

import errno
import random
import resource
import selectors
import socket
import time
from array import array
from collections.abc import Callable
from typing import Final

from p2pkv.gossip import datagrams
from p2pkv.gossip._gossip import Gossip
from p2pkv.gossip.keyring import Keyring
from p2pkv.gossip.sealed import FRAME_BYTES_MAX, Life, Opened, Opener, Sealer
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier
from p2pkv.wire.codec import pack
from p2pkv.wire.peer import Address, Card

BUFFER_BYTES: Final = 64 << 10
READS_MAX: Final = 64
PORT_TRIES: Final = 16
DESCRIPTORS: Final = 128
"""For everything but the other nodes."""


class Other:
    """One of them: it knows the agent and nobody else."""

    def __init__(self, ring: Keyring, rng: random.Random, agent: tuple[str, int]) -> None:
        # Nobody answers letters; but a port that refuses connections would say that the node is gone.
        self.listener, self.sock = bind_both()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self.agent = agent
        self.life = Life(rng.getrandbits(63) | 1, 1, rng.getrandbits(63) | 1)
        self.log = OwnershipLog(1, hold_ms=0)
        self.kept: list[int] = []
        self.gone = 0
        self._rng = rng
        self._index = PrefixIndex(max_nodes=5)
        self._sealer = Sealer(ring, "bench", self.life)
        self._opener = Opener(ring, "bench", 0.0)
        now = time.monotonic()
        address = f"127.0.0.1:{self.sock.getsockname()[1]}"
        settings = {"members_max": 4, "flush_s": 0.001, "heartbeat_s": 0.05, "silence_s": 1e6, "digest_s": 1e6}
        self.core = Gossip(
            settings, *self.life, address, self._index.entries, self.log.entries, rng.getrandbits(64), now
        )
        card = Card(self.life.node, 1, Address("127.0.0.1", 1), "", "", [], ["tcp"], self.life.instance)
        self.core.set_card(now, 1, pack(card))
        self.core.on_seeds(now, 0, [f"{agent[0]}:{agent[1]}"])
        self.act()

    def act(self) -> int:
        """Send what the core asks for; letters go nowhere. Returns how many frames."""
        frames, _, _ = self.core.take()
        for payload, _ in frames:
            self.sock.sendto(self._sealer.seal(payload), self.agent)
        return len(frames)

    def read(self) -> None:
        """Take what has come."""
        now = time.monotonic()
        for _ in range(READS_MAX):
            try:
                data = self.sock.recv(FRAME_BYTES_MAX + 1)
            except BlockingIOError:
                break
            opened = self._opener.open(data, now)
            if isinstance(opened, Opened):
                self.core.on_frame(now, *opened.life, f"{self.agent[0]}:{self.agent[1]}", opened.payload)
        self.act()

    def store(self, keys: int) -> None:
        """So many new entries, to be told of at once."""
        added = array("Q", self._rng.randbytes(8 * keys)).tolist()
        self.kept += added
        self.log.record(added, Tier.DRAM, 0.0, urgent=True)

    def change(self, keys: int) -> None:
        """Half as many come, and as many go."""
        half = keys // 2
        dropped = self.kept[self.gone : self.gone + half]
        self.gone += half
        self.log.record(dropped, Tier.GONE, 0.0, urgent=True)
        self.store(half)

    def flush(self, deltas_max: int = 1) -> int:
        """Tell of the next deltas, or of none: a heartbeat."""
        deltas = self.log.poll(0.0, deltas_max=deltas_max)
        for delta in deltas:
            self.core.publish(delta.seq, delta.checksum, delta.keys_by_tier)
        self.core.on_timer(time.monotonic())
        return self.act()


def bind_both() -> tuple[socket.socket, socket.socket]:
    """One port of this host for TCP and UDP, as agents have it."""
    for left in reversed(range(PORT_TRIES)):
        listener = socket.create_server(("127.0.0.1", 0), backlog=1)
        try:
            return listener, datagrams.bind(listener)
        except OSError as error:
            listener.close()
            if left == 0 or error.errno != errno.EADDRINUSE:
                raise
    raise AssertionError("unreachable")


class OtherNodes:
    """A context manager. Takes two descriptors for each node."""

    def __init__(self, count: int, ring: Keyring, agent: tuple[str, int]) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < (wanted := min(hard, 2 * count + DESCRIPTORS)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        rng = random.Random(7)
        self._selector = selectors.DefaultSelector()
        self.nodes = [Other(ring, rng, agent) for _ in range(count)]
        for node in self.nodes:
            self._selector.register(node.sock, selectors.EVENT_READ, node)

    def __enter__(self) -> OtherNodes:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            node.sock.close()
            node.listener.close()
        self._selector.close()

    def serve(self, until: Callable[[], bool], deadline_s: float) -> bool:
        """Answer the agent until something is so; False: it was not in time."""
        deadline = time.monotonic() + deadline_s
        look_at = 0.0
        while time.monotonic() < deadline:
            for key, _ in self._selector.select(0.02):
                key.data.read()
            now = time.monotonic()
            if now >= look_at:
                look_at = now + 0.2
                if until():
                    return True
                for node in self.nodes:
                    node.core.on_timer(now)
                    node.act()
        return False
