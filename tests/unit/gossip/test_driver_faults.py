"""Bad input on the peer port: whatever strangers send, they are closed in time and nobody else notices."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from p2pkv.config import Peer
from p2pkv.errors import P2PKVError
from p2pkv.gossip import net
from p2pkv.gossip.control import UNINTRODUCED_MAX
from p2pkv.gossip.driver import PeerNetwork
from p2pkv.gossip.introductions import HELLO_BYTES_MAX
from p2pkv.gossip.keyring import public
from p2pkv.gossip.sealed import Life, Sealer
from p2pkv.gossip.tickets import hello_ticket
from p2pkv.index.ownership import OwnershipLog
from p2pkv.index.prefix import PrefixIndex
from p2pkv.wire.frame import BODY_BYTES_MAX, HEADER, PROTOCOL_MAX, FrameDecoder, encode
from p2pkv.wire.peer import CODEC, Address, Card, Hello, PeerError, PeerType, Pin, Released, Welcome

CLOSED_WITHIN_S = 3.0
FUZZ_SEED = 20_260_101


@pytest.fixture
async def network() -> AsyncIterator[PeerNetwork]:
    one = PeerNetwork(
        settings=Peer(port=0, members_max=7, handshake_ms=400, heartbeat_ms=50, silence_ms=500, flush_ms=10),
        cell="test",
        card=Card(1, 1, Address("", 0), "", "", [], []),
        log=OwnershipLog(1),
        index=PrefixIndex(max_nodes=8, max_entries=1_000),
        rng=random.Random(1),
        sources=[],
    )
    await one.start()
    yield one
    await one.stop(1.0)


async def connect(network: PeerNetwork) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", network.port))
    return sock


async def rest(sock: socket.socket) -> bytes:
    """All that still comes until the other side closes, which must be soon."""
    loop, got = asyncio.get_running_loop(), b""
    async with asyncio.timeout(CLOSED_WITHIN_S):
        while True:
            try:
                piece = await loop.sock_recv(sock, 65_536)
            except ConnectionResetError:
                return got
            if not piece:
                return got
            got += piece


async def introduced(network: PeerNetwork, **fields: Any) -> socket.socket:
    """A stranger that has said a good HELLO."""
    sock = await connect(network)
    await asyncio.get_running_loop().sock_sendall(sock, CODEC.encode(good_hello(network, **fields)))
    return sock


SEALER = Sealer(public(), "test", Life(9, 1, 1))


def good_hello(network: PeerNetwork, **fields: Any) -> Hello:
    """With a ticket, which is good once."""
    return hello_of(STRANGER, ticket=hello_ticket(SEALER, network.life), **fields)


def hello_of(card: Card, **fields: Any) -> Hello:
    return msgspec.structs.replace(Hello(1, 1, "test", "control", card), **fields)


# Nobody listens at its address, so nothing comes of dialing it back.
STRANGER = Card(9, 1, Address("127.0.0.1", 1), "", "", [], [], 1)


def bad_first_frames(card: Card) -> dict[str, bytes]:
    good = CODEC.encode(hello_of(card))
    return {
        "an HTTP request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "zeros": bytes(64),
        "a future frame version": HEADER.pack(0, 99, PeerType.HELLO, 0, 0),
        "an oversized HELLO": HEADER.pack(HELLO_BYTES_MAX + 1, 1, PeerType.HELLO, 0, 0),
        "the largest length": HEADER.pack(0xFFFFFFFF, 1, PeerType.HELLO, 0, 0),
        "an unknown type": HEADER.pack(0, 1, 200, 0, 0),
        "an empty body": HEADER.pack(0, 1, PeerType.HELLO, 0, 0),
        "a body that is no msgpack": HEADER.pack(4, 1, PeerType.HELLO, 0, 0) + b"\xc1\xc1\xc1\xc1",
        "a bomb of nested arrays": HEADER.pack(90_000, 1, PeerType.HELLO, 0, 0) + b"\x91" * 90_000,
        "another message first": CODEC.encode(Pin(1, [], 1)),
        "another protocol": CODEC.encode(hello_of(card, protocol_min=PROTOCOL_MAX + 1, protocol_max=99)),
        "another cell": CODEC.encode(hello_of(card, cell="elsewhere")),
        "no ticket": good,
        "a ticket to somebody else": CODEC.encode(hello_of(card, ticket=hello_ticket(SEALER, Life(5, 5, 5)))),
        "a ticket that is none": CODEC.encode(hello_of(card, ticket=bytes(90))),
        "an unknown role": CODEC.encode(hello_of(card, role="root")),
        "a wrong field": good.replace(b"\xa7control", b"\xc0" * 8),
        "a HELLO that ends in the middle": good[:-3],
        "half a header": good[:5],
        "nothing": b"",
    }


UNFINISHED = {"a HELLO that ends in the middle", "half a header", "nothing"}


@pytest.mark.parametrize("name", list(bad_first_frames(STRANGER)))
async def test_a_bad_first_frame_is_closed_in_time(network: PeerNetwork, name: str) -> None:
    data = bad_first_frames(STRANGER)[name]
    sock = await connect(network)
    try:
        await asyncio.get_running_loop().sock_sendall(sock, data)
        answer = await rest(sock)
    finally:
        sock.close()
    errors = net_frames(answer)
    assert all(isinstance(error, PeerError) for error in errors)
    # What can be seen to be wrong is refused with a reason; what is only unfinished runs into the deadline.
    assert bool(errors) == (name not in UNFINISHED)
    assert not network.peers()
    await still_serves(network)


async def test_random_bytes_never_break_the_listener(network: PeerNetwork) -> None:
    rng = random.Random(FUZZ_SEED)
    good = CODEC.encode(hello_of(STRANGER))
    loop = asyncio.get_running_loop()
    for _ in range(150):
        sock = await connect(network)
        data = bytearray(good if rng.random() < 0.7 else rng.randbytes(rng.randrange(200)))
        for _ in range(rng.randrange(4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            await loop.sock_sendall(sock, bytes(data))
            if rng.random() < 0.5:
                await loop.sock_sendall(sock, rng.randbytes(rng.randrange(64)))
        except OSError:
            pass  # closed already
        sock.close()
    await still_serves(network)


async def test_random_bytes_after_a_good_hello_are_closed_with_a_reason(network: PeerNetwork) -> None:
    rng = random.Random(FUZZ_SEED)
    loop = asyncio.get_running_loop()
    for _ in range(40):
        sock = await introduced(network)
        kind = rng.choice((PeerType.BYE, PeerType.RELEASE, PeerType.WELCOME, PeerType.PIN, 77, PeerType.GOT))
        length = rng.randrange(1, 40)
        frame = HEADER.pack(length, 1, kind, 0, 0) + b"\xc1" * length
        await loop.sock_sendall(sock, frame if rng.random() < 0.8 else b"\xff" * 16)
        messages = net_frames(await rest(sock))
        sock.close()
        assert isinstance(messages[0], Welcome)
        assert isinstance(messages[-1], PeerError) and messages[-1].code == "protocol"
    assert network.stats()["malformed"] == 40
    await still_serves(network)


async def test_a_frame_over_the_limit_is_refused_before_it_is_buffered(network: PeerNetwork) -> None:
    sock = await introduced(network)
    await asyncio.get_running_loop().sock_sendall(sock, HEADER.pack(BODY_BYTES_MAX + 1, 1, PeerType.PIN, 0, 1))
    assert isinstance(net_frames(await rest(sock))[-1], PeerError)
    sock.close()


async def test_an_answer_from_a_reader_is_a_violation(network: PeerNetwork) -> None:
    sock = await introduced(network)
    await asyncio.get_running_loop().sock_sendall(sock, CODEC.encode(Released(True)))
    assert net_frames(await rest(sock))[-1].code == "protocol"
    sock.close()


async def test_a_ticket_is_good_once(network: PeerNetwork) -> None:
    hello = CODEC.encode(good_hello(network))
    loop = asyncio.get_running_loop()
    first = await connect(network)
    await loop.sock_sendall(first, hello)
    async with asyncio.timeout(CLOSED_WITHIN_S):
        assert isinstance(CODEC.decode(await net.read_frame(first, HELLO_BYTES_MAX)), Welcome)
    again = await connect(network)
    await loop.sock_sendall(again, hello)
    assert net_frames(await rest(again))[0].code == "key"
    for sock in (first, again):
        sock.close()


async def test_letters_of_who_is_no_member_are_counted_and_dropped(network: PeerNetwork) -> None:
    sock = await introduced(network)
    loop = asyncio.get_running_loop()
    rng = random.Random(FUZZ_SEED)
    for kind in range(30):
        await loop.sock_sendall(sock, encode(PeerType.LETTER, bytes([kind]) + rng.randbytes(rng.randrange(60))))
    async with asyncio.timeout(CLOSED_WITHIN_S):
        while network.stats().get("unintroduced", 0) < 30:
            await asyncio.sleep(0.01)
    assert not network.peers()
    sock.close()


async def test_a_crowd_that_says_nothing_is_bounded_and_goes(network: PeerNetwork) -> None:
    crowd = [await connect(network) for _ in range(UNINTRODUCED_MAX + 16)]
    try:
        await asyncio.gather(*(rest(sock) for sock in crowd))
    finally:
        for sock in crowd:
            sock.close()
    assert network.stats()["unintroduced_refused"] >= 1
    await still_serves(network)


@pytest.mark.parametrize("answer", [None, b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 12, bytes(range(64)), b""])
async def test_an_owner_that_answers_nonsense_or_nothing_is_left(network: PeerNetwork, answer: bytes | None) -> None:
    listener = await net.listen("127.0.0.1", 0)
    loop = asyncio.get_running_loop()

    async def answers() -> None:
        there, _ = await loop.sock_accept(listener)
        with there:
            there.setblocking(False)
            assert isinstance(CODEC.decode(await net.read_frame(there, HELLO_BYTES_MAX)), Hello)
            if answer is None:
                await asyncio.sleep(60)
            elif answer:
                await loop.sock_sendall(there, answer)
            else:
                there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    task = asyncio.ensure_future(answers())
    try:
        with pytest.raises((P2PKVError, OSError, TimeoutError)):
            async with asyncio.timeout(0.5):
                await network._control._introductions.make(addr(listener), Life(5, 1, 5), "control")
    finally:
        task.cancel()
        listener.close()
    await still_serves(network)


def addr(listener: socket.socket) -> Address:
    return Address(*listener.getsockname()[:2])


def net_frames(data: bytes) -> list[Any]:
    return [CODEC.decode(frame) for frame in FrameDecoder().feed(data)]


async def still_serves(network: PeerNetwork) -> None:
    """A well-behaved reader gets its welcome, whatever happened before."""
    sock = await connect(network)
    hello = CODEC.encode(good_hello(network, role="data"))
    await asyncio.get_running_loop().sock_sendall(sock, hello)
    async with asyncio.timeout(CLOSED_WITHIN_S):
        frame = await net.read_frame(sock, HELLO_BYTES_MAX)
    assert isinstance(CODEC.decode(frame), Welcome)
    sock.close()
