"""The cell's keys: what may be done with them, how they are written down, and that nothing shows them."""

from __future__ import annotations

import base64
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.errors import ConfigError, InvalidArgument
from p2pkv.gossip.keyring import KEYS_MAX, Key, Keyring, parse, text_of

SECRETS = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=KEYS_MAX, unique=True)
A, B, C = (Key(bytes([n]) * 32) for n in (1, 2, 3))


@given(SECRETS)
def test_what_is_written_down_is_read_again(many: list[bytes]) -> None:
    ring = Keyring(map(Key, many))
    assert parse(text_of(ring)) == ring
    assert parse("# a comment\n\n" + text_of(ring).replace("\n", "  \n\n")) == ring
    assert ring.in_use == Key(many[0]) and len(ring) == len(many)


def test_a_rotation() -> None:
    ring = Keyring([A])
    both = ring.install(B)
    assert (both.in_use, list(both)) == (A, [A, B])
    turned = both.use(B.id)
    assert (turned.in_use, list(turned)) == (B, [B, A])
    assert turned.remove(A.id) == Keyring([B])
    assert ring == Keyring([A]), "a keyring never changes"
    assert both.install(B) == both and both.use(A.id) == both


def test_what_may_not_be() -> None:
    ring = Keyring([A, B])
    with pytest.raises(InvalidArgument, match="in use"):
        ring.remove(A.id)
    for change in (ring.use, ring.remove):
        with pytest.raises(InvalidArgument, match="no such key"):
            change(C.id)
    with pytest.raises(InvalidArgument, match="1 to 8"):
        Keyring([])
    with pytest.raises(InvalidArgument, match="1 to 8"):
        Keyring(Key(secrets.token_bytes(32)) for _ in range(KEYS_MAX + 1))


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_a_key_has_32_bytes(length: int) -> None:
    with pytest.raises(InvalidArgument, match="32 bytes"):
        Key(bytes(length))


@pytest.mark.parametrize("line", ["short", "A" * 43, base64.b64encode(bytes(31)).decode(), "é" * 44, "=" * 44])
def test_a_line_that_is_no_key_is_named_and_not_shown(line: str) -> None:
    with pytest.raises(ConfigError, match="line of the key file") as caught:
        parse(text_of(Keyring([A])) + line + "\n")
    assert caught.value.context == {"line": 2} and line not in str(caught.value)


NINE = "".join(text_of(Keyring([Key(bytes([n]) * 32)])) for n in range(9))


@pytest.mark.parametrize("text", ["", "# nothing\n", NINE])
def test_too_few_and_too_many(text: str) -> None:
    with pytest.raises(ConfigError, match="1 to 8"):
        parse(text)


def test_nothing_shows_a_secret() -> None:
    shown = f"{A!r} {A} {Keyring([A, B])!r} {Keyring([A, B])} {A.id:x}"
    for form in (A.secret.hex(), base64.b64encode(A.secret).decode(), repr(A.secret)):
        assert form[:8] not in shown
