"""A proxy in front of one agent's peer port. Of TCP it can flip a byte, hold bytes back, cut, or be slow, where a test
says so; UDP passes as it is. Or nothing passes at all, of either.

The agent behind it has to advertise the proxy's address (``peer.advertise``), so the proxy is there first and learns
its target later. One thread; connections are told apart by the role in their HELLO: faults apply to data connections.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field

PIECE_BYTES = 65_536
TICK_S = 0.005


@dataclass
class _Flow:
    """One direction of one connection."""

    source: socket.socket
    target: socket.socket
    from_owner: bool
    data: bool = False
    seen: bytes = b""
    passed: int = 0  # bytes of this flow that came so far
    waiting: bytearray = field(default_factory=bytearray)
    open: bool = True


class Proxy:
    """A context manager. Fault settings may be changed at any time.

    ``flip_at``: this byte (counted from the first one of an owner's data stream) gets a bit flipped, once per
    connection. ``hold_after``: nothing of an owner's data stream goes further than this many bytes until
    :meth:`let_go`. ``cut_after``: data connections are closed there. ``rate``: bytes a second of owners' data streams,
    all together.
    """

    def __init__(self) -> None:
        self.flip_at: int | None = None
        self.hold_after: int | None = None
        self.cut_after: int | None = None
        self.rate: int | None = None
        self.parted = False
        self.flipped = 0
        self.cut = 0
        self.holding = threading.Event()
        self.target = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._frames = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._frames.bind(("127.0.0.1", self.port))
        self._askers: dict[object, socket.socket] = {}  # by address: what the agent sees instead
        self._selector = selectors.DefaultSelector()
        self._wake_end, self._woken = socket.socketpair()
        self._stopping = False
        self._flows: list[_Flow] = []
        self._allowance = 0.0  # bytes that may pass now
        self._allowed_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="test-proxy", daemon=True)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def passed(self) -> int:
        """Bytes of the owner's data stream that has the most."""
        return max((flow.passed for flow in list(self._flows) if flow.from_owner and flow.data), default=0)

    def let_go(self) -> None:
        """Pass on what was held back."""
        self.hold_after = None
        self._wake_end.send(b"x")

    def part(self) -> None:
        """Pass nothing on, in neither direction, as if a cable had been cut: nothing is closed, and nobody is told."""
        self.parted = True

    def heal(self) -> None:
        """End :meth:`part`: what TCP has to say arrives late, datagrams do not."""
        self.parted = False
        self._wake_end.send(b"x")

    def __enter__(self) -> Proxy:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(self._frames, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        self._wake_end.send(b"x")
        self._thread.join(10)
        for flow in self._flows:
            flow.source.close()
        for sock in (self._listener, self._wake_end, self._woken, self._frames, *self._askers.values()):
            sock.close()
        self._selector.close()

    def _run(self) -> None:
        while not self._stopping:
            slow = self.rate is not None and any(flow.waiting for flow in self._flows)
            for key, _ in self._selector.select(TICK_S if slow else None):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._woken:
                    self._woken.recv(64)
                elif key.fileobj is self._frames:
                    self._pass_frame()
                elif isinstance(key.data, tuple):
                    with contextlib.suppress(OSError):
                        answer = key.fileobj.recv(2_048)  # type: ignore[union-attr]
                        if not self.parted:
                            self._frames.sendto(answer, key.data)
                else:
                    self._read(key.data)
            self._listen_to(self._listener, None if self.parted else "accept")
            for flow in list(self._flows):
                if flow.source.fileno() >= 0 and (flow.waiting or flow.source not in self._selector.get_map()):
                    self._pass_on(flow)

    def _pass_frame(self) -> None:
        data, source = self._frames.recvfrom(2_048)
        if self.parted:
            return
        asker = self._askers.get(source)
        if asker is None:
            asker = self._askers[source] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            asker.bind(("127.0.0.1", 0))
            self._selector.register(asker, selectors.EVENT_READ, source)
        with contextlib.suppress(OSError):
            asker.sendto(data, ("127.0.0.1", self.target))

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        try:
            owner = socket.create_connection(("127.0.0.1", self.target), timeout=5)
        except OSError:
            sock.close()
            return
        for each in (sock, owner):
            each.settimeout(10)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        up, down = _Flow(sock, owner, False), _Flow(owner, sock, True)
        self._flows += [up, down]
        self._selector.register(sock, selectors.EVENT_READ, up)
        self._selector.register(owner, selectors.EVENT_READ, down)

    def _read(self, flow: _Flow) -> None:
        if self.parted:  # whoever closes its end is not heard either
            self._listen_to(flow.source, None)
            return
        try:
            data = flow.source.recv(PIECE_BYTES)
        except OSError:
            data = b""
        if not data:
            self._close(flow)
            return
        if not flow.from_owner and len(flow.seen) < 512:
            flow.seen += data[:512]
            if b"\xa4data" in flow.seen:
                next(f for f in self._flows if f.source is flow.target).data = True
        begin = flow.passed
        flow.passed += len(data)
        if flow.from_owner and flow.data:
            if self.flip_at is not None and begin <= self.flip_at < flow.passed:
                changed = bytearray(data)
                changed[self.flip_at - begin] ^= 0x10
                data = bytes(changed)
                self.flipped += 1
            if self.cut_after is not None and flow.passed >= self.cut_after:
                self.cut += 1
                self._close(flow)
                return
        flow.waiting += data
        self._pass_on(flow)

    def _pass_on(self, flow: _Flow) -> None:
        """Send on what may pass now; read more of it only when nothing waits, so that the sender's queue fills up."""
        size = len(flow.waiting)
        if self._stands(flow):
            size = 0
        elif flow.from_owner and flow.data and self.rate is not None:
            size = self._may_pass(size)
        data, flow.waiting = flow.waiting[:size], flow.waiting[size:]
        self._listen_to(flow.source, None if flow.waiting or self._stands(flow) else flow)
        try:
            flow.target.sendall(data)
        except OSError:
            self._close(flow)

    def _stands(self, flow: _Flow) -> bool:
        held = flow.from_owner and flow.data and self.hold_after is not None and flow.passed > self.hold_after
        if held:
            self.holding.set()
        return held or self.parted

    def _listen_to(self, sock: socket.socket, data: object) -> None:
        """Wake up for it, or not (None)."""
        known = sock.fileno() >= 0 and sock in self._selector.get_map()
        if data is None and known:
            self._selector.unregister(sock)
        elif data is not None and not known and sock.fileno() >= 0:
            self._selector.register(sock, selectors.EVENT_READ, data)

    def _may_pass(self, size: int) -> int:
        assert self.rate is not None
        now = time.monotonic()
        self._allowance = min(self._allowance + (now - self._allowed_at) * self.rate, 4 * TICK_S * self.rate)
        self._allowed_at = now
        size = min(size, int(self._allowance))
        self._allowance -= size
        return size

    def _close(self, flow: _Flow) -> None:
        for sock in (flow.source, flow.target):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(sock)
            sock.close()
        self._flows = [f for f in self._flows if f.source not in (flow.source, flow.target)]
