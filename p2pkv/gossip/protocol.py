"""Who is there, and who holds what: the rules, without a socket.

Sans-IO: events in (``on_...`` methods, each with ``now`` in seconds of a monotonic clock), effects out
(:mod:`.effects`). No clock, thread, asyncio or I/O; randomness comes from the ``rng`` it is given. The driver
(:mod:`.driver`) and the simulator run this very code. Not thread-safe.

Rules

 1. Everybody reads everybody: a node dials every member it learns of, and the dialed node (the *owner*) streams its
    own ownership log on that connection: WELCOME, a checkpoint, then deltas in order; an empty delta is its heartbeat.
 2. Only a node's own words about itself are believed. WELCOME and DIGEST name other members' addresses: reasons to
    dial, never a reason to think anybody alive or dead.
 3. A node is ALIVE while its stream is current: heard within ``silence_ms``, and the set that was built from it has
    the owner's checksum. Whenever it is not ALIVE its entries are hidden: at once when the connection is lost or the
    checksum differs, else by the first timer after ``silence_ms``. They are shown when the stream is current again.
 4. Nothing current for ``purge_s``: its entries and its row are dropped. LEAVE drops the entries at once; the
    connections are the leaving node's to close, as it may still hold blocks for its readers.
 5. A life of a node is (epoch, instance). A newer epoch voids the older life's entries and connections. An older epoch
    is refused ("stale"). The same epoch from another instance is refused while the first is alive ("duplicate").
    A life that has left does not come back.
 6. A node that reaches itself ("self") forgets that address. Another cell is refused ("cell"), loudly.
 7. The first frame of an accepted connection is HELLO, within ``handshake_ms``; that of a dialed one is WELCOME or
    ERROR, likewise. Every other frame must be lawful for the connection's phase (:data:`~p2pkv.gossip.phases.LAWFUL`).
    Whatever is not: ERROR "protocol", and the connection is closed.
 8. Wrong checksum or a gap: RESYNC, at most one a second; the owner answers with a checkpoint. A stream that is wrong
    three times in a row is closed and left alone for a while.
 9. After a stall of its own (a timer more than a second late) a node judges nobody silent until it has had
    time to read what is waiting in its sockets.
10. Everything is bounded: rows, targets, unintroduced connections, connections per reader, dials at a time, replies
    to RESYNC; the driver bounds the send queues and reports a reader that falls behind with :meth:`on_closed`.

What a frame says is kept apart from the connection it came on (:meth:`_hear`), so that streams can move to datagrams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import msgspec

from p2pkv.config import Peer as PeerSettings
from p2pkv.errors import RemoteProtocolError
from p2pkv.gossip.dialing import BACKOFF_FIRST_S, BACKOFF_MAX_S, REFUSED_BACKOFF_S, DialBook
from p2pkv.gossip.effects import Changed, Close, Deliver, Dial, Effect, Established, HandOver
from p2pkv.gossip.membership import MemberTable, Row, State, Verdict, observed
from p2pkv.gossip.outbox import Outbox
from p2pkv.gossip.phases import LAWFUL, Conn, Phase
from p2pkv.gossip.roster import Roster
from p2pkv.gossip.streams import Feed, Heard
from p2pkv.gossip.views import PeerView, at
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import Index
from p2pkv.types import NodeId
from p2pkv.wire.frame import PROTOCOL_MAX, PROTOCOL_MIN, Frame
from p2pkv.wire.peer import (
    CODEC,
    MEMBERS_MAX,
    Address,
    Advert,
    Card,
    Delta,
    Digest,
    Hello,
    Leave,
    Member,
    PeerError,
    Resync,
    Snapshot,
    Welcome,
)

if TYPE_CHECKING:
    import random

UNINTRODUCED_MAX: Final = 64
"""Accepted connections that have not said HELLO yet; each may make us buffer one HELLO."""
READER_CONNS_MAX: Final = 2
"""Control connections from one reader: the one in use, and one that replaces it before its loss is known here."""
RESYNC_MIN_S: Final = 1.0
RESYNCS_MAX: Final = 3
DIGEST_S: Final = 2.0
STALL_S: Final = 1.0
GRACE_S: Final = 1.0
"""After a stall: a loaded loop reads everything that waits in a thousand sockets in less."""


PATIENT_CODES: Final = frozenset({"cell", "stale", "duplicate", "busy"})
"""Refusals that trying again at once cannot change."""


class PeerProtocol:
    """The state of one node. See the module's rules.

    Args:
        settings: timings and bounds.
        card: how this node introduces itself, with the address as bound and an ``instance`` drawn for this run.
        log: this node's own ownership log; read here, written by the store.
        index: gets other nodes' entries, under slots 1..``members_max``; slot 0
            (:data:`~p2pkv.gossip.membership.OWN_SLOT`) is the local node's own.

    Raises:
        InvalidArgument: the index has fewer slots than that.
    """

    def __init__(
        self,
        *,
        settings: PeerSettings,
        cell: str,
        card: Card,
        log: OwnershipLog,
        index: Index,
        rng: random.Random,
        now: float,
    ) -> None:
        index.count(settings.members_max)  # an index with too few slots fails here, not when the cell is large
        self.counters: Counter[str] = Counter()
        self.table = MemberTable(card, settings.members_max)
        self.conns: dict[int, Conn] = {}
        self._cell = cell
        self._rng = rng
        self._feed = Feed(log)
        self._out = Outbox()
        self._roster = Roster(self.table, index, self._out, self.counters)
        self._dials = DialBook(targets_max=2 * settings.members_max + 64, purge_s=settings.purge_s, rng=rng)
        self._readers: dict[int, None] = {}  # connections that our stream goes to
        self._heartbeat_s = settings.heartbeat_ms / 1e3
        self._silence_s = settings.silence_ms / 1e3
        self._handshake_s = settings.handshake_ms / 1e3
        self._flush_s = settings.flush_ms / 1e3
        self._purge_s = settings.purge_s
        self._next_conn = 1
        self._unintroduced = 0
        self._due = now + rng.uniform(0.0, self._flush_s)  # phases of a cell's senders are spread: no incast
        self._beat_at = now
        self._digest_at = now + DIGEST_S
        self._judge_from = now
        self._leaving = False

    # --- what others may ask

    @property
    def card(self) -> Card:
        """How this node introduces itself."""
        return self.table.own

    @property
    def next_timer(self) -> float:
        """When :meth:`on_timer` wants to be called."""
        return self._due

    def peers(self, now: float) -> list[PeerView]:
        """What is known of every other member."""
        return [self._roster.view(now, row) for row in self.table.rows.values()]

    def peer(self, now: float, node: int) -> PeerView | None:
        """What is known of one member."""
        row = self.table.get(node)
        return self._roster.view(now, row) if row else None

    def owner_conn(self, node: int) -> int | None:
        """The connection on which we read a node's stream and ask it things."""
        row = self.table.get(node)
        return row.owner_conn if row else None

    def take_conn(self) -> int:
        """A new connection id, for an accepted connection."""
        self._next_conn += 1
        return self._next_conn

    # --- events

    def on_seeds(self, now: float, source: str, addresses: Iterable[Address]) -> list[Effect]:
        """A discovery source names these addresses, and no others any more."""
        self._dials.seed(now, source, addresses)
        self._dial(now)
        return self._out.take()

    def on_accepted(self, now: float, conn: int, host: str) -> list[Effect]:
        """A connection was accepted; ``host`` is the other end's address."""
        if self._unintroduced >= UNINTRODUCED_MAX:
            self.counters["unintroduced_refused"] += 1
            self._out.put(Close(conn, "too many connections that have not said HELLO"))
        else:
            self.conns[conn] = Conn(conn, Phase.WAITING, now, host)
            self._unintroduced += 1
        return self._out.take()

    def on_dialed(self, now: float, conn: int, host: str) -> list[Effect]:
        """A dialed connection is open."""
        if c := self.conns.get(conn):
            c.phase, c.since, c.host = Phase.GREETING, now, host
            hello = Hello(PROTOCOL_MIN, PROTOCOL_MAX, self._cell, "control", self.card)
            self._out.send(c.id, hello)
        return self._out.take()

    def on_closed(self, now: float, conn: int, reason: str) -> list[Effect]:
        """A connection is gone, or could not be opened. Nothing may be sent on it any more."""
        if c := self.conns.get(conn):
            if c.phase is Phase.DIALING:
                self.counters["dial_failures"] += 1
            self._lost(now, c, reason)
        return self._out.take()

    def on_malformed(self, now: float, conn: int, error: RemoteProtocolError) -> list[Effect]:
        """Bytes came that are no frame, or (from the driver's links) an answer to nothing."""
        if c := self.conns.get(conn):
            self._violation(now, c, error)
        return self._out.take()

    def on_frame(self, now: float, conn: int, frame: Frame) -> list[Effect]:
        """A whole frame came."""
        if c := self.conns.get(conn):
            try:
                if frame.type not in LAWFUL[c.phase]:
                    raise RemoteProtocolError("frame out of place", type=frame.type, phase=c.phase.value)
                self._on_message(now, c, frame, CODEC.decode(frame))
            except RemoteProtocolError as error:
                self._violation(now, c, error)
        return self._out.take()

    def on_timer(self, now: float) -> list[Effect]:
        """Flush, heartbeat, judge silence, dial, purge. Call it at :attr:`next_timer`; late is noticed (rule 9)."""
        if now - self._due > STALL_S:
            self.counters["stalls"] += 1
            self._out.say("warning", f"this process stood still for {now - self._due:.1f} s: judging nobody silent yet")
            self._judge_from = now + GRACE_S
        self._due = max(self._due + self._flush_s, now + self._flush_s / 2)
        self._flush(now)
        if now - self._beat_at >= self._heartbeat_s:
            self._beat_at = now
            self._out.send_all(tuple(self._readers), self._feed.heartbeat())
        if now >= self._digest_at:
            self._digest_at = now + DIGEST_S * self._rng.uniform(0.75, 1.25)
            if self._readers and not self._leaving:
                self._out.send(self._rng.choice(list(self._readers)), Digest(self._members()))
        if now >= self._judge_from:
            self._check_deadlines(now)
            self._judge_silence(now)
        for row in self._roster.purge(now, self._purge_s):
            self._dials.drop(row.node, row.card.address)
        self._dial(now)
        return self._out.take()

    def set_card(self, now: float, card: Card) -> list[Effect]:
        """This node's own card has changed (never its node, epoch or instance): tell everybody."""
        own = self.card
        assert (card.node, card.epoch, card.instance) == (own.node, own.epoch, own.instance)
        self.table.own = card
        self._out.send_all(self._established(), CODEC.encode(Advert(card)))
        for row in self.table.rows.values():
            self._roster.check_layouts(row)
        return self._out.take()

    def leave(self, now: float) -> list[Effect]:
        """Say goodbye to everybody. Connections stay, so that what is held for readers can be released; newcomers are
        refused, nobody is dialed, and the own log is not streamed any more."""
        if not self._leaving:
            self._leaving = True
            self._out.send_all(self._established(), CODEC.encode(Leave(self.card.epoch)))
            self._readers.clear()
        return self._out.take()

    def close(self, now: float) -> list[Effect]:
        """Say goodbye if that has not been done, and close everything. The last call."""
        effects = self.leave(now)
        for conn in list(self.conns):
            del self.conns[conn]
            self._out.put(Close(conn, "leaving"))
        return effects + self._out.take()

    # --- frames

    def _on_message(self, now: float, c: Conn, frame: Frame, message: msgspec.Struct) -> None:
        match message:
            case Hello():
                self._on_hello(now, c, message)
            case Welcome():
                self._on_welcome(now, c, message)
            case PeerError() if frame.request_id == 0:
                self._on_refused(now, c, message)
            case Delta() | Snapshot():
                self._hear(now, c, message)
            case Digest():
                self._heard(now, c)
                self._learn(now, message.members)
            case Advert():
                self._on_advert(now, c, message.card)
            case Leave():
                self._on_leave(now, c, message)
            case Resync():
                self._on_resync(now, c)
            case _:
                self._heard(now, c)
                self._out.put(Deliver(c.id, frame, message))

    def _on_hello(self, now: float, c: Conn, hello: Hello) -> None:
        card = observed(hello.card, c.host)
        if not max(hello.protocol_min, PROTOCOL_MIN) <= min(hello.protocol_max, PROTOCOL_MAX):
            text = f"speaks {hello.protocol_min}..{hello.protocol_max}, not {PROTOCOL_MIN}..{PROTOCOL_MAX}"
            return self._refuse(now, c, "protocol", text, card)
        if hello.cell != self._cell:
            return self._refuse(now, c, "cell", f"is of cell {hello.cell!r}, this is cell {self._cell!r}", card)
        if hello.role not in ("control", "data"):
            raise RemoteProtocolError("unknown role in HELLO", role=hello.role[:32])
        if self._leaving:
            return self._refuse(now, c, "draining", "this node is leaving", card)
        verdict = self._roster.judge(card)
        if not verdict.welcome:
            return self._refuse(now, c, *self._roster.refusal(verdict, card), card)
        welcome = Welcome(min(hello.protocol_max, PROTOCOL_MAX), self.card, [], self._cell)
        if hello.role == "data":
            self._forget(c)
            self._out.send(c.id, welcome)
            self._out.put(HandOver(c.id, hello))
            return None
        row = self._introduce(now, verdict, card)
        self._unintroduced -= 1
        c.phase, c.since, c.node = Phase.SERVING, now, row.node
        while len(row.reader_conns) >= READER_CONNS_MAX:
            self._drop(now, self.conns[row.reader_conns[0]], "the reader has connected anew")
        self._flush(now)  # so that the checkpoint and the deltas that follow meet
        row.reader_conns += (c.id,)
        self._readers[c.id] = None
        self._out.send(c.id, msgspec.structs.replace(welcome, members=self._members()))
        for frame in self._feed.catch_up():
            self._out.send_all((c.id,), frame)
        self._out.put(Established(c.id, card, dialed=False))
        self._out.put(Changed(row.node))
        if row.owner_conn is None:
            self._dials.learn(now, card.address, urgent=True)
            self._dial(now)
        return None

    def _on_welcome(self, now: float, c: Conn, welcome: Welcome) -> None:
        card = observed(welcome.card, c.host)
        if not PROTOCOL_MIN <= welcome.protocol <= PROTOCOL_MAX:
            raise RemoteProtocolError("WELCOME chose a protocol that was not offered", protocol=welcome.protocol)
        if welcome.cell not in ("", self._cell):
            return self._refuse(now, c, "cell", f"is of cell {welcome.cell!r}, this is cell {self._cell!r}", card)
        verdict = self._roster.judge(card)
        if not verdict.welcome:
            return self._refuse(now, c, *self._roster.refusal(verdict, card), card)
        row = self._introduce(now, verdict, card)
        self._dials.answered(now, c.id, row.node)
        if (old := row.owner_conn) is not None:
            if now - (row.last_heard or 0.0) <= self._silence_s:
                # Two addresses of one node. Nothing is wrong with the first connection.
                del self.conns[c.id]
                self._out.put(Close(c.id, "already connected"))
                return None
            self._drop(now, self.conns[old], "replaced by a newer connection")
        c.phase, c.node = Phase.READING, row.node
        row.owner_conn, row.last_heard, row.rtt_s = c.id, now, now - c.since
        c.since = now
        self._roster.open_stream(now, row)
        self._out.put(Established(c.id, card, dialed=True))
        self._out.put(Changed(row.node))
        self._learn(now, welcome.members)
        return None

    def _on_refused(self, now: float, c: Conn, error: PeerError) -> None:
        self.counters[f"refused_by_peer_{error.code}" if error.code in PATIENT_CODES else "refused_by_peer"] += 1
        if error.code == "self" and c.phase is Phase.GREETING:
            address = self._dials.own(now, c.id)
            self._out.say("info", f"{at(address)} is this node itself: not dialed again")
            self._drop(now, c, "self")
            return
        loud = "error" if error.code in ("stale", "duplicate") else "warning"
        if self._leaving:
            loud = "info"  # our goodbye was faster than our HELLO
        hint = " Another process has this node's identity: give each its own state_dir." if loud == "error" else ""
        text = f"refused by {c.host}: {error.code}: {error.message}.{hint}"
        self._out.say_once(now, loud, (error.code, c.host), text)
        wait = REFUSED_BACKOFF_S if error.code in PATIENT_CODES else BACKOFF_MAX_S
        self._drop(now, c, f"refused: {error.code}", wait_s=wait)

    def _hear(self, now: float, c: Conn, message: Delta | Snapshot) -> None:
        """A part of an owner's stream. Its row and the message decide; ``c`` is only where RESYNC goes."""
        row = self._row(c)
        if message.epoch != row.card.epoch:
            raise RemoteProtocolError("stream of another epoch", epoch=message.epoch, expected=row.card.epoch)
        self._heard(now, c)
        if row.state is State.LEFT:
            return
        match self._roster.stream(row).hear(message, now):
            case Heard.CURRENT:
                c.resyncs = 0
                self._roster.show(now, row)
            case Heard.OPEN:
                self._repair(now, c)
            case Heard.DIVERGED:
                self.counters["diverged"] += 1
                self._roster.hide(now, row, "its set does not have the checksum it says")
                self._repair(now, c)
            case Heard.OVERFLOW:
                self.counters["overflow"] += 1
                self._roster.hide(now, row, "it has more entries than the index may hold")
                self._drop(now, c, "too many entries", wait_s=REFUSED_BACKOFF_S)

    def _repair(self, now: float, c: Conn) -> None:
        """Rule 8: ask for a checkpoint if one is due."""
        if now - max(c.resync_at, c.since) < RESYNC_MIN_S:  # the first one comes unasked
            return
        row = self._row(c)
        if (resync := self._roster.stream(row).wanted(now)) is None:
            return
        c.resync_at = now
        c.resyncs += 1
        if c.resyncs > RESYNCS_MAX:
            self._out.say("error", f"stream of {row.node} stays wrong ({resync.reason}): left alone for a while")
            self._drop(now, c, "stream stays wrong", wait_s=REFUSED_BACKOFF_S)
        else:
            self.counters["resyncs"] += 1
            self._out.send(c.id, resync)

    def _on_resync(self, now: float, c: Conn) -> None:
        if now - c.resync_at < RESYNC_MIN_S / 2:
            self.counters["resyncs_ignored"] += 1  # no reader of this build asks so often; it may ask again
            return
        c.resync_at = now
        self.counters["resyncs_served"] += 1
        self._flush(now)
        for frame in self._feed.catch_up():
            self._out.send_all((c.id,), frame)

    def _on_advert(self, now: float, c: Conn, card: Card) -> None:
        row = self._row(c)
        card = observed(card, c.host)
        if (card.node, card.epoch, card.instance) != (row.card.node, row.card.epoch, row.card.instance):
            raise RemoteProtocolError("ADVERT of another node or life")
        self._heard(now, c)
        self._roster.update(row, card)

    def _on_leave(self, now: float, c: Conn, message: Leave) -> None:
        row = self._row(c)
        if message.epoch != row.card.epoch:
            raise RemoteProtocolError("LEAVE of another epoch", epoch=message.epoch, expected=row.card.epoch)
        self.counters["left"] += 1
        self._out.say("info", f"{row.node} has left")
        self._roster.void(now, row, State.LEFT, "left")
        self._dials.drop(row.node, row.card.address)

    # --- rows

    def _introduce(self, now: float, verdict: Verdict, card: Card) -> Row:
        """The row of a node that may stay."""
        row = self.table.get(card.node)
        if row is None:
            return self._roster.add(now, card)
        if verdict is Verdict.RENEWED:
            if row.state is State.ALIVE and row.card.address != card.address:
                self.counters["taken_over"] += 1
                old, new = f"epoch {row.card.epoch} at {at(row.card.address)}", f"{card.epoch} at {at(card.address)}"
                text = f"{row.node}: {old} is alive, and {new} has come: is one identity used twice? The newer counts"
                self._out.say("error", text)
            self._close_all(now, row, "restarted")
            self._roster.renew(now, row, card)
        else:
            self._roster.update(row, card)
        return row

    def _close_all(self, now: float, row: Row, reason: str) -> None:
        for conn in (*row.reader_conns, row.owner_conn):
            if conn is not None and conn in self.conns:
                self._drop(now, self.conns[conn], reason)

    def _learn(self, now: float, members: list[Member]) -> None:
        for member in members:
            if member.node == self.card.node or self.table.left(member.node, member.epoch):
                continue
            row = self.table.get(member.node)
            if row is None or (row.owner_conn is None and row.card.epoch <= member.epoch):
                self._dials.learn(now, member.address)
        self._dial(now)

    def _members(self) -> list[Member]:
        return self.table.connected_members()[:MEMBERS_MAX]

    # --- time

    def _flush(self, now: float) -> None:
        for frame in self._feed.flush(now):
            self._beat_at = now
            self._out.send_all(tuple(self._readers), frame)

    def _check_deadlines(self, now: float) -> None:
        for c in list(self.conns.values()):
            if c.node is None and now - c.since > self._handshake_s:
                self.counters["handshake_timeouts"] += 1
                self._drop(now, c, "no introduction in time")
            elif c.phase is Phase.READING and self._row(c).state is not State.LEFT:
                self._repair(now, c)

    def _judge_silence(self, now: float) -> None:
        for row in self.table.rows.values():
            if row.owner_conn is None or row.last_heard is None:
                continue
            quiet = now - row.last_heard
            if quiet > self._silence_s:
                self._roster.hide(now, row, f"silent for {quiet:.1f} s")
            if quiet > 2 * self._silence_s:
                # A stopped process keeps its connection and is shown at its next word; a dead link needs a new one.
                self._drop(now, self.conns[row.owner_conn], "silent")

    def _dial(self, now: float) -> None:
        if self._leaving:
            return
        for target in self._dials.due(now, self._reading):
            conn = self.take_conn()
            self.conns[conn] = Conn(conn, Phase.DIALING, now, target.address.host)
            self._dials.dialing(target, conn)
            self.counters["dials"] += 1
            self._out.put(Dial(conn, target.address))

    def _reading(self, node: int) -> bool:
        row = self.table.get(node)
        return row is not None and row.owner_conn is not None

    # --- connections

    def _lost(self, now: float, c: Conn, reason: str, wait_s: float | None = None) -> None:
        """Forget a connection that is gone or about to be closed, with what hangs on it."""
        self._forget(c)
        if c.phase in (Phase.DIALING, Phase.GREETING):
            self._dials.failed(now, c.id, wait_s=wait_s)
        if c.node is None or (row := self.table.get(c.node)) is None:
            return
        if c.phase is Phase.SERVING:
            self._readers.pop(c.id, None)
            row.reader_conns = tuple(conn for conn in row.reader_conns if conn != c.id)
        elif row.owner_conn == c.id:
            row.owner_conn = None
            self._roster.hide(now, row, f"connection lost: {reason}")
            if row.state is State.LEFT:
                return
            if wait_s is None:
                self._dials.learn(now, row.card.address)  # it may have been reached by another name
            self._dials.lost(now, row.node, wait_s=wait_s or BACKOFF_FIRST_S)
        self._out.put(Changed(row.node))

    def _drop(self, now: float, c: Conn, reason: str, *, wait_s: float | None = None) -> None:
        self._lost(now, c, reason, wait_s)
        self._out.put(Close(c.id, reason))

    def _forget(self, c: Conn) -> None:
        del self.conns[c.id]
        if c.phase is Phase.WAITING:
            self._unintroduced -= 1

    def _violation(self, now: float, c: Conn, error: RemoteProtocolError) -> None:
        if c.id not in self.conns:
            return
        self.counters["malformed"] += 1
        who = f"{c.node} ({c.host})" if c.node is not None else c.host
        self._out.say_once(now, "warning", ("malformed", c.host), f"protocol error from {who}: {error}")
        self._out.send(c.id, PeerError("protocol", error.message[:1024]))
        self._drop(now, c, "protocol error", wait_s=BACKOFF_MAX_S)

    def _refuse(self, now: float, c: Conn, code: str, text: str, card: Card) -> None:
        self.counters[f"refused_{code}"] += 1
        if code == "self":
            if c.phase is Phase.GREETING:
                address = self._dials.own(now, c.id)
                self._out.say("info", f"{at(address)} is this node itself: not dialed again")
        else:
            level = "error" if code in ("cell", "duplicate") else "warning"
            who = f"{NodeId(card.node)} at {at(card.address)} (seen from {c.host})"
            self._out.say_once(now, level, (code, c.host), f"refused {who}: {code}: it {text}")
        self._out.send(c.id, PeerError(code, text[:1024]))
        self._drop(now, c, f"refused: {code}", wait_s=REFUSED_BACKOFF_S)

    def _heard(self, now: float, c: Conn) -> None:
        if c.phase is Phase.READING:
            self._row(c).last_heard = now

    def _row(self, c: Conn) -> Row:
        assert c.node is not None
        row = self.table.get(c.node)
        assert row is not None, "a row lives as long as its connections"
        return row

    def _established(self) -> tuple[int, ...]:
        return tuple(c.id for c in self.conns.values() if c.node is not None)
