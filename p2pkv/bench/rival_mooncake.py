"""Mooncake Store over TCP: its master, a process whose segment holds the ring, and a reader that has no segment.

As it comes: the wheel's defaults, handshakes between peers (``P2PHANDSHAKE``), buffers registered once, ``get_into``
for one block and ``batch_get_into`` for several. The reader has no memory in the pool and no hot cache, so that every
get crosses to the other process. All three do nothing between gets.

The master listens on loopback. The transfer engine of both clients listens on every interface, on ports that it picks,
whatever it is told: while this runs, they can be reached from outside where the host can.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Final

from p2pkv.bench.child import Child, answer, die_with_parent, environment, requests, stop
from p2pkv.bench.rival_child import Memory, Shape, block, cannot, first_line, load, seconds_of, serve
from p2pkv.errors import DeadlineExceeded, Unavailable

NAME: Final = "mooncake"
NEEDS: Final = "Its wheel loads the system's libibverbs.so.1: apt-get install libibverbs1, or its like."
HOST: Final = "127.0.0.1"
SETTINGS: Final = {"MC_LOG_LEVEL": "ERROR", "MC_STORE_LOCAL_HOT_CACHE_SIZE": "0"}
SPARE_BYTES: Final = 64 << 20
"""Beyond what the ring needs: the master evicts from nine tenths on."""
LOCAL_BUFFER_BYTES: Final = 16 << 20
"""For gets that are not into a buffer of the caller's; there are none."""
MASTER_S: Final = 30.0
LOG_TAIL: Final = 500


class Mooncake:
    """The three processes."""

    def __init__(self, shape: Shape) -> None:
        self._master = Master()
        self._children: list[Child] = []
        try:
            for role in ("holder", "reader"):
                child = Child("rival_mooncake", role, self._master.address, *shape.arguments(), env=SETTINGS)
                self._children.append(child)
                first_line(NAME, child, NEEDS)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def read(self, blocks: int) -> float | None:
        """See :class:`p2pkv.bench.rivals.Rival`."""
        return seconds_of(NAME, self._children[-1].ask(str(blocks)))

    def __enter__(self) -> Mooncake:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child in reversed(self._children):
            child.__exit__(kind, error, at)
        self._master.stop()


class Master:
    """``mooncake_master`` on loopback, answering."""

    def __init__(self) -> None:
        port, metrics_port = _free_port(), _free_port()
        self.address = f"{HOST}:{port}"
        command = [sys.executable, "-m", "mooncake.cli", f"-rpc_address={HOST}", f"-rpc_port={port}"]
        self._process = subprocess.Popen(
            [*command, f"-metrics_host={HOST}", f"-metrics_port={metrics_port}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(SETTINGS),
            preexec_fn=die_with_parent,
        )
        try:
            self._wait(port)
        except BaseException:
            self.stop()
            raise

    def _wait(self, port: int) -> None:
        deadline = time.monotonic() + MASTER_S
        while True:
            if (code := self._process.poll()) is not None:
                raise Unavailable("mooncake_master ended", exit=code, hint="Its port may have been taken: try again.")
            try:
                socket.create_connection((HOST, port), timeout=1.0).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded("mooncake_master does not answer", seconds=MASTER_S) from error
            time.sleep(0.05)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL if that does not do."""
        stop(self._process, number=signal.SIGTERM)


def _free_port() -> int:
    """A port that is free now. The master takes a number only; should it be taken until then, it ends."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def open_store(master: str, segment_bytes: int, memory: Memory) -> Any:
    """In a child: a client with so much memory in the pool, and ``memory`` registered."""
    store = load("mooncake.store").MooncakeDistributedStore()
    arguments = (HOST, "P2PHANDSHAKE", segment_bytes, LOCAL_BUFFER_BYTES, "tcp", "", master)
    with tempfile.TemporaryFile() as log:
        code = _logging_to(log.fileno(), lambda: store.setup(*arguments))
        log.seek(0)
        if code:
            cannot(f"setup returned {code}: {log.read()[-LOG_TAIL:].decode(errors='replace')}")
    if code := store.register_buffer(memory.address, len(memory.view)):
        cannot(f"register_buffer returned {code}")
    return store


def _logging_to(descriptor: int, call: Callable[[], int]) -> int:
    """Call with native code's standard error elsewhere: a client logs errors while all is well with it."""
    kept = os.dup(2)
    os.dup2(descriptor, 2)
    try:
        return call()
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def holder(master: str, shape: Shape) -> None:
    """Put the ring into this process's segment, the only one that there is, and stay."""
    memory = Memory(shape.block_bytes)
    store = open_store(master, shape.ring_blocks * shape.block_bytes * 5 // 4 + SPARE_BYTES, memory)
    for number in range(shape.ring_blocks):
        memory.view[:] = block(shape.block_bytes, number)
        if code := store.put_from(key_of(number), memory.address, shape.block_bytes):
            cannot(f"put_from returned {code}")
    answer("ready")
    for _ in requests():
        pass
    os._exit(0)


def reader(master: str, shape: Shape) -> None:
    """Get blocks of the ring."""
    memory = Memory(shape.batch * shape.block_bytes)
    store = open_store(master, 0, memory)
    keys = [key_of(number) for number in range(shape.ring_blocks)]
    addresses = [memory.address + i * shape.block_bytes for i in range(shape.batch)]
    sizes = [shape.block_bytes] * shape.batch

    def read(numbers: Sequence[int]) -> bool:
        if len(numbers) == 1:
            return bool(store.get_into(keys[numbers[0]], memory.address, shape.block_bytes) == shape.block_bytes)
        count = len(numbers)
        return bool(store.batch_get_into([keys[i] for i in numbers], addresses[:count], sizes[:count]) == sizes[:count])

    serve(shape, memory, read)


def key_of(number: int) -> str:
    """The name of a block."""
    return f"block-{number}"


def main() -> None:
    """``probe``, or ``holder`` or ``reader`` with the master's address and a shape."""
    role, *rest = sys.argv[1:]
    if role == "probe":
        load("mooncake.store")
        answer("ready")
        os._exit(0)
    {"holder": holder, "reader": reader}[role](rest[0], Shape.of(rest[1:]))


if __name__ == "__main__":
    main()
