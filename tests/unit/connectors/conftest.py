"""A hand-written stand-in for the agent, behind the connector's client seam: what it was told, and what it answers."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from p2pkv.errors import AgentUnavailable, Busy, P2PKVError
from p2pkv.types import Layout
from p2pkv.wire.engine_types import Pace


@dataclass
class Update:
    """One finished job, as ``client.poll()`` gives it."""

    job_id: int
    kind: str
    ok: list[bool]
    sources: list[str | None]
    lost: bool = False
    bytes_local: int = 0
    bytes_peer: int = 0


@dataclass
class Region:
    """The engine's memory as the agent maps it."""

    memory: mmap.mmap
    slots: int
    slot_bytes: int

    def __getitem__(self, slot: int) -> bytes:
        assert 0 <= slot < self.slots
        return self.memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes]

    def __setitem__(self, slot: int, block: bytes) -> None:
        assert 0 <= slot < self.slots
        self.memory[slot * self.slot_bytes : (slot + 1) * self.slot_bytes] = block


class FakeCache:
    """One namespace. Blocks live in ``agent.blocks[namespace]``; ``agent.at_peers`` says which are only at a peer."""

    def __init__(self, agent: FakeAgent, layout: Layout) -> None:
        self.agent = agent
        self.layout = layout
        self.blocks = agent.blocks.setdefault(layout.namespace, {})

    def map_region(self, fd: int, *, slots: int, slot_bytes: int) -> Region:
        assert os.fstat(fd).st_size >= slots * slot_bytes
        region = Region(mmap.mmap(fd, slots * slot_bytes), slots, slot_bytes)
        self.agent.regions.append(region)
        return region

    def submit_match(self, keys: Sequence[bytes], *, pace: Pace) -> int:
        self.agent.paces.append(pace)
        self.agent.questions.append(list(keys))
        sources = [self._source(key) for key in keys]
        return self.agent.begin(lambda job: Update(job, "match", [s is not None for s in sources], sources))

    def store(self, keys: Sequence[bytes], region: Region, slots: Sequence[int]) -> int:
        def copy(job: int) -> Update:
            for key, slot in zip(keys, slots, strict=True):
                self.blocks[key] = region[slot]
            return Update(job, "store", [True] * len(keys), [None] * len(keys))

        return self.agent.begin(copy)

    def load(self, keys: Sequence[bytes], region: Region, slots: Sequence[int], *, deadline_ms: int, pace: Pace) -> int:
        self.agent.paces.append(pace)

        def copy(job: int) -> Update:
            sources = [None if key in self.agent.gone else self._source(key) for key in keys]
            for key, slot, source in zip(keys, slots, sources, strict=True):
                if source is not None:
                    region[slot] = self.blocks[key]
            return Update(
                job,
                "load",
                [s is not None for s in sources],
                sources,
                bytes_local=sources.count("local") * region.slot_bytes,
                bytes_peer=sources.count("peer") * region.slot_bytes,
            )

        return self.agent.begin(copy)

    def _source(self, key: bytes) -> str | None:
        if key not in self.blocks:
            return None
        return "peer" if key in self.agent.at_peers else "local"


@dataclass
class FakeAgent:
    """The client's side of an agent. Jobs run when :meth:`run` is called, so a test decides what is in flight."""

    blocks: dict[int, dict[bytes, bytes]] = field(default_factory=dict)
    at_peers: set[bytes] = field(default_factory=set)
    gone: set[bytes] = field(default_factory=set)  # promised by match, missing when loaded
    questions: list[list[bytes]] = field(default_factory=list)
    paces: list[Pace] = field(default_factory=list)
    waited_ms: list[float] = field(default_factory=list)
    answers_while_waited: bool = False
    opened: list[Layout] = field(default_factory=list)
    regions: list[Region] = field(default_factory=list)
    refusal: P2PKVError | None = None  # raised by every submit
    open_refusal: P2PKVError | None = None
    on_open: Callable[[], None] = lambda: None
    closed: bool = False
    _next_job: int = 0
    _waiting: deque[tuple[int, Callable[[int], Update]]] = field(default_factory=deque)
    _done: list[Update] = field(default_factory=list)

    def open(self, layout: Layout) -> FakeCache:
        self.on_open()
        if self.open_refusal is not None:
            raise self.open_refusal
        self.opened.append(layout)
        return FakeCache(self, layout)

    def poll(self, timeout_ms: float = 0) -> list[Update]:
        self.waited_ms.append(timeout_ms)
        if timeout_ms and self.answers_while_waited:
            self.run()
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self.closed = True

    def begin(self, work: Callable[[int], Update]) -> int:
        if self.refusal is not None:
            raise self.refusal
        self._next_job += 1
        self._waiting.append((self._next_job, work))
        return self._next_job

    def run(self) -> None:
        """Finish every job that was submitted; the results come with the next poll."""
        while self._waiting:
            job, work = self._waiting.popleft()
            self._done.append(work(job))

    def die(self) -> None:
        """Go away with every unfinished job."""
        while self._waiting:
            job, work = self._waiting.popleft()
            answer = work(job)
            count = len(answer.ok)
            self._done.append(Update(job, answer.kind, [False] * count, [None] * count, lost=True))
        self.refusal = AgentUnavailable("gone")

    def fill_queue(self) -> None:
        """From now on every submit is refused as too much."""
        self.refusal = Busy("full")


@pytest.fixture
def agent() -> FakeAgent:
    return FakeAgent()


@pytest.fixture
def make_layout() -> Callable[..., Layout]:
    def make(**changes: Any) -> Layout:
        fields: dict[str, Any] = {
            "model": "m",
            "revision": "r",
            "kv_dtype": "float32",
            "block_tokens": 16,
            "block_bytes": 4096,
        }
        return Layout(**(fields | changes))

    return make
