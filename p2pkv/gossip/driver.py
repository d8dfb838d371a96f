"""The peer network on asyncio: sockets, timers and keys around the gossip core.

Thin: it decides nothing. Frames and letters go to the core (:mod:`p2pkv.gossip._gossip`, ``core/gossip.hpp``); what the
core asks for is done. Everything runs on one event loop's thread, callbacks included; they must not block.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, Final

import msgspec

from p2pkv.config import Peer as PeerSettings
from p2pkv.config import parse_address
from p2pkv.errors import ConfigError, LocalProtocolError, P2PKVError, PeerUnavailable, RemoteProtocolError
from p2pkv.gossip import datagrams, keyring, net
from p2pkv.gossip._gossip import Gossip
from p2pkv.gossip.addresses import at, parse
from p2pkv.gossip.control import Control
from p2pkv.gossip.datagrams import Datagrams
from p2pkv.gossip.discovery import Discovery, from_settings
from p2pkv.gossip.keyfile import KeyFile
from p2pkv.gossip.link import PeerLink
from p2pkv.gossip.requests import Handler, Requests
from p2pkv.gossip.sealed import Life, Opener, Sealer
from p2pkv.gossip.tls import Tls
from p2pkv.gossip.views import PeerView, State, layout_conflicts
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import NodeId
from p2pkv.wire.codec import pack
from p2pkv.wire.peer import Address, Card, Hello, unpack_card

if TYPE_CHECKING:
    from p2pkv.gossip._gossip import MemberTuple

SLOW_TICK_S: Final = 1.0
"""How often idle connections, names and the key file are looked at."""
PORT_TRIES: Final = 16
"""For port 0: the port that TCP gets may be taken for UDP."""
DELTAS_PER_FLUSH: Final = 16
"""2,496 changes at a time: ten times the most that prefills give a node in a flush of 200 ms. The rest waits."""
OWN_SLOT: Final = 0

log = logging.getLogger("p2pkv.gossip")

_MET, _RENEWED, _SHOWN, _HIDDEN, _LEFT, _PURGED, _CARD, _RENEW, _INFO, _WARNING, _ERROR = range(11)
_LEVELS: Final = {_INFO: logging.INFO, _WARNING: logging.WARNING, _ERROR: logging.ERROR}
_STATES: Final = {0: State.UNREACHABLE, 1: State.ALIVE, 2: State.LEFT}


class PeerNetwork:
    """This node's place in the cell.

    Args:
        settings: the configuration's ``peer`` section.
        cell: name of the cell; nodes of others are refused.
        card: how this node introduces itself. Address and instance are filled in by :meth:`start`.
        log: the node's own ownership log. Record changes with the same clock as ``clock``; they are sent within
            ``flush_ms`` of becoming due.
        index: where other nodes' entries go, under slots that :meth:`node_slot` and :meth:`slot_node` translate.
        sources: where seeds come from; None = what the settings say.
        renew: gives, and keeps, an epoch after the one it is given, when others know a later life of this node; None =
            the next number.
    """

    def __init__(
        self,
        *,
        settings: PeerSettings,
        cell: str,
        card: Card,
        log: OwnershipLog,
        index: PrefixIndex,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
        sources: Iterable[Discovery] | None = None,
        renew: Callable[[int], int] | None = None,
    ) -> None:
        self.on_data_connection: Callable[[socket.socket, Hello, bytes], None] | None = None
        """Gets every data connection: a non-blocking socket that is its own from then on, the HELLO that came on it,
        and bytes that were read behind HELLO (none, as the driver reads no further)."""
        self.on_peer_change: Callable[[PeerView], None] | None = None
        """Called when a peer's state, card or conflicts change, not when its log does."""
        self.load_bytes: Callable[[], int] = lambda: 0
        """What this node is giving to others now, for them to hear."""
        self.counters: Counter[str] = Counter()
        self._settings = settings
        self._cell = cell
        self._card = card
        self._card_number = 1
        self._log = log
        self._index = index
        self._clock = clock
        self._rng = rng or random.SystemRandom()
        self._sources = list(sources) if sources is not None else None
        self._source_numbers: dict[str, int] = {}
        self._renew = renew
        self._keys: KeyFile | None = None
        self._core: Gossip | None = None
        self._datagrams: Datagrams
        self._control: Control
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._requests = Requests(self._spawn, self.counters)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = float("inf")
        self._slow_at = 0.0
        self._acting = False
        self._leaving = False
        self._stopping = False
        self._cards: dict[int, tuple[int, int, Card]] = {}  # by node: instance, number
        self._conflicts: dict[int, tuple[str, ...]] = {}

    # --- life

    async def start(self) -> None:
        """Bind, listen, and begin to look for others. Returns when peers can connect.

        Raises:
            ConfigError: the port is in use, the host is not an address of this machine, the key file is not good, or a
                seed is malformed.
        """
        settings = self._settings
        ring = keyring.public()
        if settings.keys:
            self._keys = KeyFile(settings.keys)
            ring = self._keys.keyring
        tls = Tls.from_settings(settings)
        listener, udp = await self._bind()
        self._port = int(listener.getsockname()[1])
        host, port = settings.host, self._port
        if settings.advertise:
            head, _, tail = settings.advertise.rpartition(":")
            with_port = head and tail.isdigit() and not (":" in head and not head.startswith("["))
            if with_port:
                host, port = parse_address(settings.advertise, key="peer.advertise")
            else:
                host = settings.advertise.removeprefix("[").removesuffix("]")
        instance = self._card.instance or self._rng.getrandbits(63) | 1
        self._card = card = msgspec.structs.replace(self._card, address=Address(host, port), instance=instance)
        now = self._clock()
        sealer = Sealer(ring, self._cell, self.life)
        opener = Opener(ring, self._cell, now)
        self._core = Gossip(
            {
                "flush_s": settings.flush_ms / 1e3,
                "heartbeat_s": settings.heartbeat_ms / 1e3,
                "silence_s": settings.silence_ms / 1e3,
                "frames_per_s": settings.frames_per_s,
                "purge_s": settings.purge_s,
                "members_max": settings.members_max,
                "protocol_max": settings.protocol_max,
            },
            card.node, card.epoch, instance, at(card.address), self._index.entries, self._log.entries,
            self._rng.getrandbits(64), now,
        )  # fmt: skip
        self._control = Control(
            settings=settings, cell=self._cell, local=self, sealer=sealer, opener=opener, clock=self._clock,
            requests=self._requests, on_letter=self._take_letter, on_lost=self._connection_lost,
            on_data=self._take_data, counters=self.counters, tls=tls,
        )  # fmt: skip
        self._datagrams = Datagrams(
            udp, sealer=sealer, opener=opener, clock=self._clock, take=self._take_frame, taken=self._act,
            counters=self.counters,
        )  # fmt: skip
        self._control.listen(listener)
        self._core.set_card(now, self._card_number, pack(card))
        self._act()
        try:
            if self._sources is None:
                self._sources = from_settings(settings, cell=self._cell, card=card)
            for source in self._sources:
                await source.start(self._on_seeds)
        except BaseException:
            await self.stop(0.0)
            raise

    async def _bind(self) -> tuple[socket.socket, socket.socket]:
        settings = self._settings
        for attempt in range(PORT_TRIES):
            listener = await net.listen(settings.host, settings.port)
            try:
                return listener, datagrams.bind(listener)
            except OSError as error:
                listener.close()
                if settings.port == 0 and attempt < PORT_TRIES - 1:
                    continue
                hint = "Another agent runs here? Choose another peer.port, or 0 for any free one."
                raise ConfigError(
                    "the peer port is taken for UDP", hint=hint, host=settings.host, port=settings.port,
                    reason=error.strerror,
                ) from error  # fmt: skip
        raise AssertionError("unreachable")

    def leave(self) -> None:
        """Say goodbye to everybody: they drop this node's entries at once. Its connections stay until :meth:`stop`, so
        that readers can finish and release what they read; new connections are refused. Idempotent."""
        if self._core is not None and not self._leaving:
            self._leaving = True
            self._core.leave(self._clock())
            self._act()

    async def stop(self, deadline_s: float = 1.0) -> None:
        """Say goodbye to everybody (if :meth:`leave` has not) and close everything. Idempotent.

        Takes at most about ``deadline_s``.
        """
        if self._stopping:
            return
        self.leave()
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        for source in self._sources or ():
            await source.stop()
        if self._core is None:
            return
        for _ in range(2):  # a goodbye may be lost; those that the timer has sent already do no harm
            self._core.on_timer(self._core.next_timer)
            self._act()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._control.stop(deadline_s)
        self._datagrams.close()

    @property
    def port(self) -> int:
        """The port that is listened on, for TCP and UDP."""
        if not self._port:
            raise LocalProtocolError("the peer network has not been started")
        return self._port

    # --- what others ask for

    @property
    def card(self) -> Card:
        """How this node introduces itself, with the address as bound."""
        return self._card

    @property
    def life(self) -> Life:
        """This run of this node."""
        return Life(self._card.node, self._card.epoch, self._card.instance)

    @property
    def leaving(self) -> bool:
        """Whether it has said goodbye."""
        return self._leaving

    def set_card(self, card: Card) -> None:
        """Replace layouts, transports or the HTTP address and tell everybody. Identity and address stay as they are."""
        own = self._card
        card = msgspec.structs.replace(card, node=own.node, epoch=own.epoch, address=own.address, instance=own.instance)
        if card == own:
            return
        self._card = card
        if self._core is None:
            return
        self._card_number += 1
        self._core.set_card(self._clock(), self._card_number, pack(card))
        for node in list(self._cards):
            self._check_layouts(node)
        self._act()

    def peers(self) -> list[PeerView]:
        """Every other member that is known, in no particular order."""
        if self._core is None:
            return []
        now = self._clock()
        return [self._view(member, now) for member in self._core.members()]

    def peer(self, node_id: int) -> PeerView | None:
        """One member."""
        member = self._core.member(node_id) if self._core is not None else None
        return self._view(member, self._clock()) if member is not None else None

    def load_of(self, node_id: int) -> int:
        """Bytes that a node was giving to others when it was last heard, in whole MiB; 0 too if that is not known."""
        return self._core.load_of(node_id, self._clock()) << 20 if self._core is not None else 0

    def link(self, node_id: int) -> PeerLink | None:
        """Our control connection to a node, for requests; None while there is none: see :meth:`reach`."""
        return self._control.link(node_id) if self._core is not None else None

    async def reach(self, node_id: int, deadline_s: float) -> PeerLink:
        """Our control connection to a node, opened if need be.

        Raises:
            PeerUnavailable: unknown, refused, unreachable, or not there within ``deadline_s``.
        """
        member = self._core.member(node_id) if self._core is not None else None
        if member is None:
            raise PeerUnavailable("no such peer", node=NodeId(node_id))
        return await self._control.reach(node_id, member[7], deadline_s)

    def node_slot(self, node_id: int) -> int | None:
        """The index slot of a node; the local node's is 0."""
        if node_id == self._card.node:
            return OWN_SLOT
        return (self._core.slot_of(node_id) or None) if self._core is not None else None

    def slot_node(self, slot: int) -> NodeId | None:
        """Which node an index slot stands for; it goes to another one only after the index has forgotten the first."""
        if slot == OWN_SLOT:
            return NodeId(self._card.node)
        node = self._core.node_at(slot) if self._core is not None else 0
        return NodeId(node) if node else None

    def on(self, message_type: type[msgspec.Struct], handler: Handler) -> None:
        """Answer readers' requests of a type (PIN, RELEASE, NIXL_CONNECT).

        ``handler(link, message)`` gives the answer, or a coroutine of it, or None for no answer. A P2PKVError that it
        raises is the reader's answer too. ``link`` lives as long as the reader's connection.
        """
        self._requests.handlers[message_type] = handler

    async def open_data(self, node_id: int, deadline_s: float) -> socket.socket:
        """A data connection to a node: introduced, non-blocking, TCP_NODELAY; the caller owns the socket.

        Raises:
            PeerUnavailable: unknown, unreachable, refused, or not done within ``deadline_s``.
        """
        view = self.peer(node_id)
        if view is None:
            raise PeerUnavailable("no such peer", node=NodeId(node_id))
        return await self._control.open_data(node_id, view.address, deadline_s)

    def stats(self) -> dict[str, int]:
        """Counters since the start, and a few sizes, by name."""
        core = self._core
        counts = Counter(core.counts) if core is not None else Counter[str]()
        return {
            **(counts + self.counters),  # both count what is malformed
            "peers": len(core.members()) if core is not None else 0,
            "peers_alive": core.alive if core is not None else 0,
            "connections": self._control.connections if core is not None else 0,
            "queued_bytes": self._control.queued_bytes if core is not None else 0,
        }

    # --- for the connections

    def life_of(self, node: int) -> Life | None:
        """The life of a member that has not left."""
        member = self._core.member(node) if self._core is not None else None
        return Life(*member[:3]) if member is not None else None

    def life_at(self, address: str) -> Life | None:
        """The life of the member that is reached there."""
        assert self._core is not None
        return next((Life(*member[:3]) for member in self._core.members() if member[7] == address), None)

    # --- events

    def _take_frame(self, life: Life, source: str, payload: bytes) -> None:
        assert self._core is not None
        self._core.on_frame(self._clock(), *life, source, payload)

    def _take_letter(self, life: Life, payload: bytes) -> None:
        assert self._core is not None
        self._core.on_letter(self._clock(), *life, payload)
        self._act()

    def _take_data(self, sock: socket.socket, hello: Hello) -> None:
        if self.on_data_connection is not None:
            self.on_data_connection(sock, hello, b"")
        else:
            sock.close()

    def _connection_lost(self, node: int) -> None:
        assert self._core is not None
        self._core.on_lost(self._clock(), node)
        self._act()

    def _on_seeds(self, source: str, addresses: Iterable[Address]) -> None:
        if self._core is None or self._stopping:
            return
        number = self._source_numbers.setdefault(source, len(self._source_numbers))
        self._core.on_seeds(self._clock(), number, [at(address) for address in addresses])
        self._act()

    def _on_timer(self) -> None:
        assert self._core is not None
        self._timer_at = float("inf")
        now = self._clock()
        self._core.set_load(self.load_bytes() >> 20)
        if self._core.flush_due(now) and not self._leaving:
            for delta in self._log.poll(now, deltas_max=DELTAS_PER_FLUSH):
                self._core.publish(delta.seq, delta.checksum, delta.keys_by_tier)
        self._core.on_timer(now)
        if now >= self._slow_at:
            self._slow_at = now + SLOW_TICK_S
            self._control.tick()
            self._datagrams.refresh()
            if self._keys is not None and (ring := self._keys.changed()) is not None:
                self._datagrams.rekey(ring)
        self._act()

    # --- effects

    def _act(self) -> None:
        """Do what the core asks for, and come back when it wants to be called."""
        core = self._core
        if core is None or self._acting:
            return
        self._acting = True
        try:
            while core.pending:
                frames, letters, events = core.take()
                for payload, addresses in frames:
                    self._datagrams.send(payload, addresses)
                for payload, address in letters:
                    self._control.letter(address, payload)
                for event in events:
                    self._event(*event)
        finally:
            self._acting = False
            self._arm(core)

    def _arm(self, core: Gossip) -> None:
        due = core.next_timer
        if due < self._timer_at and not self._stopping:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = due
            delay = max(0.0, due - self._clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _event(self, kind: int, node: int, slot: int, number: int, text: str) -> None:
        if kind in _LEVELS:
            log.log(_LEVELS[kind], "%s", text)
            return
        if kind == _RENEW:
            self._begin_again(number)
            return
        assert self._core is not None
        name = NodeId(node)
        match kind:
            case _ if kind == _MET:
                member = self._core.member(node)
                log.info("met %s epoch %d at %s", name, number, member[7] if member is not None else "?")
            case _ if kind == _RENEWED:
                log.info("%s is back as epoch %d", name, number)
                self._control.forget(node)
            case _ if kind == _SHOWN:
                log.info("%s is current: %d entries shown", name, self._index.count(slot))
            case _ if kind == _HIDDEN:
                level = logging.INFO if text in ("left", "forgotten") else logging.WARNING
                log.log(level, "entries of %s hidden: %s", name, text)
            case _ if kind == _LEFT:
                log.info("%s has left", name)
            case _ if kind == _PURGED:
                log.info("%s is forgotten: not current for %g s", name, self._settings.purge_s)
                self._cards.pop(node, None)
                self._conflicts.pop(node, None)
            case _ if kind == _CARD:
                self._check_layouts(node)
        self._changed(node)

    def _changed(self, node: int) -> None:
        view = self.peer(node)
        if view is None:
            return
        link = self.link(node)
        if link is not None:
            link.card = view.card
        if self.on_peer_change is not None:
            try:
                self.on_peer_change(view)
            except Exception:
                log.exception("on_peer_change failed")

    def _begin_again(self, beyond: int) -> None:
        """Others know a later life of this node: begin one after it, with all that is in the log."""
        assert self._core is not None
        try:
            epoch = self._renew(beyond) if self._renew is not None else beyond + 1
        except P2PKVError as error:
            log.error("this node stays out of the cell: others know a later life of it, and %s", error)
            return
        instance = self._rng.getrandbits(63) | 1
        self._card = msgspec.structs.replace(self._card, epoch=epoch, instance=instance)
        self._log.restart(epoch)
        self._datagrams.sealer.begin(self.life)
        now = self._clock()
        self._core.restart(now, epoch, instance)
        self._card_number += 1
        self._core.set_card(now, self._card_number, pack(self._card))

    # --- views

    def _view(self, member: MemberTuple, now: float) -> PeerView:
        (node, epoch, instance, slot, state, _, heard, address, packed, seq, proven, _, _, number, rtt_s) = member
        card = self._card_of(node, epoch, instance, address, packed, number)
        kernel = self._control.rtt_ms(node)
        return PeerView(
            node=NodeId(node), epoch=epoch, address=card.address, state=_STATES[state], age_ms=(now - heard) * 1e3,
            seq=seq, entries=self._index.count(slot), card=card,
            rtt_ms=kernel if kernel is not None else rtt_s * 1e3 if rtt_s >= 0 else None,
            conflicts=self._conflicts.get(node, ()), slot=slot,
            proven_ms=(now - proven) * 1e3 if proven > float("-inf") else None,
        )  # fmt: skip

    def _card_of(self, node: int, epoch: int, instance: int, address: str, packed: bytes, number: int) -> Card:
        """A member's card with the address at which it is reached; a bare one until it is there."""
        known = self._cards.get(node)
        if known is not None and known[:2] == (instance, number):
            return known[2]
        where = parse(address)
        bare = Card(node, epoch, where, "", "", [], [], instance)
        if not packed:
            return bare
        try:
            card = msgspec.structs.replace(
                unpack_card(packed), node=node, epoch=epoch, address=where, instance=instance
            )
        except RemoteProtocolError as error:
            self.counters["malformed"] += 1
            log.warning("the card of %s is malformed: %s", NodeId(node), error)
            card = bare
        self._cards[node] = instance, number, card
        return card

    def _check_layouts(self, node: int) -> None:
        """Find the fields in which a peer's layouts conflict with ours; loud once per change."""
        view = self.peer(node)
        if view is None:
            return
        conflicts, lines = layout_conflicts(self._card.layouts, view.card.layouts)
        if conflicts == self._conflicts.get(node, ()):
            return
        self._conflicts[node] = conflicts
        for line in lines:
            self.counters["layout_conflicts"] += 1
            log.error("layout conflict with %s at %s: %s", view.node, at(view.address), line)
        self._changed(node)

    def _spawn(self, coroutine: Awaitable[None], name: str) -> None:
        task = asyncio.ensure_future(coroutine)
        assert isinstance(task, asyncio.Task)
        task.set_name(name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
