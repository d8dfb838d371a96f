"""The table of answers that keeps lookups off the socket. Needs no vLLM."""

from __future__ import annotations

import pytest

from p2pkv.connectors._vllm_lookup import Answer, LookupTable

KEYS = [bytes([i]) * 8 for i in range(6)]
POSITIONS = {key: 16 * (i + 1) for i, key in enumerate(KEYS)}


@pytest.fixture
def table() -> LookupTable:
    return LookupTable(deadline_s=0.05, promised_max=3, requests_max=4, questions_max=3)


def ask(table: LookupTable, key: bytes, *, question: int, now: float, request: str = "a") -> list[bytes]:
    keys = table.to_ask(request, key, POSITIONS, 0)
    table.asked(request, keys, question, now)
    return keys


def test_the_first_question_is_for_the_key_and_everything_after_it(table: LookupTable) -> None:
    assert ask(table, KEYS[2], question=1, now=0.0) == KEYS[2:]


def test_a_group_scanned_backward_is_asked_for_whole_with_the_second_question(table: LookupTable) -> None:
    assert ask(table, KEYS[5], question=1, now=0.0) == KEYS[5:]
    assert sorted(ask(table, KEYS[4], question=2, now=0.0)) == KEYS[:5]


def test_a_key_without_a_position_is_asked_for_alone(table: LookupTable) -> None:
    assert table.to_ask("a", b"unknown-", POSITIONS, 0) == [b"unknown-"]


def test_answers_are_per_key_with_holes(table: LookupTable) -> None:
    ask(table, KEYS[0], question=1, now=0.0)
    assert table.check("a", KEYS[3], 0.01) is Answer.PENDING
    assert table.answered(1, ["local", None, "peer", None, "local", None], 0.02) == pytest.approx(0.02)
    found = [table.check("a", key, 0.03) for key in KEYS]
    assert found == [Answer.LOCAL, Answer.MISS, Answer.PEER, Answer.MISS, Answer.LOCAL, Answer.MISS]


def test_an_answer_is_for_its_own_request_only(table: LookupTable) -> None:
    ask(table, KEYS[0], question=1, now=0.0)
    table.answered(1, ["local"] * 6, 0.0)
    assert table.check("b", KEYS[0], 0.0) is Answer.UNKNOWN


def test_past_the_deadline_a_question_is_a_miss_for_good(table: LookupTable) -> None:
    ask(table, KEYS[0], question=1, now=0.0)
    assert table.check("a", KEYS[0], 0.049) is Answer.PENDING
    assert table.check("a", KEYS[0], 0.05) is Answer.MISS
    assert table.timeouts == 6
    assert table.answered(1, ["local"] * 6, 0.06) is None
    assert table.check("a", KEYS[0], 0.06) is Answer.MISS


def test_one_late_question_does_not_end_another(table: LookupTable) -> None:
    ask(table, KEYS[3], question=1, now=0.0)
    ask(table, KEYS[0], question=2, now=0.04)
    assert table.check("a", KEYS[3], 0.05) is Answer.MISS
    assert table.check("a", KEYS[0], 0.05) is Answer.PENDING


def test_a_failed_load_stays_a_miss_even_after_rescheduling(table: LookupTable) -> None:
    ask(table, KEYS[0], question=1, now=0.0)
    table.answered(1, ["local"] * 6, 0.0)
    table.load_failed("a", [KEYS[1]])
    table.scheduled("a")
    assert table.check("a", KEYS[1], 0.0) is Answer.MISS
    assert table.check("a", KEYS[0], 0.0) is Answer.UNKNOWN
    assert KEYS[1] not in table.to_ask("a", KEYS[0], POSITIONS, 0)


def test_scheduling_forgets_the_answers_and_finishing_everything(table: LookupTable) -> None:
    ask(table, KEYS[0], question=1, now=0.0)
    table.answered(1, ["local"] * 6, 0.0)
    table.scheduled("a")
    assert len(table) == 0
    table.loading("a")
    table.load_failed("a", KEYS)
    table.finished("a")
    assert len(table) == 0


def test_an_answer_for_a_finished_request_is_dropped(table: LookupTable) -> None:
    ask(table, KEYS[0], question=1, now=0.0)
    table.finished("a")
    assert table.answered(1, ["local"] * 6, 0.0) is None
    assert table.lost(1) == 0
    assert len(table) == 0


def test_a_lost_question_is_a_miss(table: LookupTable) -> None:
    ask(table, KEYS[0], question=1, now=0.0)
    assert table.lost(1) == 6
    assert table.check("a", KEYS[5], 0.0) is Answer.MISS


def test_a_refused_question_is_a_miss_until_the_request_is_scheduled(table: LookupTable) -> None:
    table.refused("a", KEYS)
    assert table.check("a", KEYS[0], 0.0) is Answer.MISS
    table.scheduled("a")
    assert table.check("a", KEYS[0], 0.0) is Answer.UNKNOWN


def test_requests_and_questions_are_bounded(table: LookupTable) -> None:
    for i in range(10):
        ask(table, KEYS[0], question=i, now=0.0, request=f"r{i}")
    assert len(table) == 4
    # The oldest questions were forgotten: their answers go nowhere, their requests time out.
    assert table.answered(6, ["local"] * 6, 0.0) is None
    assert table.answered(9, ["local"] * 6, 0.0) is not None


def test_a_request_is_promised_no_more_than_fits_and_each_block_once(table: LookupTable) -> None:
    assert [table.promise("a", key) for key in KEYS] == [True] * 3 + [False] * 3
    assert table.promise("a", KEYS[0])  # not loaded yet: the same promise
    assert table.promise("b", KEYS[5])
    table.loaded("a", KEYS[:1])
    assert not table.promise("a", KEYS[0])
    table.scheduled("a")
    assert table.promise("a", KEYS[0])
