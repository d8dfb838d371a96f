"""What the client refuses before it asks anybody, and what it says when nobody is there."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from p2pkv.client import AgentClient, Layout, Status
from p2pkv.client.cache import Cache, Region
from p2pkv.errors import AgentUnavailable, DeadlineExceeded, InvalidArgument
from p2pkv.wire.engine_types import Pace
from p2pkv.wire.limits import KEYS_MAX, REPLICAS_MAX

BLOCK = 4096
LAYOUT = Layout(model="m", revision="r", kv_dtype="float32", block_tokens=16, block_bytes=BLOCK)
KEY = b"k" * 32


@pytest.fixture
def client(tmp_path: Path) -> Iterator[AgentClient]:
    with AgentClient(tmp_path / "nobody.sock") as made:
        yield made


@pytest.fixture
def cache(client: AgentClient) -> Cache:
    """One that no agent has opened: what is refused, is refused here."""
    return Cache(client, LAYOUT, LAYOUT.namespace)


def good() -> bytearray:
    return bytearray(BLOCK)


@pytest.mark.parametrize(
    ("keys", "buffers"),
    [
        ([KEY], []),
        ([KEY], [good(), good()]),
        ([KEY[:7]], [good()]),
        ([KEY * 3], [good()]),
        ([b""], [good()]),
        ([KEY], [bytearray(BLOCK - 1)]),
        ([KEY], [bytearray(BLOCK + 1)]),
        ([KEY], [np.zeros((2, BLOCK), np.uint8)[:, ::2]]),
        ([KEY], [np.zeros((BLOCK // 8, 8), np.uint8).T]),
        ([KEY], [None]),
        ([KEY], ["x" * BLOCK]),
        ([KEY] * (KEYS_MAX + 1), [good()] * (KEYS_MAX + 1)),
    ],
    ids=[
        "no buffer",
        "too many",
        "short key",
        "long key",
        "empty key",
        "short",
        "long",
        "strided",
        "transposed",
        "none",
        "str",
        "too many keys",
    ],
)
def test_what_can_never_work_is_refused(cache: Cache, keys: list[bytes], buffers: list[object]) -> None:
    with pytest.raises(InvalidArgument):
        cache.put(keys, buffers)
    with pytest.raises(InvalidArgument):
        cache.get_into(keys, buffers)


U32, U64 = 1 << 32, 1 << 64
NODE = "00000000000000aa"


@pytest.mark.parametrize(
    "call",
    [
        *(lambda cache, ms=ms: cache.prefetch([KEY], deadline_ms=ms) for ms in (-1, U32, float("nan"))),
        *(lambda cache, ms=ms: cache.put([KEY], [good()], deadline_ms=ms) for ms in (-1, -1000, U32)),
        lambda cache: cache.replicate([KEY], [NODE] * (REPLICAS_MAX + 1)),
        *(lambda cache, node=node: cache.replicate([KEY], [node]) for node in ("-1", "x", "", "1" * 17, None, 7)),
        *(lambda cache, n=n: cache._client.warm(n) for n in (-1, U64)),
        *(lambda cache, ms=ms: cache._client.warm(1, within_ms=ms) for ms in (-1, U32)),
        *(lambda cache, ms=ms: cache.store([KEY], region(cache), [0], deadline_ms=ms) for ms in (-1, U32)),
        *(lambda cache, slot=slot: cache.store([KEY], region(cache), [slot]) for slot in (-1, U32)),
        *(lambda cache, ms=ms: cache.load([KEY], region(cache), [0], ms) for ms in (-1, U32)),
        *(lambda cache, slot=slot: cache.load([KEY], region(cache), [slot]) for slot in (-1, U32)),
        *(lambda cache, n=n: cache.load([KEY], region(cache), [0], pace=Pace(n)) for n in (-1, U32)),
        *(lambda cache, n=n: cache.submit_match([KEY], pace=Pace(1, n)) for n in (-1, U32)),
        lambda cache: cache.submit_match([KEY], pace=Pace(1, 0, U32)),
        lambda cache: cache.map_region(0, slots=-1),
        lambda cache: cache.map_region(0, slots=U32),
        lambda cache: cache.map_region(0, slots=1, offset=-1),
        lambda cache: cache.map_region(0, slots=1, offset=U64 - BLOCK),
    ],
)
def test_what_an_agent_would_give_the_client_up_for_is_never_sent(
    cache: Cache, call: Callable[[Cache], object]
) -> None:
    with pytest.raises(InvalidArgument):
        call(cache)


def region(cache: Cache) -> Region:
    return Region(cache._client, -1, 0, BLOCK, 4)


def test_the_largest_numbers_that_can_be_sent_are_not_refused(cache: Cache) -> None:
    for call in (
        lambda: cache.prefetch([KEY], deadline_ms=U32 - 1),
        lambda: cache.replicate([KEY], [NODE, "f" * 16, "0" * 16] + [NODE] * (REPLICAS_MAX - 3)),
        lambda: cache._client.warm(U64 - 1, within_ms=U32 - 1),
        lambda: cache.store([KEY], region(cache), [U32 - 1], deadline_ms=0),
        lambda: cache.load([KEY], region(cache), [U32 - 1], U32 - 1, pace=Pace(U32 - 1, U32 - 1, U32 - 1)),
    ):
        with pytest.raises(AgentUnavailable):
            call()


def test_what_cannot_be_written_to_cannot_be_read_into(cache: Cache) -> None:
    for buffer in (bytes(BLOCK), memoryview(bytes(BLOCK)), np.frombuffer(bytes(BLOCK), np.uint8)):
        with pytest.raises(InvalidArgument, match="read-only"):
            cache.get_into([KEY], [buffer])


def test_an_impossible_layout_is_refused(client: AgentClient) -> None:
    for changes in ({"model": ""}, {"block_bytes": 0}, {"block_bytes": 1 << 40}, {"block_tokens": 0}, {"rank": 1}):
        with pytest.raises(InvalidArgument):
            client.open(LAYOUT.replace(**changes))


def test_without_an_agent_gets_are_misses_and_the_rest_says_so(client: AgentClient, cache: Cache) -> None:
    started = time.monotonic()
    assert cache.get_into([KEY], [good()]) == [False]
    assert cache.get_statuses([KEY], [good()]) == [Status.LOST]
    for call in (
        lambda: cache.put([KEY], [good()]),
        lambda: cache.match([KEY]),
        lambda: client.open(LAYOUT),
        lambda: cache.submit_match([KEY]),
    ):
        with pytest.raises(AgentUnavailable):
            call()
    assert client.poll() == [] and client.jobs_running == 0 and not client.connected
    assert time.monotonic() - started < 2.0


def test_nothing_asked_is_nothing_answered(cache: Cache) -> None:
    assert cache.put([], []) == []
    assert cache.get_into([], []) == []


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[str]:
    """A socket where connections wait for ever."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        path = str(tmp_path / "s")
        listener.bind(path)
        listener.listen(8)
        yield path


def test_an_agent_that_never_answers_costs_the_deadline_and_no_more(silent: str) -> None:
    with AgentClient(silent) as client:
        for deadline_ms in (0, 1, 100):
            started = time.monotonic()
            with pytest.raises((AgentUnavailable, DeadlineExceeded)):
                client.open(LAYOUT, deadline_ms=deadline_ms)
            assert time.monotonic() - started < deadline_ms / 1000 + 0.5


ANSWERS = [b"", b"\x00" * 4096, b"HTTP/1.1 200 OK\r\n\r\n", b"\x01\0\0\0\x01\x41\0\0\x01\0\0\0\x90"]


@pytest.mark.parametrize("answer", ANSWERS)
def test_an_agent_that_is_none_is_unavailable(tmp_path: Path, answer: bytes) -> None:
    """Whatever listens there: a typed error in time, no descriptor left behind."""
    import threading

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        path = str(tmp_path / "s")
        listener.bind(path)
        listener.listen(8)

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(100)
                peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with AgentClient(path) as client, pytest.raises(AgentUnavailable):
            client.open(LAYOUT, deadline_ms=1_000)
        thread.join(10)


def test_a_closed_client_stays_closed(client: AgentClient, cache: Cache) -> None:
    client.close()
    client.close()
    assert cache.get_into([KEY], [good()]) == [False]
    with pytest.raises(AgentUnavailable, match="closed"):
        client.open(LAYOUT)
