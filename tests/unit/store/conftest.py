"""What the store's tests share: both implementations, small layouts and keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from p2pkv.store.dram import DramStore
from p2pkv.store.reference import ReferenceStore
from p2pkv.types import Layout


def _layout(block_bytes: int = 4096, **fields: object) -> Layout:
    base: dict[str, object] = {"model": "m", "revision": "r", "kv_dtype": "bf16", "block_tokens": 16}
    return Layout(block_bytes=block_bytes, **(base | fields))  # type: ignore[arg-type]


@pytest.fixture
def layout() -> Callable[..., Layout]:
    """``layout(block_bytes, **fields)``: a valid layout."""
    return _layout


@pytest.fixture
def key() -> Callable[[int], bytes]:
    """``key(i)``: the i-th block hash, 16 bytes, all different in their first eight."""
    return lambda i: i.to_bytes(8, "little") + bytes(8)


@pytest.fixture(params=[DramStore, ReferenceStore], ids=["core", "reference"])
def implementation(request: pytest.FixtureRequest) -> type[DramStore] | type[ReferenceStore]:
    """The class of the store under test: whatever is true of one must be true of the other."""
    return request.param  # type: ignore[no-any-return]
