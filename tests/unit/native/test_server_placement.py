"""Where the thread that sends runs, on a host of two processors: beside the reader, who says where it waits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pkv.wire.limits import NO_PROCESSOR
from p2pkv.wire.peer import CODEC, Get
from tests.unit.native.serving import Owner, Reader, layout_of, until

HERE = sorted(os.sched_getaffinity(0))
SMALL, LARGE = layout_of(4096), layout_of(512 << 10)

pytestmark = pytest.mark.skipif(len(HERE) < 2, reason="this host lends one processor: nothing can be put anywhere")


@pytest.fixture
def owner() -> Iterator[Owner]:
    """As made by a process that may use two processors."""
    os.sched_setaffinity(0, HERE[:2])
    try:
        made = Owner()
    finally:
        os.sched_setaffinity(0, HERE)
    with made:
        yield made
        until(made.idle)


def sends_on() -> set[int]:
    """Where the thread that sends may run."""
    [thread] = [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text() == "p2pkv-serve\n"]
    return os.sched_getaffinity(int(thread.name))


def get(reader: Reader, namespace: int, blocks: dict[bytes, bytes], processor: int) -> None:
    reader.sock.sendall(CODEC.encode(Get(namespace, list(blocks), 10_000, processor)))
    assert reader.answer().payloads == list(blocks.values())


def test_a_large_answer_is_sent_from_where_the_reader_does_not_wait(owner: Owner) -> None:
    first, second = HERE[:2]
    large, small = owner.put(LARGE, 1), owner.put(SMALL, 1)
    with owner.connect(same_host=True) as reader:
        for waits, sends in ((first, second), (second, first)):
            get(reader, LARGE.namespace, large, waits)
            assert sends_on() == {sends}
            for space, blocks in ((LARGE.namespace, large), (SMALL.namespace, small)):
                get(reader, space, blocks, NO_PROCESSOR)
                assert sends_on() == {sends}, "who does not say where it waits changes nothing"
        get(reader, SMALL.namespace, small, first)
        assert sends_on() == {first, second}


def test_for_a_reader_on_another_host_nothing_is_moved(owner: Owner) -> None:
    large = owner.put(LARGE, 1)
    before = sends_on()
    with owner.connect(same_host=False) as reader:
        get(reader, LARGE.namespace, large, HERE[0])
    assert sends_on() == before
