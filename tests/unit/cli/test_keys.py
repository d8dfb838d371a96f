"""``p2pkv keys``: a key file is made once, and rotated in three steps; nothing ever shows a secret."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from p2pkv.cli import main


def keys(capsys: pytest.CaptureFixture[str], *arguments: Any, code: int = 0) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        main(["keys", *map(str, arguments), "--json"])
    assert ended.value.code == code
    captured = capsys.readouterr()
    answer: dict[str, Any] = json.loads(captured.out or captured.err)
    return answer


def test_a_rotation_from_its_beginning_to_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    first = keys(capsys, "generate", "--file", path)["in_use"]
    assert path.stat().st_mode & 0o777 == 0o600
    installed = keys(capsys, "install", "--file", path)
    assert installed["in_use"] == first and len(installed["installed"]) == 2
    second = next(name for name in installed["installed"] if name != first)
    assert keys(capsys, "use", second, "--file", path)["in_use"] == second
    assert keys(capsys, "remove", first, "--file", path) == {"in_use": second, "installed": [second]}
    assert keys(capsys, "list", "--file", path) == {"in_use": second, "installed": [second]}


def test_a_key_goes_from_one_file_to_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    first = keys(capsys, "generate", "--file", one)["in_use"]
    keys(capsys, "generate", "--file", other)
    assert first in keys(capsys, "install", "--file", other, "--from", one)["installed"]


def test_what_cannot_be_is_refused_with_a_hint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    only = keys(capsys, "generate", "--file", path)["in_use"]
    for arguments in (
        ("generate", "--file", path), ("remove", only, "--file", path), ("use", "00000000", "--file", path),
        ("use", "no hex", "--file", path), ("list", "--file", tmp_path / "none"),
    ):  # fmt: skip
        assert keys(capsys, *arguments, code=2)["error"]["message"]


def test_no_secret_is_ever_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "keys"
    shown = str(keys(capsys, "generate", "--file", path)) + str(keys(capsys, "install", "--file", path))
    for line in path.read_text().split():
        assert line not in shown and base64.b64decode(line).hex() not in shown
