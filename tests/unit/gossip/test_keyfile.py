"""Key files: read, watched as a mounted Secret is replaced, and written so that nobody sees half of one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from p2pkv.errors import ConfigError
from p2pkv.gossip import keyfile
from p2pkv.gossip.keyfile import KeyFile, read, write
from p2pkv.gossip.keyring import Key, Keyring, text_of

A, B = (Key(bytes([n]) * 32) for n in (1, 2))
ONE, BOTH, TURNED = Keyring([A]), Keyring([A, B]), Keyring([B, A])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_what_is_written_is_read_and_nobody_elses_to_read(path: Path) -> None:
    write(path, BOTH)
    assert read(path) == BOTH and stat.S_IMODE(path.stat().st_mode) == 0o600
    write(path, TURNED)
    assert read(path) == TURNED and os.listdir(path.parent) == ["keys"]


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"not a key\n", b"A" * (keyfile.BYTES_MAX + 1)])
def test_what_is_no_key_file_is_refused_by_its_path(path: Path, content: bytes | None) -> None:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ConfigError):
        KeyFile(path)


def test_a_change_is_told_once(path: Path) -> None:
    write(path, ONE)
    watched = KeyFile(path)
    assert watched.keyring == ONE and watched.changed() is None
    write(path, BOTH)
    assert watched.changed() == BOTH == watched.keyring
    assert watched.changed() is None
    write(path, BOTH)  # another file that says the same
    assert watched.changed() is None


def test_a_file_that_is_not_good_leaves_the_keys_as_they_are_and_is_told_once(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(path, ONE)
    watched = KeyFile(path)
    path.write_text(text_of(BOTH) + "half a k")
    assert watched.changed() is None and watched.changed() is None
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    path.unlink()
    assert watched.changed() is None and watched.keyring == ONE
    write(path, BOTH)
    assert watched.changed() == BOTH
    for key in (A, B):
        assert key.secret.hex() not in caplog.text and text_of(Keyring([key])).strip() not in caplog.text


def test_a_secret_that_kubernetes_replaces_by_moving_a_link(tmp_path: Path) -> None:
    for name, ring in (("..1", ONE), ("..2", BOTH)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "keys", ring)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "keys").symlink_to("..data/keys")
    watched = KeyFile(tmp_path / "keys")
    assert watched.keyring == ONE
    (tmp_path / "..new").symlink_to("..2")
    os.replace(tmp_path / "..new", tmp_path / "..data")
    assert watched.changed() == BOTH


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path / "no" / "keys", ONE)
    (tmp_path / "keys").mkdir()
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path / "keys", ONE)
    assert os.listdir(tmp_path) == ["keys"]
