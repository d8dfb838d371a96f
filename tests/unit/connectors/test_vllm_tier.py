"""The vLLM tier against vLLM's own types, with a fake agent behind the client seam. Runs where vLLM is (.venv-vllm)."""

from __future__ import annotations

import mmap
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from p2pkv.errors import AgentUnavailable, ConfigError, LayoutMismatch
from p2pkv.types import Layout

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm", reason="vLLM is not installed here: run this with .venv-vllm (`make vllm`)")
    import numpy as np
    from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
    from vllm.v1.kv_offload.tiering.base import JobResult, TransferJob
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    from p2pkv.connectors import _vllm_metrics as metrics
    from p2pkv.connectors import vllm as module
    from p2pkv.connectors.vllm import P2PKVTier

HIT, MISS, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY
SLOTS, ROW = 16, 4096
HASHES = [bytes([i + 1]) * 32 for i in range(8)]
KEYS = [make_offload_key(h, 0) for h in HASHES]


class Clock:
    """Stands in for the ``time`` module: time passes when the test, or a sleep, says so."""

    now = 100.0
    on_sleep: Callable[[], None] = staticmethod(lambda: None)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.on_sleep()


@dataclass
class Engine:
    """A tier with the memory it shares, and vLLM's side of the conversation."""

    tier: P2PKVTier
    memory: np.ndarray[Any, Any]
    agent: Any
    clock: Clock
    jobs: int = 0

    def request(self, name: str, keys: Sequence[bytes] = tuple(KEYS)) -> ReqContext:
        context = ReqContext(req_id=name)
        for i, key in enumerate(keys):
            context.set_offload_key_position(key, 16 * (i + 1))
        self.tier.on_new_request(context)
        return context

    def lookups(self, context: ReqContext, keys: Sequence[bytes] = tuple(KEYS)) -> list[LookupResult]:
        """What one scheduler step does: results first, then every key."""
        self.tier.get_finished_jobs()
        return [self.tier.lookup(key, context) for key in keys]

    def job(self, context: ReqContext, keys: Sequence[bytes], slots: Sequence[int], *, load: bool) -> int:
        self.jobs += 1
        chunk_ids = np.array(slots, dtype=np.int32)
        submit = self.tier.submit_load if load else self.tier.submit_store
        submit(TransferJob(self.jobs, keys, chunk_ids, is_promotion=load, req_context=context))
        return self.jobs

    def finished(self) -> dict[int, JobResult]:
        return {result.job_id: result for result in self.tier.get_finished_jobs()}

    def step_ends(self, *, new: Sequence[str] = (), preempted: Sequence[str] = ()) -> None:
        self.tier.on_schedule_end(ScheduleEndContext(new, preempted))

    def counted(self, name: str) -> dict[tuple[str, ...], float]:
        stats = self.tier.get_stats()
        return dict(stats.data["data"].get(name, {})) if stats is not None else {}

    def hold_everywhere(self, hashes: Sequence[bytes], *, peer: Sequence[bytes] = ()) -> None:
        for layout in self.agent.opened:
            self.agent.blocks[layout.namespace].update({h: h[:1] * ROW for h in hashes})
        self.agent.at_peers.update(peer)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def region() -> Iterator[tuple[int, mmap.mmap]]:
    fd = os.memfd_create("primary")
    os.ftruncate(fd, SLOTS * ROW)
    memory = mmap.mmap(fd, SLOTS * ROW)
    yield fd, memory
    os.close(fd)


@pytest.fixture
def start(
    agent: Any, clock: Clock, region: tuple[int, mmap.mmap], make_layout: Callable[..., Layout]
) -> Iterator[Callable[..., Engine]]:
    tiers: list[P2PKVTier] = []

    def make(*, groups: int = 1, **options: Any) -> Engine:
        fd, memory = region
        array = np.frombuffer(memory, dtype=np.uint8).reshape(SLOTS, ROW)
        spec = SimpleNamespace(config=SimpleNamespace(engine_id="e"), _scheduler_mmap=SimpleNamespace(fd=fd))
        layouts = {g: make_layout(group=g) for g in range(groups)}
        tier = P2PKVTier(spec, memoryview(array), "P2PKVTier", client=agent, layouts=layouts, **options)
        tiers.append(tier)
        return Engine(tier, array, agent, clock)

    yield make
    agent.run()
    for tier in tiers:
        tier.shutdown()


# --- lookups ---


def test_a_request_is_asked_for_with_one_message_and_answered_from_then_on(
    start: Callable[..., Engine], agent: Any
) -> None:
    engine = start()
    engine.hold_everywhere(HASHES[:3])
    request = engine.request("a")
    assert engine.lookups(request) == [RETRY] * 8
    assert engine.lookups(request) == [RETRY] * 8
    agent.run()
    assert engine.lookups(request) == [HIT] * 3 + [MISS] * 5
    assert agent.questions == [HASHES]


def test_an_open_lookup_does_not_keep_an_idle_engine_stepping(start: Callable[..., Engine]) -> None:
    engine = start()
    engine.lookups(engine.request("a"))
    assert not engine.tier.has_pending_work()


def test_no_answer_within_the_deadline_is_a_miss_also_if_it_comes_later(
    start: Callable[..., Engine], agent: Any, clock: Clock
) -> None:
    engine = start(lookup_deadline_ms=50)
    engine.hold_everywhere(HASHES)
    request = engine.request("a")
    engine.lookups(request)
    clock.now += 0.051
    assert engine.lookups(request) == [MISS] * 8
    agent.run()
    assert engine.lookups(request) == [MISS] * 8
    assert engine.counted(metrics.LOOKUP_FAILURES) == {("timeout",): 8}


def test_without_vllms_private_positions_each_key_is_asked_for_alone(start: Callable[..., Engine], agent: Any) -> None:
    engine = start()
    engine.hold_everywhere(HASHES)
    request = ReqContext(req_id="a")
    del request._offload_key_positions
    engine.lookups(request, KEYS[:2])
    agent.run()
    assert engine.lookups(request, KEYS[:2]) == [HIT, HIT]
    assert agent.questions == [[HASHES[0]], [HASHES[1]]]


def test_each_group_has_its_own_namespace_and_keys_lose_their_group_number(
    start: Callable[..., Engine], agent: Any
) -> None:
    engine = start(groups=2)
    second = [make_offload_key(h, 1) for h in HASHES[:2]]
    agent.blocks[agent.opened[1].namespace][HASHES[0]] = bytes(ROW)
    request = engine.request("a", [*KEYS[:2], *second])
    engine.lookups(request, [*KEYS[:2], *second])
    agent.run()
    assert engine.lookups(request, [*KEYS[:2], *second]) == [MISS, MISS, HIT, MISS]
    assert agent.questions == [HASHES[:2], HASHES[:2]]


def test_a_long_prompt_is_asked_for_in_several_messages(
    start: Callable[..., Engine], agent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEYS_PER_MESSAGE", 3)
    engine = start()
    engine.hold_everywhere(HASHES)
    request = engine.request("a")
    engine.lookups(request)
    agent.run()
    assert engine.lookups(request) == [HIT] * 8
    assert [len(question) for question in agent.questions] == [3, 3, 2]


def test_a_scheduled_or_preempted_request_is_asked_for_again(start: Callable[..., Engine], agent: Any) -> None:
    engine = start()
    request = engine.request("a")
    engine.lookups(request)
    agent.run()
    assert engine.lookups(request) == [MISS] * 8
    engine.hold_everywhere(HASHES)
    engine.step_ends(preempted=["a"])
    engine.lookups(request)
    agent.run()
    assert engine.lookups(request) == [HIT] * 8


def test_vllms_hit_source_says_where_the_block_is(start: Callable[..., Engine], agent: Any) -> None:
    engine = start()
    engine.hold_everywhere(HASHES[:2], peer=[HASHES[1]])
    request = engine.request("a")
    engine.lookups(request)
    agent.run()
    engine.lookups(request, KEYS[:1])
    assert engine.tier.cache_hit_source is CacheHitSource.HOST
    engine.lookups(request, KEYS[1:2])
    assert engine.tier.cache_hit_source is CacheHitSource.P2P


# --- jobs ---


def test_stored_blocks_come_back_into_other_slots(start: Callable[..., Engine], agent: Any) -> None:
    engine = start()
    request = engine.request("a")
    for slot in range(3):
        engine.memory[slot] = 10 + slot
    store = engine.job(request, KEYS[:3], [0, 1, 2], load=False)
    assert engine.finished() == {}
    assert engine.tier.has_pending_work()
    agent.run()
    assert engine.finished()[store].success
    load = engine.job(request, KEYS[:3], [9, 7, 8], load=True)
    agent.run()
    result = engine.finished()[load]
    assert result.success
    assert result.transfer_bytes == 3 * ROW
    assert [set(engine.memory[slot].tolist()) for slot in (9, 7, 8)] == [{10}, {11}, {12}]
    assert not engine.tier.has_pending_work()


def test_a_block_that_does_not_come_is_a_miss_for_that_request_and_no_other(
    start: Callable[..., Engine], agent: Any
) -> None:
    engine = start()
    engine.hold_everywhere(HASHES)
    request, other = engine.request("a"), engine.request("b")
    engine.lookups(request)
    agent.run()
    engine.lookups(request)
    agent.gone.add(HASHES[1])
    load = engine.job(request, KEYS[:3], [0, 1, 2], load=True)
    agent.run()
    result = engine.finished()[load]
    assert not result.success
    assert result.successful_keys == [KEYS[0], KEYS[2]]
    # vLLM does not ask for the loaded ones while its primary tier has them; if it lost them, they are not loaded twice.
    assert engine.lookups(request, KEYS[:4]) == [MISS, MISS, MISS, HIT]
    engine.step_ends(preempted=["a"])
    engine.lookups(request)
    engine.lookups(other)
    agent.run()
    assert engine.lookups(request, KEYS[:3]) == [HIT, MISS, HIT]
    assert engine.lookups(other)[1] is HIT
    assert engine.counted(metrics.LOAD_FAILURES) == {("missing",): 1}


def test_a_job_of_two_groups_ends_when_both_parts_have(start: Callable[..., Engine], agent: Any) -> None:
    engine = start(groups=2)
    request = engine.request("a")
    other_group = make_offload_key(HASHES[0], 1)
    engine.memory[0], engine.memory[1] = 5, 6
    store = engine.job(request, [KEYS[0], other_group], [0, 1], load=False)
    agent.run()
    assert engine.finished()[store].success
    stored = [agent.blocks[layout.namespace][HASHES[0]][0] for layout in agent.opened]
    assert stored == [5, 6]


def test_a_full_queue_answers_at_once_that_nothing_was_stored(start: Callable[..., Engine], agent: Any) -> None:
    engine = start()
    request = engine.request("a")
    agent.fill_queue()
    store = engine.job(request, KEYS[:2], [0, 1], load=False)
    assert not engine.finished()[store].success
    assert not engine.tier.has_pending_work()
    assert engine.counted(metrics.STORE_REJECTED) == {("busy",): 2}


def test_open_jobs_are_bounded(start: Callable[..., Engine], agent: Any) -> None:
    engine = start(open_jobs_max=2)
    request = engine.request("a")
    jobs = [engine.job(request, [KEYS[i]], [i], load=False) for i in range(3)]
    assert list(engine.finished()) == [jobs[2]]
    agent.run()
    assert all(result.success for result in engine.finished().values())


def test_an_agent_that_dies_turns_lookups_into_misses_and_jobs_into_failures(
    start: Callable[..., Engine], agent: Any
) -> None:
    engine = start()
    engine.hold_everywhere(HASHES)
    loading, asking = engine.request("a"), engine.request("b")
    engine.lookups(asking)
    load = engine.job(loading, KEYS[:2], [0, 1], load=True)
    store = engine.job(loading, KEYS[2:4], [2, 3], load=False)
    agent.die()
    results = engine.finished()
    assert not results[load].success
    assert results[load].successful_keys == []
    assert not results[store].success
    assert engine.lookups(asking) == [MISS] * 8
    assert engine.lookups(engine.request("c")) == [MISS] * 8
    assert not engine.tier.has_pending_work()


def test_draining_waits_for_every_job(start: Callable[..., Engine], agent: Any, clock: Clock) -> None:
    engine = start()
    store = engine.job(engine.request("a"), KEYS[:1], [0], load=False)
    clock.on_sleep = agent.run
    engine.tier.drain_jobs()
    assert engine.finished()[store].success


def test_after_a_reset_the_old_weights_blocks_are_not_seen(
    start: Callable[..., Engine], agent: Any, clock: Clock
) -> None:
    engine = start()
    engine.hold_everywhere(HASHES)
    opened = threading.Event()
    agent.on_open = opened.set
    engine.tier.drain_jobs()
    assert opened.wait(10)
    engine.tier._session._thread.join(10)
    assert [layout.revision for layout in agent.opened] == ["r", "r+reset1"]
    assert len(agent.regions) == 1
    request = engine.request("a")
    engine.lookups(request)
    agent.run()
    assert engine.lookups(request) == [MISS] * 8


def test_shutdown_leaves_an_agent_that_does_not_answer(start: Callable[..., Engine], agent: Any, clock: Clock) -> None:
    engine = start()
    engine.job(engine.request("a"), KEYS[:1], [0], load=False)
    before = clock.now
    engine.tier.shutdown()
    assert agent.closed
    assert clock.now - before <= module.SHUTDOWN_DRAIN_S + 0.1


# --- the session ---


def test_an_engine_starts_without_its_agent_and_finds_it_later(start: Callable[..., Engine], agent: Any) -> None:
    agent.open_refusal = AgentUnavailable("not yet")
    tried_again = threading.Event()
    engine = start()
    request = engine.request("a")
    assert engine.lookups(request) == [MISS] * 8
    store = engine.job(request, KEYS[:1], [0], load=False)
    assert not engine.finished()[store].success

    def come_up() -> None:
        agent.open_refusal = None
        tried_again.set()

    agent.on_open = come_up
    assert tried_again.wait(10)
    engine.tier._session._thread.join(10)
    engine.hold_everywhere(HASHES)
    request = engine.request("b")
    engine.lookups(request)
    agent.run()
    assert engine.lookups(request) == [HIT] * 8


def test_a_conflicting_layout_stops_the_engine_from_starting(start: Callable[..., Engine], agent: Any) -> None:
    agent.open_refusal = LayoutMismatch("differs", fields=("block_bytes",))
    with pytest.raises(LayoutMismatch):
        start()
    assert agent.closed


def test_an_unknown_option_is_an_error_that_names_the_nearest(start: Callable[..., Engine]) -> None:
    with pytest.raises(ConfigError, match="lookup_deadline_ms"):
        start(lookup_deadline=5)
    with pytest.raises(ConfigError, match="load_deadline_ms"):
        start(load_deadline_ms="soon")


def test_the_region_is_found_by_path_when_vllm_hides_its_descriptor(clock: Clock) -> None:
    name = f"p2pkv-test-{os.getpid()}"
    path = f"/dev/shm/vllm_offload_{name}.mmap"
    spec = SimpleNamespace(config=SimpleNamespace(engine_id=name))
    with pytest.raises(ConfigError, match="TieringOffloadingSpec"):
        module.region_descriptor(spec)
    with open(path, "xb") as file:
        file.truncate(ROW)
    try:
        fd, owned = module.region_descriptor(spec)
        assert owned
        assert os.fstat(fd).st_size == ROW
        os.close(fd)
    finally:
        os.unlink(path)


# --- metrics ---


def test_everything_reported_is_defined_with_its_labels(start: Callable[..., Engine], agent: Any) -> None:
    engine = start()
    engine.hold_everywhere(HASHES[:2], peer=HASHES[:1])
    request = engine.request("a")
    engine.lookups(request)
    engine.job(request, KEYS[4:5], [4], load=False)
    agent.run()
    engine.lookups(request)
    engine.job(request, KEYS[:3], [0, 1, 2], load=True)
    agent.run()
    engine.finished()
    stats = engine.tier.get_stats()
    assert stats is not None
    observed = stats.data["data"]
    definitions = P2PKVTier.build_metric_definitions({})
    for name, values in observed.items():
        for labels in values:
            assert len(labels) == len(definitions[name].labelnames), name
    assert observed[metrics.LOOKUP_BLOCKS] == {("peer",): 1, ("local",): 1, ("miss",): 6}
    assert observed[metrics.LOAD_BYTES] == {("peer",): ROW, ("local",): ROW}
    assert observed[metrics.LOAD_FAILURES] == {("missing",): 1}
    assert observed[metrics.STORE_BYTES] == {(): ROW}
    assert engine.tier.get_stats() is None


# --- waiting for answers, and what computing takes ---


def test_an_answer_that_comes_within_the_steps_patience_needs_no_other_step(
    start: Callable[..., Engine], agent: Any
) -> None:
    engine = start()
    engine.hold_everywhere(HASHES[:2])
    agent.answers_while_waited = True
    context = engine.request("r")
    assert engine.lookups(context)[:3] == [LookupResult.HIT, LookupResult.HIT, LookupResult.MISS]


def test_a_step_waits_so_long_in_all_and_not_for_each_request(start: Callable[..., Engine], agent: Any) -> None:
    engine = start(lookup_wait_ms=2.0)
    for number in range(100):
        engine.lookups(engine.request(f"r{number}"), [bytes([number]) * 16 + bytes(4)])
    assert 0 < sum(agent.waited_ms) <= 100.0, "each wait is for what is left"
    assert max(agent.waited_ms) <= 2.0
    waits = len([wait for wait in agent.waited_ms if wait > 0])
    engine.lookups(engine.request("late"), [bytes([200]) * 16 + bytes(4)])
    assert len([wait for wait in agent.waited_ms if wait > 0]) == waits, "the step's patience is used up"
    engine.step_ends()
    engine.lookups(engine.request("next"), [bytes([201]) * 16 + bytes(4)])
    assert len([wait for wait in agent.waited_ms if wait > 0]) > waits


def test_patience_of_nothing_never_waits(start: Callable[..., Engine], agent: Any) -> None:
    engine = start(lookup_wait_ms=0)
    engine.lookups(engine.request("r"))
    assert not any(agent.waited_ms)


def computed(engine: Engine, name: str, keys: Sequence[bytes], seconds: float) -> None:
    """A request that is scheduled, takes so long, and offers its blocks."""
    context = engine.request(name, keys)
    engine.step_ends(new=[name])
    engine.clock.now += seconds
    engine.step_ends()
    engine.job(context, keys, list(range(len(keys))), load=False)
    engine.tier.on_request_finished(context)


def test_what_blocks_take_goes_along_with_questions_and_loads(start: Callable[..., Engine], agent: Any) -> None:
    engine = start()
    for number in range(6):
        computed(engine, f"r{number}", KEYS, 0.1 * len(KEYS))
    agent.run()
    engine.lookups(engine.request("asks"))
    assert agent.paces[-1].block_us == pytest.approx(100_000, rel=0.01)
    engine.job(engine.request("loads"), KEYS, list(range(len(KEYS))), load=True)
    assert agent.paces[-1].block_us == pytest.approx(100_000, rel=0.01)


def test_where_costs_are_not_to_decide_the_agent_is_told_of_none(start: Callable[..., Engine], agent: Any) -> None:
    engine = start(cost_aware=False)
    for number in range(6):
        computed(engine, f"r{number}", KEYS, 0.1 * len(KEYS))
    engine.lookups(engine.request("asks"))
    assert {pace.block_us for pace in agent.paces} == {0}
