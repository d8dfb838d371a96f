"""Others' systems beside ours: what is asked of whoever is to be measured, and that bytes are looked at."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from p2pkv.bench import fetch, rivals
from p2pkv.bench.report import Report, Times, make_report, times
from p2pkv.bench.rival_child import Ring, Shape, block, first_line, seconds_of
from p2pkv.cli.app import command
from p2pkv.errors import IntegrityError, InvalidArgument, Unavailable

SHAPE = Shape(block_bytes=1 << 10, ring_blocks=3, batch=2)


def test_a_rival_that_nobody_knows_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="unknown rival"):
        rivals.choose(["nobody"], ["tcp"])


@pytest.mark.parametrize("name", rivals.RIVALS)
def test_a_rival_without_its_wheel_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(Unavailable, match="not installed") as caught:
        rivals.choose([name], ["tcp", "nixl"])
    assert caught.value.context == {"rival": name}
    assert "make rivals" in caught.value.hint


def test_a_rival_beside_a_transport_that_is_not_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: object())
    with pytest.raises(InvalidArgument, match="transport is not measured") as caught:
        rivals.choose(["kvcr"], ["tcp"])
    assert "--transport nixl" in caught.value.hint


def test_a_rival_that_cannot_run_here_says_why() -> None:
    child = SimpleNamespace(line=lambda: "cannot ImportError: libibverbs.so.1: no such file")
    with pytest.raises(Unavailable, match="cannot run here") as caught:
        first_line("mooncake", child, rivals.RIVALS["mooncake"].needs)
    assert "apt-get install libibverbs1" in caught.value.hint
    assert caught.value.context["why"] == "ImportError: libibverbs.so.1: no such file"


def test_a_wheel_that_cannot_be_loaded_is_an_answer_and_not_a_traceback() -> None:
    program = "from p2pkv.bench.rival_child import load; load('p2pkv.no_such')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "cannot ModuleNotFoundError: No module named 'p2pkv.no_such'\n"


def test_answers_are_seconds_or_a_failure_and_wrong_bytes_end_the_run() -> None:
    assert seconds_of("kvcr", "ok 0.25") == 0.25
    assert seconds_of("kvcr", "failed") is None
    with pytest.raises(IntegrityError, match="not the block's"):
        seconds_of("kvcr", "wrong")


def _ring(memory: bytearray, asked: list[list[int]]) -> Ring:
    def read(numbers: Sequence[int]) -> bool:
        asked.append(list(numbers))
        for place, number in enumerate(numbers):
            memory[place << 10 : (place + 1) << 10] = block(1 << 10, number)
        return True

    return Ring(SHAPE, memoryview(memory), read)


def test_a_reader_goes_round_the_ring_and_looks_at_every_block() -> None:
    asked: list[list[int]] = []
    memory = bytearray(2 << 10)
    ring = _ring(memory, asked)
    assert [ring.get(blocks).partition(" ")[0] for blocks in (1, 2, 2)] == ["ok"] * 3
    assert asked == [[0], [1, 2], [0, 1]]


def test_bytes_of_the_block_before_are_wrong() -> None:
    memory = bytearray(2 << 10)
    memory[: 1 << 10] = block(1 << 10, 0)
    ring = Ring(SHAPE, memoryview(memory), lambda numbers: True)  # it says that all came, and nothing did
    assert ring.get(1).startswith("ok ")
    assert ring.get(1) == "wrong"


def test_blocks_that_did_not_come_are_no_sample() -> None:
    assert Ring(SHAPE, memoryview(bytearray(2 << 10)), lambda numbers: False).get(2) == "failed"


def _row(case: str, way: str, seconds: float, transport: str = "tcp") -> Times:
    return times([seconds], case=case, way=way, transport=transport, blocks=1, block_bytes=1 << 20)


def _claims(rows: list[Times]) -> dict[str, tuple[float | None, bool]]:
    found = fetch.claims_of(rows)
    return {claim.id: (claim.value, claim.ok) for claim in found if claim.id.rpartition("_")[2] in rivals.RIVALS}


def test_faster_than_mooncake_is_claimed_of_the_sizes_of_the_issue_and_as_fast_is_not_faster() -> None:
    ours = [_row("256KiB", "get_into", 0.8), _row("1MiB", "get_into", 1.0), _row("16x1MiB", "get_into", 9.0)]
    theirs = [_row(case, "mooncake", 1.0) for case in ("256KiB", "1MiB", "16x1MiB")]
    assert _claims(ours + theirs) == {
        "fetch.tcp.256KiB.over_mooncake": (0.8, True),
        "fetch.tcp.1MiB.over_mooncake": (1.0, False),
        "fetch.tcp.4MiB.over_mooncake": (None, False),
    }


def test_nothing_is_claimed_over_a_rival_that_was_not_measured() -> None:
    assert _claims([_row("1MiB", "get_into", 1.0), _row("1MiB", "get_into", 1.0, "nixl")]) == {}


def test_a_rivals_row_is_no_way_of_ours_and_ours_are_over_it() -> None:
    case = fetch.Case("1MiB", 1, 1)
    phase = fetch.Phase(1 << 20, 1, 1, (case,))
    samples = {("1MiB", way): fetch.Samples() for way in ("get_into", "load", "raw_tcp", "mooncake")}
    for number, sample in enumerate(samples.values(), 1):
        sample.seconds.append(float(number))
    rows = {row.way: row.over for row in fetch.rows_of(case, phase, "tcp", samples)}
    assert rows == {
        "raw_tcp": {},
        "mooncake": {},
        "get_into": {"raw_tcp": 0.3333, "mooncake": 0.25},
        "load": {"raw_tcp": 0.6667, "mooncake": 0.5},
    }


def test_the_command_takes_a_list_of_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def run(**arguments: object) -> Report:
        asked.append((arguments["transports"], arguments["rival"]))
        return make_report("fetch", [], [])

    monkeypatch.setattr(fetch, "run", run)
    arguments = ["bench", "fetch", "--transport", "tcp,nixl", "--rival", "mooncake, kvcr", "--json"]
    assert CliRunner().invoke(command(), arguments).exit_code == 0
    assert asked == [(["tcp", "nixl"], ["mooncake", "kvcr"])]


@pytest.fixture(params=rivals.RIVALS)
def here(request: pytest.FixtureRequest) -> Iterator[str]:
    """A rival that can run here."""
    try:
        rivals.choose([request.param], ["tcp", "nixl"])
    except Unavailable as error:
        pytest.skip(str(error))
    yield request.param


def test_a_rival_that_is_there_delivers_the_rings_blocks_and_is_gone_afterwards(here: str) -> None:
    with rivals.RIVALS[here].start(Shape(block_bytes=1 << 16, ring_blocks=6, batch=3)) as rival:
        taken = [rival.read(blocks) for blocks in (1, 3, 1, 2)]
        pids = [child.pid for child in rival._children]
    assert all(seconds is not None and seconds > 0 for seconds in taken)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
