"""Hashing: vLLM's recipes byte for byte, index keys, packed keys, and set checksums."""

from __future__ import annotations

import json
from array import array
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from p2pkv.errors import InvalidArgument
from p2pkv.index import _core, hashing
from p2pkv.index.hashing import (
    LoraAdapter,
    MultiModalSpan,
    VllmHasher,
    dynamo_hashes,
    index_keys,
    mooncake_hashes,
    sglang_event_hash,
    sglang_page_hashes,
    token_chain,
    unpack_keys,
)
from p2pkv.index.prefix import PrefixIndex
from p2pkv.types import MASK64, Tier, index_key, mix64

VECTORS = json.loads((Path(__file__).parent / "vectors" / "vllm_hashes.json").read_text(encoding="utf-8"))["cases"]
U64 = st.integers(0, MASK64)


@pytest.mark.parametrize("case", VECTORS, ids=lambda c: f"{c['algorithm']}: {c['name']}")
def test_block_hashes_equal_those_of_vllm(case: dict[str, Any]) -> None:
    hashes = VllmHasher(case["algorithm"], case["seed"]).block_hashes(
        case["tokens"],
        case["block_tokens"],
        lora=LoraAdapter(**case["lora"]) if case["lora"] else None,
        cache_salt=case["cache_salt"],
        mm=[MultiModalSpan(**span) for span in case["mm"]],
    )
    assert [h.hex() for h in hashes] == case["hashes"]


def test_the_vectors_tell_the_recipes_apart() -> None:
    plain = [c["hashes"][0] for c in VECTORS if c["name"].startswith("plain")]
    assert len(set(plain)) == len(hashing.VLLM_ALGORITHMS) == 4
    assert [len(h) // 2 for h in plain] == [32, 32, 16, 16]


def test_one_string_object_used_twice_hashes_like_two_equal_ones() -> None:
    """Pickle would write a reference for the second; vLLM never has the same object twice."""
    shared = "".join(["same", "/thing"])
    other = "".join(["same/", "thing"])
    hasher = VllmHasher("sha256")
    tokens = list(range(16))
    assert hasher.block_hashes(tokens, 16, lora=LoraAdapter(shared, shared)) == hasher.block_hashes(
        tokens, 16, lora=LoraAdapter(shared, other)
    )


@pytest.mark.parametrize("make", [tuple, lambda t: array("I", t), lambda t: np.array(t, dtype=np.int64)])
def test_tokens_may_come_as_any_array_of_integers(make: Any) -> None:
    tokens = list(range(40))
    hasher = VllmHasher("sha256")
    assert hasher.block_hashes(make(tokens), 16) == hasher.block_hashes(tokens, 16)


@pytest.mark.parametrize("bad", [[1.0, 2.0], [True, 2], [np.int64(1), 2], "ab"])
def test_tokens_that_would_silently_hash_to_something_else_are_refused(bad: Any) -> None:
    with pytest.raises(InvalidArgument, match="plain integers"):
        VllmHasher("sha256").block_hashes(bad, 2)


def test_a_recipe_whose_seed_vllm_draws_at_random_needs_one() -> None:
    with pytest.raises(InvalidArgument, match="PYTHONHASHSEED"):
        VllmHasher("xxhash")


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(InvalidArgument, match="sha256_cbor"):
        VllmHasher("md5")


def test_block_size_and_spans_are_checked() -> None:
    hasher = VllmHasher()
    with pytest.raises(InvalidArgument):
        hasher.block_hashes([1], 0)
    with pytest.raises(InvalidArgument, match="ascend"):
        hasher.block_hashes([1], 1, mm=[MultiModalSpan("a", 4, 4), MultiModalSpan("b", 7, 1)])
    with pytest.raises(InvalidArgument):
        hashing.coarser([], 0)


def test_a_chunk_is_known_by_its_last_block_and_an_unfinished_one_not_at_all() -> None:
    assert hashing.coarser([b"1", b"2", b"3", b"4", b"5"], 2) == [b"2", b"4"]


def test_event_hash_is_the_low_64_bits_big_endian() -> None:
    assert hashing.vllm_event_hash(bytes(range(32))) == 0x18191A1B1C1D1E1F


@given(U64, st.lists(st.binary(min_size=8, max_size=64)))
def test_batch_index_keys_equal_the_definition(namespace: int, hashes: list[bytes]) -> None:
    assert list(hashing.unpack_keys(hashing.index_keys(namespace, hashes))) == [index_key(namespace, h) for h in hashes]


def test_index_keys_refuse_what_is_no_block_hash() -> None:
    with pytest.raises(InvalidArgument):
        hashing.index_keys(0, [b"1234567"])
    with pytest.raises(InvalidArgument):
        hashing.index_keys(1 << 64, [])
    with pytest.raises(TypeError):
        hashing.index_keys(0, ["12345678"])  # type: ignore[list-item]


@given(U64)
def test_mix64_is_the_same_in_both_languages(x: int) -> None:
    assert _core.mix64(x) == mix64(x)


def test_mix64_is_splitmix64() -> None:
    """First outputs of the reference generator (Vigna) for seed 0: state advances by the golden ratio."""
    assert [mix64(i * 0x9E3779B97F4A7C15 & MASK64) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@given(st.lists(U64), st.sampled_from([t for t in Tier if t]))
def test_set_checksum_is_the_same_in_both_languages(keys: list[int], tier: Tier) -> None:
    expected = reduce(xor, (hashing.entry_checksum(key, tier) for key in keys), 0)
    assert hashing.entries_checksum(hashing.pack_keys(keys), tier) == expected


def test_set_checksum_refuses_tiers_that_hold_nothing() -> None:
    for tier in (Tier.GONE, 5, -1):
        with pytest.raises(InvalidArgument):
            hashing.entries_checksum(b"", tier)


@given(st.lists(U64))
def test_keys_pack_and_unpack(keys: list[int]) -> None:
    packed = hashing.pack_keys(keys)
    assert packed == b"".join(key.to_bytes(8, "little") for key in keys)
    assert list(hashing.unpack_keys(packed)) == keys


def test_packing_refuses_what_is_no_key() -> None:
    for bad in (-1, 1 << 64):
        with pytest.raises(InvalidArgument):
            hashing.pack_keys([bad])
    with pytest.raises(InvalidArgument):
        hashing.unpack_keys(b"123")


# --- SGLang's pages


def test_page_hashes_equal_those_of_sglang() -> None:
    case = json.loads((Path(__file__).parent / "vectors" / "sglang_hashes.json").read_text(encoding="utf-8"))
    hashes = sglang_page_hashes(case["tokens"], case["page_tokens"])
    assert [each.hex() for each in hashes] == case["hashes"]
    assert [sglang_event_hash(each) for each in hashes] == case["event_hashes"]
    rest = case["tokens"][case["page_tokens"] :]
    assert sglang_page_hashes([*rest, 1], case["page_tokens"], parent=hashes[0]) == hashes[1:]
    assert sglang_page_hashes(np.array(case["tokens"][:3]), case["page_tokens"]) == []


@pytest.mark.parametrize(("tokens", "page"), [([-1], 1), ([1 << 32], 1), ([True], 1), ([1], 0)])
def test_page_hashes_refuse_what_is_no_page(tokens: list[int], page: int) -> None:
    with pytest.raises(InvalidArgument):
        sglang_page_hashes(tokens, page)


# --- Dynamo's blocks


def test_block_and_sequence_hashes_equal_those_of_dynamo() -> None:
    case = json.loads((Path(__file__).parent / "vectors" / "dynamo_hashes.json").read_text(encoding="utf-8"))
    for typecode in "Iiq":
        found = dynamo_hashes(array(typecode, case["tokens"]), case["block_tokens"])
        assert unpack_keys(found.local).tolist() == case["local"]
        assert unpack_keys(found.sequence).tolist() == case["sequence"]
    other = dynamo_hashes(array("I", case["tokens"][:4]), 4, seed=1)
    assert unpack_keys(other.local).tolist() == [xxhash.xxh3_64_intdigest(array("I", [1, 2, 3, 4]), seed=1)]
    with pytest.raises(InvalidArgument):
        dynamo_hashes(array("I", [1]), 0)
    with pytest.raises(InvalidArgument):
        dynamo_hashes(array("I", [1]), 1, seed=-1)


# --- Mooncake's blocks

MOONCAKE = json.loads((Path(__file__).parent / "vectors" / "mooncake_hashes.json").read_text(encoding="utf-8"))["cases"]


@pytest.mark.parametrize("case", MOONCAKE, ids=lambda c: c["name"])
def test_rolling_hashes_equal_those_of_mooncake(case: dict[str, Any]) -> None:
    tokens = np.array(case["tokens"], np.int32).view(np.uint32)
    found = mooncake_hashes(tokens, case["block_tokens"], salt=case["salt"])
    assert unpack_keys(found).tolist() == case["hashes"]


def test_rolling_hashes_refuse_what_is_no_block() -> None:
    for tokens, block in ((array("I", [1]), 0), (array("i", [-1]), 1)):
        with pytest.raises(InvalidArgument):
            mooncake_hashes(tokens, block)


# --- our own chain


def chained(tokens: list[int], block: int, seed: int) -> list[int]:
    hashes, parent = [], seed
    for at in range(0, len(tokens) - block + 1, block):
        data = parent.to_bytes(8, "little") + b"".join(t.to_bytes(4, "little") for t in tokens[at : at + block])
        hashes.append(parent := xxhash.xxh3_64_intdigest(data))
    return hashes


@given(
    tokens=st.lists(st.integers(0, (1 << 32) - 1), max_size=70),
    block=st.integers(1, 20),
    seed=st.integers(0, MASK64),
    width=st.sampled_from("IQq"),
)
def test_token_chain_is_its_definition(tokens: list[int], block: int, seed: int, width: str) -> None:
    packed = token_chain(array(width, tokens), block, seed=seed)
    assert unpack_keys(packed).tolist() == chained(tokens, block, seed)


@pytest.mark.parametrize(
    ("tokens", "block"),
    [
        (array("q", [-1]), 1),
        (array("i", [-1]), 1),
        (array("Q", [1 << 32]), 1),
        (array("H", [1]), 1),
        (array("d", [1.0]), 1),
        (b"12345678", 1),
        (np.arange(8, dtype=np.int64)[::2], 1),
        (np.arange(8, dtype=">u4"), 1),
        (array("I", [1]), 0),
        (array("I", [1]), -1),
    ],
    ids=["negative", "negative 32", "large", "short", "float", "bytes", "strided", "big-endian", "no block", "less"],
)
def test_token_chain_refuses_what_is_no_tokens(tokens: Any, block: int) -> None:
    with pytest.raises(InvalidArgument):
        token_chain(tokens, block)


def test_matching_tokens_is_hashing_and_matching() -> None:
    tokens = np.random.default_rng(5).integers(0, 128_000, size=8_200, dtype=np.int64)
    index, namespace = PrefixIndex(), 0xFEDC_BA98_7654_3210
    hashes = unpack_keys(token_chain(tokens, 16, seed=7))
    assert len(hashes) == 512
    keys = index_keys(namespace, [h.to_bytes(8, "little") for h in hashes])
    index.apply(3, keys[: 8 * 300], Tier.DRAM)
    for beyond in (False, True):
        found = index.match_tokens(tokens, 16, namespace=namespace, seed=7, beyond=beyond)
        assert found == index.match(keys, beyond=beyond)
        assert (found.depth, found.chain) == (300, 512)
    assert index.match_tokens(tokens, 16, namespace=namespace + 1, seed=7).depth == 0
    assert index.match_tokens(tokens[:15], 16, namespace=namespace).chain == 0
