"""The extension's own MessagePack against msgspec's, both ways; what comes in is of the shape, or a ValueError."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv._native import Shape, pack

pytestmark = pytest.mark.deep

U64_MAX = (1 << 64) - 1
encode, decode = msgspec.msgpack.encode, msgspec.msgpack.decode

sizes = st.sampled_from([0, 1, 15, 16, 31, 32, 255, 256, 65_535, 65_536])
"""Around where MessagePack changes the form of a header."""
edges = st.sampled_from([sign * (1 << bits) + by for bits in range(64) for sign in (1, -1) for by in (-1, 0, 1)])
integers = st.integers(-(1 << 63), U64_MAX) | edges.filter(lambda n: n >= -(1 << 63)) | st.just(U64_MAX)
scalars = (
    st.none()
    | st.booleans()
    | integers
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=40)
    | sizes.map(lambda n: "x" * n)
    | sizes.map(bytes)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=3) | integers, inner, max_size=20),
    max_leaves=40,
)


# --- out ---


@given(values)
def test_what_is_packed_is_byte_for_byte_what_msgspec_makes_of_it(value: object) -> None:
    assert pack(value) == encode(value)


@pytest.mark.parametrize("count", [15, 16, 65_535, 65_536])
def test_long_arrays_and_maps_are_too(count: int) -> None:
    for value in (list(range(count)), dict.fromkeys(range(count)), tuple(range(count))):
        assert pack(value) == encode(value)


@given(st.binary(max_size=300))
def test_every_kind_of_bytes_is_a_byte_string(data: bytes) -> None:
    assert pack(data) == pack(bytearray(data)) == pack(memoryview(data)) == encode(data)
    assert pack(memoryview(bytes(len(data) + 2))[1:-1]) == encode(bytes(len(data)))


def test_what_is_not_a_number_stays_none() -> None:
    assert math.isnan(decode(pack(math.nan)))


class Number(int):
    pass


class Pair(NamedTuple):
    left: int
    right: object = None


def test_subclasses_are_packed_as_what_they_are_a_kind_of() -> None:
    assert pack([Number(5), Pair(1, "x"), {Number(1): True}]) == encode([5, [1, "x"], {1: True}])


@pytest.mark.parametrize("value", [U64_MAX + 1, -(1 << 63) - 1, 1 << 1000])
def test_a_number_of_more_than_64_bits_is_an_overflow(value: int) -> None:
    with pytest.raises(OverflowError):
        pack([value])


@pytest.mark.parametrize("value", [object(), {1, 2}, 1j, Pair, msgspec.msgpack.Ext(1, b"")], ids=range(5))
def test_what_messagepack_has_no_word_for_is_a_type_error(value: object) -> None:
    for holder in (value, [value], {"key": value}):
        with pytest.raises(TypeError, match=type(value).__name__):
            pack(holder)


def test_text_that_is_no_text_and_views_with_holes_are_refused() -> None:
    with pytest.raises(UnicodeEncodeError):
        pack("\ud800")
    with pytest.raises(BufferError):
        pack(memoryview(bytes(8))[::2])


def test_nesting_has_an_end() -> None:
    value: Any = 1
    for _ in range(16):
        value = [value]
    assert pack(value) == encode(value)
    endless: list[object] = []
    endless.append(endless)
    for deeper in ([value], {"key": value}, endless):
        with pytest.raises(ValueError, match="deep"):
            pack(deeper)


# --- in ---

u64, u8 = Shape.uint(U64_MAX), Shape.uint(255)
EVERYTHING = Shape.record(
    tuple,
    [
        u64,
        u8,
        Shape.boolean(),
        Shape.text(50),
        Shape.binary(70_000),
        Shape.array(Shape.record(Pair, [u64, Shape.text(9)], ("none",)), 30),
    ],
)

lawful = st.tuples(
    st.integers(0, U64_MAX) | edges.filter(lambda n: n >= 0),
    st.integers(0, 255),
    st.booleans(),
    st.text(max_size=50),
    st.binary(max_size=300) | sizes.map(bytes),
    st.lists(st.builds(Pair, st.integers(0, U64_MAX), st.text(max_size=9)), max_size=30).map(tuple),
)
later_fields = st.lists(
    scalars
    | st.lists(scalars | st.lists(scalars, max_size=3), max_size=3)
    | st.dictionaries(integers, scalars, max_size=3),
    max_size=3,
)


@given(lawful, later_fields)
def test_what_msgspec_packs_is_read_back_and_later_fields_are_passed_over(
    fields: tuple[object, ...], later: list[object]
) -> None:
    assert EVERYTHING.unpack(encode([*fields, *later])) == fields


@given(lawful)
def test_what_is_read_is_of_the_types_that_it_should_be(fields: tuple[object, ...]) -> None:
    read = EVERYTHING.unpack(pack(fields))
    assert [type(value) for value in read] == [int, int, bool, str, bytes, tuple]
    assert all(type(pair) is Pair and pair._fields == ("left", "right") for pair in read[-1])


@given(lawful, st.data())
def test_a_value_that_ends_early_is_a_value_error(fields: tuple[object, ...], data: st.DataObject) -> None:
    packed = pack(fields)
    with pytest.raises(ValueError):
        EVERYTHING.unpack(packed[: data.draw(st.integers(0, len(packed) - 1))])
    with pytest.raises(ValueError, match="follow"):
        EVERYTHING.unpack(packed + data.draw(st.binary(min_size=1, max_size=5)))


@settings(max_examples=500)
@given(lawful, st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6))
def test_mutated_bytes_are_what_msgspec_reads_or_a_value_error(
    fields: tuple[object, ...], flips: list[tuple[int, int]]
) -> None:
    packed = bytearray(pack(fields))
    for at, byte in flips:
        packed[at % len(packed)] = byte
    try:
        read = EVERYTHING.unpack(bytes(packed))
        twin = decode(bytes(packed))
    except (ValueError, msgspec.DecodeError):
        return  # msgspec alone refuses what is wrong in a later field
    assert list(read[:5]) == twin[:5]
    assert [list(pair) for pair in read[5]] == [(pair + ["none"])[:2] for pair in twin[5]]


@settings(max_examples=500)
@given(st.binary(max_size=60), st.booleans())
def test_random_bytes_are_a_value_or_a_value_error(data: bytes, in_an_array: bool) -> None:
    for shape in (EVERYTHING, u8, Shape.boolean(), Shape.text(5), Shape.binary(5), Shape.array(EVERYTHING, 5)):
        try:
            shape.unpack(b"\x96" + data if in_an_array else data)
        except ValueError:
            pass


@pytest.mark.parametrize(
    ("shape", "wrong"),
    [
        (u8, 256), (u8, -1), (u8, True), (u8, 1.0), (u8, "1"), (u8, None), (u8, b"1"), (u8, [1]),
        (Shape.boolean(), 1), (Shape.boolean(), None),
        (Shape.text(3), "four"), (Shape.text(3), b"abc"), (Shape.text(3), None),
        (Shape.binary(3), b"four"), (Shape.binary(3), "abc"), (Shape.binary(3), [1]),
        (Shape.array(u8, 3), [1] * 4), (Shape.array(u8, 3), [1, 256]), (Shape.array(u8, 3), {1: 2}),
        (Shape.record(Pair, [u8, u8]), [1]), (Shape.record(Pair, [u8, u8], (0,)), []),
        (Shape.record(Pair, [u8, u8]), {}),
        (Shape.record(tuple, []), None), (Shape.record(tuple, []), {}),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_or_out_of_bounds_is_a_value_error(shape: Shape, wrong: object) -> None:
    for packed in (pack(wrong), encode(wrong)):
        with pytest.raises(ValueError, match="expected"):
            shape.unpack(packed)


def test_a_text_is_measured_in_characters_and_must_be_one() -> None:
    assert Shape.text(3).unpack(pack("語語語")) == "語語語"
    with pytest.raises(ValueError):
        Shape.text(3).unpack(b"\xa2\xff\xff")


@pytest.mark.parametrize("header", [b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff"])
def test_a_count_makes_it_allocate_no_more_than_the_input_could_hold(header: bytes) -> None:
    shape = Shape.array(Shape.array(u64, U64_MAX), U64_MAX)
    tracemalloc.start()
    try:
        for packed in (header, header + header, b"\x92" + header + bytes(100)):
            with pytest.raises(ValueError):
                shape.unpack(packed)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("header", [b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"], ids=["bytes", "text"])
def test_a_length_is_not_believed_either(header: bytes) -> None:
    for shape in (Shape.binary(U64_MAX), Shape.text(U64_MAX)):
        with pytest.raises(ValueError):
            shape.unpack(header + bytes(100))


@pytest.mark.parametrize("depth", [10, 1_000, 1_000_000])
def test_a_later_field_without_end_is_a_value_error(depth: int) -> None:
    with pytest.raises(ValueError, match="later"):
        Shape.record(tuple, []).unpack(b"\x91" * depth + b"\xc0")


def test_what_may_be_missing_has_its_default() -> None:
    default = ["kept as it is"]
    shape = Shape.record(Pair, [u8, u8], (default,))
    assert shape.unpack(pack([1])) == Pair(1, default) and shape.unpack(pack([1])).right is default
    assert shape.unpack(pack([1, 2])) == Pair(1, 2)


def test_a_shape_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(TypeError, match="tuple"):
        Shape.record(list, [u8])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="defaults"):
        Shape.record(Pair, [u8], (1, 2))
    with pytest.raises((TypeError, RuntimeError)):
        Shape.record(Pair, [int])  # type: ignore[list-item]
