"""The cell's keys in a file: read, watched, and changed in one step.

The file may be a mounted Secret, which Kubernetes replaces by moving a link: what counts is where the path leads to.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from p2pkv.errors import ConfigError
from p2pkv.gossip.keyring import Keyring, parse, text_of

BYTES_MAX = 65_536

log = logging.getLogger("p2pkv.gossip")


def read(path: str | Path) -> Keyring:
    """The keyring in a file.

    Raises:
        ConfigError: it cannot be read, or is no key file.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(BYTES_MAX + 1)
    except OSError as error:
        hint = "`p2pkv keys generate --file PATH` makes one."
        raise ConfigError("the key file cannot be read", path=path, reason=error.strerror, hint=hint) from error
    if len(data) > BYTES_MAX:
        raise ConfigError("the key file is too large to be one", path=path, limit=BYTES_MAX)
    try:
        return parse(data.decode())
    except UnicodeDecodeError as error:
        raise ConfigError("the key file is no text", path=path) from error
    except ConfigError as error:
        raise ConfigError(error.message, path=path, hint=error.hint, **error.context) from error


def write(path: str | Path, keyring: Keyring) -> None:
    """Put a keyring in a file that only its owner can read; whoever reads meanwhile sees the old one or the new one.

    Raises:
        ConfigError: it cannot be written; what was there is there still.
    """
    path = Path(path)
    try:
        descriptor, beside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
        try:
            with os.fdopen(descriptor, "w", encoding="ascii") as file:
                file.write(text_of(keyring))
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            os.unlink(beside)
            raise
    except OSError as error:
        raise ConfigError("the key file cannot be written", path=path, reason=error.strerror) from error


class KeyFile:
    """A key file that is looked at again and again. ``keyring``: the last good one.

    Raises:
        ConfigError: it is not good to begin with.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._seen = _stamp(path)
        self.keyring = read(path)

    def changed(self) -> Keyring | None:
        """The new keyring, where it is another one than at the last call; a bad file is logged, once, and not used."""
        stamp = _stamp(self.path)
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            keyring = read(self.path)
        except ConfigError as error:
            log.error("keys stay as they are: %s", error)
            return None
        if keyring == self.keyring:
            return None
        log.info("keys: %r is now %r", self.keyring, keyring)
        self.keyring = keyring
        return keyring


def _stamp(path: str | Path) -> tuple[int, ...]:
    """Another one whenever the file may be another one; () while there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
