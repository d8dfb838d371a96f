"""Discovery finds seeds; a fake resolver and a fake announcement stand in for the network."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

import pytest

from p2pkv.config import Peer
from p2pkv.errors import ConfigError
from p2pkv.gossip.discovery import DnsSeeds, StaticSeeds, ZeroconfSeeds, from_settings
from p2pkv.types import NodeId
from p2pkv.wire.peer import Address


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

    async def resolve(host: str, port: int) -> list[str]:
        assert (host, port) == ("peers.svc", 7841)
        answer = answers.pop(0) if answers else ["10.0.0.2", "::2"]
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

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
