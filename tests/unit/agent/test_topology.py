"""What the host says of its links."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pkv.agent import topology


def make(root: Path, name: str, content: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def test_the_speed_of_the_interface_that_has_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology.socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "eth1")])
    monkeypatch.setattr(topology, "_address_of", {"lo": "127.0.0.1", "eth0": "10.0.0.1", "eth1": "10.0.0.2"}.get)
    make(tmp_path, "eth0/speed", "25000\n")
    make(tmp_path, "eth1/speed", "-1\n")
    assert topology.link_bytes_per_s("10.0.0.1", tmp_path) == 25e9 / 8
    assert topology.link_bytes_per_s("10.0.0.2", tmp_path) is None, "it says that it does not know"
    assert topology.link_bytes_per_s("127.0.0.1", tmp_path) is None, "it has none"
    assert topology.link_bytes_per_s("0.0.0.0", tmp_path) == 25e9 / 8


def test_active_rdma_ports_count_together(tmp_path: Path) -> None:
    assert topology.rdma_bytes_per_s(tmp_path / "none") is None
    for port, state in (
        ("mlx5_0/ports/1", "4: ACTIVE"),
        ("mlx5_1/ports/1", "4: ACTIVE"),
        ("mlx5_2/ports/1", "1: DOWN"),
    ):
        make(tmp_path, f"{port}/rate", "400 Gb/sec (4X NDR)\n")
        make(tmp_path, f"{port}/state", state)
    assert topology.rdma_bytes_per_s(tmp_path) == 2 * 400e9 / 8


def test_this_host_can_be_asked() -> None:
    topology.link_bytes_per_s("127.0.0.1")
    topology.rdma_bytes_per_s()
