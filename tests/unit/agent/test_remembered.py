"""What is kept of others over a restart: written when it may be, ended when it must be, and forgotten node by node."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from p2pkv.agent import remembered as module
from p2pkv.agent.remembered import Remembered
from p2pkv.gossip.views import PeerView, State
from p2pkv.index.dump import Interrupted
from p2pkv.index.hashing import pack_keys
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import Layout, NodeId, Tier
from p2pkv.wire.peer import Address, Card

KEYS = pack_keys(range(100))
LAYOUT = Layout(model="m", revision="1", kv_dtype="float16", block_tokens=16, block_bytes=4096)


def peer(node: int, slot: int | None = 1, **changes: object) -> PeerView:
    card = Card(node, 7, Address("10.0.0.1", node), "", "host", [LAYOUT], ["tcp"])
    view = PeerView(
        node=NodeId(node), epoch=7, address=card.address, state=State.ALIVE, age_ms=5.0, seq=3, entries=100, card=card,
        rtt_ms=None, conflicts=(), slot=slot, proven_ms=5.0,
    )  # fmt: skip
    return replace(view, **changes)  # type: ignore[arg-type]


def index_of(*slots: int) -> PrefixIndex:
    index = PrefixIndex()
    for slot in slots:
        index.apply(slot, KEYS, Tier.DRAM)
    return index


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "index.dump")


async def loaded(path: str, *known: PeerView, purge_s: float = 60.0) -> Remembered:
    made = Remembered(path, purge_s=purge_s)
    await made.load(lambda: known)
    return made


async def saved(path: str, *peers: PeerView) -> None:
    made = await loaded(path)
    await made.save(index_of(*(p.slot for p in peers if p.slot is not None)), peers)
    assert (made.saves, made.failures) == (1, 0)


async def test_peers_come_back_with_what_they_had(path: str) -> None:
    await saved(path, peer(10, 1), peer(11, 2))
    again = await loaded(path)
    assert sorted(int(recalled.node) for recalled in again) == [10, 11]
    assert [(int(recalled.node), row.depth) for recalled, row in again.match(KEYS)] == [(10, 100), (11, 100)]
    assert list(again.layouts) == [LAYOUT]
    assert all(0 < recalled.age_ms < 60_000 for recalled in again)


async def test_of_whom_nothing_is_known_nothing_is_written(path: str) -> None:
    await saved(path, peer(10, None), peer(11, 2, proven_ms=None), peer(12, 3, entries=0), peer(13, 4))
    assert [int(recalled.node) for recalled in await loaded(path)] == [13]


async def test_the_age_is_that_of_the_last_proof(path: str) -> None:
    await saved(path, peer(10, age_ms=1.0, proven_ms=90_000.0))
    [recalled] = await loaded(path)
    assert 90_000 <= recalled.age_ms < 150_000


async def test_what_is_too_old_is_not_loaded(path: str) -> None:
    await saved(path, peer(10, 1, proven_ms=module.AGE_MAX_S * 1e3 + 1), peer(11, 2))
    assert [int(recalled.node) for recalled in await loaded(path)] == [11]


async def test_a_card_that_is_too_long_leaves_out_its_node_only(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NOTE_BYTES_MAX", 400)
    long = replace(peer(10), card=Card(10, 7, Address("h" * 300, 1), "", "x" * 200, [], []))
    await saved(path, long, peer(11, 2))
    monkeypatch.undo()
    assert [int(recalled.node) for recalled in await loaded(path)] == [11]


@pytest.mark.parametrize(
    ("heard", "forgotten"),
    [
        (peer(10), True),
        (peer(10, state=State.UNREACHABLE), False),
        (peer(10, state=State.LEFT), True),
        (peer(10, state=State.UNREACHABLE, epoch=8), True),  # another life
        (peer(11), False),
        (replace(peer(11), address=Address("10.0.0.1", 10)), True),  # another node in its place
        (replace(peer(11, state=State.UNREACHABLE), address=Address("10.0.0.1", 10)), False),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_node_is_forgotten_when_it_is_heard_from(
    path: str, heard: PeerView, forgotten: bool, when: str
) -> None:
    await saved(path, peer(10, 1), peer(12, 2))
    made = await loaded(path, *([heard] if when == "before" else []))
    made.heard(heard)
    assert sorted(int(recalled.node) for recalled in made) == ([12] if forgotten else [10, 12])
    assert [int(recalled.node) for recalled, _ in made.match(KEYS)] == ([12] if forgotten else [10, 12])


async def test_nothing_is_written_over_a_dump_that_says_more(path: str) -> None:
    await saved(path, peer(10))
    before = Path(path).read_bytes()
    made = await loaded(path)
    await made.save(PrefixIndex(), [])
    assert made.saves == 0 and Path(path).read_bytes() == before
    made.heard(peer(10))
    await made.save(PrefixIndex(), [])
    assert made.saves == 1 and Path(path).read_bytes() != before


async def test_nothing_is_written_over_a_dump_that_has_not_been_read(path: str) -> None:
    await saved(path, peer(10))
    before = Path(path).read_bytes()
    made = Remembered(path, purge_s=60.0)
    loading = asyncio.create_task(made.load(tuple))
    await made.save(PrefixIndex(), [])
    await asyncio.sleep(0)
    await made.save(PrefixIndex(), [])
    await loading
    assert made.saves == 0 and Path(path).read_bytes() == before and len(made) == 1


async def test_time_takes_all_that_did_not_come_back(path: str) -> None:
    await saved(path, peer(10))
    made = await loaded(path, purge_s=0.0)
    assert len(made) == 1
    made.tick()
    assert len(made) == 0 and list(made.match(KEYS)) == []


async def test_an_error_of_any_kind_is_counted_and_work_goes_on(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await loaded(path)

    def fails(*_: object, **__: object) -> int:
        raise MemoryError("no more")

    monkeypatch.setattr(module, "dump", fails)
    await made.save(PrefixIndex(), [])
    assert (made.saves, made.failures) == (0, 1)
    monkeypatch.undo()
    await made.save(PrefixIndex(), [])
    assert (made.saves, made.failures) == (1, 1)


@pytest.mark.parametrize("work", ["load", "dump"])
async def test_stopping_ends_what_is_under_way(path: str, work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given its time first if it writes; and whoever looks at nothing any more is left alone."""
    ended = threading.Event()

    def slow(*_: object, over: object, **__: object) -> None:
        while not over():  # type: ignore[operator]
            time.sleep(0.001)
        ended.set()
        raise Interrupted("enough")

    made = await loaded(path) if work == "dump" else Remembered(path, purge_s=60.0)
    monkeypatch.setattr(module, work, slow)
    task = asyncio.create_task(made.save(PrefixIndex(), []) if work == "dump" else made.load(tuple))
    await asyncio.sleep(0)
    began = time.monotonic()
    await made.stop(0.1)
    assert ended.is_set() and time.monotonic() - began < 5.0
    await task
    await made.save(PrefixIndex(), [])
    assert made.saves == 0


async def test_a_disk_that_hangs_keeps_nobody_from_stopping(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(module, "dump", lambda *_, **__: hangs.wait(30.0))
    made = await loaded(path)
    task = asyncio.create_task(made.save(PrefixIndex(), []))
    await asyncio.sleep(0)
    began = time.monotonic()
    await made.stop(0.05)
    assert time.monotonic() - began < 5.0 and not task.done()
    hangs.set()
    await task


async def test_without_a_path_nothing_is_done() -> None:
    made = await loaded("")
    await made.save(index_of(1), [peer(10)])
    await made.stop(0.0)
    assert (made.saves, made.failures, len(made)) == (0, 0, 0)
