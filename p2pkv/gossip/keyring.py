"""The cell's keys: the one that frames are sealed with, and those that are opened. Pure.

A key is 32 random bytes that all members of a cell share. Rotation without downtime takes three steps, each done on
every member before the next begins: install the new key (frames of both are opened), use it (it seals), remove the old
one. As text, one key a line in base64, the first one in use; empty lines and those that begin with ``#`` do not count.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Iterator
from typing import Final

from p2pkv.errors import ConfigError, InvalidArgument

KEY_BYTES: Final = 32
KEYS_MAX: Final = 8
"""Two while a rotation is under way; more only by mistake."""


class Key:
    """One key. Its ``id`` may be shown, and says nothing of the secret; nothing ever prints the secret."""

    __slots__ = ("id", "secret")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise InvalidArgument("a cell key has 32 bytes", bytes=len(secret))
        self.secret = secret
        digest = hashlib.blake2b(secret, digest_size=4, person=b"p2pkv key id").digest()
        self.id = int.from_bytes(digest, "little")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and other.secret == self.secret

    def __hash__(self) -> int:
        return self.id

    def __repr__(self) -> str:
        return f"Key({self.id:08x})"


class Keyring:
    """One to eight different keys, the first of them in use. Immutable."""

    __slots__ = ("_keys",)

    def __init__(self, keys: Iterable[Key]) -> None:
        listed = {key.id: key for key in keys}
        if not 1 <= len(listed) <= KEYS_MAX:
            raise InvalidArgument("a keyring has 1 to 8 keys", keys=len(listed))
        self._keys = listed

    @property
    def in_use(self) -> Key:
        """What is sent is sealed with it."""
        return next(iter(self))

    def get(self, key_id: int) -> Key | None:
        """The key of this id."""
        return self._keys.get(key_id)

    def install(self, key: Key) -> Keyring:
        """With one more key, that is not in use yet."""
        return Keyring([*self, key])

    def use(self, key_id: int) -> Keyring:
        """With another key in use.

        Raises:
            InvalidArgument: it is not installed.
        """
        chosen = self._of(key_id)
        return Keyring([chosen, *self])

    def remove(self, key_id: int) -> Keyring:
        """Without a key.

        Raises:
            InvalidArgument: it is not installed, or it is in use.
        """
        removed = self._of(key_id)
        if removed == self.in_use:
            raise InvalidArgument("this key is in use", key=f"{key_id:08x}", hint="Use another one first.")
        return Keyring(key for key in self if key != removed)

    def _of(self, key_id: int) -> Key:
        key = self.get(key_id)
        if key is None:
            raise InvalidArgument("no such key", key=f"{key_id:08x}", installed=[f"{known.id:08x}" for known in self])
        return key

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys.values())

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, Key) and self.get(key.id) == key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Keyring) and list(self) == list(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return f"Keyring({', '.join(f'{key.id:08x}' for key in self)})"


def public() -> Keyring:
    """The ring of a cell without a key: everybody has it. It keeps cells apart and changed bits out, nothing else."""
    return Keyring([Key(hashlib.blake2b(b"this cell has no key", digest_size=KEY_BYTES).digest())])


def parse(text: str) -> Keyring:
    """A keyring from its text.

    Raises:
        ConfigError: naming the line, and never what is in it.
    """
    keys = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            keys.append(Key(base64.b64decode(line, validate=True)))
        except (binascii.Error, ValueError, InvalidArgument) as error:
            hint = "`p2pkv keys generate` makes one."
            raise ConfigError("a line of the key file is no key", line=number, hint=hint) from error
    try:
        return Keyring(keys)
    except InvalidArgument as error:
        raise ConfigError("a key file has 1 to 8 different keys, one a line", keys=len(keys)) from error


def text_of(keyring: Keyring) -> str:
    """The text of a keyring. Secret."""
    return "".join(base64.b64encode(key.secret).decode() + "\n" for key in keyring)
