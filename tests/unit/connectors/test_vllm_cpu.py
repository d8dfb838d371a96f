"""The CPU offloading worker against vLLM's own region and transfer specs. Runs where vLLM is (.venv-vllm)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="vLLM is not installed here: run this with .venv-vllm (`make vllm`)")
    import numpy as np
    import torch
    from vllm.v1.kv_offload.base import (
        CanonicalKVCacheRef,
        CanonicalKVCaches,
        CanonicalKVCacheTensor,
        GPULoadStoreSpec,
    )
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

    from p2pkv.connectors.vllm_cpu import CpuOffloadingWorker, placements

BLOCKS, PAGE, CHUNKS = 12, 256, 8
Worker = tuple[CpuOffloadingWorker, list[torch.Tensor]]


@pytest.fixture
def make_worker() -> Iterator[Callable[..., Worker]]:
    workers = []
    names = count()

    def make(*, blocks_per_chunk: int = 1, groups: int = 1) -> Worker:
        """Two layers per group, each its own tensor, every block filled with its own number."""
        tensors = [torch.zeros(BLOCKS, PAGE, dtype=torch.int8) for _ in range(2 * groups)]
        for i, tensor in enumerate(tensors):
            for block in range(BLOCKS):
                tensor[block] = 20 * i + block
        caches = CanonicalKVCaches(
            [CanonicalKVCacheTensor(tensor, PAGE) for tensor in tensors],
            [[CanonicalKVCacheRef(2 * g, PAGE), CanonicalKVCacheRef(2 * g + 1, PAGE)] for g in range(groups)],
        )
        row = -(-len(tensors) * PAGE * blocks_per_chunk // 4096) * 4096
        region = SharedOffloadRegion(
            engine_id=f"p2pkv-test-{os.getpid()}-{next(names)}",
            num_chunks=CHUNKS,
            rank=0,
            kv_bytes_per_chunk=row,
            cpu_page_size=len(tensors) * PAGE * blocks_per_chunk,
        )
        worker = CpuOffloadingWorker(caches, blocks_per_chunk, region)
        workers.append(worker)
        return worker, tensors

    yield make
    for worker in workers:
        worker.shutdown()


def engine(blocks: list[int], sizes: list[int] | None = None, indices: list[int] | None = None) -> Any:
    sizes = sizes or [len(blocks)]
    return GPULoadStoreSpec(blocks, group_sizes=sizes, block_indices=indices or [0] * len(sizes))


def run(worker: CpuOffloadingWorker, job: int, start: Callable[[], bool]) -> None:
    assert start()
    worker.wait({job})
    results = worker.get_finished()
    assert [(result.job_id, result.success) for result in results] == [(job, True)]
    assert worker.get_finished() == []


@pytest.mark.parametrize("blocks_per_chunk", [1, 2, 3])
def test_what_was_stored_is_loaded_into_other_blocks(make_worker: Callable[..., Worker], blocks_per_chunk: int) -> None:
    worker, tensors = make_worker(blocks_per_chunk=blocks_per_chunk)
    blocks = list(range(6))
    chunks = CPULoadStoreSpec([5, 2, 7, 1, 0, 3][: 6 // blocks_per_chunk])
    run(worker, 1, lambda: worker.submit_store(1, engine(blocks), chunks))
    expected = [tensor[:6].clone() for tensor in tensors]
    targets = [11, 6, 10, 7, 9, 8]
    run(worker, 2, lambda: worker.submit_load(2, chunks, engine(targets)))
    for tensor, blocks_before in zip(tensors, expected, strict=True):
        assert torch.equal(tensor[targets], blocks_before)


def test_a_load_may_begin_in_the_middle_of_a_chunk(make_worker: Callable[..., Worker]) -> None:
    worker, tensors = make_worker(blocks_per_chunk=3)
    chunks = CPULoadStoreSpec([4, 6])
    run(worker, 1, lambda: worker.submit_store(1, engine([0, 1, 2, 3, 4, 5]), chunks))
    # Blocks 2 to 4 of the prompt: the last of the first chunk, and two of the second.
    run(worker, 2, lambda: worker.submit_load(2, chunks, engine([9, 10, 11], indices=[2])))
    assert tensors[1][9:12, 0].tolist() == [22, 23, 24]


def test_groups_move_only_their_own_layers(make_worker: Callable[..., Worker]) -> None:
    worker, tensors = make_worker(groups=2)
    chunks = CPULoadStoreSpec([0, 1, 2])
    run(worker, 1, lambda: worker.submit_store(1, engine([0, 1, 2], sizes=[2, 1], indices=[0, 0]), chunks))
    run(worker, 2, lambda: worker.submit_load(2, chunks, engine([9, 10, 11], sizes=[2, 1], indices=[0, 0])))
    assert [tensor[9:12, 0].tolist() for tensor in tensors] == [
        [0, 1, 11],
        [20, 21, 31],
        [49, 50, 42],
        [69, 70, 62],
    ]


def test_placements_skip_empty_groups_and_refuse_what_does_not_fit() -> None:
    found = list(placements(engine([7, 8], sizes=[0, 2], indices=[5, 1]), np.array([3, 4], dtype=np.int32), 2))
    assert found == [[], [(7, 3, 1), (8, 4, 0)]]
    with pytest.raises(ValueError, match="too few"):
        list(placements(engine([7, 8], indices=[1]), np.array([3], dtype=np.int32), 2))
    with pytest.raises(ValueError, match="that fill"):
        list(placements(engine([7]), np.array([3, 4], dtype=np.int32), 2))


def test_a_copy_that_fails_is_reported_and_the_next_one_runs(make_worker: Callable[..., Worker]) -> None:
    worker, _ = make_worker()
    worker.submit_store(1, engine([0, 1]), CPULoadStoreSpec([0, CHUNKS + 1]))
    worker.submit_store(2, engine([0]), CPULoadStoreSpec([0]))
    worker.wait({1, 2})
    assert [result.success for result in worker.get_finished()] == [False, True]
