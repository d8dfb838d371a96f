"""Layouts of engines, and those adopted from peers ahead of them."""

from __future__ import annotations

import pytest

from p2pkv.agent.layouts import Layouts
from p2pkv.errors import LayoutMismatch
from p2pkv.store.dram import DramStore
from p2pkv.types import Layout

PAGE = 4096
LAYOUT = Layout(model="m", revision="r", kv_dtype="bf16", block_tokens=16, block_bytes=PAGE)
OTHER = LAYOUT.replace(block_tokens=32, block_bytes=2 * PAGE)


class Scene:
    def __init__(self) -> None:
        self.changes = self.drops = 0
        self.store = DramStore(64 * PAGE)
        self.layouts = Layouts(self.store, self._changed, self._dropped)

    def _changed(self) -> None:
        self.changes += 1

    def _dropped(self) -> None:
        self.drops += 1


def test_an_adopted_layout_is_told_of_once_and_becomes_the_engines() -> None:
    scene = Scene()
    namespace = scene.layouts.adopt(LAYOUT)
    assert scene.layouts.adopt(LAYOUT) == namespace and scene.changes == 1
    assert scene.layouts.open(LAYOUT) == namespace
    assert (scene.changes, scene.drops) == (1, 0)


def test_an_engines_layout_goes_before_one_that_was_only_adopted() -> None:
    scene = Scene()
    scene.layouts.adopt(LAYOUT)
    scene.layouts.open(OTHER)
    assert scene.store.layouts() == [OTHER] and scene.drops == 1


def test_an_engines_layout_stays_whatever_peers_say() -> None:
    scene = Scene()
    scene.layouts.open(LAYOUT)
    with pytest.raises(LayoutMismatch):
        scene.layouts.adopt(OTHER)
    with pytest.raises(LayoutMismatch):
        scene.layouts.open(OTHER)
    assert scene.store.layouts() == [LAYOUT]


def test_an_engine_makes_an_adopted_layout_its_own() -> None:
    scene = Scene()
    scene.layouts.adopt(LAYOUT)
    scene.layouts.open(LAYOUT)
    scene.layouts.close(LAYOUT)
    with pytest.raises(LayoutMismatch):
        scene.layouts.open(OTHER)
    assert scene.store.layouts() == [LAYOUT] and scene.drops == 0
