"""The tier's session with its agent: caches opened, the region handed over; retried off the scheduler's thread.

The protocols below are all that the connector uses of :mod:`p2pkv.client`, and what its tests fake.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal, Protocol

from p2pkv.errors import DeadlineExceeded, InvalidArgument, LayoutMismatch, P2PKVError, Unavailable
from p2pkv.types import Layout
from p2pkv.wire.engine_types import Pace

logger = logging.getLogger("vllm.p2pkv")

RETRY_S_MIN: Final = 0.25
RETRY_S_MAX: Final = 5.0
"""An agent that restarts is found again within seconds; one that never comes costs one connect() per five seconds."""


class JobUpdate(Protocol):
    """One finished client job. ``ok`` and ``sources`` have one entry per key, in the order of submission."""

    @property
    def job_id(self) -> int: ...
    @property
    def kind(self) -> Literal["match", "store", "load"]: ...
    @property
    def ok(self) -> Sequence[bool]: ...
    @property
    def lost(self) -> bool: ...
    @property
    def sources(self) -> Sequence[str | None]: ...
    @property
    def bytes_local(self) -> int: ...
    @property
    def bytes_peer(self) -> int: ...


class CacheHandle(Protocol):
    """One layout's cache. The submitting calls return at once with a job number, or raise ``Unavailable``/``Busy``."""

    def map_region(self, fd: int, *, slots: int, slot_bytes: int) -> Any: ...
    def submit_match(self, keys: Sequence[bytes], *, pace: Pace) -> int: ...
    def store(self, keys: Sequence[bytes], region: Any, slots: Sequence[int]) -> int: ...
    def load(
        self, keys: Sequence[bytes], region: Any, slots: Sequence[int], *, deadline_ms: int, pace: Pace
    ) -> int: ...


class Client(Protocol):
    """The connection to the agent; thread-safe."""

    def open(self, layout: Layout) -> CacheHandle: ...
    def poll(self, timeout_ms: float = 0) -> Sequence[JobUpdate]: ...
    def close(self) -> None: ...


class Session:
    """What is open at the agent at one time: a cache per KV-cache group, and the engine's region."""

    __slots__ = ("caches", "region")

    def __init__(self, caches: Mapping[int, CacheHandle], region: Any) -> None:
        self.caches = caches
        self.region = region


class SessionKeeper:
    """Opens the session, at once if the agent is there, else from a thread that sleeps between attempts.

    ``current`` may be read from any thread and is None until the session is open. Once open, the client itself sees to
    reconnecting; the keeper's thread has ended by then.

    Args:
        client: owned by the caller.
        region_fd: descriptor of the engine's shared memory; stays the caller's.
        slots: slots in it.
        slot_bytes: bytes of one slot.
    """

    def __init__(self, client: Client, *, region_fd: int, slots: int, slot_bytes: int) -> None:
        self._client = client
        self._fd = os.dup(region_fd)
        self._slots = slots
        self._slot_bytes = slot_bytes
        self._region: Any = None  # handed over once; the client repeats it to an agent that restarted
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.current: Session | None = None

    def start(self, layouts: Mapping[int, Layout]) -> None:
        """First attempt, in the caller's thread (blocks for at most the client's own deadline).

        Raises:
            LayoutMismatch, InvalidArgument: the agent can never serve this engine as it is configured.
        """
        try:
            self.current = self._open(layouts)
        except (Unavailable, DeadlineExceeded) as error:
            logger.warning("p2pkv: no agent yet, starting without it: %s", error)
            self.restart(layouts)

    def restart(self, layouts: Mapping[int, Layout]) -> None:
        """Give up the current session, if any, and open ``layouts`` from a thread. Never blocks for the agent."""
        self._end_thread()
        self.current = None
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._keep_trying, args=(dict(layouts), self._stop), name="p2pkv-session", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """End the thread and forget the session. The client is closed by its owner."""
        self._end_thread()
        self.current = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self, layouts: Mapping[int, Layout]) -> Session:
        caches = {group: self._client.open(layout) for group, layout in layouts.items()}
        if self._region is None:
            first = next(iter(caches.values()))
            self._region = first.map_region(self._fd, slots=self._slots, slot_bytes=self._slot_bytes)
        return Session(caches, self._region)

    def _keep_trying(self, layouts: dict[int, Layout], stop: threading.Event) -> None:
        delay = RETRY_S_MIN
        while not stop.is_set():
            try:
                session = self._open(layouts)
            except (Unavailable, DeadlineExceeded):
                pass
            except (LayoutMismatch, InvalidArgument) as error:
                logger.error("p2pkv: the agent refuses this engine, its KV cache is not shared: %s", error)
                return
            except P2PKVError as error:
                logger.warning("p2pkv: opening the cache failed, trying again: %s", error)
            else:
                if not stop.is_set():
                    self.current = session
                    logger.info("p2pkv: agent found, the KV cache is shared")
                return
            stop.wait(delay)
            delay = min(2 * delay, RETRY_S_MAX)

    def _end_thread(self) -> None:
        self._stop.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()
