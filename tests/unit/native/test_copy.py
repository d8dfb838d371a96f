"""The copy of whole blocks: equal at every length and alignment, and not a byte beside them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pkv import _native

KIB, MIB = 1 << 10, 1 << 20
GUARD = 256
SMALL = [0, 1, 31, 32, 33, 127, 128, 129, 2047, 2048, 2049]
LARGE = [256 * KIB - 1, 256 * KIB, 256 * KIB + 1, 512 * KIB - 1, 512 * KIB, 512 * KIB + 1, MIB + 13]
SOURCE = bytearray(random.Random(2).randbytes(MIB + 1024))
TARGET = bytearray(MIB + 1024)


def copy(dst: memoryview, src: memoryview) -> bool:
    return _native.copy(dst, src)


def copy_hash(dst: memoryview, src: memoryview) -> bool:
    return _native.copy_hash(dst, src) == xxhash.xxh3_128_digest(bytes(src))


def begin_at(buffer: bytearray, misaligned: int) -> int:
    """Where in it the first address lies, behind a guard, that is so many bytes over a multiple of 64."""
    return GUARD + (misaligned - _native.address_of(buffer) - GUARD) % 64


def check(how: Callable[[memoryview, memoryview], bool], length: int, to: int, at: int) -> None:
    """Copy from and to so many bytes over a multiple of 64, and look at all that is around."""
    begin, source = begin_at(TARGET, to), begin_at(SOURCE, at)
    end = begin + length
    TARGET[: end + GUARD] = b"\xaa" * (end + GUARD)
    assert how(memoryview(TARGET)[begin:end], memoryview(SOURCE)[source : source + length])
    assert TARGET[begin:end] == SOURCE[source : source + length]
    assert TARGET[:begin] == b"\xaa" * begin, "before it"
    assert TARGET[end : end + GUARD] == b"\xaa" * GUARD, "behind it"


@pytest.mark.parametrize("length", SMALL)
def test_a_small_copy_is_equal_wherever_it_lies(length: int) -> None:
    for to in range(64):
        for at in range(64):
            check(copy, length, to, at)


@pytest.mark.parametrize("how", [copy, copy_hash])
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(LARGE + SMALL), st.integers(0, 63), st.integers(0, 63))
def test_a_large_copy_is_equal_wherever_it_lies(
    how: Callable[[memoryview, memoryview], bool], length: int, to: int, at: int
) -> None:
    check(how, length, to, at)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, MIB), st.integers(0, 63), st.integers(0, 63))
def test_a_copy_of_any_length_is_equal(length: int, to: int, at: int) -> None:
    check(copy, length, to, at)


def test_the_source_is_left_alone() -> None:
    before = bytes(SOURCE)
    for length in LARGE:
        check(copy, length, 13, 21)
    assert before == SOURCE
