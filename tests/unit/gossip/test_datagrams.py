"""The UDP socket: frames in and out on both families, names looked up, strangers named."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from typing import Any

import pytest

from p2pkv import _native
from p2pkv.gossip import datagrams
from p2pkv.gossip.datagrams import Datagrams, bind, name_of, pack_address
from p2pkv.gossip.keyring import Key, Keyring, public
from p2pkv.gossip.sealed import Life, Opener, Sealer


class End:
    """One socket, and what came on it."""

    def __init__(self, host: str, node: int, ring: Keyring | None = None) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.listener = socket.create_server((host, 0), family=family)
        self.got: list[tuple[Life, str, bytes]] = []
        self.came = asyncio.Event()
        self.counters: Counter[str] = Counter()
        self.life = Life(node, 1, node)
        ring = ring or public()
        self.datagrams = Datagrams(
            bind(self.listener), sealer=Sealer(ring, "c", self.life), opener=Opener(ring, "c", 0.0),
            clock=asyncio.get_running_loop().time, take=lambda *frame: self.got.append(frame), taken=self.came.set,
            counters=self.counters,
        )  # fmt: skip
        port = self.listener.getsockname()[1]
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def until(self, count: int) -> None:
        async with asyncio.timeout(5.0):
            while len(self.got) < count:
                self.came.clear()
                await self.came.wait()

    def close(self) -> None:
        self.datagrams.close()
        self.listener.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("others", [1, 10])
async def test_one_sealed_frame_reaches_everybody(host: str, others: int) -> None:
    try:
        ends = [End(host, node + 1) for node in range(others + 1)]
    except OSError:
        pytest.skip("NO IPv6 HERE: its addresses are not tested")
    try:
        one, *rest = ends
        addresses = [end.address for end in rest]
        for number in range(3):
            one.datagrams.send(b"frame %d" % number, addresses)
        for end in rest:
            await end.until(3)
            assert sorted(end.got) == [(one.life, one.address, b"frame %d" % number) for number in range(3)]
        assert one.counters["frames_sent"] == 3 * others and one.counters["frames_not_sent"] == 0
        rest[0].datagrams.send(b"back", [one.address])
        await one.until(1)
        assert one.got == [(rest[0].life, rest[0].address, b"back")]
    finally:
        for end in ends:
            end.close()


async def test_frames_that_come_often_wait_for_each_other_and_a_late_one_comes_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = End("127.0.0.1", 1), End("127.0.0.1", 2)
    read = _native.receive_all
    reads = []

    def counted(fd: int, most: int) -> list[tuple[bytes, bytes]]:
        found = read(fd, most)
        reads.append(len(found))
        return found

    monkeypatch.setattr(_native, "receive_all", counted)
    monkeypatch.setattr(datagrams, "GATHER_S", 0.05)  # so that a busy machine passes too
    try:
        for number in range(300):
            one.datagrams.send(b"%d" % number, [other.address])
            for _ in range(10):
                await asyncio.sleep(0)
        await other.until(300)
        assert [payload for _, _, payload in other.got] == [b"%d" % number for number in range(300)]
        assert len(reads) < 150, reads
        async with asyncio.timeout(5.0):
            while reads[-1] != 0:  # nothing more came: the socket wakes the loop again
                await asyncio.sleep(0.001)
        looked = len(reads)
        one.datagrams.send(b"late", [other.address])
        await other.until(301)
        assert len(reads) == looked + 1
    finally:
        one.close()
        other.close()


async def test_a_frame_that_makes_trouble_does_not_make_the_node_deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagrams, "GATHER_S", 0.02)
    one, other = End("127.0.0.1", 1), End("127.0.0.1", 2)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    trouble = 0

    def take(life: Life, source: str, payload: bytes) -> None:
        nonlocal trouble
        if payload == b"trouble":
            trouble += 1
            other.came.set()
            raise RuntimeError("trouble")
        other.got.append((life, source, payload))

    monkeypatch.setattr(other.datagrams, "_take", take)
    try:
        for round_ in range(1, 6):  # while it gathers, and while it does not
            one.datagrams.send(b"trouble", [other.address])
            async with asyncio.timeout(5.0):
                while trouble < round_:
                    other.came.clear()
                    await other.came.wait()
        one.datagrams.send(b"well", [other.address])
        await other.until(1)
    finally:
        asyncio.get_running_loop().set_exception_handler(None)
        one.close()
        other.close()


async def test_a_name_is_looked_up_and_one_that_is_none_costs_nothing_but_its_frames() -> None:
    one, other = End("127.0.0.1", 1), End("127.0.0.1", 2)
    try:
        named = other.address.replace("127.0.0.1", "localhost")
        addresses = [named, "no such name:1", "127.0.0.1:9", other.address, "10.0.0.1"]
        async with asyncio.timeout(10.0):
            while len(other.got) < 4:
                one.datagrams.send(b"x", addresses)
                await asyncio.sleep(0.02)
        one.datagrams._resolved[named] = (("127.0.0.1", 1), -1e9)
        one.datagrams.refresh()
        assert named not in one.datagrams._resolved
    finally:
        one.close()
        other.close()


async def test_who_has_another_key_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    one, other = End("127.0.0.1", 1), End("127.0.0.1", 2, Keyring([Key(b"9" * 32)]))
    try:
        with caplog.at_level(logging.ERROR):
            async with asyncio.timeout(5.0):
                while one.counters["frames_unknown_key"] < 5:
                    other.datagrams.send(b"x", [one.address])
                    await asyncio.sleep(0.005)
        assert not one.got and caplog.text.count(f"{other.address} seals its frames with a key") == 1
    finally:
        one.close()
        other.close()


@pytest.mark.parametrize(
    ("family", "address", "name"),
    [
        (socket.AF_INET, ("10.1.2.3", 7841), "10.1.2.3:7841"),
        (socket.AF_INET6, ("fe80::1", 7841, 0, 3), "[fe80::1]:7841"),
        (socket.AF_INET6, ("::1", 1), "[::1]:1"),
    ],
)
def test_socket_addresses_are_the_kernels(family: int, address: tuple[Any, ...], name: str) -> None:
    packed = pack_address(family, address)
    assert len(packed) == (16 if family == socket.AF_INET else 28) and name_of(packed) == name
