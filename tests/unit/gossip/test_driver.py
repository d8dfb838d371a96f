"""The peer network on real sockets: three networks in one process, loopback, any free ports."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from p2pkv.config import Peer
from p2pkv.errors import Busy, ConfigError, DeadlineExceeded, LayoutMismatch, PeerUnavailable, RemoteProtocolError
from p2pkv.gossip import keyfile
from p2pkv.gossip.driver import PeerNetwork
from p2pkv.gossip.keyring import Key, Keyring, public
from p2pkv.gossip.requests import REQUESTS_MAX
from p2pkv.gossip.sealed import Life, Sealer
from p2pkv.gossip.tickets import hello_ticket
from p2pkv.gossip.views import State
from p2pkv.index.hashing import pack_keys, unpack_keys
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Tier
from p2pkv.wire.peer import CODEC, Address, Hello, Pin, Pinned, Release, Released
from tests.unit.gossip.certificates import Authority

DEADLINE_S = 10.0


class Node:
    """A network with what it is built from, and a way to wait for something to become true of it."""

    def __init__(self, card: Any, **settings: Any) -> None:
        fast = {"port": 0, "members_max": 63, "heartbeat_ms": 50, "flush_ms": 10, "silence_ms": 1_000}
        self.settings = Peer(**{**fast, **settings})
        self.log = OwnershipLog(card.epoch, hold_ms=0)
        self.index = PrefixIndex(max_nodes=64, max_entries=1 << 20)
        self.net = PeerNetwork(
            settings=self.settings,
            cell="test",
            card=card,
            log=self.log,
            index=self.index,
            rng=random.Random(card.node * 1_000 + card.epoch),
        )
        self.net.on_peer_change = lambda _: self.changed.set()
        self.changed = asyncio.Event()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.net.port}"

    @property
    def node(self) -> int:
        return self.net.card.node

    def put(self, keys: range) -> None:
        self.log.record(keys, Tier.DRAM, time.monotonic())

    def keys_of(self, other: Node) -> set[int]:
        """What is shown here of another's entries."""
        slot = self.net.node_slot(other.node)
        view = self.net.peer(other.node)
        if slot is None or view is None or not view.alive:
            return set()
        return {k for _, packed in self.index.snapshot(slot) for k in unpack_keys(packed)}

    async def until(self, what: Callable[[], bool], deadline_s: float = DEADLINE_S) -> float:
        """Wait for a condition, looked at after every frame and change; returns the seconds it took."""
        start = time.monotonic()
        async with asyncio.timeout(deadline_s):
            while not what():
                self.changed.clear()
                try:
                    async with asyncio.timeout(0.02):
                        await self.changed.wait()
                except TimeoutError:
                    pass
        return time.monotonic() - start

    def vanish(self) -> None:
        """As kill -9 would: every socket is reset, nothing is said."""
        net: Any = self.net
        net._stopping = net._control._stopping = True
        net._timer.cancel()
        for task in (*net._tasks, *net._control._lobby):
            task.cancel()
        asyncio.get_running_loop().remove_reader(net._control._listener)
        net._control._listener.close()
        for connection in list(net._control._conns):
            connection.abort("killed")
        net._datagrams.close()


@pytest.fixture
async def nodes(card: Any) -> AsyncIterator[Callable[..., Any]]:
    made: list[Node] = []

    async def make(node: int, *seeds: Node, epoch: int = 1, **settings: Any) -> Node:
        fields = settings.pop("card_fields", {})
        one = Node(card(node, epoch, host="", instance=0, **fields), seeds=tuple(s.address for s in seeds), **settings)
        made.append(one)
        await one.net.start()
        return one

    yield make
    await asyncio.gather(*(one.net.stop(1.0) for one in made))


async def three(nodes: Any) -> tuple[Node, Node, Node]:
    a = await nodes(1)
    b = await nodes(2, a)
    c = await nodes(3, a)
    for one in (a, b, c):
        one.put(range(one.node * 1_000, one.node * 1_000 + 300))
    await converged(a, b, c)
    return a, b, c


async def converged(*all_nodes: Node) -> None:
    for reader in all_nodes:
        for owner in all_nodes:
            if reader is not owner:
                expected = set(range(owner.node * 1_000, owner.node * 1_000 + 300))
                await reader.until(lambda r=reader, o=owner, e=expected: r.keys_of(o) == e)  # type: ignore[misc]


async def test_three_nodes_with_one_seed_converge(nodes: Any) -> None:
    a, b, c = await three(nodes)
    assert {v.node for v in b.net.peers()} == {1, 3} and all(v.alive for v in b.net.peers())
    view = b.net.peer(3)
    assert view is not None and view.rtt_ms is not None and view.rtt_ms < 1_000 and view.entries == 300
    assert b.net.slot_node(b.net.node_slot(3)) == 3 and b.net.slot_node(0) == 2 and b.net.node_slot(2) == 0
    a.log.record([1_000], Tier.GONE, time.monotonic())
    await c.until(lambda: 1_000 not in c.keys_of(a))


async def test_a_killed_node_is_hidden_after_the_silence_and_shown_when_it_is_back(nodes: Any, card: Any) -> None:
    a, b, c = await three(nodes)
    keys = pack_keys([3_000])
    assert b.index.contains_any(keys) == b"\1"
    port = c.net.port
    c.vanish()
    assert await b.until(lambda: not b.net.peer(3).alive) < 3.0 or b.net.stats().get("stalls")
    assert b.index.contains_any(keys) == b"\0" and b.net.link(3) is None
    with pytest.raises(PeerUnavailable):
        await b.net.open_data(3, 1.0)
    again = await nodes(3, epoch=2, port=port)
    again.put(range(3_000, 3_300))
    await converged(a, b, again)
    assert b.net.peer(3).epoch == 2 and b.index.contains_any(keys) == b"\1"


async def test_a_broken_connection_is_hidden_at_once_and_shown_when_it_is_restored(nodes: Any) -> None:
    a = await nodes(1)
    b = await nodes(2, a)
    a.put(range(1_000, 1_300))
    await b.until(lambda: len(b.keys_of(a)) == 300)
    states = []
    b.net.on_peer_change = lambda view: states.append((view.node, view.state)) or b.changed.set()
    await b.net.reach(1, 5.0)
    a.net._control._conns.popitem()[0]._transport.abort()
    await b.until(lambda: (1, State.ALIVE) in states)
    assert states[0] == (1, State.UNREACHABLE)
    assert b.keys_of(a) == set(range(1_000, 1_300))


async def test_a_node_whose_port_refuses_connections_is_hidden_at_once(nodes: Any) -> None:
    _, b, c = await three(nodes)
    slot = b.net.node_slot(3)
    c.vanish()
    with pytest.raises(PeerUnavailable, match="data connection"):
        await b.net.open_data(3, 1.0)
    assert b.net.peer(3).state is State.UNREACHABLE and b.net.slot_node(slot) == 3


async def test_a_node_that_stops_sending_is_hidden_after_the_silence_and_shown_when_it_goes_on(nodes: Any) -> None:
    _, b, c = await three(nodes)
    c.net._timer.cancel()  # its loop still reads; it sends nothing by itself
    took_s = await b.until(lambda: not b.net.peer(3).alive)
    assert took_s < 3.0 or b.net.stats().get("stalls")  # a starved test machine judges later, by design
    c.net._on_timer()
    await b.until(lambda: b.net.peer(3).alive)


async def test_goodbye_drops_the_entries_at_once(nodes: Any) -> None:
    _, b, c = await three(nodes)
    slot = b.net.node_slot(3)
    start = time.monotonic()
    await c.net.stop(2.0)
    assert time.monotonic() - start < 2.0
    await b.until(lambda: b.net.peer(3).state is State.LEFT)
    assert b.index.count(slot) == 0


async def test_a_newer_epoch_replaces_a_living_one(nodes: Any, caplog: pytest.LogCaptureFixture) -> None:
    a, b, c = await three(nodes)
    link = await b.net.reach(3, 5.0)
    newer = await nodes(3, a, epoch=2)
    await b.until(lambda: b.net.peer(3).epoch == 2 and b.net.peer(3).alive)
    assert b.keys_of(newer) == set()
    assert link.closed and (await b.net.reach(3, 5.0)).epoch == 2
    assert "is one identity used twice" in caplog.text
    await c.until(lambda: "is used by another process" in caplog.text)
    assert c.net.card.epoch == 1, "the later one is alive"


async def test_a_later_life_is_connected_to_although_an_earlier_one_has_just_refused(nodes: Any) -> None:
    a, b, c = await three(nodes)
    port = c.net.port
    c.vanish()
    with pytest.raises(PeerUnavailable):
        await b.net.reach(3, 5.0)
    await nodes(3, a, epoch=2, port=port)
    await b.until(lambda: b.net.peer(3).epoch == 2 and b.net.peer(3).alive)
    assert (await b.net.reach(3, 5.0)).epoch == 2


async def test_a_node_that_is_its_own_seed_forgets_that(nodes: Any) -> None:
    one = await nodes(1)
    one.net._on_seeds("static", [one.net.card.address])
    await one.until(lambda: one.net.stats().get("frames_received", 0) >= 1)
    said = one.net.stats()["hellos_out"]
    beats = one.net._core.counts["heartbeats_out"]
    await one.until(lambda: one.net._core.counts["heartbeats_out"] > beats + 10)
    assert one.net.peers() == [] and one.net.stats()["hellos_out"] == said


async def test_a_node_whose_epoch_is_too_old_takes_a_later_one_when_the_later_life_is_silent(nodes: Any) -> None:
    """As after a state directory was restored from a copy."""
    a, _, c = await three(nodes)
    port, epochs = c.net.port, []
    newer = await nodes(4, a, epoch=7)
    newer.put(range(4_000, 4_300))
    await a.until(lambda: len(a.keys_of(newer)) == 300)
    newer.vanish()
    restored = await nodes(4, a, epoch=3)
    restored.net._renew = lambda beyond: epochs.append(beyond) or beyond + 1
    restored.put(range(4_100, 4_150))
    await a.until(lambda: a.keys_of(restored) == set(range(4_100, 4_150)))
    assert epochs == [7] and restored.net.card.epoch == 8 == restored.log.epoch and port


async def test_a_port_in_use_is_a_config_error_with_a_hint(nodes: Any, card: Any) -> None:
    one = await nodes(1)
    other = Node(card(2), port=one.net.port)
    with pytest.raises(ConfigError, match="port in use") as error:
        await other.net.start()
    assert error.value.hint


async def test_requests_are_answered_refused_and_given_up_in_time(nodes: Any) -> None:
    a = await nodes(1)
    b = await nodes(2, a)
    await b.until(lambda: b.net.peer(1) is not None and a.net.peer(2) is not None)
    link = await b.net.reach(1, 5.0)
    assert b.net.link(1) is link is await b.net.reach(1, 5.0)
    seen = []

    def pinned(lease: int) -> Pinned:
        return Pinned(lease, 1_000, b"", [], [], b"", "")

    async def on_pin(reader: Any, pin: Pin) -> Pinned:
        seen.append(reader.node_id)
        if pin.ttl_ms == 1:
            raise LayoutMismatch("layouts differ", fields=("order",))
        if pin.ttl_ms == 2:
            raise ZeroDivisionError
        if pin.ttl_ms == 3:
            await asyncio.Event().wait()
        return pinned(pin.ttl_ms)

    with pytest.raises(RemoteProtocolError, match="no handler"):
        await link.request(Pin(1, [], 9), 5.0)
    a.net.on(Pin, on_pin)
    a.net.on(Release, lambda _reader, release: Released(held=release.lease == 7))
    assert (await link.request(Pin(1, [], 77), 5.0)).lease == 77
    assert (await link.request(Release(7), 5.0)).held and not (await link.request(Release(8), 5.0)).held
    assert seen == [2]
    with pytest.raises(LayoutMismatch) as mismatch:
        await link.request(Pin(1, [], 1), 5.0)
    assert mismatch.value.fields == ("order",)
    with pytest.raises(RemoteProtocolError, match="failed at the owner"):
        await link.request(Pin(1, [], 2), 5.0)
    with pytest.raises(DeadlineExceeded):
        await link.request(Pin(1, [], 3), 0.05)
    stuck = [asyncio.ensure_future(link.request(Pin(1, [], 3), 30.0)) for _ in range(REQUESTS_MAX + 4)]
    await asyncio.wait(stuck, return_when=asyncio.FIRST_COMPLETED)
    await b.until(lambda: sum(f.done() for f in stuck) == 5)
    assert all(isinstance(f.exception(), Busy) for f in stuck if f.done())
    gone = []
    link.on_close(lambda: gone.append(1))
    a.vanish()
    done = await asyncio.gather(*stuck, return_exceptions=True)
    assert sum(isinstance(e, PeerUnavailable) for e in done) == len(stuck) - 5
    assert gone == [1] and link.closed
    with pytest.raises(PeerUnavailable):
        await link.request(Pin(1, [], 9), 5.0)


async def test_data_connections_are_handed_over_as_bare_sockets(nodes: Any) -> None:
    a = await nodes(1)
    b = await nodes(2, a)
    await b.until(lambda: b.net.peer(1) is not None)
    got: asyncio.Queue[tuple[socket.socket, Hello, bytes]] = asyncio.Queue()
    a.net.on_data_connection = lambda *args: got.put_nowait(args)
    mine = await b.net.open_data(1, 5.0)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(mine, b"after hello")
    theirs, hello, leftover = await asyncio.wait_for(got.get(), 5.0)
    assert hello.role == "data" and hello.card.node == 2 and not theirs.getblocking() and not mine.getblocking()
    assert mine.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) and leftover == b""
    assert await loop.sock_recv(theirs, 64) == b"after hello"
    await loop.sock_sendall(theirs, b"and back")
    assert await loop.sock_recv(mine, 64) == b"and back"
    theirs.close()
    mine.close()
    with pytest.raises(PeerUnavailable):
        await b.net.open_data(99, 1.0)


async def test_a_card_change_reaches_everybody_and_conflicts_are_named(
    nodes: Any, layout: Any, caplog: pytest.LogCaptureFixture
) -> None:
    a = await nodes(1, card_fields={"layouts": [layout()]})
    b = await nodes(2, a)
    await a.until(lambda: a.net.peer(2) is not None and a.net.peer(2).alive)
    with caplog.at_level(logging.ERROR):
        b.net.set_card(msgspec.structs.replace(b.net.card, layouts=[layout(kv_dtype="fp8"), layout(order="HND")]))
        await a.until(lambda: a.net.peer(2).conflicts == ("order",))
        await b.until(lambda: b.net.peer(1).conflicts == ("order",))
    assert "order is 'HND' there, '' here" in caplog.text
    assert (await a.net.reach(2, 5.0)).card.layouts[1].order == "HND"


async def test_who_does_not_read_is_disconnected_and_nobody_else(nodes: Any) -> None:
    a = await nodes(1, send_queue="256KiB")
    b = await nodes(2, a)
    await b.until(lambda: b.net.peer(1) is not None and a.net.peer(2) is not None)
    await b.net.reach(1, 5.0)
    loop = asyncio.get_running_loop()
    sloth = socket.socket()
    sloth.setblocking(False)
    sloth.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    try:
        await loop.sock_connect(sloth, ("127.0.0.1", a.net.port))
        card = msgspec.structs.replace(b.net.card, node=9, address=Address("127.0.0.1", 9))
        ticket = hello_ticket(Sealer(public(), "test", Life(9, card.epoch, card.instance)), a.net.life)
        await loop.sock_sendall(sloth, CODEC.encode(Hello(1, 1, "test", "control", card, ticket)))
        await a.until(lambda: a.net.stats()["connections"] == 2)
        for _ in range(200):
            a.net._control.letter("127.0.0.1:9", bytes(100_000))
            assert a.net.stats()["queued_bytes"] < (1 << 20)
            await asyncio.sleep(0)
            if a.net.stats().get("slow_readers"):
                break
        await a.until(lambda: a.net.stats()["connections"] == 1)
        assert a.net.stats()["slow_readers"] == 1
        assert not (await b.net.reach(1, 5.0)).closed
    finally:
        sloth.close()


async def test_connections_that_nobody_needs_are_closed_without_anybody_being_hidden(nodes: Any) -> None:
    a = await nodes(1)
    b = await nodes(2, a)
    await b.until(lambda: b.net.peer(1) is not None and a.net.peer(2) is not None and a.net.peer(2).alive)
    link = await b.net.reach(1, 5.0)
    for conn in b.net._control._conns.values():
        conn.used_at = float("-inf")
    hidden = a.net._core.counts["hidden"]
    b.net._control.tick()
    await a.until(lambda: a.net._control.link(2) is None and link.closed)
    assert a.net._core.counts["hidden"] == hidden and b.net._core.counts["hidden"] == 0
    assert not (await b.net.reach(1, 5.0)).closed


@pytest.mark.parametrize("older", [2, 3])
async def test_a_cell_that_speaks_two_protocols_is_one_cell(nodes: Any, older: int) -> None:
    """As during a rolling upgrade: one node does not speak the latest protocol yet."""
    a = await nodes(1, protocol_max=older)
    b, c = await nodes(2, a), await nodes(3, a)
    for one in (a, b, c):
        one.put(range(one.node * 1_000, one.node * 1_000 + 300))
    await converged(a, b, c)
    protocols = {(r.node, m[0]): m[12] for r in (a, b, c) for m in r.net._core.members()}
    assert protocols == {(1, 2): older, (1, 3): older, (2, 1): older, (3, 1): older, (2, 3): 4, (3, 2): 4}
    a.log.record([1_000], Tier.GONE, time.monotonic())
    c.log.record([3_000], Tier.GONE, time.monotonic())
    await c.until(lambda: 1_000 not in c.keys_of(a))
    await a.until(lambda: 3_000 not in a.keys_of(c))


async def test_a_connection_that_has_just_come_when_the_node_stops_is_closed(nodes: Any) -> None:
    """Its task may be cancelled before its first step, and then runs no line of what would have closed the socket."""
    a = await nodes(1)
    control = a.net._control
    with socket.create_connection(("127.0.0.1", a.net.port)):
        control._accept()
        (task,) = control._lobby
        accepted = task.get_coro().cr_frame.f_locals["sock"]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await a.until(lambda: not control._lobby)
    assert accepted.fileno() == -1


async def test_what_a_node_gives_to_others_is_heard_by_all_who_speak_of_it(nodes: Any) -> None:
    a = await nodes(1, protocol_max=3)
    b, c = await nodes(2, a), await nodes(3, a)
    b.net.load_bytes = lambda: 5 << 20
    await c.until(lambda: c.net.load_of(2) == 5 << 20)
    b.net.load_bytes = lambda: 1 << 60
    await c.until(lambda: c.net.load_of(2) == 0xFFFF << 20)
    b.net.load_bytes = lambda: 0
    await c.until(lambda: c.net.load_of(2) == 0)
    assert a.net.load_of(2) == c.net.load_of(1) == c.net.load_of(99) == 0


async def test_what_a_node_said_of_its_load_is_not_believed_for_long(nodes: Any) -> None:
    a = await nodes(1)
    b = await nodes(2, a)
    b.net.load_bytes = lambda: 5 << 20
    await a.until(lambda: a.net.load_of(2) == 5 << 20)
    await b.net.stop()
    await a.until(lambda: a.net.load_of(2) == 0)


async def test_keys_rotate_under_load_and_no_frame_is_lost_to_it(nodes: Any, tmp_path: Any) -> None:
    files = [tmp_path / f"keys-{n}" for n in range(3)]
    first, second = Key(b"1" * 32), Key(b"2" * 32)
    for path in files:
        keyfile.write(path, Keyring([first]))
    a = await nodes(1, keys=str(files[0]))
    b, c = await nodes(2, a, keys=str(files[1])), await nodes(3, a, keys=str(files[2]))
    everybody = (a, b, c)
    for one in everybody:
        one.put(range(one.node * 1_000, one.node * 1_000 + 300))
    await converged(*everybody)
    for step in ([first, second], [second, first], [second]):
        for path, one in zip(files, everybody, strict=True):
            keyfile.write(path, Keyring(step))
            one.put(range(one.node * 1_000, one.node * 1_000 + 300))
            one.log.record([one.node * 1_000 + len(step)], Tier.SSD, time.monotonic())
            one.net._slow_at = 0.0  # looks at the file at its next timer
            await one.until(lambda o=one, s=step: list(o.net._datagrams.opener._keyring) == s)  # type: ignore[misc]
    await converged(*everybody)
    for one in everybody:
        stats = one.net.stats()
        assert not {name for name in stats if name.startswith("frames_") and name not in FRAME_COUNTS}, stats
        assert one.net._core.counts["hidden"] == 0
    assert {one.net._datagrams.sealer.keyring.in_use for one in everybody} == {second}


FRAME_COUNTS = {"frames_in", "frames_received", "frames_sent"}


async def test_who_has_another_key_never_gets_in_and_is_named(
    nodes: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    keyfile.write(good, Keyring([Key(b"1" * 32)]))
    keyfile.write(bad, Keyring([Key(b"3" * 32)]))
    a = await nodes(1, keys=str(good))
    with caplog.at_level(logging.ERROR):
        stranger = await nodes(2, a, keys=str(bad))
        plain = await nodes(3, a)  # with no key at all
        await a.until(lambda: a.net.counters["frames_unknown_key"] >= 2)
    assert not a.net.peers() and not stranger.net.peers() and not plain.net.peers()
    assert f"127.0.0.1:{stranger.net.port} seals its frames with a key that this node does not have" in caplog.text
    for other in (stranger, plain):  # dialing, although gossip would not
        with pytest.raises(PeerUnavailable, match="refused"):
            await other.net._control._introductions.make(a.net.card.address, a.net.life, "data")


def tls(authority: Authority, name: str) -> dict[str, str]:
    certificate, key = authority.issue(name)
    return {"tls_certificate": certificate, "tls_key": key, "tls_authority": str(authority.path)}


async def test_with_certificates_all_of_tcp_is_mutual_tls(nodes: Any, tmp_path: Any) -> None:
    good = Authority(tmp_path, "good")
    a = await nodes(1, **tls(good, "a"))
    b = await nodes(2, a, **tls(good, "b"))
    a.put(range(1_000, 1_300))
    await b.until(lambda: b.keys_of(a) == set(range(1_000, 1_300)))
    await a.until(lambda: a.net.peer(2) is not None)
    a.net.on(Pin, lambda _reader, pin: Pinned(pin.ttl_ms, 1_000, b"", [], [], b"", ""))
    link = await b.net.reach(1, 5.0)
    assert (await link.request(Pin(1, [], 77), 5.0)).lease == 77
    got: asyncio.Queue[socket.socket] = asyncio.Queue()
    a.net.on_data_connection = lambda sock, *_: got.put_nowait(sock)
    mine = await b.net.open_data(1, 5.0)
    theirs = await asyncio.wait_for(got.get(), 5.0)
    loop, data = asyncio.get_running_loop(), random.Random(1).randbytes(3 << 20)
    sending = asyncio.ensure_future(loop.sock_sendall(theirs, data))
    received = bytearray()
    while len(received) < len(data):
        received += await loop.sock_recv(mine, 1 << 20)
    await sending
    assert bytes(received) == data
    theirs.close()
    assert await asyncio.wait_for(loop.sock_recv(mine, 1), 5.0) == b"", "the end is seen through it"
    mine.close()


async def test_without_a_good_certificate_nobody_is_let_in(
    nodes: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good, other = Authority(tmp_path, "good"), Authority(tmp_path, "other")
    a = await nodes(1, **tls(good, "a"))
    b, c = await nodes(2, a, **tls(other, "b")), await nodes(3, a)
    for one in (b, c):
        await one.until(lambda o=one: o.net.peer(1) is not None)  # type: ignore[misc]
        with pytest.raises(PeerUnavailable):
            await one.net.open_data(1, 3.0)
        with pytest.raises(PeerUnavailable):
            await one.net.reach(1, 3.0)
    assert a.net.stats()["tls_failures"] >= 1 and a.net.stats()["connections"] == 0
    assert "refused 127.0.0.1" in caplog.text


async def test_certificates_that_cannot_be_used_are_named_at_the_start(card: Any, tmp_path: Any) -> None:
    for path in (tmp_path / "none", tmp_path / "no certificate"):
        if "certificate" in path.name:
            path.write_text("hello")
        fields = {name: str(path) for name in ("tls_certificate", "tls_key", "tls_authority")}
        with pytest.raises(ConfigError, match="certificates"):
            await Node(card(1), **fields).net.start()


async def test_zero_is_any_free_port_and_advertise_wins(nodes: Any) -> None:
    plain = await nodes(1)
    assert plain.net.card.address.port == plain.net.port > 0
    named = await nodes(2, advertise="node-2.example:9")
    assert (named.net.card.address.host, named.net.card.address.port) == ("node-2.example", 9)
    host_only = await nodes(3, advertise="node-3.example")
    assert host_only.net.card.address.host == "node-3.example"
    assert host_only.net.card.address.port == host_only.net.port
    assert plain.net.card.instance != named.net.card.instance
