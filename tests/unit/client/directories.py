"""An arena with its directory, and an agent that gives both out and says nothing more."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from p2pkv import _native
from p2pkv.client import Layout
from p2pkv.store.arena import Arena
from p2pkv.store.base import Reservation
from p2pkv.store.directory import DirectoryFiles
from p2pkv.store.dram import DramStore
from p2pkv.wire.engine import CODEC, Ready
from p2pkv.wire.engine_types import ENGINE_PROTOCOL_MAX


class Held:
    """A store's arena and directory, with a few blocks in it."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self.layout: Final = Layout(model="m", revision="r", kv_dtype="u8", block_tokens=16, block_bytes=block_bytes)
        self.arena = Arena.create(blocks * block_bytes, huge="none")
        self.store = DramStore(self.arena.capacity_bytes, extent_bytes=block_bytes)
        self.files = DirectoryFiles(self.store, self.arena.capacity_bytes)
        self.namespace = self.store.register(self.layout)
        self.keys = [bytes([i + 1]) * 16 for i in range(blocks)]
        for key in self.keys:
            place = self.store.reserve(self.namespace, key, 0.0)
            assert isinstance(place, Reservation)
            assert _native.copy(self.arena.view(place.offset, place.length), key * (block_bytes // 16))
            self.store.commit(place, bytes(16), 0.0)

    def gets(self, fd: int) -> _native.Gets:
        """An engine's end of a socket, with the directory."""
        mapped = []
        for descriptor, writable in zip(self.files.descriptors(), (False, True), strict=True):
            mapped.append(_native.Mapping(descriptor, os.fstat(descriptor).st_size, writable))
            os.close(descriptor)
        return _native.Gets(fd, self.arena.view(0, self.arena.capacity_bytes), *mapped)


class Silent:
    """Listens at ``path``, introduces itself to whoever comes, and answers nothing else."""

    def __init__(self, path: Path, arena_fd: int, arena_bytes: int, directory: Sequence[int]) -> None:
        self.path = str(path)
        self._given = (arena_fd, arena_bytes, tuple(directory))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(8)
        self._ends: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        arena_fd, arena_bytes, directory = self._given
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            peer.recv(4096)
            ours, theirs = socket.socketpair()
            self._ends += [peer, ours]
            ready = CODEC.encode(Ready(ENGINE_PROTOCOL_MAX, 1, 1, arena_bytes, 10_000), 1)
            with theirs, contextlib.suppress(OSError):  # who connected may have gone again
                socket.send_fds(peer, [ready], [arena_fd, theirs.fileno(), *directory])

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        for end in self._ends:
            end.close()
