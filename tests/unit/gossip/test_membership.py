"""The member table: verdicts, slots, bounds; and the dial book: backoff, rest, oblivion."""

from __future__ import annotations

import random
from typing import Any

import pytest

from p2pkv.gossip.dialing import BACKOFF_MAX_S, DIALS_MAX, DialBook
from p2pkv.gossip.membership import MemberTable, State, Verdict
from p2pkv.wire.peer import Address


@pytest.fixture
def table(card: Any) -> MemberTable:
    return MemberTable(card(1, host="10.0.0.1"), members_max=3)


def test_verdicts(table: MemberTable, card: Any) -> None:
    assert table.judge(table.own) is Verdict.SELF
    assert table.judge(card(1, epoch=9)) is Verdict.TWIN
    assert table.judge(card(1, instance=9)) is Verdict.TWIN
    assert table.judge(card(2, epoch=3)) is Verdict.NEW
    row, _ = table.add(0.0, card(2, epoch=3))
    assert table.judge(card(2, epoch=3, host="elsewhere")) is Verdict.KNOWN
    assert table.judge(card(2, epoch=4)) is Verdict.RENEWED
    assert table.judge(card(2, epoch=2)) is Verdict.STALE
    assert table.judge(card(2, epoch=3, instance=9)) is Verdict.RENEWED  # nobody is there to object
    row.owner_conn = 5
    assert table.judge(card(2, epoch=3, instance=9)) is Verdict.DUPLICATE


def test_a_slot_is_reused_last_and_only_after_it_was_freed(table: MemberTable, card: Any) -> None:
    rows = [table.add(0.0, card(n))[0] for n in (2, 3)]
    slots = [table.take_slot(row) for row in rows]
    assert 0 not in slots and len(set(slots)) == 2
    assert [table.node_at(s) for s in slots] == [2, 3] and table.node_at(0) == 1
    table.free_slot(rows[0])
    assert table.node_at(slots[0]) is None
    third = table.add(0.0, card(4))[0]
    assert table.take_slot(third) not in slots
    table.check_integrity()


def test_a_full_table_gives_away_the_longest_gone_row_without_a_connection(table: MemberTable, card: Any) -> None:
    rows = [table.add(float(n), card(n))[0] for n in (2, 3, 4)]
    for row in rows:
        row.reader_conns = (row.card.node,)
    assert table.judge(card(9)) is Verdict.FULL
    rows[1].reader_conns = rows[2].reader_conns = ()
    rows[2].state = State.LEFT
    assert table.judge(card(9)) is Verdict.NEW
    assert table.add(9.0, card(9))[1] is rows[2]
    assert table.add(9.0, card(10))[1] is rows[1]
    assert table.judge(card(11)) is Verdict.NEW  # 9 and 10 have no connection either


def make_book(targets_max: int = 100) -> DialBook:
    return DialBook(targets_max=targets_max, purge_s=10.0, rng=random.Random(1))


def nobody(_: int) -> bool:
    return False


def test_failures_back_off_to_a_bound_with_jitter() -> None:
    book, now, waits = make_book(), 0.0, []
    book.seed(now, "static", [Address("a", 1)])
    for conn in range(12):
        (target,) = book.due(now, nobody)
        book.dialing(target, conn)
        assert not book.due(now, nobody)
        book.failed(now, conn)
        waits.append(target.next_at - now)
        now = target.next_at
    assert waits[0] <= 0.05 and BACKOFF_MAX_S / 2 <= waits[-1] <= BACKOFF_MAX_S
    assert len(set(waits)) == len(waits)


def test_hearsay_that_never_answers_is_forgotten_and_a_seed_is_not() -> None:
    book, now = make_book(), 0.0
    book.seed(now, "static", [Address("seed", 1)])
    book.learn(now, Address("rumour", 1))
    for conn in range(100):
        for target in book.due(now, nobody):
            book.dialing(target, id(target) + conn)
            book.failed(now, id(target) + conn)
        now += 0.5
    assert [t.address.host for t in book] == ["seed"]


def test_a_seed_that_its_source_no_longer_names_becomes_hearsay() -> None:
    book = make_book()
    book.seed(0.0, "dns", [Address("a", 1), Address("b", 1)])
    book.seed(5.0, "dns", [Address("b", 1)])
    assert {t.address.host: t.sources for t in book} == {"a": set(), "b": {"dns"}}


def test_wildcards_and_no_port_are_no_addresses() -> None:
    book = make_book()
    for address in (Address("0.0.0.0", 1), Address("::", 1), Address("", 1), Address("a", 0)):
        assert book.learn(0.0, address) is None
    assert len(book) == 0


def test_an_address_rests_while_its_node_is_connected_and_is_tried_when_it_is_lost() -> None:
    book = make_book()
    target = book.learn(0.0, Address("a", 1))
    assert target is not None
    book.dialing(target, 1)
    book.answered(0.0, 1, node=7)
    assert not book.due(9.0, lambda node: node == 7)
    book.lost(9.0, 7)
    assert book.due(9.1, nobody) == [target]


def test_dials_at_the_same_time_and_targets_are_bounded() -> None:
    book = make_book(targets_max=DIALS_MAX + 20)
    book.seed(0.0, "dns", [Address(f"h{i}", 1) for i in range(DIALS_MAX + 50)])
    assert len(book) == DIALS_MAX + 20
    due = book.due(0.0, nobody)
    assert len(due) == DIALS_MAX
    for i, target in enumerate(due):
        book.dialing(target, i)
    assert not book.due(0.0, nobody)
