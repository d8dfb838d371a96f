"""From rows to the promises of the issue, without an agent."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from p2pkv.bench import failover, fetch, idle, stress
from p2pkv.bench.progress import Progress
from p2pkv.bench.report import Times, times
from p2pkv.bench.stress_writer import BLOCK_BYTES, Counter, block_of, key_of
from p2pkv.client import Status
from p2pkv.errors import InvalidArgument, P2PKVError


def _row(transport: str, case: str, way: str, seconds: float) -> Times:
    return times([seconds], case=case, way=way, transport=transport, blocks=1, block_bytes=1 << 20)


def test_fetch_claims_are_of_a_way_over_the_limit_of_the_same_case_and_transport() -> None:
    rows = [
        *(_row("tcp", case, "raw_tcp", 1.0) for case in ("1MiB", "4MiB")),
        _row("tcp", "1MiB", "get_into", 1.5),
        _row("tcp", "1MiB", "load", 9.0),
        _row("tcp", "4MiB", "get_into", 1.4),
        _row("tcp", "64x1MiB", "raw_tcp", 0.9),
        _row("tcp", "64x1MiB", "get_into", 1.0),
        _row("tcp", "1MiB.local", "memcpy", 1.0),
        _row("tcp", "1MiB.local", "memcpy_region", 2.0),
        _row("tcp", "1MiB.local", "get_into", 1.25),
        _row("tcp", "1MiB.local", "load", 1.6),
        _row("tcp", "64KiB.local", "load", 99e-6),
    ]
    claims = {claim.id: claim for claim in fetch.claims_of(rows) if claim.value is not None}
    assert {id_: (claim.value, claim.ok) for id_, claim in claims.items()} == {
        "fetch.tcp.1MiB.over_raw_tcp": (1.5, True),
        "fetch.tcp.4MiB.over_raw_tcp": (1.4, False),
        "fetch.tcp.64x1MiB.of_raw_tcp": (0.9, True),
        "fetch.tcp.1MiB.local.of_memcpy": (0.8, False),
        "fetch.tcp.1MiB.local.load.of_memcpy_region": (1.25, True),
        "fetch.tcp.64KiB.local.load": (99.0, True),
    }


def test_a_case_that_was_not_measured_is_a_claim_that_does_not_hold() -> None:
    claims = fetch.claims_of([_row("nixl", "1MiB", "get_into", 2.0)])
    assert [(claim.id, claim.value, claim.ok) for claim in claims] == [
        (f"fetch.nixl.{case}.of_raw_nixl", None, False) for case in ("256KiB", "16x256KiB", "16x1MiB", "64x1MiB")
    ]


def test_an_unknown_transport_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="no such transport"):
        fetch.choose(["carrier pigeon"], Progress())


def test_rounds_take_turns_and_large_cases_some_of_them() -> None:
    called: list[str] = []

    def call(name: str, seconds: float | None) -> fetch.Turn:
        def measured() -> float | None:
            called.append(name)
            return seconds

        return fetch.Case(name, 1, 4 if name == "large" else 1), "get_into", measured

    samples = fetch.interleave([call("small", 0.1), call("large", 0.2)], 8, "test", Progress())
    assert samples[("small", "get_into")].seconds == [0.1] * 8
    assert samples[("large", "get_into")].seconds == [0.2] * 2
    assert called.index("large") < 2  # in its round, not at the end


def test_a_way_that_mostly_fails_is_not_a_measurement() -> None:
    turn: fetch.Turn = (fetch.Case("small", 1, 1), "load", lambda: None)
    with pytest.raises(P2PKVError, match="too many gets failed"):
        fetch.interleave([turn], 10, "test", Progress())


def test_a_ring_is_larger_than_what_the_reader_keeps_and_a_batch_fits_under_lease() -> None:
    for phase in fetch.PHASES:
        batch = max(case.blocks for case in phase.cases)
        assert phase.ring_blocks * phase.block_bytes - phase.reader_bytes >= batch * phase.block_bytes
        assert phase.reader_bytes >= 2 * batch * phase.block_bytes


def _kill(during: float, miss: float, status: Status = Status.MISS, then: float = 1e-3) -> failover.Kill:
    return failover.Kill([1e-4] * 1000, [during] * 1000, [1e-4] * 1000, 1e-3, 1e-3, miss, status, then, 1e-3, 1.0)


def _rounds(fault: str, kills: list[failover.Kill], size: int = failover.CAPACITY_BYTES) -> list[failover.Round]:
    return [failover.row_of(n, fault, size, kill) for n, kill in enumerate(kills)]


def _failover_claims(rows: list[failover.Round]) -> dict[str, tuple[float, bool]]:
    claims = failover.claims_of(rows)
    return {claim.id.removeprefix("failover."): (claim.value, claim.ok) for claim in claims if claim.value is not None}


def test_failover_claims_are_of_the_median_ratio_and_the_slowest_get_beyond_a_miss() -> None:
    killed = _rounds("killed", [_kill(1e-4, 0.011), _kill(1e-4, 0.201), _kill(9e-4, 0.011)])
    stopped = _rounds("stopped", [_kill(2e-4, 0.051, then=0.004)])
    assert _failover_claims(killed + stopped) == {
        "blocks_from_the_dead": (0.0, True),
        "killed.local_p99.during_over_before": (1.0, True),
        "killed.local_p99.after_over_before": (1.0, True),
        "killed.first_get": (200.0, False),
        "killed.then": (0.0, True),
        "stopped.local_p99.during_over_before": (2.0, False),
        "stopped.local_p99.after_over_before": (1.0, True),
        "stopped.first_get": (50.0, True),
        "stopped.then": (3.0, False),
    }


def test_a_full_arena_has_a_claim_of_its_own() -> None:
    rows = _rounds("killed", [_kill(1e-4, 0.011)]) + _rounds("killed", [_kill(9e-4, 0.301)], failover.FULL_BYTES)
    claims = _failover_claims(rows)
    assert claims["killed.local_p99.during_over_before"] == (1.0, True)
    assert claims["killed.first_get"] == (10.0, True)
    assert claims["killed.first_get.full_arena"] == (300.0, False)


def test_a_block_from_the_dead_is_never_right() -> None:
    assert _failover_claims(_rounds("killed", [_kill(1e-4, 0.01, Status.OK)]))["blocks_from_the_dead"] == (1.0, False)


def _idle(transport: str, total: float | None) -> idle.Idle:
    return idle.Idle(
        agent="owner",
        transport=transport,
        seconds=30,
        processes=2,
        agent_percent=total,
        children_percent=0.0,
        total_percent=total,
    )


def test_idle_claims_are_of_the_busier_agent_and_strict() -> None:
    claims = idle.claims_of([_idle("tcp", 0.5), _idle("tcp", 1.9), _idle("nixl", 2.0), _idle("nixl", 0.1)])
    assert [(claim.id, claim.value, claim.ok) for claim in claims] == [
        ("idle.tcp.agent", 1.9, True),
        ("idle.nixl.agent", 2.0, False),
    ]


def test_cpu_time_is_read_from_the_kernel_whatever_a_process_calls_itself(tmp_path: Path) -> None:
    ticks = idle.os.sysconf("SC_CLK_TCK")
    for pid, children in ((7, "8"), (8, "9"), (9, "")):
        task = tmp_path / str(pid) / "task" / str(pid)
        task.mkdir(parents=True)
        (task / "children").write_text(children)
        fields = ["S", *["0"] * 10, str(3 * ticks), str(2 * ticks), *["0"] * 30]
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a ) b) {' '.join(fields)}")
    assert list(idle.descendants(7, tmp_path)) == [8, 9]
    assert idle.process_seconds(7, tmp_path) == 5.0


def test_a_block_can_be_told_by_its_key(tmp_path: Path) -> None:
    keys = [key_of(number) for number in range(100)]
    assert len(set(keys)) == 100
    assert len(block_of(keys[0])) == BLOCK_BYTES
    ours, theirs = Counter(tmp_path / "count"), Counter(tmp_path / "count")
    ours.value = 12
    assert theirs.value == 12


def test_stress_claims_count_wrong_blocks_and_that_there_was_stress() -> None:
    row = stress.Stress(
        transport="tcp", block_bytes=1, reads=10, delivered=9, pulled=8, from_memory=1, wrong=1, rejected=0, missed=1,
        missed_at_owner=0, timed_out=0, pauses=0, held_blocks=0,
        owner_stops=1, owner_kills=1, written=5, evicted=3, seconds=1.0, pulled_per_s=8.0,
        gb_s=0.1,
    )  # fmt: skip
    assert [claim.id for claim in stress.claims_of(row, 8) if not claim.ok] == ["stress.wrong", "stress.held_blocks"]
    assert [claim.id for claim in stress.claims_of(row, 9) if not claim.ok] == [
        "stress.wrong", "stress.pulled", "stress.held_blocks"
    ]  # fmt: skip
    from_memory = replace(row, transport="memory")
    assert stress.claims_of(from_memory, 100)[-1].ok and not stress.claims_of(from_memory, 200)[-1].ok
