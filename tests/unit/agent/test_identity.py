"""A node's identity: kept over restarts, one process at a time, and never made up from garbage."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2pkv.agent.identity import Identity
from p2pkv.errors import ConfigError


def test_the_node_stays_and_the_epoch_grows(tmp_path: Path) -> None:
    state = str(tmp_path / "deep" / "state")
    seen = []
    for _ in range(3):
        with Identity.load(state) as identity:
            seen.append((identity.node, identity.epoch))
    assert len({node for node, _ in seen}) == 1
    assert [epoch for _, epoch in seen] == [1, 2, 3]


def test_an_identity_in_memory_is_new_each_time_and_leaves_no_trace(tmp_path: Path) -> None:
    os.chdir(tmp_path)
    nodes = {Identity.load(":memory:").node for _ in range(50)}
    assert len(nodes) == 50 and 0 not in nodes
    assert list(tmp_path.iterdir()) == []


def test_two_agents_cannot_be_the_same_node(tmp_path: Path) -> None:
    first = Identity.load(str(tmp_path))
    with pytest.raises(ConfigError, match="another agent"):
        Identity.load(str(tmp_path))
    first.close()
    first.close()
    with Identity.load(str(tmp_path)) as second:
        assert second.node == first.node


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"node": 1, "epoch": 1}',
        b'{"node": "xyz", "epoch": 1}',
        b'{"node": "0", "epoch": 1}',
        b'{"node": "-1", "epoch": 1}',
        b'{"node": "11112222333344445", "epoch": 1}',
        b'{"node": "1"}',
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "identity.json").write_bytes(content)
    for _ in range(2):
        with pytest.raises(ConfigError, match="damaged"):
            Identity.load(str(tmp_path))
    assert (tmp_path / "identity.json").read_bytes() == content


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="state directory"):
        Identity.load(str(tmp_path / "file" / "state"))
