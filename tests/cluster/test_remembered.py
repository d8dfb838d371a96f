"""A restarted agent answers questions from what it knew before, says how old that is, and forgets it in time."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.agents import AgentProcess, Cluster, eventually, make_layout, visible
from tests.cluster.blocks import blocks_of, new_keys

pytestmark = [pytest.mark.cluster]

BLOCK = 4_096
LAYOUT = make_layout(BLOCK, model="remembered")
BODY = {"model": "remembered"}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as made:
        yield made


def start(cluster: Cluster, name: str, *seeds: str, **settings: object) -> AgentProcess:
    state = cluster.directory / f"state-{name}"
    return cluster.launch(seeds=seeds, settings={"state_dir": str(state), **settings})


def two(cluster: Cluster, **settings: object) -> tuple[AgentProcess, AgentProcess, list[bytes]]:
    """A, which will be started again, B, which has four blocks, and their keys."""
    b = start(cluster, "b").ready()
    a = start(cluster, "a", b.address, **settings).ready()
    cluster.connected(a, b)
    keys = new_keys(6)
    a.open(LAYOUT)
    assert all(b.open(LAYOUT).put(keys[:4], blocks_of(keys[:4], BLOCK)))
    visible(a.open(LAYOUT), keys[:4])
    return a, b, keys


def ask(agent: AgentProcess, path: str, **body: Any) -> tuple[dict[str, Any], str | None]:
    """The answer, and its Age header."""
    connection = http.client.HTTPConnection("127.0.0.1", agent.http_port, timeout=10.0)
    try:
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        return json.loads(text), answer.getheader("age")
    finally:
        connection.close()


def again(agent: AgentProcess) -> None:
    agent.launch()
    agent.ready()


def remembered(agent: AgentProcess) -> list[dict[str, Any]]:
    return [peer for peer in agent.nodes()["peers"] if peer["remembered"]]


def restarted(cluster: Cluster, **settings: object) -> tuple[AgentProcess, AgentProcess, list[bytes]]:
    """A after its restart, B, which was dead by then, and the keys."""
    a, b, keys = two(cluster, **settings)
    assert a.terminate() == 0
    b.kill()
    again(a)
    eventually(lambda: remembered(a), why="what was known is loaded")
    return a, b, keys


def test_questions_are_answered_from_before_the_restart_with_their_age(cluster: Cluster) -> None:
    a, b, keys = restarted(cluster)
    texts = [key.hex() for key in keys]
    found, age = ask(a, "/query_by_hash", **BODY, seq_hashes=texts)
    cpu = 4 * LAYOUT.block_tokens
    assert found["default"] == {b.node: {"longest_matched": cpu, "GPU": 0, "DP": {"0": 0}, "CPU": cpu, "DISK": 0}}
    assert age is not None and 0 <= int(age) < 120
    assert ask(a, "/query_by_hash", **BODY, seq_hashes=[*texts[:2], 5], block_size=16.0)[1] is not None, "the other way"
    candidates = ask(a, "/v1/score", **BODY, hashes=texts)[0]["candidates"]
    [row] = [row for row in candidates if row["node"] == b.node]
    assert (row["remembered"], row["depth"], row["fetch_blocks"]) == (True, 4, 0)
    assert row["compute_tokens"] == 2 * LAYOUT.block_tokens and row["age_ms"] > 0
    assert ask(a, "/query_by_hash", **BODY, seq_hashes=texts, instance_id=a.node) == ({"default": {}}, None)
    command = [sys.executable, "-m", "p2pkv.cli", "lookup", "--model", "remembered", "--hashes", ",".join(texts)]
    shown = subprocess.run(
        [*command, "--agent", f"127.0.0.1:{a.http_port}"], capture_output=True, text=True, check=True, timeout=60
    )
    assert b.node in shown.stdout and "before the agent's start" in shown.stderr
    answer = ask(a, "/v1/lookup", namespace=f"{LAYOUT.namespace:016x}", hashes=texts)[0]
    assert [(row["node"], row["depth"], row["remembered"]) for row in answer["nodes"]] == [(b.node, 4, True)]
    assert answer["anywhere"] == 0, "nothing of it can be pulled"
    assert a.metric("p2pkv_remembered_nodes") == 1


def test_what_was_beyond_the_reach_of_the_living_does_not_count_as_fetched(cluster: Cluster) -> None:
    """C lives and has the first two blocks; B, remembered, had others: it would have to fetch both."""
    b = start(cluster, "b").ready()
    a = start(cluster, "a", b.address).ready()
    cluster.connected(a, b)
    keys = new_keys(6)
    a.open(LAYOUT)
    assert all(b.open(LAYOUT).put(keys[3:], blocks_of(keys[3:], BLOCK)))
    visible(a.open(LAYOUT), keys[3:])
    assert a.terminate() == 0
    b.kill()
    again(a)
    eventually(lambda: remembered(a))
    c = start(cluster, "c", a.address).ready()
    cluster.connected(a, c)
    assert all(c.open(LAYOUT).put(keys[:2], blocks_of(keys[:2], BLOCK)))
    visible(a.open(LAYOUT), keys[:2])
    answer, _ = ask(a, "/v1/score", **BODY, hashes=[key.hex() for key in keys])
    rows = {row["node"]: row for row in answer["candidates"]}
    tokens = 4 * LAYOUT.block_tokens
    assert [(rows[n]["fetch_blocks"], rows[n]["compute_tokens"]) for n in (b.node, c.node)] == [
        (2, tokens),
        (0, tokens),
    ]


def test_nothing_is_pulled_from_whom_is_only_remembered(cluster: Cluster) -> None:
    a, _, keys = restarted(cluster)
    cache = a.open(LAYOUT)
    assert cache.match(keys).anywhere == 0
    assert cache.get_into([keys[0]], [bytearray(BLOCK)]) == [False]


def test_a_node_that_is_back_is_asked_itself(cluster: Cluster) -> None:
    """Its memory was lost with its process, and so is what was remembered of it."""
    a, b, keys = restarted(cluster)
    b.arguments += ["--seed", a.address]
    again(b)
    cluster.connected(a, b)
    assert remembered(a) == []
    assert ask(a, "/query_by_hash", **BODY, seq_hashes=[key.hex() for key in keys]) == ({}, None)
    assert a.metric("p2pkv_remembered_nodes") == 0


def test_a_node_that_did_not_go_is_current_again_without_its_age(cluster: Cluster) -> None:
    a, b, keys = two(cluster)
    assert a.terminate() == 0
    again(a)
    cluster.connected(a, b)
    found, age = ask(a, "/query_by_hash", **BODY, seq_hashes=[key.hex() for key in keys])
    assert (list(found["default"]), age) == ([b.node], None)


def test_what_does_not_come_back_is_forgotten(cluster: Cluster) -> None:
    a, _, keys = restarted(cluster, **{"peer.purge_s": 8})
    eventually(lambda: not remembered(a), 30.0, why="purge_s has passed")
    assert ask(a, "/query_by_hash", **BODY, seq_hashes=[key.hex() for key in keys])[0] == {}


def test_what_is_still_remembered_outlives_another_restart(cluster: Cluster) -> None:
    a, b, _ = restarted(cluster)
    assert a.terminate() == 0
    again(a)
    [row] = eventually(lambda: remembered(a))
    assert row["node"] == b.node


@pytest.mark.parametrize("damage", ["garbage", "directory"])
def test_a_dump_that_cannot_be_read_keeps_nobody_from_starting(cluster: Cluster, damage: str) -> None:
    a, b, _ = two(cluster)
    assert a.terminate() == 0
    path = cluster.directory / "state-a" / "index.dump"
    assert path.exists()
    if damage == "garbage":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        path.unlink()
        path.mkdir()
    again(a)
    eventually(lambda: a.metric("p2pkv_index_dump_failures_total") == 1)
    cluster.connected(a, b)
    assert "not remembered" in a.log()


def test_it_can_be_turned_off(cluster: Cluster) -> None:
    a, _, _ = two(cluster, **{"peer.remember_s": 0})
    assert a.terminate() == 0
    assert not list(Path(cluster.directory / "state-a").glob("*.dump"))


def test_it_is_written_from_time_to_time(cluster: Cluster) -> None:
    a, b, _ = two(cluster, **{"peer.remember_s": 0.2})
    written = a.metric("p2pkv_index_dumps_total")
    eventually(lambda: a.metric("p2pkv_index_dumps_total") >= written + 2)
    a.kill()
    b.kill()
    again(a)
    [row] = eventually(lambda: remembered(a))
    assert row["node"] == b.node
