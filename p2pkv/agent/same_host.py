"""Is NIXL faster than TCP between two agents of this host? Measured once, at start, on this host.

What decides it is whether one process may copy straight out of another's memory (``process_vm_readv``, which UCX calls
CMA): then one copy replaces two and the sockets between. Where a container forbids it, NIXL falls back to emulated
reads over TCP, which are slower than plain TCP.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
from typing import Final

PROBE_BYTES: Final = 4 << 20
ROUNDS: Final = 5


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def cma_seconds() -> float | None:
    """Best time to copy :data:`PROBE_BYTES` out of a child's memory; ``None`` where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "process_vm_readv"):
        return None
    source = ctypes.create_string_buffer(os.urandom(1 << 16) * (PROBE_BYTES >> 16), PROBE_BYTES)
    target = ctypes.create_string_buffer(PROBE_BYTES)
    hold, release = os.pipe()
    child = os.fork()
    if child == 0:  # holds a copy-on-write copy of `source` at the same address until the pipe closes
        os.close(release)
        os.read(hold, 1)
        os._exit(0)
    os.close(hold)
    try:
        best: float | None = None
        local = _Iovec(ctypes.addressof(target), PROBE_BYTES)
        remote = _Iovec(ctypes.addressof(source), PROBE_BYTES)
        for _ in range(ROUNDS):
            started = time.perf_counter()
            copied = libc.process_vm_readv(child, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
            elapsed = time.perf_counter() - started
            if copied != PROBE_BYTES:
                return None
            best = elapsed if best is None else min(best, elapsed)
        return best
    finally:
        os.close(release)
        os.waitpid(child, 0)


def tcp_seconds() -> float:
    """Best time to receive :data:`PROBE_BYTES` over a loopback connection."""
    source = os.urandom(1 << 16) * (PROBE_BYTES >> 16)
    target = memoryview(bytearray(PROBE_BYTES))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reader = socket.create_connection(listener.getsockname(), timeout=2.0)
        writer, _ = listener.accept()
    with reader, writer:
        best = float("inf")
        for _ in range(ROUNDS):
            started = time.perf_counter()
            sender = threading.Thread(target=writer.sendall, args=(source,))
            sender.start()
            got = 0
            while got < PROBE_BYTES:
                got += reader.recv_into(target[got:])
            best = min(best, time.perf_counter() - started)
            sender.join()
        return best


def nixl_is_faster() -> bool:
    """Whether agents of this host should read each other over NIXL. Takes some 20 ms; not for the event loop."""
    cma = cma_seconds()
    return cma is not None and cma < tcp_seconds()
