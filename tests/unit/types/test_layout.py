"""A layout is a value, and its namespace is the same for ever: blocks on disks and at peers are filed under it."""

from __future__ import annotations

import copy

import pytest

from p2pkv.types import Layout

FIELDS: dict[str, str | int] = {
    "model": "m", "revision": "r", "kv_dtype": "bf16", "block_tokens": 16, "block_bytes": 1 << 20,
}  # fmt: skip
EVERY_FIELD: dict[str, str | int] = {
    "model": "meta-llama/Llama-3.1-8B",
    "revision": "0e9e39f2",
    "kv_dtype": "bfloat16",
    "block_tokens": 256,
    "block_bytes": 1 << 27,
    "rank": 3,
    "world": 8,
    "order": "NHD/layer-major",
    "hash_algo": "sha256_cbor",
    "hash_seed": "00" * 32,
    "hash_block_tokens": 16,
    "engine": "vllm",
    "engine_format": "1",
    "group": 2,
    "tenant": "t",
    "lora": "l",
    "cache_salt": "s",
}
TEXTS: dict[str, str | int] = {
    "model": "ü" * 20, "revision": "語" * 100, "cache_salt": "x" * 512, "tenant": "y" * 31, "lora": "z" * 32,
    "order": "\0",
}  # fmt: skip
NUMBERS: dict[str, str | int] = {
    "block_tokens": 1 << 20, "block_bytes": 65_535, "rank": 127, "world": 128, "group": 255,
    "hash_block_tokens": 65_536,
}  # fmt: skip
EXTREMES: dict[str, str | int] = {
    "block_tokens": (1 << 64) - 1, "rank": -1, "world": -33, "group": -(1 << 63), "block_bytes": 1 << 32,
    "hash_block_tokens": -129,
}  # fmt: skip


def layout(**changes: object) -> Layout:
    return Layout(**(FIELDS | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "namespace"),
    [
        ({}, 0x28893D72474C7CF2),
        (EVERY_FIELD, 0xB861AFDCC02890FB),
        (TEXTS, 0x9922E12509C4F588),
        (NUMBERS, 0x6AF2C5FA5880FFFE),
        (EXTREMES, 0x59C0A20BA90DE030),
    ],
    ids=["defaults", "every field", "texts", "numbers", "extremes"],
)
def test_a_namespace_never_changes(changes: dict[str, object], namespace: int) -> None:
    """Computed by 0.1.0 as it was when layouts were msgspec Structs."""
    assert layout(**changes).namespace == namespace


@pytest.mark.parametrize("name", Layout.FIELDS)
def test_every_field_is_part_of_the_value_and_of_the_namespace(name: str) -> None:
    other = layout().replace(**{name: EVERY_FIELD[name]})
    assert other != layout()
    assert other.namespace != layout().namespace


def test_layouts_of_equal_fields_are_one_value() -> None:
    assert layout() == layout()
    assert len({layout(), layout(), layout(rank=1, world=2)}) == 2
    assert layout() != FIELDS and layout() != tuple(layout().asdict().values())


def test_fields_are_in_the_order_of_their_declaration_however_they_are_given() -> None:
    backwards = Layout(**dict(reversed(EVERY_FIELD.items())))  # type: ignore[arg-type]
    assert list(backwards.asdict().items()) == list(EVERY_FIELD.items())
    assert tuple(EVERY_FIELD) == Layout.FIELDS
    assert repr(layout()).startswith("Layout(model='m', revision='r', kv_dtype='bf16', block_tokens=16, ")


def test_a_layout_is_frozen() -> None:
    frozen = layout()
    with pytest.raises(AttributeError, match="frozen"):
        frozen.model = "other"  # type: ignore[misc]
    with pytest.raises(AttributeError, match="frozen"):
        del frozen.model
    with pytest.raises(AttributeError, match="frozen"):
        frozen.unheard_of = 1  # type: ignore[attr-defined]
    frozen.asdict()["model"] = "other"
    assert frozen == layout()


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"model": "m"}, "needs 'revision'"),
        (FIELDS | {"colour": 1}, "no field 'colour'"),
        (FIELDS | {"namespace": 1}, "no field 'namespace'"),
    ],
)
def test_fields_that_are_missing_or_unknown_are_named(given: dict[str, object], complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        Layout(**given)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Layout("m", "r", "bf16", 16, 1 << 20)  # type: ignore[misc]


def test_a_replaced_field_is_checked_like_a_given_one() -> None:
    assert layout().replace(rank=1, world=2) == layout(rank=1, world=2)
    with pytest.raises(TypeError, match="colour"):
        layout().replace(colour=1)


def test_copies_are_equal_and_stay_frozen() -> None:
    for copied in (copy.copy(layout()), copy.deepcopy(layout())):
        assert copied == layout() and hash(copied) == hash(layout())
        with pytest.raises(AttributeError):
            copied.model = "other"


def test_conflicts_name_what_differs_in_the_same_cache_and_nothing_in_another() -> None:
    assert layout().conflicts(layout(block_tokens=32, order="HND")) == ("block_tokens", "order")
    assert layout().conflicts(layout(model="other", block_tokens=32)) == ()


def test_what_makes_a_layout_impossible_is_said_in_words() -> None:
    assert layout().problems() == []
    assert [problem.split()[0] for problem in layout(model="", block_bytes=0, rank=1).problems()] == [
        "model", "block_bytes", "rank",
    ]  # fmt: skip
    assert layout(tenant="x" * 513).problems() == ["tenant is longer than 512 characters"]
