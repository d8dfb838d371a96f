"""The engine's handle on its agent: connects lazily, reconnects by itself, never waits longer than it was allowed.

Two ways to work, both thread-safe. *Blocking calls* (open, put, get_into, match) have a deadline each. *Jobs*
(submit_match, store, load) wait for nobody and are collected by :meth:`AgentClient.poll`: for a scheduler's step. A
load of at most 4 MiB that is all in the agent's arena is copied before it returns (half a millisecond at most).

When the agent goes away, blocking calls raise :class:`AgentUnavailable` (or count as misses, where that is the answer a
cache gives), running jobs come back with ``lost=True``, and the next use reconnects, with backoff, and tells the new
agent again which layouts and regions are in use.
"""

from __future__ import annotations

import os
import threading
import time

from p2pkv.client.cache import Cache, Region, checked_ms
from p2pkv.client.connection import Connection
from p2pkv.client.jobs import JobKind, JobResult, Jobs
from p2pkv.client.messages import Answer, Done, Load, Open, Opened, Request, Warm, Warming
from p2pkv.errors import AgentUnavailable, InvalidArgument, P2PKVError
from p2pkv.light import Final
from p2pkv.paths import default_socket_path
from p2pkv.types import MASK64, Layout
from p2pkv.wire.engine_types import WARM_PROTOCOL, Source

CONNECT_MS: Final = 2_000
BACKOFF_S: Final = (0.05, 2.0)
"""First and longest pause between attempts to reach an agent that is not there."""

ABANDON_MS: Final = 5_000
"""A match or store unanswered so long after its own deadline is given up, with the connection: the agent is stuck.

Never a load: until the agent has answered, or is gone (which ends the connection), it may write into the engine's
slots, and a slot that the engine has reused would be overwritten. An agent that is stopped (SIGSTOP) holds up the loads
that it had begun until it is continued or killed; nothing else waits for it."""


class AgentClient:
    """See the module's docstring.

    Args:
        socket_path: the agent's Unix socket; ``None`` = ``$P2PKV_SOCKET`` or the default place.
        name: shown by the agent beside this connection.
    """

    def __init__(self, socket_path: str | os.PathLike[str] | None = None, *, name: str = "") -> None:
        self._path = os.fspath(socket_path) if socket_path is not None else default_socket_path()
        self._name = name or f"pid {os.getpid()}"
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._caches: dict[int, Cache] = {}
        self._regions: dict[int, Region] = {}
        self._next_region = 1
        self._retry_at = 0.0
        self._backoff_s = BACKOFF_S[0]
        self._connecting: threading.Thread | None = None
        self.jobs = Jobs()
        self._job_deadlines: dict[int, float] = {}
        self._loads: set[int] = set()
        self._closed = False

    def open(self, layout: Layout, *, deadline_ms: int = CONNECT_MS) -> Cache:
        """Use a layout's namespace.

        Raises:
            LayoutMismatch: another engine of this cell keeps the same cache with another layout; ``fields`` says where.
            InvalidArgument: the layout itself is impossible.
            AgentUnavailable, DeadlineExceeded: no agent, or no answer in time.
        """
        if problems := layout.problems():
            raise InvalidArgument("the layout is impossible: " + "; ".join(problems))
        deadline = time.monotonic() + deadline_ms / 1000
        answer = self.connection(deadline).request(Open(layout.asdict()), deadline=deadline)
        if not isinstance(answer, Opened):
            raise P2PKVError("unexpected answer to OPEN", got=type(answer).__name__)
        with self._lock:
            cache = self._caches.get(answer.namespace)
            if cache is None:
                cache = self._caches[answer.namespace] = Cache(self, layout, answer.namespace)
            return cache

    def warm(self, top_bytes: int = 0, *, within_ms: int = 600_000, stop: bool = False) -> Warming:
        """Have the agent pull what its peers used last, ``top_bytes`` of it, into what memory it has free: in the
        background, behind all that anybody waits for. Returns at once; call it with 0 bytes to hear how it goes.

        Raises:
            InvalidArgument: a number that cannot be. Busy: it is warming up already.
            AgentUnavailable, DeadlineExceeded: no agent, or no answer in time.
        """
        if not 0 <= top_bytes <= MASK64:
            raise InvalidArgument("not a number of bytes", top_bytes=top_bytes, hint="0 asks how it goes.")
        within_ms = checked_ms(within_ms, "within_ms")
        deadline = time.monotonic() + CONNECT_MS / 1000
        connection = self.connection(deadline).speaking(WARM_PROTOCOL)
        answer = connection.request(Warm(top_bytes, within_ms, stop), deadline=deadline)
        if not isinstance(answer, Warming):
            raise P2PKVError("unexpected answer to WARM", got=type(answer).__name__)
        return answer

    def poll(self, timeout_ms: float = 0) -> list[JobResult]:
        """Results of jobs that have ended since the last call; waits at most ``timeout_ms`` for the first one."""
        jobs = self.jobs
        if not jobs.running and (results := jobs.take()):
            return results  # nothing else is under way: no need to look at the socket
        deadline = time.monotonic() + timeout_ms / 1000
        while True:
            connection = self._connection
            if connection is not None:
                connection.pump()
                if connection.own_loads.running:
                    connection.own_loads.pump()
                self._give_up_stuck(connection)
                if connection.broken is not None:
                    self._collect_lost(connection)
            results = self.jobs.take()
            left = deadline - time.monotonic()
            if results or left <= 0 or not self.jobs.running or connection is None:
                return results
            if self.jobs.falls_asleep():
                try:
                    connection.wait_news(left)
                finally:
                    self.jobs.wakes()

    @property
    def jobs_running(self) -> int:
        """Submitted jobs whose results have not been seen by :meth:`poll` yet."""
        return self.jobs.running

    @property
    def connected(self) -> bool:
        """Whether the agent was there when last looked."""
        connection = self._connection
        return connection is not None and connection.broken is None

    def close(self) -> None:
        """Leave the agent. Regions are unmapped on its side; running jobs are lost."""
        with self._lock:
            self._closed = True
            if self._connection is not None:
                self._connection.close()
                self._collect_lost(self._connection)
                self._connection = None  # its descriptors close with the last thread that is still in it
            for cache in self._caches.values():
                cache.forget()
            self._caches.clear()
            for region in list(self._regions.values()):
                region.forget()
            self._regions.clear()

    def __enter__(self) -> AgentClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for Cache and Region ---

    @property
    def live(self) -> Connection | None:
        """The connection if there is one; what it is asked may find it broken."""
        return self._connection

    def connection(self, deadline: float) -> Connection:
        """A live connection, made now if need be; for blocking calls."""
        connection = self._connection
        if connection is not None and connection.broken is None:
            return connection
        with self._lock:
            connection = self._connection
            if connection is not None and connection.broken is None:
                return connection
            return self._connect(min(deadline, time.monotonic() + CONNECT_MS / 1000))

    def connection_now(self) -> Connection:
        """A live connection if there is one; otherwise starts to make one in the background and raises. Never waits."""
        connection = self._connection
        if connection is not None and connection.broken is None:
            return connection
        with self._lock:
            if (self._connecting is None or not self._connecting.is_alive()) and time.monotonic() >= self._retry_at:
                self._connecting = threading.Thread(target=self._connect_quietly, name="p2pkv-connect", daemon=True)
                self._connecting.start()
        raise AgentUnavailable("not connected to the agent", socket=self._path)

    def submit(self, message: Request, kind: JobKind, keys: int, deadline_ms: int) -> int:
        """Send a job's request; the result comes out of :meth:`poll`."""
        connection = self.connection_now()
        job_id = self.jobs.begin()

        def on_answer(answer: Answer | P2PKVError) -> None:
            self._job_deadlines.pop(job_id, None)
            self._loads.discard(job_id)
            self.jobs.finish(job_id, kind, keys, answer)

        if kind != "load":
            self._job_deadlines[job_id] = time.monotonic() + (deadline_ms + ABANDON_MS) / 1000
        if kind == "load":
            self._loads.add(job_id)
        try:
            connection.submit(message, on_answer)
        except BaseException:
            self._job_deadlines.pop(job_id, None)
            self._loads.discard(job_id)
            self.jobs.forget(job_id)
            raise
        return job_id

    def load_here(self, message: Load, region: Region, block_bytes: int) -> int | None:
        """A load by threads of our own, of blocks that are all in the arena. None: they are not; ask the agent.

        If some have gone by the time that they are copied, the agent is asked after all, for the same job.
        """
        connection = self._connection
        memory = region.memory() if connection is not None and connection.own_loads.fd >= 0 else None
        if connection is None or memory is None:
            return None
        keys = list(message.keys)
        to = [memory.address + region.offset + slot * region.slot_bytes for slot in message.slots]
        job_id = self.jobs.begin()
        reported = False

        def on_copied(statuses: bytes) -> None:
            nonlocal reported
            reported = True
            if any(statuses):
                self._go_on(job_id, message)
            else:
                done = Done(statuses, bytes([Source.LOCAL]) * len(keys), len(keys) * block_bytes, 0)
                self.jobs.finish(job_id, "load", len(keys), done)

        try:
            begun = connection.own_loads.begin(message.namespace, keys, memory, to, block_bytes, on_copied)
        except BaseException:
            if not reported:
                self.jobs.forget(job_id)
            raise
        if begun:
            self.wake()
            return job_id
        self.jobs.forget(job_id)
        return None

    def wake(self) -> None:
        """Whoever polls in another thread: for a result, or to watch for one, that the socket says nothing of."""
        if self.jobs.sleepers and (connection := self._connection) is not None:
            connection.own_loads.wake()

    def _go_on(self, job_id: int, message: Load) -> None:
        """The agent goes on with a load of ours that found too little."""

        def on_answer(answer: Answer | P2PKVError) -> None:
            self._loads.discard(job_id)
            self.jobs.finish(job_id, "load", len(message.keys), answer)

        self._loads.add(job_id)
        try:
            self.connection_now().submit(message, on_answer)
        except P2PKVError as error:
            on_answer(error)

    def add_region(self, region: Region) -> int:
        """Number a region and remember it for reconnects."""
        with self._lock:
            number = self._next_region
            self._next_region += 1
            self._regions[number] = region
            return number

    def drop_region(self, number: int) -> None:
        """Forget a region."""
        with self._lock:
            self._regions.pop(number, None)

    # --- inside ---

    def _connect_quietly(self) -> None:
        try:
            self.connection(time.monotonic() + CONNECT_MS / 1000)
        except P2PKVError:
            pass  # the backoff says when to try again; whoever asks meanwhile gets AgentUnavailable

    def _connect(self, deadline: float) -> Connection:
        if self._closed:
            raise AgentUnavailable("this client is closed")
        if self._connection is not None:
            self._collect_lost(self._connection)
            self._connection = None
        now = time.monotonic()
        if now < self._retry_at:
            raise AgentUnavailable("the agent was not there a moment ago", socket=self._path)
        connection: Connection | None = None
        try:
            connection = Connection(self._path, name=self._name, deadline=deadline)
            for cache in self._caches.values():
                connection.request(Open(cache.layout.asdict()), deadline=deadline)
            for region in self._regions.values():
                try:
                    region.announce(connection, deadline)
                except InvalidArgument:
                    pass  # the engine has cut its file off: the agent refuses the jobs that name it, and only these
        except P2PKVError:
            if connection is not None:
                connection.close("the agent did not take up what is in use here")
            self._retry_at = time.monotonic() + self._backoff_s
            self._backoff_s = min(self._backoff_s * 2, BACKOFF_S[1])
            raise
        self._backoff_s = BACKOFF_S[0]
        self._connection = connection
        return connection

    def _give_up_stuck(self, connection: Connection) -> None:
        now = time.monotonic()
        if not self._loads and any(now > deadline for deadline in list(self._job_deadlines.values())):
            connection.close("a job was not answered long after its deadline")

    def _collect_lost(self, connection: Connection) -> None:
        connection.own_loads.end()
        for on_answer in connection.take_lost():
            on_answer(connection.broken or AgentUnavailable("gone"))
