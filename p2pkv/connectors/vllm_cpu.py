"""vLLM's tiered KV offloading on the CPU platform, for laptops, tests and CI.

vLLM's own offloading specs move blocks with CUDA streams and refuse every other platform. The spec here,
:class:`CpuTieringOffloadingSpec`, replaces only the worker: the "GPU" blocks already lie in host memory, so a thread
copies them to and from the shared offload region. Manager, tiers, region and metrics are vLLM's. Used by name::

    "kv_connector": "OffloadingConnector",
    "kv_connector_extra_config": {
        "spec_name": "CpuTieringOffloadingSpec", "spec_module_path": "p2pkv.connectors.vllm_cpu", ...}

Runs in vLLM's worker process (the spec also in the scheduler's); knows nothing of p2pkv's client or agent.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

# Below "vllm", so that vLLM's logging configuration shows it.
logger = init_logger("vllm.p2pkv.cpu")

Ids = npt.NDArray[np.int32]
Bytes = npt.NDArray[np.int8]


class Placement(NamedTuple):
    """Where one engine block lies in the offload region: page ``sub`` of chunk ``chunk``."""

    block: int
    chunk: int
    sub: int


class _Copy(NamedTuple):
    job_id: int
    engine: GPULoadStoreSpec
    chunk_ids: Ids
    is_store: bool


def placements(engine: GPULoadStoreSpec, chunk_ids: Ids, blocks_per_chunk: int) -> Iterator[list[Placement]]:
    """The blocks of a transfer, group by group, each with its place in the region.

    A group's first block may lie in the middle of its first chunk (``block_indices`` says where), and its last chunk
    may be filled in part.

    Args:
        engine: block ids of all groups one after another, ``group_sizes[g]`` of them for group g.
        chunk_ids: the chunks of all groups one after another, shape (chunks,).
        blocks_per_chunk: engine blocks in one chunk.
    """
    blocks = engine.block_ids
    block_at = chunk_at = 0
    for size, first_index in zip(engine.group_sizes, engine.block_indices, strict=True):
        skip = first_index % blocks_per_chunk if size else 0
        chunk_count = -(-(size + skip) // blocks_per_chunk)
        if chunk_at + chunk_count > len(chunk_ids):
            raise ValueError(f"{len(chunk_ids)} chunks are too few for groups of {list(engine.group_sizes)} blocks")
        yield [
            Placement(
                int(blocks[block_at + i]),
                int(chunk_ids[chunk_at + (skip + i) // blocks_per_chunk]),
                (skip + i) % blocks_per_chunk,
            )
            for i in range(size)
        ]
        block_at += size
        chunk_at += chunk_count
    if chunk_at != len(chunk_ids):
        raise ValueError(f"{len(chunk_ids)} chunks for groups that fill {chunk_at}")


class CpuOffloadingWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies blocks between the engine's KV cache and the offload region on one thread, in order of submission.

    The order matters: a load may follow a store of the same chunk. Numpy releases the interpreter lock while it copies,
    so the model runs on. Owns ``region`` and closes it in :meth:`shutdown`. All methods are for the engine's thread.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, blocks_per_chunk: int, region: SharedOffloadRegion) -> None:
        self._region = region
        self._blocks_per_chunk = blocks_per_chunk
        self._refs = kv_caches.group_data_refs
        # Views as numpy arrays: copying torch tensors would start a second team of OpenMP threads on this thread, which
        # spins against the model's.
        self._engine: list[Bytes] = []  # per tensor: (blocks, page bytes)
        self._host: list[Bytes] = []  # per tensor: (chunks, blocks per chunk, page bytes)
        for cache in kv_caches.tensors:
            page = cache.page_size_bytes
            if cache.tensor.device.type != "cpu":
                raise ValueError(f"this KV cache is on {cache.tensor.device}: use vLLM's own spec there")
            # view() refuses where it would have to copy; a copy would be filled and thrown away.
            self._engine.append(cache.tensor.view(torch.int8).view(cache.tensor.shape[0], -1).numpy())
            rows = region.create_next_worker_view(page * blocks_per_chunk)
            self._host.append(rows.unflatten(1, (blocks_per_chunk, page)).numpy())
        self._jobs: queue.SimpleQueue[_Copy | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._open: set[int] = set()  # guarded by _changed, as are the results
        self._results: list[TransferResult] = []
        self._thread = threading.Thread(target=self._run, name="p2pkv-cpu-offload", daemon=True)
        self._thread.start()

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Start to copy engine blocks into chunks of the region."""
        return self._submit(job_id, src_spec, dst_spec, is_store=True)

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Start to copy chunks of the region into engine blocks."""
        return self._submit(job_id, dst_spec, src_spec, is_store=False)

    def _submit(self, job_id: int, engine: GPULoadStoreSpec, host: LoadStoreSpec, *, is_store: bool) -> bool:
        if not isinstance(host, BlockIDsLoadStoreSpec):
            raise TypeError(f"cannot copy to or from a {type(host).__name__}")
        with self._changed:
            self._open.add(job_id)
        self._jobs.put(_Copy(job_id, engine, host.block_ids, is_store))
        return True

    def get_finished(self) -> list[TransferResult]:
        """The transfers that ended since the last call."""
        with self._changed:
            results, self._results = self._results, []
        return results

    def wait(self, job_ids: set[int]) -> None:
        """Block until the named transfers have ended (vLLM calls it before it reuses their blocks)."""
        with self._changed:
            self._changed.wait_for(lambda: self._open.isdisjoint(job_ids))

    def shutdown(self) -> None:
        """Finish what is queued, stop the thread, give the region back. Idempotent."""
        self._jobs.put(None)
        self._thread.join()
        self._engine.clear()
        self._host.clear()
        self._region.cleanup()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            started = time.perf_counter()
            try:
                copied_bytes, ok = self._copy(job), True
            except Exception:  # whatever it is, the engine has to hear of it: vLLM stops on a failed transfer
                logger.exception("Copying the KV blocks of job %d failed", job.job_id)
                copied_bytes, ok = 0, False
            result = TransferResult(job.job_id, ok, copied_bytes, time.perf_counter() - started)
            with self._changed:
                self._results.append(result)
                self._open.discard(job.job_id)
                self._changed.notify_all()

    def _copy(self, job: _Copy) -> int:
        copied_bytes = 0
        groups = placements(job.engine, job.chunk_ids, self._blocks_per_chunk)
        for refs, group in zip(self._refs, groups, strict=True):
            for ref in refs:
                engine, host, size = self._engine[ref.tensor_idx], self._host[ref.tensor_idx], ref.page_size_bytes
                for block, chunk, sub in group:
                    inside, outside = engine[block, :size], host[chunk, sub, :size]
                    if job.is_store:
                        np.copyto(outside, inside)
                    else:
                        np.copyto(inside, outside)
                copied_bytes += size * len(group)
        return copied_bytes


class CpuTieringOffloadingSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's ``TieringOffloadingSpec`` (same options) with a worker for the CPU platform."""

    _worker: OffloadingWorker | None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        """The worker of this rank; made on the first call.

        Raises:
            ValueError: the offload region would hold no chunk, or a layout was asked for that needs vLLM's own worker.
        """
        worker = self._worker
        if worker is None:
            if self.config.canonical_layout:
                raise ValueError("canonical_layout needs vLLM's own worker: leave it out on the CPU platform")
            if self.num_chunks < 1:
                raise ValueError(
                    f"cpu_bytes_to_use={self.extra_config.get('cpu_bytes_to_use')} is less than one chunk of "
                    f"{self.kv_bytes_per_chunk} bytes"
                )
            region = SharedOffloadRegion(
                engine_id=self.config.engine_id,
                num_chunks=self.num_chunks,
                rank=0 if self.replicated_layout else self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            try:
                self._worker = worker = CpuOffloadingWorker(kv_caches, self.blocks_per_chunk, region)
            except Exception:
                region.cleanup()
                raise
        return worker
