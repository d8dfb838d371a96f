"""Who this node is across restarts: a node id drawn once, and an epoch that grows at every start and is never reused.

Kept in ``<state_dir>/identity.json``, written before the epoch is used, under a lock that lasts as long as the process:
two agents can never run as the same node.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from pathlib import Path
from types import TracebackType
from typing import Annotated

import msgspec
from msgspec import Meta

from p2pkv.errors import ConfigError
from p2pkv.paths import default_state_dir
from p2pkv.types import NodeId


class _Saved(msgspec.Struct, forbid_unknown_fields=True):
    node: str
    epoch: Annotated[int, Meta(ge=0, lt=1 << 32)]


class Identity:
    """A node id and an epoch; holds the lock on its directory until closed."""

    def __init__(self, node: NodeId, epoch: int, directory: Path | None = None, lock_fd: int = -1) -> None:
        self.node = node
        self.epoch = epoch
        self.directory = directory
        """Its own, and locked; None: it leaves no trace."""
        self._lock_fd = lock_fd

    @classmethod
    def fresh(cls) -> Identity:
        """A new node that leaves no trace."""
        return cls(NodeId(secrets.randbits(63) | 1), 1)

    @classmethod
    def load(cls, state_dir: str) -> Identity:
        """Take up the identity kept in a directory ("" = the default one, ":memory:" = none), with the next epoch.

        Raises:
            ConfigError: the directory cannot be written, is in use by another agent, or holds garbage.
        """
        if state_dir == ":memory:":
            return cls.fresh()
        directory = Path(state_dir or default_state_dir())
        path = directory / "identity.json"
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock_fd = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(
                "cannot write the state directory",
                path=directory,
                reason=error.strerror,
                hint='Set state_dir to a directory of this user, or to ":memory:".',
            ) from error
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock_fd)
            raise ConfigError(
                "another agent uses this state directory",
                path=directory,
                hint="Give each agent on this host a state_dir of its own.",
            ) from error
        try:
            saved = cls._next(path)
            cls._write(path, saved)
        except OSError as error:
            os.close(lock_fd)
            raise ConfigError("cannot write the node's identity", path=path, reason=error.strerror) from error
        except ConfigError:
            os.close(lock_fd)
            raise
        return cls(NodeId(int(saved.node, 16)), saved.epoch, directory, lock_fd)

    @staticmethod
    def _next(path: Path) -> _Saved:
        try:
            saved = msgspec.json.decode(path.read_bytes(), type=_Saved)
            if not 0 < int(saved.node, 16) < 1 << 64:
                raise ValueError("node id out of range")
        except FileNotFoundError:
            return _Saved(f"{secrets.randbits(63) | 1:016x}", 1)
        except (msgspec.DecodeError, ValueError) as error:
            raise ConfigError(
                "the node's identity file is damaged", path=path, hint="Delete it: this node then joins as a new one."
            ) from error
        return _Saved(saved.node, saved.epoch + 1)

    def renew(self, beyond: int) -> int:
        """Take an epoch later than ``beyond``, which others know of this node, and keep it.

        Raises:
            ConfigError: it cannot be written, or there is none.
        """
        if beyond >= (1 << 32) - 1:
            raise ConfigError(
                "no epoch is left for this node", hint="Delete its state_dir: it then joins as a new one."
            )
        self.epoch = max(self.epoch, beyond) + 1
        if self.directory is not None:
            path = self.directory / "identity.json"
            try:
                self._write(path, _Saved(f"{int(self.node):016x}", self.epoch))
            except OSError as error:
                raise ConfigError("cannot write the node's identity", path=path, reason=error.strerror) from error
        return self.epoch

    @staticmethod
    def _write(path: Path, saved: _Saved) -> None:
        temporary = path.with_suffix(".new")
        with open(temporary, "wb") as file:
            file.write(msgspec.json.encode(saved))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    def close(self) -> None:
        """Let another agent have the directory."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def __enter__(self) -> Identity:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
