"""A cell of protocol cores in memory, under virtual time, driven by one seed: the very code that ships.

Faults: connections that break with their frames (each end learns of it at its own time), connections that fall silent,
nodes that crash, restart, stall and leave. Frames on one connection keep their order, as on TCP.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from p2pkv.config import Peer
from p2pkv.gossip.effects import Close, Dial, Effect, Established, HandOver, Say, Send
from p2pkv.gossip.membership import State
from p2pkv.gossip.net import UNACKED_MAX_MS
from p2pkv.gossip.protocol import PeerProtocol
from p2pkv.index.hashing import unpack_keys
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier
from p2pkv.wire.frame import FrameDecoder
from p2pkv.wire.peer import Address, Card

log = logging.getLogger("tests.sim")
Entries = frozenset[tuple[int, int]]


@dataclass
class Pipe:
    """One connection; ``ends[0]`` dialed. Frames in a direction arrive in order."""

    ends: list[tuple[SimNode, int]]
    arrives: list[float] = field(default_factory=lambda: [0.0, 0.0])  # by receiving end: nothing overtakes
    decoders: list[FrameDecoder] = field(default_factory=lambda: [FrameDecoder(), FrameDecoder()])
    silent: bool = False
    broken: bool = False


class SimNode:
    """One node; a new ``core`` and ``log`` at every start."""

    def __init__(self, cell: Cell, i: int, seeds: list[Address]) -> None:
        self.cell = cell
        self.id = 100 + i
        self.address = Address(f"10.0.0.{i}", 7841)
        self.seeds = seeds
        self.epoch = 0
        self.up = False
        self.stalled_until = 0.0
        self.pipes: dict[int, tuple[Pipe, int]] = {}
        self.core: PeerProtocol
        self.log: OwnershipLog
        self.index: PrefixIndex

    def start(self) -> None:
        """A new life."""
        cell = self.cell
        self.epoch += 1
        self.up = True
        self.stalled_until = 0.0
        self.pipes = {}
        self.log = OwnershipLog(self.epoch, hold_ms=50)
        self.index = PrefixIndex(max_nodes=cell.settings.members_max + 1, max_entries=1 << 20)
        card = Card(self.id, self.epoch, self.address, "", "", [], [], cell.rng.getrandbits(63))
        self.core = PeerProtocol(
            settings=cell.settings, cell="sim", card=card, log=self.log, index=self.index,
            rng=random.Random(cell.rng.getrandbits(64)), now=cell.now,
        )  # fmt: skip
        self.act(self.core.on_seeds(cell.now, "static", self.seeds))
        self.arm()

    def crash(self) -> None:
        """Gone without a word; its connections are reset, or just fall silent."""
        self.up = False
        for pipe, _ in list(self.pipes.values()):
            if self.cell.rng.random() < 0.7:
                self.cell.break_pipe(pipe)
            else:
                pipe.silent = True
        self.pipes = {}

    def leave(self) -> None:
        """Gone with a word."""
        self.act(self.core.close(self.cell.now))
        self.up = False
        self.pipes = {}

    def arm(self) -> None:
        """Have the core's timer called."""
        core = self.core

        def fire() -> None:
            if self.up and self.core is core:
                self.act(core.on_timer(self.cell.now))
                self.arm()

        self.cell.at(max(core.next_timer, self.cell.now), lambda: self.cell.on(self, fire))

    def act(self, effects: list[Effect]) -> None:
        """Do what the core asks for."""
        self.cell.note(self)
        for effect in effects:
            match effect:
                case Dial():
                    self.cell.dial(self, effect.conn, effect.address)
                case Send():
                    for conn in effect.conns:
                        assert conn in self.pipes, "sent on a connection that is not there"
                        self.cell.send(*self.pipes[conn], effect.frame)
                case Close():
                    if end := self.pipes.pop(effect.conn, None):
                        self.cell.close(*end)
                case Say():
                    log.debug("%.3f %x %s: %s", self.cell.now, self.id, effect.level, effect.text)
                    assert effect.level != "error", effect.text
                case Established() | HandOver():
                    pass
                case _:
                    pass

    def view_of(self, other: SimNode) -> Entries | None:
        """What this node shows of another's entries; None while they are hidden."""
        row = self.core.table.get(other.id)
        if row is None or row.state is not State.ALIVE:
            return None
        return entries_of(self.index, row.slot)


class Cell:
    """All nodes, the network between them, and the clock."""

    def __init__(self, seed: int, nodes: int, settings: Peer | None = None) -> None:
        self.rng = random.Random(seed)
        self.settings = settings or Peer(members_max=16, purge_s=8.0)
        self.now = 1_000.0
        self.heap: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()
        self.events = 0
        self.history: dict[tuple[int, int], dict[int, Entries]] = {}
        seed_address = Address("10.0.0.0", 7841)
        self.nodes = [SimNode(self, i, [seed_address]) for i in range(nodes)]
        self.nodes[0].seeds = [Address("10.0.0.1", 7841)] if nodes > 1 else []

    # --- time

    def at(self, when: float, what: Callable[[], None]) -> None:
        """Do something later."""
        heapq.heappush(self.heap, (when, next(self.order), what))

    def on(self, node: SimNode, what: Callable[[], None]) -> None:
        """Let something happen to a node, when it is not stalled."""
        if node.stalled_until > self.now:
            self.at(node.stalled_until, lambda: self.on(node, what))
        else:
            what()

    def run(self, seconds: float) -> None:
        """Let time pass; the invariants are checked as it does."""
        end = self.now + seconds
        while self.heap and self.heap[0][0] <= end:
            self.now, _, what = heapq.heappop(self.heap)
            what()
            self.events += 1
            if self.events % 16 == 0:
                self.check()
        self.now = end

    # --- network

    def latency(self) -> float:
        """One way, seconds."""
        return self.rng.choice((0.0005, 0.002, 0.03)) * self.rng.uniform(0.5, 1.5)

    def dial(self, node: SimNode, conn: int, address: Address) -> None:
        """A connection attempt."""
        core = node.core
        there = next((n for n in self.nodes if n.address == address), None)

        def arrive() -> None:
            if node.core is not core or not node.up:
                return
            if there is None or not there.up:
                if conn in core.conns:
                    node.act(core.on_closed(self.now, conn, "refused"))
                return
            if conn not in core.conns:
                return
            far = there.core.take_conn()
            pipe = Pipe([(node, conn), (there, far)])
            node.pipes[conn] = (pipe, 0)
            there.pipes[far] = (pipe, 1)
            there.act(there.core.on_accepted(self.now, far, node.address.host))
            node.act(core.on_dialed(self.now, conn, address.host))

        self.at(self.now + self.latency(), lambda: self.on(node, arrive))

    def send(self, pipe: Pipe, end: int, frame: bytes) -> None:
        """A frame from one end of a pipe. On a silent one the sender's kernel gives up some day."""
        if pipe.silent:
            node, conn = pipe.ends[end]
            self.at(self.now + UNACKED_MAX_MS / 1e3, lambda: self.on(node, lambda: self.give_up(node, pipe, conn)))
            return
        self.deliver(pipe, 1 - end, lambda node, conn: self.receive(pipe, 1 - end, node, conn, frame))

    def receive(self, pipe: Pipe, end: int, node: SimNode, conn: int, frame: bytes) -> None:
        """Bytes at the other end, in pieces as the network likes."""
        cut = self.rng.randrange(len(frame) + 1)
        for piece in (frame[:cut], frame[cut:]):
            for whole in pipe.decoders[end].feed(piece):
                if conn in node.pipes:
                    node.act(node.core.on_frame(self.now, conn, whole))

    def close(self, pipe: Pipe, end: int) -> None:
        """One end has closed: the other learns of it behind what was sent before."""
        self.deliver(pipe, 1 - end, lambda node, conn: self.lose(node, conn))

    def give_up(self, node: SimNode, pipe: Pipe, conn: int) -> None:
        """TCP_USER_TIMEOUT."""
        if node.up and node.pipes.get(conn, (None,))[0] is pipe:
            self.lose(node, conn)

    def lose(self, node: SimNode, conn: int) -> None:
        """A node notices that a connection is gone."""
        if node.pipes.pop(conn, None):
            node.act(node.core.on_closed(self.now, conn, "reset"))

    def deliver(self, pipe: Pipe, end: int, what: Callable[[SimNode, int], None]) -> None:
        """Something happens at one end of a pipe, after all that was under way to it."""
        node, conn = pipe.ends[end]
        when = pipe.arrives[end] = max(pipe.arrives[end], self.now + self.latency())

        def arrive() -> None:
            # A later life of the node may use the same number for another connection.
            alive = node.up and node.pipes.get(conn, (None,))[0] is pipe
            if alive and not pipe.broken and not pipe.silent:
                what(node, conn)

        self.at(when, lambda: self.on(node, arrive))

    def break_pipe(self, pipe: Pipe) -> None:
        """What is under way is lost; each end notices at its own time."""
        pipe.broken = True
        for node, conn in pipe.ends:
            core = node.core

            def notice(node: SimNode = node, conn: int = conn, core: Any = core) -> None:
                if node.up and node.core is core:
                    self.lose(node, conn)

            self.at(self.now + self.rng.choice((0.0, 0.01, 1.0)), lambda n=node, f=notice: self.on(n, f))

    # --- faults and work

    def disturb(self) -> None:
        """One random fault or change."""
        rng = self.rng
        node = rng.choice(self.nodes)
        match rng.choice(("write",) * 12 + ("break",) * 4 + ("silence", "crash", "stall", "leave")):
            case "write" if node.up:
                keys = [rng.randrange(1 << 64) for _ in range(rng.randrange(1, 20))]
                keys += rng.sample(sorted(k for k, _ in self.entries(node)), min(5, len(self.entries(node))))
                node.log.record(keys, Tier(rng.randrange(5)), self.now, urgent=rng.random() < 0.3)
            case "break" if node.pipes:
                self.break_pipe(rng.choice(list(node.pipes.values()))[0])
            case "silence" if node.pipes:
                rng.choice(list(node.pipes.values()))[0].silent = True
            case "crash" if node.up:
                node.crash()
                self.at(self.now + rng.uniform(0.01, 12.0), node.start)
            case "leave" if node.up:
                node.leave()
                self.at(self.now + rng.uniform(0.01, 5.0), node.start)
            case "stall" if node.up:
                node.stalled_until = self.now + rng.uniform(0.1, 6.0)

    def entries(self, node: SimNode) -> Entries:
        """What a node has published, by its own account."""
        snapshot = node.log.snapshot()
        pairs = [(k, t) for part in snapshot for t, p in enumerate(part.keys_by_tier) for k in unpack_keys(p)]
        return frozenset(pairs)

    def note(self, node: SimNode) -> None:
        """Remember what a node's set was at each sequence number."""
        known = self.history.setdefault((node.id, node.epoch), {0: frozenset()})
        if node.log.seq not in known:
            known[node.log.seq] = self.entries(node)

    # --- what must hold

    def check(self) -> None:
        """Invariant 2: what a replica shows of an owner at (epoch, seq) is the owner's set at that point."""
        for reader in self.nodes:
            if not reader.up:
                continue
            reader.core.table.check_integrity()
            for owner in self.nodes:
                shown = reader.view_of(owner)
                if shown is None:
                    continue
                view = reader.core.peer(self.now, owner.id)
                assert view is not None
                history = self.history[(owner.id, view.epoch)]
                # A flush publishes several deltas in one call; only the last of them is remembered here.
                if view.seq in history:
                    assert shown == history[view.seq], (reader.id, owner.id, view.seq)

    def assert_converged(self) -> None:
        """Every replica equals the owner's set, and nobody else is there."""
        up = [node for node in self.nodes if node.up]
        for reader in up:
            others = {owner.id for owner in up if owner is not reader}
            assert {n for n, row in reader.core.table.rows.items() if row.state is State.ALIVE} == others
            for owner in up:
                if owner is not reader:
                    assert reader.view_of(owner) == self.entries(owner), (reader.id, owner.id)


def entries_of(index: PrefixIndex, slot: int) -> Entries:
    """All of a slot's entries."""
    return frozenset((key, int(tier)) for tier, keys in index.snapshot(slot) for key in unpack_keys(keys))


@pytest.fixture
def make_cell() -> Callable[..., Cell]:
    """Builds cells; ``P2PKV_TEST_SEED`` replaces the seed."""

    def make(seed: int, nodes: int, settings: Peer | None = None) -> Cell:
        seed = int(os.environ.get("P2PKV_TEST_SEED", seed))
        print(f"seed {seed}: set P2PKV_TEST_SEED={seed} to replay")
        return Cell(seed, nodes, settings)

    return make
