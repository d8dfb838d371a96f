"""What the HTTP endpoint says of blocks, asked of real agents: lookups, the conductor's queries, and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from p2pkv.index.hashing import VllmHasher
from tests.cluster.agents import AgentProcess, Cluster, make_layout, visible
from tests.cluster.blocks import blocks_of, new_keys

pytestmark = [pytest.mark.cluster]

BLOCK = 4_096
TOKENS = 16


def ask(agent: AgentProcess, path: str, **body: Any) -> Any:
    status, answer = agent.http(path, body=json.dumps(body).encode())
    assert status == 200, answer
    return json.loads(answer)


def nodes(pair: list[AgentProcess]) -> list[str]:
    return [agent.node for agent in pair]


def stored(pair: list[AgentProcess], model: str, *held: range, count: int = 8) -> list[bytes]:
    """A chain of which each agent has the blocks named for it; both engines have the layout."""
    layout = make_layout(BLOCK, model=model)
    keys = new_keys(count)
    caches = [agent.open(layout) for agent in pair]
    for cache, mine in zip(caches, held, strict=True):
        some = [keys[i] for i in mine]
        assert all(cache.put(some, blocks_of(some, BLOCK)))
    for i, cache in enumerate(caches):
        visible(cache, [keys[n] for n in held[1 - i]])
    return keys


def test_a_score_says_what_is_there_what_others_have_and_what_nobody_has(pair: list[AgentProcess]) -> None:
    keys = stored(pair, "score", range(3), range(1, 6))
    answer = ask(pair[0], "/v1/score", model="score", hashes=[key.hex() for key in keys])
    assert answer["tokens"] == 8 * TOKENS
    rows = {row["node"]: row for row in answer["candidates"]}
    assert set(rows) == set(nodes(pair))
    first, second = (rows[node] for node in nodes(pair))
    assert (first["self"], first["depth"], first["fetch_blocks"], first["compute_tokens"]) == (True, 3, 3, 2 * TOKENS)
    # The second one lacks only the first block of what there is: depth 0, and yet one block to fetch.
    assert (second["self"], second["depth"], second["fetch_blocks"], second["compute_tokens"]) == (False, 0, 1, 32)
    assert first["fetch_bytes"] == 3 * BLOCK and first["tiers"] == {"hbm": 0, "dram": 3, "ssd": 0, "shared": 0}
    assert first["age_ms"] == 0 and second["age_ms"] >= 0
    assert [row["node"] for row in answer["candidates"]] == nodes(pair)[::-1], "less to fetch comes first"


def test_a_score_is_of_the_candidates_that_were_named_and_have_such_a_layout(pair: list[AgentProcess]) -> None:
    pair[0].open(make_layout(BLOCK, model="alone"))
    keys = [key.hex() for key in new_keys(4)]
    found = ask(pair[0], "/v1/score", model="alone", hashes=keys)["candidates"]
    assert [(row["node"], row["depth"], row["compute_tokens"]) for row in found] == [(pair[0].node, 0, 4 * TOKENS)]
    assert ask(pair[0], "/v1/score", model="alone", hashes=keys, candidates=["0" * 16])["candidates"] == []
    assert ask(pair[0], "/v1/score", model="nobody's", hashes=keys) == {"tokens": 0, "candidates": []}


def test_tokens_are_hashed_as_the_engines_do(pair: list[AgentProcess]) -> None:
    hasher = VllmHasher("sha256", "7")
    layout = make_layout(BLOCK, model="tokens", hash_algo="sha256", hash_seed=hasher.none_hash.hex())
    tokens = list(range(100))
    keys = hasher.block_hashes(tokens, TOKENS)
    assert all(pair[0].open(layout).put(keys[:4], blocks_of(keys[:4], BLOCK)))
    answer = ask(pair[0], "/v1/score", model="tokens", token_ids=tokens)
    [row] = answer["candidates"]
    assert (answer["tokens"], row["blocks"], row["depth"], row["compute_tokens"]) == (100, 6, 4, 100 - 4 * TOKENS)
    by_tokens = ask(pair[0], "/query", model="tokens", token_ids=tokens)
    by_hash = ask(pair[0], "/query_by_hash", model="tokens", seq_hashes=[key.hex() for key in keys])
    cpu = 4 * TOKENS
    hit = {"longest_matched": cpu, "GPU": 0, "DP": {"0": 0}, "CPU": cpu, "DISK": 0}
    assert by_tokens == by_hash == {"default": {pair[0].node: hit}}


def test_a_text_is_scored_by_tier_with_the_tokenizer_of_its_model(tmp_path: Path) -> None:
    """llm-d's question, and its answer: by the address of each node, blocks weighed by where they lie."""
    made = pytest.importorskip("tokenizers", reason="the tokenizers extra is not installed here")
    words = {f"w{i}": i for i in range(200)}
    tokenizer = made.Tokenizer(made.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = made.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    hasher = VllmHasher("sha256", "7")
    layout = make_layout(BLOCK, model="text", hash_algo="sha256", hash_seed=hasher.none_hash.hex())
    keys = hasher.block_hashes(list(range(100)), TOKENS)
    prompt = " ".join(f"w{i}" for i in range(100))
    with Cluster() as cluster:
        first, second = cluster.start(2, settings={"http.tokenizers": f"text={tmp_path}"})
        cluster.connected()
        assert all(first.open(layout).put(keys[:4], blocks_of(keys[:4], BLOCK)))
        visible(second.open(layout), keys[:4])
        for agent in (first, second):
            assert ask(agent, "/score_completions", model="text", prompt=prompt) == {first.address: pytest.approx(3.2)}
        assert ask(first, "/score_completions", model="text", prompt="w5 w6") == {}
        status, answer = first.http("/score_completions", body=b'{"model": "other", "prompt": "w1"}')
        assert status == 404 and "http.tokenizers" in json.loads(answer)["hint"]


def test_hashes_may_be_numbers(pair: list[AgentProcess]) -> None:
    keys = stored(pair, "numbers", range(2), range(3))
    numbers = [int.from_bytes(key[:8], "little") for key in keys]
    assert ask(pair[0], "/query_by_hash", model="numbers", seq_hashes=numbers) == ask(
        pair[1], "/query_by_hash", model="numbers", seq_hashes=[key.hex() for key in keys]
    )


def test_one_instance_of_the_answer(pair: list[AgentProcess]) -> None:
    keys = [key.hex() for key in stored(pair, "one", range(2), range(3))]
    answer = ask(pair[0], "/query_by_hash", model="one", seq_hashes=keys, instance_id=pair[1].node)
    assert {name: hit["longest_matched"] for name, hit in answer["default"].items()} == {pair[1].node: 3 * TOKENS}


def test_a_prompt_is_tokens_or_hashes_and_not_both(pair: list[AgentProcess]) -> None:
    for body in ({"model": "m"}, {"model": "m", "token_ids": [1], "hashes": []}):
        status, answer = pair[0].http("/v1/score", body=json.dumps(body).encode())
        assert status == 400 and "either" in json.loads(answer)["error"]


def test_what_the_framework_answers_is_what_is_answered_without_it(pair: list[AgentProcess]) -> None:
    """A whole number that is written as a fraction is one, and sees the application's own route."""
    keys = [key.hex() for key in stored(pair, "ways", range(2), range(3))]
    short = pair[0].http("/query_by_hash", body=json.dumps({"model": "ways", "seq_hashes": keys}).encode())
    body = {"model": "ways", "seq_hashes": keys, "block_size": 16.0}
    assert pair[0].http("/query_by_hash", body=json.dumps(body).encode()) == short
    assert short[0] == 200 and len(json.loads(short[1])["default"]) == 2


def test_the_description_names_every_question(pair: list[AgentProcess]) -> None:
    status, answer = pair[0].http("/openapi.json")
    described = json.loads(answer)
    assert status == 200
    assert {
        "/v1/score",
        "/v1/lookup",
        "/query",
        "/query_by_hash",
        "/score_completions",
        "/v1/nodes",
        "/v1/blocks",
    } <= set(described["paths"])
    missing = [ref for ref in refs_of(described) if ref.rpartition("/")[2] not in described["components"]["schemas"]]
    assert missing == []


def refs_of(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"]] if "$ref" in value else []
        return own + [ref for each in value.values() for ref in refs_of(each)]
    return [ref for each in value for ref in refs_of(each)] if isinstance(value, list) else []
