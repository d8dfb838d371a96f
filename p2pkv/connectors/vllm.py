"""vLLM's socket for p2pkv: an out-of-tree secondary tier of its ``OffloadingConnector`` (vLLM 0.32).

    --kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": {
        "spec_name": "TieringOffloadingSpec", "cpu_bytes_to_use": ..., "block_size": 256, "secondary_tiers": [
            {"type": "P2PKVTier", "module_path": "p2pkv.connectors.vllm", "socket": "/run/p2pkv/agent.sock"}]}}'

vLLM copies finished blocks from the accelerator into its primary tier, a region of shared memory, and offers them here;
the tier hands the region's descriptor to the node's agent once, and from then on passes block hashes and slot numbers
only: the agent moves the bytes between the region, its own memory and its peers.

What holds (all of it runs on the scheduler's thread, except the session's opening):

* No call waits for anybody, but the constructor (once, for the client's deadline) and :meth:`P2PKVTier.drain_jobs`; and
  a step's lookups may wait for a millisecond in all (``lookup_wait_ms``), since to be answered a step later costs far
  more. A load of at most 4 MiB that is all in the agent's arena is copied within the call: half a millisecond at most.
* A request is asked for with one message; until the answer is there its keys are RETRY, after the deadline MISS.
* Whatever fails (no agent, queue full, job lost, block gone) becomes a MISS that vLLM computes, or a block not stored.
* A job stays open until its end is certain, because until then the agent may touch vLLM's slots: a load that the agent
  cannot finish in time is the agent's to give up, and only a closed connection makes a job lost.
* Open jobs and questions are bounded; with none open, the tier asks for no scheduler steps.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_block_hash,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from p2pkv.connectors import _vllm_metrics as metrics
from p2pkv.connectors._vllm_layout import find_vllm_config, layouts_of
from p2pkv.connectors._vllm_lookup import Answer, LookupTable
from p2pkv.connectors._vllm_options import parse_options
from p2pkv.connectors._vllm_pace import PrefillPace
from p2pkv.connectors._vllm_session import CacheHandle, Client, JobUpdate, SessionKeeper
from p2pkv.errors import AgentUnavailable, Busy, ConfigError, P2PKVError
from p2pkv.types import Layout
from p2pkv.wire.engine_types import Pace

# Below "vllm", so that vLLM's logging configuration shows it.
logger = init_logger("vllm.p2pkv")

T = TypeVar("T")

STUCK_AFTER_S: Final = 10.0
DRAIN_POLL_S: Final = 0.001
SHUTDOWN_DRAIN_S: Final = 2.0
"""How long a leaving engine waits for its last stores. They are worth little more than that."""

WAITS_MAX: Final = 8
WAIT_S_MIN: Final = 0.00005
"""Of one step's waits, however little time passed: a clock that stands still must not make it wait for ever."""

KEYS_PER_MESSAGE: Final = 1024
"""Keys of one question or job at the agent, well below what a message may hold; more are split."""

_SOURCES: Final = {Answer.LOCAL: CacheHitSource.HOST, Answer.PEER: CacheHitSource.P2P}


@dataclass(slots=True)
class _Job:
    """One of vLLM's transfer jobs; it becomes one client job per KV-cache group."""

    job_id: int
    request_id: str
    is_load: bool
    submitted: float
    positions: Mapping[OffloadKey, int]  # end token of each key of the request, as far as vLLM tells
    parts: int = 0  # client jobs still open
    failed: list[OffloadKey] = field(default_factory=list)
    done: list[OffloadKey] = field(default_factory=list)
    bytes_moved: int = 0
    warned: bool = False


@dataclass(slots=True)
class _Part:
    """One client job in flight: what to do with its answer."""

    job: _Job
    keys: list[OffloadKey]


class P2PKVTier(SecondaryTierManager):  # type: ignore[misc]
    """Shares this engine's KV blocks with the fleet through the node's p2pkv agent.

    Args:
        offloading_spec: vLLM's offloading spec, ``TieringOffloadingSpec`` or a subclass of it.
        primary_kv_view: the primary tier's memory, shape (chunks, bytes per chunk); vLLM's.
        tier_type: this class's name, as in the configuration.
        backpressure_detector: vLLM's, if one was configured.
        client: stands in for the connection to the agent in tests; owned by the tier from then on.
        layouts: stands in for the layouts found from vLLM's configuration, in tests.
        options: see :class:`~p2pkv.connectors._vllm_options.TierOptions`.

    Raises:
        ConfigError: an option is wrong, or the engine's KV cache cannot be shared; says why.
        LayoutMismatch: the agent has this model's cache under a layout that conflicts.
    """

    # One source per class is what vLLM asks for; it reads the attribute right after each hit, so lookup() sets it to
    # where that block is, and vLLM's own metrics tell a peer's blocks from the local agent's.
    cache_hit_source = CacheHitSource.P2P

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        client: Client | None = None,
        layouts: dict[int, Layout] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._options = parse_options(options)
        self._layouts = layouts or layouts_of(
            offloading_spec,
            find_vllm_config(),
            block_bytes=self.block_size_bytes,
            model=self._options.model,
            revision=self._options.revision,
            tenant=self._options.tenant,
        )
        self._resets = 0
        self._pace = PrefillPace()
        self._wait_left_s = self._options.lookup_wait_ms / 1000
        self._lookups = LookupTable(
            deadline_s=self._options.lookup_deadline_ms / 1000, promised_max=len(primary_kv_view)
        )
        self._parts: dict[int, _Part] = {}
        self._finished: list[JobResult] = []
        self._stats = metrics.TierStats()
        self._connected: bool | None = None
        self._client = client or _connect(self._options.socket, offloading_spec.config.engine_id)
        fd, owned = region_descriptor(offloading_spec)
        try:
            self._session = SessionKeeper(
                self._client,
                region_fd=fd,
                slots=len(primary_kv_view),
                slot_bytes=self.block_size_bytes,
            )
        finally:
            if owned:
                os.close(fd)
        try:
            self._session.start(self._layouts)
        except P2PKVError:
            self._session.close()
            self._client.close()
            raise

    # --- requests ---

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Nothing is known of a request before its first lookup."""
        return RequestOffloadingContext()

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """HIT if the agent has the block or knows a live peer that has it; RETRY while it has not answered yet."""
        now = time.monotonic()
        answer = self._lookups.check(req_context.req_id, key, now)
        if answer is Answer.UNKNOWN:
            self._ask(key, req_context, now)
            answer = self._await_answer(req_context.req_id, key, now)
        if self._lookups.timeouts:
            self._stats.count(metrics.LOOKUP_FAILURES, self._lookups.timeouts, "timeout")
            self._lookups.timeouts = 0
        if answer is Answer.PENDING:
            return LookupResult.RETRY
        if not answer.is_hit or not self._lookups.promise(req_context.req_id, key):
            return LookupResult.MISS
        self.cache_hit_source = _SOURCES[answer]
        return LookupResult.HIT

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """What was known of a request is out of date once it is scheduled or preempted."""
        now = time.monotonic()
        self._wait_left_s = self._options.lookup_wait_ms / 1000
        self._pace.stepped(now)
        for request_id in context.new_req_ids:
            self._lookups.scheduled(request_id)
            self._pace.scheduled(request_id, now)
        for request_id in context.preempted_req_ids:
            self._lookups.scheduled(request_id)
            self._pace.finished(request_id)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forget the request. Its jobs in flight go on to their end."""
        self._lookups.finished(req_context.req_id)
        self._pace.finished(req_context.req_id)

    def _ask(self, key: OffloadKey, req_context: ReqContext, now: float) -> None:
        group = get_offload_group_idx(key)
        # Private in vLLM; without it every key is asked for by itself, which is slower and as right.
        known = getattr(req_context, "_offload_key_positions", {})
        positions = {k: position for k, position in known.items() if k[-4:] == key[-4:]}
        keys = self._lookups.to_ask(req_context.req_id, key, positions, group)
        session = self._session.current
        is_chain = bool(keys) and keys[0] == key  # not a windowed group, which is scanned backward
        for batch in batched(keys, KEYS_PER_MESSAGE):
            pace = self._pace_from(batch[0], positions, group) if is_chain else Pace()
            try:
                if session is None:
                    raise AgentUnavailable("no session with the agent")
                question = session.caches[group].submit_match([get_offload_block_hash(k) for k in batch], pace=pace)
            except P2PKVError as error:
                self._stats.count(metrics.LOOKUP_FAILURES, len(batch), self._note_refusal(error))
                self._lookups.refused(req_context.req_id, batch)
            else:
                self._lookups.asked(req_context.req_id, batch, question, now)

    def _await_answer(self, request_id: str, key: OffloadKey, now: float) -> Answer:
        """Give an answer that is on its way the moment that it takes, as far as this step may still wait."""
        answer = self._lookups.check(request_id, key, now)
        for _ in range(WAITS_MAX):  # what comes first may be another's
            if answer is not Answer.PENDING or self._wait_left_s <= 0.0:
                break
            self._take_updates(self._wait_left_s * 1000)
            until = time.monotonic()
            self._wait_left_s -= max(until - now, WAIT_S_MIN)
            now = until
            answer = self._lookups.check(request_id, key, now)
        return answer

    def _pace_from(self, key: OffloadKey, positions: Mapping[OffloadKey, int], group: int) -> Pace:
        """What computing takes from a block on; unknown, too, where costs are not to decide."""
        if not self._options.cost_aware:
            return Pace()
        return self._pace.of(self._position_of(key, positions, group))

    def _position_of(self, key: OffloadKey, positions: Mapping[OffloadKey, int], group: int) -> int:
        """A block's place in its chain, as far as vLLM tells."""
        end_tokens = positions.get(key, 0)
        return max(0, end_tokens // self._layouts[group].block_tokens - 1)

    # --- jobs ---

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Have the agent copy the slots' blocks. If it cannot take them now, the job ends at once, as not stored."""
        self._note_computed(job_metadata)
        self._submit(job_metadata, is_load=False)

    def _note_computed(self, metadata: TransferJob) -> None:
        """New blocks of a request: how long have they taken?"""
        keys = list(metadata.keys)
        if not keys:
            return
        group = get_offload_group_idx(keys[0])
        known = getattr(metadata.req_context, "_offload_key_positions", {})  # private in vLLM
        positions = [self._position_of(key, known, group) for key in keys if get_offload_group_idx(key) == group]
        self._pace.computed(metadata.req_context.req_id, min(positions), len(positions), time.monotonic())

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Have the agent bring blocks into the slots. If it cannot start now, the job ends at once, as failed."""
        self._lookups.loading(job_metadata.req_context.req_id)
        self._submit(job_metadata, is_load=True)

    def _submit(self, metadata: TransferJob, *, is_load: bool) -> None:
        known = getattr(metadata.req_context, "_offload_key_positions", {})  # private in vLLM
        job = _Job(metadata.job_id, metadata.req_context.req_id, is_load, time.monotonic(), known)
        by_group: defaultdict[int, tuple[list[OffloadKey], list[int]]] = defaultdict(lambda: ([], []))
        for key, slot in zip(metadata.keys, metadata.chunk_ids.tolist(), strict=True):
            keys, slots = by_group[get_offload_group_idx(key)]
            keys.append(key)
            slots.append(slot)
        for group, (keys, slots) in by_group.items():
            for batch, places in zip(batched(keys, KEYS_PER_MESSAGE), batched(slots, KEYS_PER_MESSAGE), strict=True):
                try:
                    part = self._start(job, group, batch, places)
                except P2PKVError as error:
                    job.failed += batch
                    self._count_failed(job, len(batch), self._note_refusal(error))
                else:
                    job.parts += 1
                    self._parts[part] = _Part(job, batch)
        if job.parts == 0:
            self._finish(job)

    def _start(self, job: _Job, group: int, keys: list[OffloadKey], slots: list[int]) -> int:
        session = self._session.current
        if session is None:
            raise AgentUnavailable("no session with the agent")
        if len(self._parts) >= self._options.open_jobs_max:
            raise Busy("too many open jobs", limit=self._options.open_jobs_max)
        cache: CacheHandle = session.caches[group]
        hashes = [get_offload_block_hash(key) for key in keys]
        if job.is_load:
            pace = self._pace_from(keys[0], job.positions, group)
            return cache.load(hashes, session.region, slots, deadline_ms=self._options.load_deadline_ms, pace=pace)
        return cache.store(hashes, session.region, slots)

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """The jobs that ended since the last call; also takes in the answers to lookups."""
        self._take_updates()
        if not self._finished:
            return ()
        finished, self._finished = self._finished, []
        return finished

    def has_pending_work(self) -> bool:
        """Only jobs need steps: a request whose lookup is open waits in vLLM's queue, which makes the steps itself."""
        return bool(self._parts or self._finished)

    def drain_jobs(self) -> None:
        """Block until no job is open, then move to the next epoch of weights (vLLM calls this to reset its cache)."""
        self._drain(until=None)
        if self._options.new_weights_on_reset:
            self._resets += 1
            self._session.restart(
                {
                    group: layout.replace(revision=f"{layout.revision}+reset{self._resets}")
                    for group, layout in self._layouts.items()
                }
            )

    def shutdown(self) -> None:
        """Let the last stores end for a moment, then leave the agent. The agent drops what is still open."""
        self._drain(until=time.monotonic() + SHUTDOWN_DRAIN_S)
        self._session.close()
        self._client.close()

    def _drain(self, *, until: float | None) -> None:
        while self._parts and (until is None or time.monotonic() < until):
            self._take_updates()
            if self._parts:
                time.sleep(DRAIN_POLL_S)

    def _take_updates(self, timeout_ms: float = 0) -> None:
        updates = self._client.poll(timeout_ms)
        now = time.monotonic()
        for update in updates:
            if update.kind == "match":
                self._answered(update, now)
            else:
                self._progressed(update, now)
        if self._parts:
            self._warn_of_stuck_jobs(now)

    def _answered(self, update: JobUpdate, now: float) -> None:
        self._note_connected(not update.lost)
        if update.lost:
            self._stats.count(metrics.LOOKUP_FAILURES, self._lookups.lost(update.job_id), "lost")
            return
        # "present" is what counts; where is only known of blocks that are.
        sources = [source if ok else None for ok, source in zip(update.ok, update.sources, strict=True)]
        waited_s = self._lookups.answered(update.job_id, sources, now)
        if waited_s is not None:
            self._stats.observe(metrics.LOOKUP_SECONDS, waited_s)
            for result in ("local", "peer", None):
                self._stats.count(metrics.LOOKUP_BLOCKS, sources.count(result), result or "miss")

    def _progressed(self, update: JobUpdate, now: float) -> None:
        part = self._parts.pop(update.job_id, None)
        if part is None:
            return
        job = part.job
        self._note_connected(not update.lost)
        ok = [False] * len(part.keys) if update.lost else update.ok
        failed = [key for key, good in zip(part.keys, ok, strict=True) if not good]
        job.failed += failed
        job.done += [key for key, good in zip(part.keys, ok, strict=True) if good]
        job.parts -= 1
        self._count_failed(job, len(failed), "lost" if update.lost else "missing" if job.is_load else "refused")
        moved_bytes = (len(part.keys) - len(failed)) * self.block_size_bytes
        job.bytes_moved += moved_bytes
        if job.is_load and not update.lost:
            for label in ("local", "peer"):
                self._stats.count(metrics.LOAD_BLOCKS, list(update.sources).count(label), label)
            self._stats.count(metrics.LOAD_BYTES, update.bytes_local, "local")
            self._stats.count(metrics.LOAD_BYTES, update.bytes_peer, "peer")
        elif not job.is_load:
            self._stats.count(metrics.STORE_BLOCKS, len(part.keys) - len(failed))
            self._stats.count(metrics.STORE_BYTES, moved_bytes)
        if job.parts == 0:
            self._stats.observe(metrics.LOAD_SECONDS if job.is_load else metrics.STORE_SECONDS, now - job.submitted)
            self._finish(job)

    def _finish(self, job: _Job) -> None:
        success = not job.failed
        if job.is_load:
            self._pace.loaded(job.request_id, time.monotonic())
            self._lookups.loaded(job.request_id, job.done)
            self._lookups.load_failed(job.request_id, job.failed)
        self._finished.append(
            JobResult(
                job_id=job.job_id,
                success=success,
                successful_keys=job.done if job.is_load and not success else None,
                transfer_time=time.monotonic() - job.submitted,
                transfer_bytes=job.bytes_moved,
            )
        )

    def _warn_of_stuck_jobs(self, now: float) -> None:
        # Jobs are answered roughly in order, so the oldest is enough to look at.
        job = next(iter(self._parts.values())).job
        if not job.warned and now - job.submitted > STUCK_AFTER_S:
            job.warned = True
            logger.warning(
                "p2pkv: the agent has not answered a %s for %.0f s. It holds vLLM's slots until it answers or its "
                "connection closes; if its process is stopped or hangs, end it.",
                "load" if job.is_load else "store",
                now - job.submitted,
            )

    # --- metrics ---

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        """The tier's metrics, for vLLM's ``/metrics``."""
        return metrics.definitions()

    def get_stats(self) -> OffloadingConnectorStats | None:
        """What was observed since the last call."""
        return self._stats.take()

    def _count_failed(self, job: _Job, blocks: int, reason: str) -> None:
        self._stats.count(metrics.LOAD_FAILURES if job.is_load else metrics.STORE_REJECTED, blocks, reason)

    def _note_refusal(self, error: P2PKVError) -> str:
        if isinstance(error, Busy):
            return "busy"
        self._note_connected(False)
        return "unavailable"

    def _note_connected(self, connected: bool) -> None:
        if connected != self._connected:
            self._connected = connected
            self._stats.gauge(metrics.AGENT_CONNECTED, float(connected))


def batched(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """``items`` in lists of at most ``size``."""
    return (list(items[i : i + size]) for i in range(0, len(items), size))


def region_descriptor(spec: OffloadingSpec) -> tuple[int, bool]:
    """A descriptor of the primary tier's shared memory, and whether the caller has to close it.

    Raises:
        ConfigError: this spec has no shared region.
    """
    fd = getattr(getattr(spec, "_scheduler_mmap", None), "fd", None)  # private in vLLM
    if isinstance(fd, int):
        return fd, False
    path = f"/dev/shm/vllm_offload_{spec.config.engine_id}.mmap"
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC), True
    except OSError as error:
        raise ConfigError(
            "the primary tier has no shared memory that could be handed to the agent",
            hint='Use "spec_name": "TieringOffloadingSpec".',
            spec=type(spec).__name__,
            path=path,
        ) from error


def _connect(socket: str | None, engine_id: str) -> Client:
    # Imported here, so that vLLM's front-end process, which needs only the metrics' definitions, has no client.
    from p2pkv.client import AgentClient

    return AgentClient(socket, name=f"vllm {engine_id}")
