"""Cards and layouts, and the loops that the driver's tests run on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from p2pkv.types import Layout
from p2pkv.wire.peer import Address, Card


def make_card(node: int = 2, epoch: int = 1, *, host: str = "10.0.0.2", instance: int = 1, **more: Any) -> Card:
    fields: dict[str, Any] = {"http": "", "host_id": "", "layouts": [], "transports": ["tcp"]}
    fields.update(more)
    return Card(node=node, epoch=epoch, address=Address(host, 7841), instance=instance, **fields)


def make_layout(**fields: Any) -> Layout:
    defaults: dict[str, Any] = {"model": "m", "revision": "r", "kv_dtype": "bf16", "block_tokens": 256}
    return Layout(**{**defaults, "block_bytes": 1 << 20, **fields})


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories(item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The driver's tests run on asyncio's own loop and on uvloop, which the agent uses."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    if item.path.name.startswith("test_driver"):
        factories["uvloop"] = uvloop.new_event_loop
    return factories


@pytest.fixture
def card() -> Callable[..., Card]:
    return make_card


@pytest.fixture
def layout() -> Callable[..., Layout]:
    return make_layout
