"""What the demo promises: each promise fails by itself, and is printed as it is judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from p2pkv.demo.report import Run, table
from p2pkv.demo.run import judge

PREFIX_TOKENS = 4096


def run(how: str, **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "prompt": 0, "how": how, "replica": "B", "ttft_s": 10.0, "cached_tokens": 0, "from_local_tokens": 0,
        "from_peer_tokens": 0, "bytes_moved": 0, "pull_s": 0.0, "tokens": [1, 2, 3],
    }  # fmt: skip
    return Run(**(fields | changes))


@dataclass
class Case:
    """Changes of a pulled run, and the promise that they break; empty = none."""

    changes: dict[str, Any]
    broken: str = ""


@pytest.mark.parametrize(
    "case",
    [
        Case({}),
        Case({"tokens": [1, 2, 4]}, "demo.tokens_differ"),
        Case({"from_peer_tokens": 3840}, "demo.pulled_share_of_full_blocks"),
        Case({"ttft_s": 3.6}, "demo.ttft_pulled_over_recomputed"),
    ],
)
def test_a_promise_is_broken_by_one_run_of_many(case: Case) -> None:
    good = {"ttft_s": 0.5, "from_peer_tokens": PREFIX_TOKENS, "bytes_moved": 64 << 20, "pull_s": 0.2}
    runs = [run("cold", replica="A"), run("recomputed"), run("pulled", **good)]
    runs += [msgspec.structs.replace(each, prompt=1) for each in runs]
    runs[-1] = msgspec.structs.replace(runs[-1], **case.changes)
    outcome = judge(runs, PREFIX_TOKENS, asked="auto", used="tcp")
    assert [promise.id for promise in outcome.promises if not promise.ok] == ([case.broken] if case.broken else [])
    assert outcome.ok is not bool(case.broken)
    shown = table(outcome)
    assert ("FAIL" in shown, "DIFFER" in shown) == (bool(case.broken), "tokens" in case.changes)


def test_another_transport_than_asked_for_breaks_a_promise() -> None:
    runs = [run("recomputed"), run("pulled", ttft_s=0.1, from_peer_tokens=PREFIX_TOKENS)]
    assert judge(runs, PREFIX_TOKENS, asked="tcp", used="tcp").ok
    assert not judge(runs, PREFIX_TOKENS, asked="nixl", used="tcp").ok


def test_a_demo_that_measured_nothing_keeps_no_promise_and_has_a_json_form() -> None:
    outcome = judge([], PREFIX_TOKENS, asked="auto", used="none")
    assert not outcome.ok
    assert msgspec.json.decode(msgspec.json.encode(outcome))["runs"] == []
