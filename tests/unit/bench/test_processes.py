"""The processes beside the agents, and the command's exit codes."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from p2pkv.bench import fetch
from p2pkv.bench.child import Child, environment
from p2pkv.bench.memcpy import Memcpy
from p2pkv.bench.raw_tcp import RawTcp
from p2pkv.bench.report import Report, at_most, make_report
from p2pkv.cli.app import command
from p2pkv.errors import Unavailable


def test_raw_tcp_fills_the_callers_buffers() -> None:
    buffers = [memoryview(bytearray(1 << 16)) for _ in range(3)]
    with RawTcp(1 << 18) as tcp:
        assert tcp.read(buffers) > 0
        assert all(buffer == b"\x5a" * (1 << 16) for buffer in buffers)
        assert tcp.read(buffers[:1]) > 0


def test_memcpy_fills_the_callers_buffers() -> None:
    buffers = [memoryview(bytearray(1 << 10)) for _ in range(2)]
    assert Memcpy(1 << 11).read(buffers) > 0
    assert all(buffer == b"\xa5" * (1 << 10) for buffer in buffers)


def test_a_child_that_ends_is_an_error_and_not_a_hang() -> None:
    with Child("raw_tcp", "not a number") as child, pytest.raises(Unavailable, match="ended"):
        child.line()


def test_settings_of_this_process_do_not_reach_the_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PKV_STORE_CAPACITY", "1MiB")
    assert "P2PKV_STORE_CAPACITY" not in environment()
    assert environment({"A": "b"})["A"] == "b"


@pytest.mark.parametrize(("value", "check", "code"), [(1.0, True, 0), (3.0, True, 1), (3.0, False, 0)])
def test_the_exit_code_says_that_a_claim_does_not_hold_if_asked(
    monkeypatch: pytest.MonkeyPatch, value: float, check: bool, code: int
) -> None:
    def run(**_: object) -> Report:
        return make_report("fetch", [], [at_most("a", value, 2.0, "x", "")])

    monkeypatch.setattr(fetch, "run", run)
    flags = ["--check"] if check else []
    result = CliRunner().invoke(command(), ["bench", "fetch", "--json", *flags])
    assert result.exit_code == code
    assert json.loads(result.stdout)["claims"][0]["ok"] is (value <= 2.0)
