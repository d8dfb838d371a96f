"""Discovery finds seeds; a fake resolver and a fake announcement stand in for the network."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import dns.asyncresolver
import dns.message
import dns.name
import dns.rcode
import dns.rrset
import pytest

from p2pkv.config import Peer
from p2pkv.errors import ConfigError
from p2pkv.gossip.discovery import DnsSeeds, StaticSeeds, ZeroconfSeeds, from_settings
from p2pkv.gossip.discovery.dns import resolve_services
from p2pkv.types import NodeId
from p2pkv.wire.peer import Address, Card


class Finds:
    """Collects what a source names, and lets a test wait for it."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[tuple[str, list[Address]]] = asyncio.Queue()

    def __call__(self, source: str, addresses: Iterable[Address]) -> None:
        self.queue.put_nowait((source, list(addresses)))

    async def next(self, deadline_s: float = 10.0) -> tuple[str, list[Address]]:
        return await asyncio.wait_for(self.queue.get(), deadline_s)


async def test_static_seeds_are_named_once() -> None:
    finds = Finds()
    source = StaticSeeds(["10.0.0.1:7", "[::1]:8", "name:9"])
    await source.start(finds)
    assert await finds.next() == ("static", [Address("10.0.0.1", 7), Address("::1", 8), Address("name", 9)])
    await source.stop()


def test_a_malformed_seed_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        StaticSeeds(["no-port"])


async def test_dns_follows_the_records_and_keeps_them_while_the_resolver_fails() -> None:
    answers: list[Any] = [OSError("no such name"), ["10.0.0.1"], ["10.0.0.1"], OSError("down"), ["10.0.0.2", "::2"]]
    finds = Finds()

    async def resolve(host: str, port: int) -> list[Address]:
        assert (host, port) == ("peers.svc", 7841)
        answer = answers.pop(0) if answers else ["10.0.0.2", "::2"]
        if isinstance(answer, Exception):
            raise answer
        return [Address(found, port) for found in answer]

    source = DnsSeeds("peers.svc:7841", refresh_s=0.0, resolve=resolve)
    await source.start(finds)
    assert await finds.next() == ("dns", [Address("10.0.0.1", 7841)])
    assert await finds.next() == ("dns", [Address("10.0.0.2", 7841), Address("::2", 7841)])
    await source.stop()
    assert finds.queue.empty()


async def test_dns_resolves_a_real_name() -> None:
    finds = Finds()
    source = DnsSeeds("localhost:7841")
    await source.start(finds)
    _, addresses = await finds.next()
    assert all(a.host in ("127.0.0.1", "::1") for a in addresses) and addresses
    await source.stop()


class NameServer(asyncio.DatagramProtocol):
    """Answers SRV questions for one name over UDP, and says of all others that they do not exist."""

    name = dns.name.from_text("_peers._udp.p2pkv.svc.")

    def __init__(self) -> None:
        self.records = ["10 50 7842 b.p2pkv.svc.", "0 0 7841 a.p2pkv.svc."]
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        if query.question[0].name == self.name:
            answer.answer.append(dns.rrset.from_text(self.name, 1, "IN", "SRV", *self.records))
        else:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self.transport.sendto(answer.to_wire(), addr)


async def test_srv_records_name_hosts_and_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(NameServer, local_addr=("127.0.0.1", 0))
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers, resolver.port = ["127.0.0.1"], transport.get_extra_info("sockname")[1]
    monkeypatch.setattr(dns.asyncresolver, "Resolver", lambda: resolver)
    finds = Finds()
    source = from_settings(
        Peer(dns="_peers._udp.p2pkv.svc"), cell="c", card=Card(1, 1, Address("", 0), "", "", [], [])
    )[0]
    assert isinstance(source, DnsSeeds)
    source._refresh_s = 0.01
    try:
        await source.start(finds)
        assert await finds.next() == ("dns", [Address("a.p2pkv.svc", 7841), Address("b.p2pkv.svc", 7842)])
        server.records.pop()
        assert await finds.next() == ("dns", [Address("b.p2pkv.svc", 7842)])
        with pytest.raises(OSError, match="there is no"):
            await resolve_services("_other._udp.p2pkv.svc", 0)
    finally:
        await source.stop()
        transport.close()


def test_announcements_of_other_cells_and_our_own_are_not_seeds() -> None:
    source = ZeroconfSeeds(cell="c", node=NodeId(1), address=Address("127.0.0.1", 1))
    good: dict[bytes, bytes | None] = {b"cell": b"c", b"node": str(NodeId(2)).encode()}
    assert source.accept(good, ["10.0.0.2"], 7841) == (Address("10.0.0.2", 7841),)
    assert source.accept({**good, b"cell": b"other"}, ["10.0.0.2"], 7841) == ()
    assert source.accept({**good, b"node": str(NodeId(1)).encode()}, ["10.0.0.2"], 7841) == ()
    assert source.accept({}, ["10.0.0.2"], 7841) == ()
    assert source.accept(good, ["10.0.0.2"], None) == () and source.accept(good, [], 7841) == ()
    assert len(source.accept(good, [f"10.0.0.{i}" for i in range(99)], 7841)) == 4


async def test_two_agents_find_each_other_by_zeroconf_on_loopback() -> None:
    finds = [Finds(), Finds()]
    sources = [ZeroconfSeeds(cell="c", node=NodeId(i + 1), address=Address("127.0.0.1", 7_000 + i)) for i in range(2)]
    try:
        for source, find in zip(sources, finds, strict=True):
            try:
                await source.start(find)
            except ConfigError as error:
                pytest.skip(f"no multicast here: {error}")
        try:
            assert await finds[0].next(15.0) == ("zeroconf", [Address("127.0.0.1", 7_001)])
            assert await finds[1].next(15.0) == ("zeroconf", [Address("127.0.0.1", 7_000)])
        except TimeoutError:
            pytest.skip("multicast on loopback does not come through here")
        await sources[1].stop()
        assert await finds[0].next(15.0) == ("zeroconf", [])
    finally:
        for source in sources:
            await source.stop()


def test_settings_choose_the_sources(card: Any) -> None:
    chosen = from_settings(Peer(seeds=("a:1",), dns="b:2", zeroconf=True), cell="c", card=card(1))
    assert [s.source for s in chosen] == ["static", "dns", "zeroconf"]
    assert from_settings(Peer(), cell="c", card=card(1)) == []


def test_importing_the_driver_does_not_import_zeroconf() -> None:
    code = "import sys, p2pkv.gossip.driver; assert 'zeroconf' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
