"""Engine memory as the agent maps it: never more than there is, and not unmapped while a job uses it."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pkv.agent.regions import MappedRegion
from p2pkv.errors import Busy, InvalidArgument
from p2pkv.wire.engine import MapRegion

SLOT = 4096
SLOTS = 8


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("test-region")
    os.ftruncate(fd, SLOTS * SLOT)
    yield fd
    os.close(fd)


def test_a_slot_lies_where_it_should(memory: int) -> None:
    region = MappedRegion(memory, MapRegion(1, SLOT, SLOT, SLOTS - 1))
    first, second = region.addresses([0, 1])
    assert second - first == SLOT
    assert region.addresses([SLOTS - 2]) == [first + (SLOTS - 2) * SLOT]
    assert region.addresses([]) == []
    asyncio.run(region.close())


@pytest.mark.parametrize(
    ("offset", "slot_bytes", "slots"),
    [(0, SLOT, SLOTS + 1), (SLOT, SLOT, SLOTS), (0, 0, 1), (0, SLOT, 0), (0, 1 << 63, 2), ((1 << 64) - SLOT, SLOT, 1),
     (1, SLOT, 1)],
)  # fmt: skip
def test_what_is_not_there_is_not_mapped(memory: int, offset: int, slot_bytes: int, slots: int) -> None:
    with pytest.raises(InvalidArgument):
        MappedRegion(memory, MapRegion(1, offset, slot_bytes, slots))


def test_only_memory_that_can_be_written_is_mapped(memory: int, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(SLOT))
    read_only = os.open(tmp_path / "f", os.O_RDONLY)
    read_end, write_end = os.pipe()
    try:
        for fd in (read_only, read_end):
            with pytest.raises(InvalidArgument):
                MappedRegion(fd, MapRegion(1, 0, SLOT, 1))
    finally:
        for fd in (read_only, read_end, write_end):
            os.close(fd)


@pytest.mark.parametrize("slots", [[SLOTS], [0, SLOTS], [0xFFFF_FFFF]])
def test_a_slot_outside_is_refused(memory: int, slots: list[int]) -> None:
    region = MappedRegion(memory, MapRegion(1, 0, SLOT, SLOTS))
    with pytest.raises(InvalidArgument):
        region.addresses(slots)
    asyncio.run(region.close())


async def test_closing_waits_for_the_jobs_that_use_it_and_takes_no_new_ones(memory: int) -> None:
    region = MappedRegion(memory, MapRegion(1, 0, SLOT, SLOTS))
    with region:
        with region:
            closing = asyncio.ensure_future(region.close())
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not closing.done()
        with pytest.raises(InvalidArgument, match="unmapped"):
            region.addresses([0])
    await asyncio.wait_for(closing, 5)
    await region.close()


def test_that_the_agent_is_out_of_descriptors_is_not_the_engines_fault(
    memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that is told INVALID gives its agent up for good."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("p2pkv.agent.regions.mmap.mmap", fail)
    with pytest.raises(Busy):
        MappedRegion(memory, MapRegion(1, 0, SLOT, SLOTS))
