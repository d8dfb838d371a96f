"""What stands in for typing is, for those who use it, what typing has."""

from __future__ import annotations

import copy
import subprocess
import sys
import typing

import pytest

from p2pkv import light


class Ours(light.NamedTuple):
    """A tuple."""

    a: int
    b: str = "b"
    c: int = 5

    @property
    def both(self) -> str:
        return f"{self.a}{self.b}"

    def with_a(self, a: int) -> Ours:
        return self._replace(a=a)


class Theirs(typing.NamedTuple):
    """A tuple."""

    a: int
    b: str = "b"
    c: int = 5


def test_a_named_tuple_is_one() -> None:
    assert Ours(1) == Theirs(1) == (1, "b", 5) and Ours(1, "x", c=7) == (1, "x", 7)
    assert (Ours._fields, Ours._field_defaults) == (Theirs._fields, Theirs._field_defaults)
    assert list(Ours.__annotations__) == list(Theirs.__annotations__)
    assert (Ours.__doc__, Ours.__name__, Ours.__module__) == (Theirs.__doc__, "Ours", __name__)
    assert Ours(3).both == "3b" and Ours(3).with_a(4) == (4, "b", 5) and isinstance(Ours(3), tuple)
    assert repr(Ours(1)) == "Ours(a=1, b='b', c=5)"
    with pytest.raises(TypeError):
        Ours()
    with pytest.raises(AttributeError):
        Ours(1).a = 2  # type: ignore[misc]


def test_it_can_be_copied_and_hashed() -> None:
    assert copy.deepcopy(Ours(1)) == Ours(1) and hash(Ours(1)) == hash(Theirs(1))


def test_metadata_is_kept() -> None:
    assert light.Annotated[int, "a", 5].__metadata__ == typing.Annotated[int, "a", 5].__metadata__  # type: ignore[attr-defined]


def test_every_word_is_one_of_typing() -> None:
    assert all(hasattr(typing, name) for name in light.__all__)


def test_the_client_brings_no_typing() -> None:
    program = "import sys; import p2pkv.client; sys.exit('typing' in sys.modules)"
    assert subprocess.run([sys.executable, "-S", "-c", program], check=False, cwd=ROOT).returncode == 0


ROOT = __file__.rpartition("/tests/")[0]
