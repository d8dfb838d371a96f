"""Where threads are put that serve an engine, on a host of two processors."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from p2pkv import _native
from p2pkv.wire.limits import NO_PROCESSOR

HERE = sorted(os.sched_getaffinity(0))
two = pytest.mark.skipif(len(HERE) < 2, reason="this host lends one processor: nothing can be put anywhere")
more = pytest.mark.skipif(
    len(HERE) < 3, reason="this host lends at most two processors: what happens with more is not seen"
)


class Threads:
    """Two threads that do nothing."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._over.wait) for _ in range(2)]
        for thread in self._threads:
            thread.start()
        self.reader, self.checker = (thread.native_id or 0 for thread in self._threads)

    def allowed(self) -> tuple[set[int], set[int]]:
        return os.sched_getaffinity(self.reader), os.sched_getaffinity(self.checker)

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads()
    yield made
    made.end()


def placement(processors: list[int]) -> _native.Placement:
    """As made by a process that may use these."""
    os.sched_setaffinity(0, processors)  # this thread's
    try:
        return _native.Placement()
    finally:
        os.sched_setaffinity(0, HERE)


@two
def test_the_reader_gets_the_processor_that_the_engine_does_not_wait_on(threads: Threads) -> None:
    first, second = HERE[:2]
    made = placement([first, second])
    for engine, other in [(first, second), (second, first), (second, first), (first, second)]:
        made.arrange(engine, threads.reader, threads.checker)
        assert threads.allowed() == ({other}, {engine})


@two
def test_a_reader_that_replaces_another_is_put_there_too(threads: Threads) -> None:
    first, second = HERE[:2]
    made = placement([first, second])
    made.arrange(first, 0, threads.checker)
    assert threads.allowed() == (set(HERE), {first}), "0 is nobody, not the caller"
    assert os.sched_getaffinity(0) == set(HERE)
    made.arrange(first, threads.reader, threads.checker)
    assert threads.allowed() == ({second}, {first})


@two
def test_who_is_given_up_runs_everywhere_again_and_can_be_put_there_again(threads: Threads) -> None:
    first, second = HERE[:2]
    made = placement([first, second])
    made.give_up()
    assert threads.allowed() == (set(HERE), set(HERE)), "nobody had been put anywhere"
    for _ in range(2):
        made.arrange(first, threads.reader, threads.checker)
        assert threads.allowed() == ({second}, {first})
        made.give_up()
        assert threads.allowed() == ({first, second}, {first, second})


@two
def test_nothing_is_done_for_an_engine_that_is_elsewhere_or_does_not_say(threads: Threads) -> None:
    made = placement(HERE[:2])
    for engine in (NO_PROCESSOR, max(HERE) + 1, 1 << 31):
        made.arrange(engine, threads.reader, threads.checker)
        assert threads.allowed() == (set(HERE), set(HERE))


@pytest.mark.parametrize("count", [1, pytest.param(3, marks=more)])
def test_nothing_is_done_where_there_is_one_processor_or_one_to_spare(threads: Threads, count: int) -> None:
    placement(HERE[:count]).arrange(HERE[0], threads.reader, threads.checker)
    assert threads.allowed() == (set(HERE), set(HERE))


@two
def test_a_thread_that_has_ended_harms_nobody() -> None:
    threads = Threads()
    threads.end()
    placement(HERE[:2]).arrange(HERE[0], threads.reader, threads.checker)


@pytest.mark.parametrize("processors", [1, 2, 3, 4])
def test_from_four_processors_on_there_are_many(processors: int) -> None:
    """Asked once per process, so each is one of its own."""
    if processors > len(HERE):
        pytest.skip(f"this host lends {len(HERE)} processors")
    program = "from p2pkv import _native; print(_native.many_processors())"
    said = subprocess.run(
        [sys.executable, "-c", f"import os; os.sched_setaffinity(0, {HERE[:processors]}); {program}"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert said.stdout.split() == [str(processors >= 4)]
