"""An agent that cannot start says why in one line, with what to do, exits with 2, and leaves nothing behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.agents import Cluster

pytestmark = [pytest.mark.cluster]

START_S = 40.0


def start(
    tmp_path: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run an agent that is expected to end by itself."""
    import p2pkv

    env = {key: value for key, value in os.environ.items() if not key.startswith("P2PKV_")}
    env["PYTHONPATH"] = str(Path(p2pkv.__file__).parents[1])
    env |= environment or {}
    defaults = ["--set", "state_dir=:memory:", "--set", "http.enabled=false", "--peer-port", "0", "--transport", "tcp"]
    if "--capacity" not in arguments:
        defaults += ["--capacity", "16MiB"]
    if "--socket" not in arguments:
        defaults += ["--socket", os.path.relpath(tmp_path / "agent.sock")]
    return subprocess.run(
        [sys.executable, "-m", "p2pkv.cli", "agent", *defaults, *arguments],
        env=env, timeout=START_S, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "error: " in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_an_unknown_key_is_refused_with_the_nearest_known_one(tmp_path: Path) -> None:
    refused(start(tmp_path, "--set", "store.capcity=1GiB"), "store.capcity", "store.capacity")
    file = tmp_path / "config.yaml"
    file.write_text("transport:\n  streems: 4\n")
    refused(start(tmp_path, "--config", str(file)), "transport.streems", "transport.streams", "config.yaml")
    refused(start(tmp_path, environment={"P2PKV_PEER_HOSTS": "x"}), "peer.hosts", "peer.host", "P2PKV_PEER_HOSTS")


@pytest.mark.parametrize("key", ["peer.port", "http.port"])
def test_a_port_in_use_is_refused_by_name(tmp_path: Path, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        flag = "--peer-port" if key == "peer.port" else "--http-port"
        done = start(
            tmp_path, flag, port, "--set", "http.enabled=true", *([] if key == "http.port" else ["--http-port", "0"])
        )
    refused(done, port)
    assert not (tmp_path / "agent.sock").exists(), "the socket was left behind"


@pytest.mark.parametrize("capacity", ["1024TiB", "100000GiB"])
def test_an_arena_larger_than_memory_is_refused(tmp_path: Path, capacity: str) -> None:
    refused(start(tmp_path, "--capacity", capacity), "hint: ")


@pytest.mark.parametrize("capacity", ["0", "1KiB", "-5MiB", "lots", "200%", ""])
def test_a_capacity_that_is_none_is_refused(tmp_path: Path, capacity: str) -> None:
    refused(start(tmp_path, "--capacity", capacity))


def test_a_socket_that_another_agent_listens_on_is_refused_and_left_alone(tmp_path: Path, cluster: Cluster) -> None:
    [agent] = cluster.start(1, http_on=False)
    refused(start(tmp_path, "--socket", agent.socket), "another agent")
    agent.open().match([b"x" * 16])


def test_a_socket_path_that_is_a_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    refused(start(tmp_path, "--socket", os.path.relpath(path)))
    assert path.read_text() == "data"


def test_a_socket_path_that_is_too_long_is_refused(tmp_path: Path) -> None:
    refused(start(tmp_path, "--socket", "/tmp/" + "x" * 120), "107")


def test_a_state_directory_in_use_or_damaged_is_refused(tmp_path: Path, cluster: Cluster) -> None:
    state = tmp_path / "state"
    cluster.start(1, http_on=False, settings={"state_dir": state})
    refused(start(tmp_path, "--set", f"state_dir={state}"), "state")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "identity.json").write_text("{")
    refused(start(tmp_path, "--set", f"state_dir={damaged}"), "identity")


def test_a_bind_beyond_loopback_has_to_be_asked_for(tmp_path: Path) -> None:
    refused(start(tmp_path, "--set", "peer.host=0.0.0.0"), "peer.insecure")
    refused(start(tmp_path, "--set", "peer.host=192.0.2.1", "--insecure"))


def test_huge_pages_that_are_not_there_are_refused(tmp_path: Path) -> None:
    refused(start(tmp_path, "--capacity", "4096GiB", "--set", "store.huge_pages=huge"))
