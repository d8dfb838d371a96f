"""The UDP socket: frames out, sealed once for all who get them; frames in, opened. No protocol.

Bound to the same host and port as the TCP listener, so that one address names both. On the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from p2pkv import _native
from p2pkv.gossip.keyring import Keyring
from p2pkv.gossip.sayings import Sayings
from p2pkv.gossip.sealed import HEADER, Life, Opener, Refusal, Sealer

READS_MAX: Final = 256
"""Datagrams per wake-up of the socket: others on the loop get their turn."""
GATHER_S: Final = 0.005
"""When wake-ups follow each other faster than this, frames wait so long in the socket for each other: a cell of a
thousand sends each node one every 0.2 ms, and to be woken for one costs more than to read it. Small against a flush."""
BUFFER_BYTES: Final = 4 << 20
"""Of the socket, each way (the kernel may give less): a second of a full cell's frames while this process stalls."""
NAMES_MAX: Final = 8_192
MANY: Final = 4
"""Addresses from which on one call sends to all of them."""
ADDRESS_BYTES: Final = {socket.AF_INET: 16, socket.AF_INET6: 28}
RESOLVE_AGAIN_S: Final = 30.0

log = logging.getLogger("p2pkv.gossip")

SocketAddress = tuple[Any, ...]
Take = Callable[[Life, str, bytes], None]


class Datagrams:
    """Frames to and from addresses (``host:port``).

    Args:
        sock: bound, non-blocking; owned by this object from here on.
        take: gets every frame that was opened: who sealed it, the address that it came from, its payload.
        taken: called after a batch of them.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        sealer: Sealer,
        opener: Opener,
        clock: Callable[[], float],
        take: Take,
        taken: Callable[[], None],
        counters: Counter[str],
    ) -> None:
        self.sealer = sealer
        self.opener = opener
        self._sock = sock
        self._clock = clock
        self._take = take
        self._taken = taken
        self._counters = counters
        self._resolved: dict[str, tuple[SocketAddress | None, float]] = {}
        self._resolving: set[asyncio.Task[None]] = set()
        self._names: dict[bytes, str] = {}
        self._many: list[str] = []
        self._many_packed = b""
        self._many_left = False
        self._address_bytes = ADDRESS_BYTES[sock.family]
        self._sayings = Sayings(clock)
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
        self._woken_at = float("-inf")
        self._gathering: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock, self._readable)

    def close(self) -> None:
        """Close the socket. Idempotent."""
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock)
        if self._gathering is not None:
            self._gathering.cancel()
        for task in self._resolving:
            task.cancel()
        self._sock.close()

    def rekey(self, keyring: Keyring) -> None:
        """From now on seal with its key in use, and open with all of its keys."""
        self.opener.rekey(keyring)
        self.sealer.keyring = keyring

    # --- out

    def send(self, payload: bytes, addresses: list[str]) -> None:
        """Seal a payload and send it to all of these. What cannot be sent now is lost, as on the way."""
        frame = self.sealer.seal(payload)
        send, resolved, counters = self._sock.sendto, self._resolved, self._counters
        sent = 0
        if len(addresses) >= MANY:
            packed, addresses = self._pack(addresses)
            sent = _native.send_to_all(self._sock.fileno(), frame, packed, self._address_bytes)
            counters["frames_not_sent"] += len(packed) // self._address_bytes - sent
        for address in addresses:
            known = resolved.get(address)
            to = known[0] if known is not None else self._resolve(address)
            if to is None:
                self._look_again(address, known)
                continue
            try:
                send(frame, to)
                sent += 1
            except (BlockingIOError, InterruptedError):
                counters["frames_not_sent"] += 1
            except OSError:
                counters["frames_not_sent"] += 1  # no route, or a firewall's word: as good as lost
        counters["frames_sent"] += sent
        counters["frame_bytes_sent"] += sent * len(frame)

    def _pack(self, addresses: list[str]) -> tuple[bytes, list[str]]:
        """Socket addresses as the kernel takes them, of all that are resolved; and the others."""
        if addresses is self._many and not self._many_left:
            return self._many_packed, []
        pieces, left = [], []
        for address in addresses:
            to = (self._resolved.get(address) or (None,))[0]
            if to is None:
                left.append(address)
            else:
                pieces.append(pack_address(self._sock.family, to))
        # The same list as long as the same members are there: the core keeps it.
        self._many, self._many_packed, self._many_left = addresses, b"".join(pieces), bool(left)
        return self._many_packed, left

    def _resolve(self, address: str) -> SocketAddress | None:
        """Now for a numeric address; a name takes a task, and what is sent meanwhile is lost."""
        host, _, port = address.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if len(self._resolved) >= NAMES_MAX:
            self._resolved.clear()
        try:
            infos = socket.getaddrinfo(
                host, port, self._sock.family, socket.SOCK_DGRAM,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )  # fmt: skip
        except (OSError, ValueError):
            self._resolved[address] = None, self._clock()
            task = asyncio.get_running_loop().create_task(self._resolve_name(address, host, port))
            self._resolving.add(task)
            task.add_done_callback(self._resolving.discard)
            return None
        self._resolved[address] = infos[0][4], float("inf")
        return infos[0][4]

    async def _resolve_name(self, address: str, host: str, port: str) -> None:
        try:
            infos = await asyncio.get_running_loop().getaddrinfo(
                host, port, family=self._sock.family, type=socket.SOCK_DGRAM
            )
        except (OSError, ValueError) as error:
            self._sayings.say("resolve", address, f"cannot look up {address}: {error}", logging.WARNING)
            return
        self._resolved[address] = infos[0][4], self._clock()

    def _look_again(self, address: str, known: tuple[SocketAddress | None, float] | None) -> None:
        if known is not None and self._clock() - known[1] > RESOLVE_AGAIN_S:
            del self._resolved[address]  # the next frame asks again

    def refresh(self) -> None:
        """Forget the addresses of names that were looked up long ago: pods move."""
        old = self._clock() - RESOLVE_AGAIN_S
        self._many = []
        for address, (_, at) in list(self._resolved.items()):
            if at < old:
                del self._resolved[address]

    # --- in

    def _readable(self) -> None:
        """The socket has something: read it, and look again only in a while if this happens often."""
        woken_at = self._loop.time()
        if woken_at - self._woken_at < GATHER_S:
            self._loop.remove_reader(self._sock)
            self._gathering = self._loop.call_later(GATHER_S, self._gathered)
        self._woken_at = woken_at
        self._read()

    def _gathered(self) -> None:
        self._gathering = None
        count = 1
        try:
            count = self._read()
        finally:  # whatever one frame did: the next ones are read
            if self._sock.fileno() < 0:
                pass  # closed by what was read
            elif count == 0:
                self._loop.add_reader(self._sock, self._readable)
            else:
                self._gathering = self._loop.call_later(GATHER_S if count < READS_MAX else 0.0, self._gathered)

    def _read(self) -> int:
        now = self._clock()
        count = 0
        received = 0
        opened = 0
        for data, source in _native.receive_all(self._sock.fileno(), READS_MAX):
            count += 1
            received += len(data)
            outcome = self.opener.open(data, now)
            if isinstance(outcome, Refusal):
                self._refused(outcome, data, source)
                continue
            opened += 1
            self._take(outcome.life, self._names.get(source) or self._name(source), outcome.payload)
        self._counters["frames_received"] += opened
        self._counters["frame_bytes_received"] += received
        self._taken()
        return count

    def _name(self, source: bytes) -> str:
        if len(self._names) >= NAMES_MAX:
            self._names.clear()
        name = self._names[source] = name_of(source)
        return name

    def _refused(self, why: Refusal, data: bytes, source: bytes) -> None:
        self._counters[f"frames_{why.value}"] += 1
        if why not in (Refusal.UNKNOWN_KEY, Refusal.FORGED, Refusal.VERSION):
            return
        name = self._name(source)
        if why is Refusal.UNKNOWN_KEY:
            key_id = HEADER.unpack_from(data)[2]
            text = f"{name} seals its frames with a key that this node does not have ({key_id:08x})"
        elif why is Refusal.VERSION:
            text = f"{name} sends frames of a version that this build does not speak ({data[0]})"
        else:
            text = f"{name} is of another cell, or forges frames, or the network changes them"
        self._sayings.say(why.value, name.rpartition(":")[0], text, logging.ERROR)


def pack_address(family: int, address: SocketAddress) -> bytes:
    """A socket address as the kernel takes it (sockaddr_in, sockaddr_in6)."""
    head = struct.pack("=H", family) + struct.pack("!H", address[1])
    if family == socket.AF_INET:
        return head + socket.inet_aton(address[0]) + bytes(8)
    flow, scope = address[2:4] if len(address) > 3 else (0, 0)
    host = address[0].partition("%")[0]
    return head + struct.pack("!I", flow) + socket.inet_pton(socket.AF_INET6, host) + struct.pack("=I", scope)


def name_of(packed: bytes) -> str:
    """``host:port`` of a socket address that the kernel gave."""
    (family,) = struct.unpack_from("=H", packed)
    (port,) = struct.unpack_from("!H", packed, 2)
    if family == socket.AF_INET:
        return f"{socket.inet_ntoa(packed[4:8])}:{port}"
    return f"[{socket.inet_ntop(socket.AF_INET6, packed[8:24])}]:{port}"


def bind(listener: socket.socket) -> socket.socket:
    """A UDP socket on the address that a TCP socket listens on.

    Raises:
        OSError: that port is taken for UDP.
    """
    sock = socket.socket(listener.family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        if listener.family == socket.AF_INET6:
            sock.setsockopt(
                socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
            )
        sock.bind(listener.getsockname())
    except BaseException:
        sock.close()
        raise
    return sock
