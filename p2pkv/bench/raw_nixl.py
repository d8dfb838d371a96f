"""The limit of the NIXL transport: two processes with nothing but NIXL between them, one READ at a time.

Same backend, same options as ours, memory registered once, descriptor lists prepared once, one descriptor per block.
No index, no pin, no checksum, and always the same bytes.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import mmap
import os
import select
import sys
import time
from types import TracebackType
from typing import Any, Final

from p2pkv.bench.child import Child, answer, requests
from p2pkv.errors import DeadlineExceeded

PACKAGES: Final = ("nixl_cu12", "nixl_cu13")
QUIET: Final = {"UCX_HANDLE_ERRORS": "none", "UCX_LOG_LEVEL": "error", "NIXL_LOG_LEVEL": "ERROR"}
REST_S: Final = 0.1
READ_S: Final = 20.0
OWNER: Final = "bench-owner"


def installed() -> bool:
    """Whether a NIXL build is there."""
    return any(importlib.util.find_spec(package) is not None for package in PACKAGES)


class RawNixl:
    """The two processes, connected and warmed."""

    def __init__(self, bytes_max: int) -> None:
        self._owner = Child("raw_nixl", "owner", str(bytes_max), env=QUIET)
        self._reader: Child | None = None
        try:
            address, metadata = self._owner.line().split()
            self._reader = Child("raw_nixl", "reader", str(bytes_max), address, metadata, env=QUIET)
            self._owner.tell("progress")  # a new connection needs both sides
            self._inline = self._reader.line() == "inline"
            self._owner.tell("rest")
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def read(self, blocks: int, block_bytes: int) -> float:
        """READ so many blocks; returns the seconds that the reader's process took for it."""
        assert self._reader is not None
        if self._inline:
            return float(self._reader.ask(f"{blocks} {block_bytes}"))
        self._owner.tell("progress")  # emulated over TCP: the owner's CPU moves the bytes
        try:
            return float(self._reader.ask(f"{blocks} {block_bytes}"))
        finally:
            self._owner.tell("rest")

    def __enter__(self) -> RawNixl:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for child in (self._reader, self._owner):
            if child is not None:
                child.__exit__(kind, error, at)


def make_agent(name: str, length: int) -> tuple[Any, int]:
    """In a child: a NIXL agent and the address of its registered, touched memory, which is never given back."""
    package = next(package for package in PACKAGES if importlib.util.find_spec(package) is not None)
    module = importlib.import_module(package)
    agent = module.nixl_agent(name, module.nixl_agent_config(enable_prog_thread=False, backends=[]))
    agent.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
    memory = mmap.mmap(-1, length)
    memory[:] = b"\x5a" * length
    globals()["_memory"] = memory
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    globals()["_registered"] = agent.register_memory([(address, length, 0, "")], "DRAM")
    return agent, address


def owner(length: int) -> None:
    """Be read from; progress in a loop only while told to."""
    agent, address = make_agent(OWNER, length)
    answer(f"{address} {agent.get_agent_metadata().hex()}")
    progressing = False
    while True:
        if select.select([sys.stdin], [], [], 0.0 if progressing else REST_S)[0]:
            line = os.read(sys.stdin.fileno(), 4096)
            if not line:
                os._exit(0)
            progressing = line.split()[-1] == b"progress"
        agent.get_new_notifs()


class Reads:
    """In the reader's process: prepared lists by shape of the read, and READs that are timed."""

    def __init__(self, length: int, remote_address: int, metadata: bytes) -> None:
        self._agent, self._address = make_agent("bench-reader", length)
        self._remote_address = remote_address
        self._agent.add_remote_agent(metadata)
        self._lists: dict[tuple[int, int], tuple[Any, Any, list[int]]] = {}

    def read(self, blocks: int, block_bytes: int) -> tuple[float, bool]:
        """Seconds, and whether the bytes were there when the post returned."""
        shape = (blocks, block_bytes)
        if shape not in self._lists:
            local = [(self._address + i * block_bytes, block_bytes, 0) for i in range(blocks)]
            remote = [(self._remote_address + i * block_bytes, block_bytes, 0) for i in range(blocks)]
            self._lists[shape] = (
                self._agent.prep_xfer_dlist("", local, "DRAM"),
                self._agent.prep_xfer_dlist(OWNER, remote, "DRAM"),
                list(range(blocks)),
            )
        mine, theirs, indices = self._lists[shape]
        agent = self._agent
        began = time.perf_counter()
        handle = agent.make_prepped_xfer("READ", mine, indices, theirs, indices, b"")
        state = agent.transfer(handle)
        inline = state == "DONE"
        while state == "PROC":
            state = agent.check_xfer_state(handle)
            if time.perf_counter() - began > READ_S:
                raise DeadlineExceeded("a raw NIXL READ does not end")
        agent.release_xfer_handle(handle)
        took = time.perf_counter() - began
        if state != "DONE":
            raise RuntimeError(f"a raw NIXL READ ended as {state}")
        return took, inline


def reader(length: int, remote_address: int, metadata: bytes) -> None:
    """Connect, warm up, then one timed READ per line."""
    reads = Reads(length, remote_address, metadata)
    inline = False
    for _ in range(8):  # the first ones connect; the path that large reads take is chosen by the later ones
        _, inline = reads.read(1, length)
    answer("inline" if inline else "progress")
    for line in requests():
        blocks, block_bytes = line.split()
        answer(repr(reads.read(int(blocks), int(block_bytes))[0]))
    os._exit(0)


def main() -> None:
    """``owner <bytes>`` or ``reader <bytes> <address> <metadata>``."""
    role, length, *rest = sys.argv[1:]
    if role == "owner":
        owner(int(length))
    else:
        reader(int(length), int(rest[0]), bytes.fromhex(rest[1]))


if __name__ == "__main__":
    main()
