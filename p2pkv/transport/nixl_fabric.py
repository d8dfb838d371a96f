"""One-sided reads into the arena: what the engine needs of them (:class:`Fabric`), and NIXL doing it.

Only the NIXL child imports this module's NIXL half; nothing here imports numpy, torch or NIXL itself before
:func:`load_nixl` is called. Every call is made on one thread, because NIXL drops the GIL inside its own.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import mmap
import os
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, Final, NamedTuple, Protocol, SupportsIndex

from p2pkv import _native

PACKAGES: Final = ("nixl_cu12", "nixl_cu13")
"""Never the meta package ``nixl``: it imports torch when neither is there."""

SCRATCH_BYTES: Final = 65_536

Table = list[tuple[int, int, int]]
"""Descriptors: (address, length, 0) each."""


class FabricError(Exception):
    """A NIXL call failed. ``disconnected``: the peer's process or the way to it is gone."""

    def __init__(self, detail: str, *, disconnected: bool = False) -> None:
        super().__init__(detail)
        self.disconnected = disconnected


class Fabric(Protocol):
    """One-sided reads into the registered arena. Every call may raise :class:`FabricError`; none blocks on a peer.

    Tables are plain lists: for the few dozen rows of a piece they are several times faster than arrays.
    """

    def connect(self, metadata: bytes) -> str:
        """Load a peer's metadata; returns the agent name it contains."""

    def disconnect(self, name: str) -> None:
        """Forget a peer that has nothing in flight."""

    def create(self, peer: str, local: Table, remote: Table) -> object:
        """A transfer of all rows; nothing flies yet."""

    def post(self, transfer: object) -> bool:
        """Start it. True: it has already ended."""

    def ended(self, transfer: object) -> bool:
        """Progress, and say whether every row has landed."""

    def release(self, transfer: object) -> None:
        """Free a transfer that has ended, failed and settled, or was never posted."""

    def progress(self) -> None:
        """Let the worker serve peers and connections."""

    def probe(self, peer: str, remote_address: int, length: int) -> object:
        """A transfer of ``length`` bytes (at most 64 KiB) into scratch memory that nobody uses."""

    def adopt(self, handle: int) -> object:
        """A transfer that native code has posted."""


class NativeCalls(NamedTuple):
    """What native code calls of NIXL (``native/inline_reads.hpp``).

    The bindings' own functions: a frame of the interpreter between them costs microseconds per piece, because the piece
    before has driven it out of the processor's caches.
    """

    descriptors: Callable[[Table], object]
    create: Callable[[object, object, str], int]
    post: Callable[[int], SupportsIndex]  # nixl_status_t
    release: Callable[[int], object]


class NixlFabric:
    """:class:`~.nixl_engine.Fabric` over a real NIXL agent with the UCX backend and no progress thread."""

    def __init__(self, module: ModuleType, name: str, base: int, arena_bytes: int) -> None:
        self._bindings = bindings = importlib.import_module(f"{module.__name__}._bindings")
        self._handle: Any = importlib.import_module(f"{module.__name__}._api").nixl_xfer_handle
        # NIXL's errors have no common base class. The last two are its bindings': a number that is none of C's.
        own = [value for key, value in vars(bindings).items() if key.startswith("nixl") and key.endswith("Error")]
        self._errors = (*own, TypeError, ValueError)
        self._disconnects = (bindings.nixlRemoteDisconnectError,)
        self._agent: Any = module.nixl_agent(name, module.nixl_agent_config(enable_prog_thread=False, backends=[]))
        self._agent.create_backend("UCX", {"ucx_error_handling_mode": "peer"})
        self._scratch = mmap.mmap(-1, SCRATCH_BYTES)
        self._scratch_base = ctypes.addressof(ctypes.c_char.from_buffer(self._scratch))
        regions = [(base, arena_bytes, 0, ""), (self._scratch_base, SCRATCH_BYTES, 0, "")]
        self._registered = self._agent.register_memory(regions, "DRAM")
        self.metadata: bytes = self._agent.get_agent_metadata()

    def _call(self, function: Callable[..., Any], *args: object) -> Any:
        try:
            return function(*args)
        except self._errors as error:
            raise self.error_of(error) from error

    def error_of(self, error: Exception) -> FabricError:
        """What one of NIXL's own exceptions means."""
        return FabricError(f"{type(error).__name__}: {error}", disconnected=isinstance(error, self._disconnects))

    def native_calls(self) -> NativeCalls:
        """The calls that make up a read, without the layers of the Python API. They raise NIXL's own exceptions."""
        api, agent = self._agent, self._agent.agent
        return NativeCalls(
            partial(self._bindings.nixlXferDList, api.nixl_mems["DRAM"]),
            partial(agent.createXferReq, api.nixl_ops["READ"]),
            agent.postXferReq,
            agent.releaseXferReq,
        )

    def adopt(self, handle: int) -> object:
        return self._handle(self._agent.agent, handle)

    def connect(self, metadata: bytes) -> str:
        name: bytes = self._call(self._agent.add_remote_agent, metadata)
        return name.decode("utf-8", "replace")

    def disconnect(self, name: str) -> None:
        self._call(self._agent.remove_remote_agent, name)

    def create(self, peer: str, local: Table, remote: Table) -> object:
        return self._call(self._create, peer, local, remote)

    def _create(self, peer: str, local: Table, remote: Table) -> object:
        # Descriptors per request cost 8 us + 0.7 us each: less than prepared lists, whose fixed grid our slots lack.
        descs = self._agent.get_xfer_descs
        return self._agent.initialize_xfer("READ", descs(local, "DRAM"), descs(remote, "DRAM"), peer)

    def post(self, transfer: object) -> bool:
        return self._check(self._call(self._agent.transfer, transfer))

    def ended(self, transfer: object) -> bool:
        return self._check(self._call(self._agent.check_xfer_state, transfer))

    @staticmethod
    def _check(state: str) -> bool:
        if state == "ERR":
            raise FabricError("NIXL reports ERR without a reason")
        return state == "DONE"

    def release(self, transfer: object) -> None:
        try:
            self._call(self._agent.release_xfer_handle, transfer)
        except FabricError as error:
            logging.warning("a transfer could not be released: %s", error)

    def progress(self) -> None:
        self._call(self._agent.get_new_notifs)

    def probe(self, peer: str, remote_address: int, length: int) -> object:
        return self.create(peer, [(self._scratch_base, length, 0)], [(remote_address, length, 0)])


def map_arena(fd: int, arena_bytes: int) -> _native.Mapping:
    """Map the arena and fill in page tables where its pages exist already.

    A page that the agent has written is not in *our* page table until it is touched, and a peer's copy would take a
    fault per 4 KiB: half the speed. If the memfd has holes, filling tables would allocate them, so it is not done."""
    status = os.fstat(fd)
    if status.st_size < arena_bytes:
        raise ValueError(f"the arena has {status.st_size} bytes, not {arena_bytes}")
    arena = _native.Mapping(fd, arena_bytes, True)
    if status.st_blocks * 512 >= arena_bytes:
        _native.populate(arena.address, arena_bytes)  # before Linux 5.14: faults it is
    return arena


def load_nixl() -> ModuleType:
    """The NIXL build that is installed.

    Raises:
        ImportError: none is, or the one that is cannot be loaded."""
    reasons = []
    for package in PACKAGES:
        try:
            return importlib.import_module(package)
        except ImportError as error:
            reasons.append(f"{package}: {error}")
    raise ImportError("; ".join(reasons))
