"""Nonsense on the HTTP endpoint: 4xx with words in it, never 5xx, and the agent goes on."""

from __future__ import annotations

import errno
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.cluster.agents import AgentProcess, make_layout
from tests.cluster.blocks import block_of, blocks_of, new_keys

pytestmark = [pytest.mark.cluster]


@pytest.fixture(autouse=True)
def _still_well(pair: list[AgentProcess]) -> Iterator[None]:
    yield
    assert pair[0].http("/healthz") == (200, b"ok")
    layout = make_layout(4096)
    keys = new_keys(1)
    assert pair[0].open(layout).put(keys, blocks_of(keys, 4096)) == [True]


BODIES = [
    ("/query", b"", 422),
    ("/query", b"{", 422),
    ("/query", b"\xff\xfe\x00", 422),
    ("/query", b"[]", 422),
    ("/query", b"[" * 200_000, 422),
    ("/query", b'{"model": "m"}', 422),
    ("/query", b'{"model": "m", "token_ids": "abc"}', 422),
    ("/query", b'{"model": "m", "token_ids": [-1]}', 422),
    ("/query", b'{"model": "m", "token_ids": [4294967296]}', 422),
    ("/query", b'{"model": "m", "token_ids": [1.5]}', 422),
    ("/query", b'{"model": "m", "token_ids": [1], "block_size": 0}', 422),
    ("/query", b'{"model": "' + b"x" * 1000 + b'", "token_ids": [1]}', 422),
    ("/query_by_hash", b'{"model": "m", "seq_hashes": ["zz"]}', 422),
    ("/query_by_hash", b'{"model": "m", "seq_hashes": ["' + b"z" * 32 + b'"]}', 400),
    ("/query_by_hash", b'{"model": "m", "seq_hashes": ["0123456789abcde\\u00e9"]}', 400),
    ("/query_by_hash", b'{"model": "m", "seq_hashes": [18446744073709551616]}', 422),
    ("/query_by_hash", b'{"model": "m", "seq_hashes": [null]}', 422),
    ("/v1/lookup", b'{"namespace": "xyz", "hashes": []}', 422),
    ("/v1/lookup", b'{"namespace": "0000000000000000", "hashes": {}}', 422),
    ("/v1/lookup", b'{"namespace": "0000000000000000", "hashes": ["0123456789abcdef0"]}', 400),
]


@pytest.mark.parametrize(("path", "body", "status"), BODIES, ids=lambda v: str(v)[:40])
def test_a_body_that_is_wrong_is_the_askers_fault(
    pair: list[AgentProcess], path: str, body: bytes, status: int
) -> None:
    got, answer = pair[0].http(path, body=body)
    assert 400 <= got < 500, answer
    assert got == status or {got, status} == {400, 422}
    assert json.loads(answer), "says why"


@pytest.mark.parametrize(
    "path",
    [
        "/nothing/here",
        "/v1/blocks?namespace=zz",
        "/v1/blocks?limit=-1",
        "/v1/blocks?limit=99999999",
        "/v1/blocks?limit=x",
    ],
)
def test_a_question_that_is_wrong_is_the_askers_fault(pair: list[AgentProcess], path: str) -> None:
    status, _ = pair[0].http(path)
    assert 400 <= status < 500


def test_a_body_that_is_too_large_is_refused_by_its_announcement(pair: list[AgentProcess]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", pair[0].http_port, timeout=10)
    try:
        connection.putrequest("POST", "/query")
        connection.putheader("content-type", "application/json")
        connection.putheader("content-length", str(1 << 40))
        connection.endheaders()
        assert connection.getresponse().status == 413
    finally:
        connection.close()


def test_a_body_that_never_ends_is_cut_off(pair: list[AgentProcess]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", pair[0].http_port, timeout=20)
    try:
        connection.putrequest("POST", "/query")
        connection.putheader("content-type", "application/json")
        connection.putheader("transfer-encoding", "chunked")
        connection.endheaders()
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        refused = False
        for _ in range(64):
            try:
                connection.send(chunk)
            except OSError:
                refused = True
                break
        if not refused:
            assert connection.getresponse().status == 413
    finally:
        connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 4096,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n" + b"a: b\r\n" * 100_000,
        b"\x16\x03\x01\x02\x00",
    ],
    ids=["zeros", "version", "headers without end", "tls"],
)
def test_what_is_not_http_is_answered_in_http_or_cut_off(pair: list[AgentProcess], data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", pair[0].http_port), timeout=10) as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            answer = b""
            while piece := sock.recv(65_536):
                answer += piece
        except OSError as error:  # cut off, before we had sent everything or before we could say that we had
            assert error.errno in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN)
            return
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:100]


def test_engines_are_served_while_http_is_kept_busy_with_the_longest_question(pair: list[AgentProcess]) -> None:
    """2 million tokens are the most that ``/query`` takes: seconds of hashing, for which no local get may wait."""
    a = pair[0]
    layout = make_layout(65_536, model="long", hash_algo="sha256", hash_seed="00" * 32)
    cache = a.open(layout)
    [key] = new_keys(1)
    assert cache.put([key], [block_of(key, 65_536)]) == [True]
    body = json.dumps({"model": "long", "token_ids": [7] * 2_000_000}).encode()
    answers: list[tuple[int, bytes]] = []
    asking = threading.Thread(target=lambda: answers.append(a.http("/query", body=body, timeout_s=60)))
    out = bytearray(65_536)
    worst = 0.0
    began = time.monotonic()
    asking.start()
    while asking.is_alive():
        started = time.monotonic()
        assert cache.get_into([key], [out], deadline_ms=10_000) == [True]
        worst = max(worst, time.monotonic() - started)
    asking.join()
    assert [status for status, _ in answers] == [200]
    # Reading 12 MB of JSON is a third of it and still happens in one piece.
    assert worst < 0.65 * (time.monotonic() - began), worst
