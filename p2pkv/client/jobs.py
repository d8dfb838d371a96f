"""Results of work that was submitted without waiting."""

from __future__ import annotations

import itertools
import threading
from collections import deque

from p2pkv import _native
from p2pkv.client.messages import Answer, Done, EngineError, Matched
from p2pkv.errors import P2PKVError
from p2pkv.light import Final, Literal, NamedTuple
from p2pkv.types import Status
from p2pkv.wire.engine_types import Source

JobKind = Literal["match", "store", "load"]
FINISHED_MAX: Final = 65_536
"""Results nobody fetched by :meth:`AgentClient.poll`; beyond it the oldest are dropped."""

_LOST: Final = bytes([Status.LOST])
_INVALID: Final = bytes([Status.INVALID])


class JobResult(NamedTuple):
    """How a submitted job ended. ``ok``, ``statuses`` and ``sources`` have one entry per key, in the order submitted.

    ``ok``: for store, the block is in the agent's store; for load, the block's bytes are in its slot; for match, the
    block is here or at a live peer. ``sources``: "local", "peer" or None. ``lost``: the agent went away meanwhile.
    """

    job_id: int
    kind: JobKind
    ok: list[bool]
    statuses: bytes
    sources: list[str | None]
    bytes_local: int = 0
    bytes_peer: int = 0
    lost: bool = False
    error: str = ""


_SOURCE_NAMES: Final[dict[int, str | None]] = {Source.NONE: None, Source.LOCAL: "local", Source.PEER: "peer"}
_STORED: Final = frozenset({Status.OK, Status.EXISTS})


class Jobs:
    """The finished jobs of one client, and the numbers of the running ones. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self.finished: deque[JobResult] = deque(maxlen=FINISHED_MAX)
        self.running = 0
        self.sleepers = 0

    def begin(self) -> int:
        """Count a job in."""
        with self._lock:
            self.running += 1
            return next(self._ids)

    def loads_here(
        self, gets: _native.Gets, memory: object, base: int, slot_bytes: int, slots: int
    ) -> _native.LoadsHere:
        """What does loads that are over when they return, out of the local arena into the region at ``base``; it
        numbers them and adds their results by itself."""
        return _native.LoadsHere(gets, memory, base, slot_bytes, slots, self._ids, self.finished.append, JobResult)

    def forget(self, job_id: int) -> None:
        """A job that could not even be submitted."""
        with self._lock:
            self.running -= 1

    def finish(self, job_id: int, kind: JobKind, keys: int, answer: Answer | P2PKVError) -> None:
        """Turn an answer (or what came instead) into a result."""
        if isinstance(answer, Matched):
            ok = [source != Source.NONE for source in answer.present]
            statuses = bytes(Status.OK if held else Status.MISS for held in ok)
            result = JobResult(job_id, kind, ok, statuses, [_SOURCE_NAMES.get(s) for s in answer.present])
        elif isinstance(answer, Done) and len(answer.statuses) == keys:
            good = _STORED if kind == "store" else {Status.OK}
            result = JobResult(
                job_id,
                kind,
                [status in good for status in answer.statuses],
                answer.statuses,
                [_SOURCE_NAMES.get(s) for s in answer.sources],
                answer.bytes_local,
                answer.bytes_peer,
            )
        elif isinstance(answer, EngineError):
            result = JobResult(job_id, kind, [False] * keys, _INVALID * keys, [None] * keys, error=answer.message)
        else:
            lost = isinstance(answer, P2PKVError)
            result = JobResult(
                job_id, kind, [False] * keys, _LOST * keys, [None] * keys, lost=lost, error=str(answer)[:200]
            )
        with self._lock:
            self.running -= 1
            self.finished.append(result)

    def falls_asleep(self) -> bool:
        """Somebody is about to sleep until a result is there, and counts in :attr:`sleepers` until :meth:`wakes`.
        False: there is one already."""
        with self._lock:
            self.sleepers += 1  # first: who adds a result without the lock (native code) looks at this afterwards
            if self.finished:
                self.sleepers -= 1
                return False
            return True

    def wakes(self) -> None:
        """After :meth:`falls_asleep` said True."""
        with self._lock:
            self.sleepers -= 1

    def take(self) -> list[JobResult]:
        """Every result that has not been taken yet, oldest first."""
        results: list[JobResult] = []
        try:
            while self.finished:
                results.append(self.finished.popleft())
        except IndexError:  # another thread has taken it
            pass
        return results
