"""What may be on its way at once, and whose turn it is."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from p2pkv.transport.admission import BACKGROUND_SHARE, Admission

LIMIT = 100


class Asker:
    """Wants pieces one after the other, and tries whenever it is told that it may."""

    def __init__(self, admission: Admission, sizes: list[int], *, background: bool = False) -> None:
        self.admission = admission
        self.sizes = sizes
        self.background = background
        self.in_flight: list[int] = []
        self.told = 0

    def tell(self) -> None:
        self.told += 1

    def ask(self) -> bool:
        if not self.sizes or not self.admission.take(self, self.sizes[0], self.tell, background=self.background):
            return False
        self.in_flight.append(self.sizes.pop(0))
        return True

    def land(self) -> None:
        self.admission.give_back(self.in_flight.pop(0), background=self.background)


def test_so_much_is_let_in_and_no_more() -> None:
    admission = Admission(LIMIT)
    one = Asker(admission, [40, 40, 40])
    assert [one.ask() for _ in range(3)] == [True, True, False]
    assert admission.used_bytes == 80 and admission.waiting == 1
    one.land()
    assert one.told == 1 and one.ask() and admission.waiting == 0


def test_a_piece_larger_than_everything_is_let_in_alone() -> None:
    admission = Admission(LIMIT)
    large, small = Asker(admission, [500]), Asker(admission, [1])
    assert large.ask() and not small.ask()
    large.land()
    assert small.ask()


def test_whoever_comes_later_does_not_pass_by_those_that_wait() -> None:
    admission = Admission(LIMIT)
    first, large, small = (Asker(admission, sizes) for sizes in ([100], [90], [1]))
    assert first.ask() and not large.ask() and not small.ask()
    first.land()
    assert not small.ask(), "it would fit, but it is not its turn"
    assert large.ask() and small.ask()


def test_requests_take_turns_piece_by_piece() -> None:
    admission = Admission(10)
    many, few = Asker(admission, [10] * 20), Asker(admission, [10] * 2)
    order = []
    assert many.ask()
    assert not few.ask() and not many.ask()
    for _ in range(6):
        (many if many.in_flight else few).land()
        for name, asker in (("many", many), ("few", few)):
            if asker.ask():
                order.append(name)
    assert Counter(order[:4]) == {"many": 2, "few": 2}


def test_who_leaves_the_line_lets_the_next_one_in() -> None:
    admission = Admission(LIMIT)
    first, second, third = (Asker(admission, [100]) for _ in range(3))
    first.ask(), second.ask(), third.ask()
    first.land()
    admission.leave(second)
    assert third.told == 1 and third.ask()
    admission.leave(third)  # does not wait: nothing happens


def test_the_background_takes_its_share_and_only_what_nobody_waits_for() -> None:
    admission = Admission(LIMIT)
    later = Asker(admission, [10] * 10, background=True)
    while later.ask():
        pass
    assert sum(later.in_flight) <= BACKGROUND_SHARE * LIMIT
    now = Asker(admission, [70, 30])
    assert now.ask() and not now.ask()
    later.land()
    assert not later.ask(), "somebody waits"
    later.land()
    assert now.ask()


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(1, 150)), max_size=80))
def test_what_is_used_is_what_is_in_flight(steps: list[tuple[int, bool, int]]) -> None:
    admission = Admission(LIMIT)
    askers = [Asker(admission, [], background=i == 4) for i in range(5)]
    for which, land, size in steps:
        asker = askers[which]
        if land and asker.in_flight:
            asker.land()
        elif not land:
            asker.sizes.append(size)
            asker.ask()
        used = sum(sum(each.in_flight) for each in askers)
        assert admission.used_bytes == used
        assert used <= LIMIT or sum(len(each.in_flight) for each in askers) == 1
