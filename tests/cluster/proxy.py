"""A proxy in front of one agent's peer port. Of TCP it can flip a byte, hold bytes back, or cut, where a test says so;
UDP passes as it is.

The agent behind it has to advertise the proxy's address (``peer.advertise``), so the proxy is there first and learns
its target later. One thread; connections are told apart by the role in their HELLO: faults apply to data connections.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
from dataclasses import dataclass, field

PIECE_BYTES = 65_536


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
    :meth:`let_go`. ``cut_after``: data connections are closed there.
    """

    def __init__(self) -> None:
        self.flip_at: int | None = None
        self.hold_after: int | None = None
        self.cut_after: int | None = None
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
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._woken:
                    self._woken.recv(64)
                elif key.fileobj is self._frames:
                    self._pass_frame()
                elif isinstance(key.data, tuple):
                    with contextlib.suppress(OSError):
                        self._frames.sendto(key.fileobj.recv(2_048), key.data)  # type: ignore[union-attr]
                else:
                    self._read(key.data)
            for flow in [flow for flow in self._flows if flow.waiting]:
                self._pass_on(flow)

    def _pass_frame(self) -> None:
        data, source = self._frames.recvfrom(2_048)
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
        if flow.from_owner and flow.data and self.hold_after is not None and flow.passed > self.hold_after:
            self.holding.set()
            with contextlib.suppress(KeyError):
                self._selector.unregister(flow.source)  # reads no more, so that the owner's queue fills up
            return
        if flow.source.fileno() >= 0 and flow.source not in self._selector.get_map():
            self._selector.register(flow.source, selectors.EVENT_READ, flow)
        data, flow.waiting = flow.waiting, bytearray()
        try:
            flow.target.sendall(data)
        except OSError:
            self._close(flow)

    def _close(self, flow: _Flow) -> None:
        for sock in (flow.source, flow.target):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(sock)
            sock.close()
        self._flows = [f for f in self._flows if f.source not in (flow.source, flow.target)]
