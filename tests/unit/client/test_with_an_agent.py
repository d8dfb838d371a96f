"""The client against one real agent: bytes, layouts, jobs, and many threads at once."""

from __future__ import annotations

import gc
import mmap
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from p2pkv.client import AgentClient, Status
from p2pkv.errors import AgentUnavailable, InvalidArgument, LayoutMismatch, P2PKVError
from tests.cluster.agents import AgentProcess, Cluster, eventually, make_layout
from tests.cluster.blocks import block_of, blocks_of, new_keys

pytestmark = [pytest.mark.cluster]

BLOCK = 65_536
LAYOUT = make_layout(BLOCK)


@pytest.fixture(scope="module")
def agent() -> Iterator[AgentProcess]:
    with Cluster() as cluster:
        yield cluster.start(1, http_on=False)[0]


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[AgentClient]:
    with AgentClient(agent.socket) as made:
        yield made


def test_every_kind_of_buffer_round_trips_bit_for_bit(client: AgentClient) -> None:
    cache = client.open(LAYOUT)
    contents = blocks_of(keys := new_keys(5), BLOCK)
    sources = [
        bytearray(contents[0]),
        contents[1],
        memoryview(contents[2]),
        np.frombuffer(contents[3], np.float32).reshape(128, 128).copy(),
        np.frombuffer(contents[4], np.uint16).copy(),
    ]
    assert cache.put(keys, sources) == [True] * 5
    mapping = mmap.mmap(-1, BLOCK)
    targets = [bytearray(BLOCK), np.zeros((64, 256), np.float32), memoryview(bytearray(BLOCK)), mapping,
               np.zeros(BLOCK, np.int8)]  # fmt: skip
    assert cache.get_into(keys, targets) == [True] * 5
    assert [bytes(memoryview(target).cast("B")) if not isinstance(target, np.ndarray) else target.tobytes()
            for target in targets] == contents  # fmt: skip


def test_torch_tensors_round_trip_whatever_their_type(client: AgentClient) -> None:
    torch = pytest.importorskip("torch", reason="TORCH IS NOT INSTALLED: tensors are not tested")
    cache = client.open(LAYOUT)
    keys = new_keys(3)
    brain = torch.randn(BLOCK // 2).to(torch.bfloat16)
    tensors = [brain, torch.randn(BLOCK // 4), torch.zeros(BLOCK, dtype=torch.int8)]
    assert cache.put(keys, tensors) == [True] * 3
    out = [torch.empty_like(tensor) for tensor in tensors]
    assert cache.get_into(keys, out) == [True] * 3
    assert all(torch.equal(a, b) for a, b in zip(tensors, out, strict=True))


@pytest.mark.parametrize("block_bytes", [1, 13, 4096, 4097, 1 << 20, (5 << 20) + 13])
def test_blocks_of_any_size_round_trip(client: AgentClient, block_bytes: int) -> None:
    cache = client.open(make_layout(block_bytes))
    keys = new_keys(3)
    assert cache.put(keys, blocks_of(keys, block_bytes)) == [True] * 3
    out = [bytearray(block_bytes) for _ in keys]
    assert cache.get_into(keys, out) == [True] * 3
    assert out == blocks_of(keys, block_bytes)


def test_more_than_fits_the_staging_memory_is_put_in_parts(client: AgentClient) -> None:
    layout = make_layout(3 << 20)
    cache = client.open(layout)
    keys = new_keys(14)  # 42 MiB through 32
    assert cache.put(keys, blocks_of(keys, layout.block_bytes)) == [True] * 14
    out = [bytearray(layout.block_bytes) for _ in keys[-4:]]
    assert cache.get_into(keys[-4:], out) == [True] * 4
    assert out == blocks_of(keys[-4:], layout.block_bytes)


def test_a_block_is_written_once(client: AgentClient) -> None:
    cache = client.open(LAYOUT)
    [key] = new_keys(1)
    assert cache.put([key], [b"\x01" * BLOCK]) == [True]
    assert cache.put([key], [b"\x02" * BLOCK]) == [True], "it is there"
    out = bytearray(BLOCK)
    assert cache.get_into([key], [out]) == [True]
    assert out == b"\x01" * BLOCK


def test_a_key_that_is_named_twice_is_there_twice(client: AgentClient) -> None:
    """``put``: True where the block is there afterwards."""
    cache = client.open(LAYOUT)
    [key] = new_keys(1)
    content = block_of(key, BLOCK)
    cache.put([key, key], [content, content])
    out = [bytearray(BLOCK), bytearray(BLOCK)]
    assert cache.get_into([key, key], out) == [True, True]
    assert out == [content, content]


def test_match_counts_the_prefix_and_says_what_is_behind_a_hole(client: AgentClient) -> None:
    cache = client.open(LAYOUT)
    keys = new_keys(6)
    held = [keys[i] for i in (0, 1, 3, 5)]
    assert all(cache.put(held, blocks_of(held, BLOCK)))
    match = cache.match(keys)
    assert (match.local, match.anywhere) == (2, 2)
    assert match.present == ["local", "local", None, "local", None, "local"]
    assert cache.match([]).local == 0


def test_misses_say_so_and_leave_their_neighbours_alone(client: AgentClient) -> None:
    cache = client.open(LAYOUT)
    keys = new_keys(4)
    assert all(cache.put(keys[::2], blocks_of(keys[::2], BLOCK)))
    out = [bytearray(BLOCK) for _ in keys]
    assert cache.get_statuses(keys, out) == [Status.OK, Status.MISS, Status.OK, Status.MISS]
    assert out[::2] == blocks_of(keys[::2], BLOCK)


def test_layouts_that_conflict_are_refused_by_the_field_that_differs(client: AgentClient) -> None:
    first = make_layout(BLOCK, model="conflict")
    client.open(first)
    with pytest.raises(LayoutMismatch) as caught:
        client.open(make_layout(BLOCK, model="conflict", block_tokens=32))
    assert caught.value.fields == ("block_tokens",)
    with pytest.raises(LayoutMismatch) as caught:
        client.open(make_layout(2 * BLOCK, model="conflict", order="HND"))
    assert set(caught.value.fields) == {"block_bytes", "order"}
    assert client.open(make_layout(BLOCK, model="conflict", tenant="other")).namespace != first.namespace


def test_a_layout_whose_block_is_larger_than_the_arena_is_refused_and_the_client_goes_on(client: AgentClient) -> None:
    with pytest.raises(P2PKVError):
        client.open(make_layout(100 << 20))
    assert client.open(LAYOUT).match(new_keys(1)).local == 0


def test_blocks_of_one_tenant_are_not_anothers(client: AgentClient) -> None:
    one, other = client.open(make_layout(BLOCK, tenant="a")), client.open(make_layout(BLOCK, tenant="b"))
    [key] = new_keys(1)
    assert one.put([key], [block_of(key, BLOCK)]) == [True]
    assert other.match([key]).anywhere == 0
    assert other.get_into([key], [bytearray(BLOCK)]) == [False]


def test_a_region_that_is_not_as_large_as_it_says_is_refused(client: AgentClient) -> None:
    cache = client.open(LAYOUT)
    fd = os.memfd_create("small")
    os.ftruncate(fd, BLOCK)
    try:
        with pytest.raises(InvalidArgument):
            cache.map_region(fd, slots=2)
        with pytest.raises(InvalidArgument):
            cache.map_region(fd, slots=1, slot_bytes=BLOCK - 1)
        region = cache.map_region(fd, slots=1)
        with pytest.raises(InvalidArgument):
            cache.store(new_keys(2), region, [0])
        job = cache.store(new_keys(1), region, [1])
        [result] = eventually(lambda: client.poll(100), why="the job ends")
        assert result.job_id == job and result.ok == [False] and result.error
        region.unmap()
    finally:
        os.close(fd)


def test_eight_threads_on_one_client_do_not_get_into_each_others_way(client: AgentClient) -> None:
    """Puts, gets, matches and jobs at once; every byte is looked at."""
    cache = client.open(LAYOUT)
    fd = os.memfd_create("region")
    os.ftruncate(fd, 16 * BLOCK)
    memory = mmap.mmap(fd, 16 * BLOCK)
    region = cache.map_region(fd, slots=16)
    stable = new_keys(32)
    assert all(cache.put(stable, blocks_of(stable, BLOCK)))
    failures: list[BaseException] = []
    jobs_wanted: set[int] = set()
    jobs_lock = threading.Lock()
    results = []

    def work(number: int) -> None:
        rng = random.Random(number)
        slots = [2 * number, 2 * number + 1]
        try:
            for round_number in range(40):
                keys = new_keys(3)
                assert cache.put(keys, blocks_of(keys, BLOCK)) == [True] * 3
                wanted = [*keys, *rng.sample(stable, 3)]
                out = [bytearray(BLOCK) for _ in wanted]
                for key, good, content in zip(wanted, cache.get_into(wanted, out, deadline_ms=5_000), out, strict=True):
                    assert not good or content == block_of(key, BLOCK), "WRONG BYTES"
                assert cache.match(keys).local <= 3
                if round_number % 10 == 0:
                    with jobs_lock:
                        jobs_wanted.add(cache.load(rng.sample(stable, 2), region, slots))
                        results.extend(client.poll())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not failures, failures
    eventually(lambda: results.extend(client.poll(50)) or jobs_wanted <= {r.job_id for r in results}, why="jobs end")
    assert all(result.ok == [True, True] for result in results)
    region.unmap()
    memory.close()
    os.close(fd)


def test_a_client_that_is_closed_keeps_no_descriptor_not_even_until_garbage_is_collected(agent: AgentProcess) -> None:
    """An engine that comes and goes in one process would run out of them."""
    keys = new_keys(2)
    before: list[str] = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            before = before or _descriptors()
            client = AgentClient(agent.socket)
            cache = client.open(LAYOUT)
            assert all(cache.put(keys, blocks_of(keys, BLOCK)))
            assert all(cache.get_into(keys, [bytearray(BLOCK), bytearray(BLOCK)]))
            client.close()
            assert _descriptors() == before
        with pytest.raises(AgentUnavailable):
            cache.match(keys)
    finally:
        gc.enable()


def _descriptors() -> list[str]:
    names = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    return sorted(os.readlink(name) for name in names if os.path.exists(name))


def test_threads_may_close_a_client_under_each_other(agent: AgentProcess) -> None:
    """Everybody gets an answer or a typed error; nobody hangs."""
    for _ in range(5):
        client = AgentClient(agent.socket)
        cache = client.open(LAYOUT)
        keys = new_keys(2)
        assert all(cache.put(keys, blocks_of(keys, BLOCK)))
        unexpected: list[BaseException] = []

        def read(cache: object = cache, keys: list[bytes] = keys, unexpected: list[BaseException] = unexpected) -> None:
            try:
                for _ in range(200):
                    out = [bytearray(BLOCK) for _ in keys]
                    for key, good, content in zip(keys, cache.get_into(keys, out), out, strict=True):  # type: ignore[attr-defined]
                        assert not good or content == block_of(key, BLOCK)
            except P2PKVError:
                pass
            except BaseException as error:
                unexpected.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        client.close()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert not unexpected, unexpected


LIGHT = """
import os, sys
for name in ("msgspec", "inspect", "dataclasses", "typing_extensions", "uuid", "datetime"):
    assert name not in sys.modules, name
    sys.modules[name] = None  # whoever imports it now gets an ImportError
from p2pkv.client import AgentClient, Layout
from p2pkv.errors import LayoutMismatch

layout = Layout(model="light", revision="r", kv_dtype="uint8", block_tokens=16, block_bytes=4096)
keys, blocks = [os.urandom(32) for _ in range(3)], [os.urandom(4096) for _ in range(3)]
with AgentClient(sys.argv[1]) as client:
    cache = client.open(layout)
    assert cache.namespace == layout.namespace
    try:
        client.open(layout.replace(order="HND"))
        raise SystemExit("no mismatch")
    except LayoutMismatch as error:
        assert error.fields == ("order",)
    assert cache.put(keys, blocks) == [True] * 3
    out = [bytearray(4096) for _ in range(3)]
    assert cache.get_into(keys, out) == [True] * 3 and out == blocks
    assert cache.get_into([bytes(32)], out[:1]) == [False]
    match = cache.match(keys)
    assert match.local == 3 and match.present == ["local"] * 3 and len(match.nodes) == 1
    fd = os.memfd_create("light")
    os.ftruncate(fd, 3 * 4096)
    region = cache.map_region(fd, slots=3)
    os.close(fd)
    cache.store([bytes(32)], region, [0])
    cache.load(keys, region, [0, 1, 2])
    cache.submit_match(keys)
    results = []
    while len(results) < 3:
        results += client.poll(1_000)
    assert all(all(result.ok) for result in results), results
    region.unmap()
"""


def test_nothing_that_an_engine_does_imports_msgspec_or_what_it_drags_along(agent: AgentProcess) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, agent.socket], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
