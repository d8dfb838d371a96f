"""Issue 2, done when 6: reads while the owner keeps evicting and reusing slots give no wrong byte, and what
keeps it so.

The mutation tests hold a read up between the owner's pin and the bytes' journey, and reuse every slot of the owner
meanwhile. With both guards the bytes are right; without the lease's hold the checksum rejects them; without either
wrong bytes are delivered.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from p2pkv.client.cache import Cache
from p2pkv.types import Status
from tests.cluster.agents import AgentProcess, Cluster, eventually, make_layout, state_of, visible
from tests.cluster.blocks import block_of, blocks_of, new_keys
from tests.cluster.proxy import Proxy
from tests.cluster.transports import NIXL, TCP, options

pytestmark = [pytest.mark.cluster]

BLOCK = 65_536
LAYOUT = make_layout(BLOCK)
READS = int(os.environ.get("P2PKV_TEST_READS", "100000"))
"""Blocks pulled from the peer, over both transports together; the issue's full figure is a million."""
BATCH = 48
HELD_UP = 256
WARM = 128
MUTANT = str(Path(__file__).with_name("mutant_agent.py"))


# ---------------------------------------------------------------------------------------------- the guards, taken out


@contextmanager
def held_up(kind: str, reader: AgentProcess, proxy: Proxy) -> Iterator[Callable[[], object]]:
    """Keep the bytes of the next pull from arriving. Gives what waits until the owner has pinned and is held up.

    tcp: the proxy passes another 100 kB on. nixl: the reader's NIXL process, which does the reading, stands still.
    """
    if kind == "tcp":
        proxy.hold_after = proxy.passed + 100_000
        try:
            yield lambda: proxy.holding.wait(10)
        finally:
            proxy.let_go()
        return
    [child] = reader.children()
    os.kill(child, signal.SIGSTOP)
    eventually(lambda: state_of(child) == "T", why="the NIXL process stands still")
    try:
        yield lambda: True
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGCONT)


def read_while_every_slot_is_reused(
    cluster: Cluster, kind: str, *, owner_mutations: str = "", reader_mutations: str = ""
) -> tuple[list[Status], int, float]:
    """One read of 16 MiB, held up while the owner stores more than its arena holds of others. So much, because what is
    in the sockets' buffers already (up to 10 MiB) cannot be overwritten any more.

    Returns the statuses, how many delivered blocks have a wrong byte, and how many the reader rejected.
    """

    def program(mutations: str) -> list[str] | None:
        return [MUTANT, mutations] if mutations else None

    patient = {"transport.stall_ms": 20_000, "transport.streams": 1, "transport.in_flight": "64MiB"}
    with Proxy() as proxy:
        advertised = {"peer.advertise": proxy.address} if kind == "tcp" else {}
        [owner] = cluster.start(
            1, capacity="40MiB", program=program(owner_mutations), **options(kind, **patient, **advertised)
        )
        proxy.target = owner.peer_port
        [reader] = cluster.start(
            1, capacity="40MiB", seeds=(proxy.address,), program=program(reader_mutations), **options(kind, **patient)
        )
        cluster.connected()
        writer, cache = owner.open(LAYOUT), reader.open(LAYOUT)
        warm = new_keys(WARM)  # the two are connected and know each other: the next read is nothing but one read
        assert all(writer.put(warm, blocks_of(warm, BLOCK)))
        visible(cache, warm)
        assert all(cache.get_into(warm, [bytearray(BLOCK) for _ in warm], deadline_ms=10_000))
        keys = new_keys(HELD_UP)
        assert all(writer.put(keys, blocks_of(keys, BLOCK)))
        visible(cache, keys)
        out = [bytearray(BLOCK) for _ in keys]
        statuses: list[Status] = []
        with held_up(kind, reader, proxy) as until_held_up:
            reading = threading.Thread(target=lambda: statuses.extend(cache.get_statuses(keys, out, 20_000)))
            reading.start()
            eventually(lambda: owner.metric("p2pkv_leases") > 0, why="the owner has pinned")
            assert until_held_up()
            for _ in range(15):
                fresh = new_keys(64)
                writer.put(fresh, blocks_of(fresh, BLOCK))
        reading.join(30)
        assert not reading.is_alive() and len(statuses) == HELD_UP
        wrong = sum(
            status is Status.OK and content != block_of(key, BLOCK)
            for key, status, content in zip(keys, statuses, out, strict=True)
        )
        rejected = reader.metric("p2pkv_rejected_blocks_total")
        assert owner.metric("p2pkv_evictions_total") > 100
        return statuses, wrong, rejected


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_leased_blocks_stay_while_every_other_slot_is_reused(cluster: Cluster, kind: str) -> None:
    statuses, wrong, rejected = read_while_every_slot_is_reused(cluster, kind)
    assert statuses == [Status.OK] * HELD_UP
    assert (wrong, rejected) == (0, 0)


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_without_the_leases_hold_the_checksum_rejects_what_was_overwritten(cluster: Cluster, kind: str) -> None:
    statuses, wrong, rejected = read_while_every_slot_is_reused(cluster, kind, owner_mutations="no-hold")
    assert wrong == 0
    assert rejected > 0
    assert sum(status is not Status.OK for status in statuses) == rejected


@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_without_either_wrong_bytes_are_delivered(cluster: Cluster, kind: str) -> None:
    """So the two tests above would notice."""
    statuses, wrong, _ = read_while_every_slot_is_reused(
        cluster, kind, owner_mutations="no-hold", reader_mutations="no-check"
    )
    assert wrong > 0
    assert statuses == [Status.OK] * HELD_UP


# ------------------------------------------------------------------------------------------------------- in the large


class Churn(threading.Thread):
    """Stores block after block, so that the owner evicts all the time; knows which keys are likely still there."""

    def __init__(self, cache: Cache, window: int) -> None:
        super().__init__(name="test-churn")
        self._cache = cache
        self._window = window
        self._keys: list[bytes] = []
        self.contents: dict[bytes, bytes] = {}  # of the latest keys, so that a reader need not make them again
        self.stored = 0
        self.stopping = False
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stopping:
                keys = new_keys(16)
                blocks = blocks_of(keys, BLOCK)
                self.contents.update(zip(keys, blocks, strict=True))
                self.stored += sum(self._cache.put(keys, blocks))
                self._keys = [*self._keys, *keys][-self._window :]
                while len(self.contents) > 3 * self._window:
                    del self.contents[next(iter(self.contents))]
        except BaseException as error:
            self.failure = error

    def some(self, count: int, rng: random.Random) -> list[bytes]:
        """Keys of any age, as often as not just being evicted."""
        keys = self._keys
        return rng.sample(keys, min(count, len(keys)))


@pytest.mark.timeout(3_600 if READS > 200_000 else 240)
@pytest.mark.parametrize("kind", [TCP, NIXL])
def test_no_read_gives_a_wrong_byte_while_slots_are_reused(cluster: Cluster, kind: str) -> None:
    target = READS // 2
    [owner] = cluster.start(1, capacity="32MiB", **options(kind))
    [reader] = cluster.start(1, capacity="8MiB", seeds=(owner.address,), **options(kind))  # keeps little: pulls a lot
    cluster.connected()
    rng = random.Random(2)
    writer, cache = owner.open(LAYOUT), reader.open(LAYOUT)
    churn = Churn(writer, window=450)
    churn.start()
    delivered = wrong = 0
    out = [bytearray(BLOCK) for _ in range(BATCH)]
    started = time.monotonic()
    try:
        eventually(lambda: len(churn.some(BATCH, rng)) == BATCH, why="there is something to read")
        pulled = 0.0
        rounds = 0
        while pulled < target:
            rounds += 1
            keys = churn.some(BATCH, rng)
            for key, good, content in zip(keys, cache.get_into(keys, out, deadline_ms=2_000), out, strict=True):
                if good:
                    delivered += 1
                    wrong += content != (churn.contents.get(key) or block_of(key, BLOCK))
            if rounds % 50 == 0:
                pulled = reader.metric("p2pkv_pulled_blocks_total")
                assert churn.failure is None, churn.failure
    finally:
        churn.stopping = True
        churn.join(30)
    seconds = time.monotonic() - started
    rejected = reader.metric("p2pkv_rejected_blocks_total")
    evicted = owner.metric("p2pkv_evictions_total")
    print(
        f"{kind}: {pulled:.0f} blocks pulled, {delivered} delivered, {wrong} wrong, {rejected:.0f} rejected, "
        f"{evicted:.0f} evicted at the owner in {seconds:.1f} s"
    )
    assert wrong == 0
    assert rejected == 0, "the lease did not hold"
    assert evicted > target / 10
