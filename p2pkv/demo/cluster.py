"""Agents and vLLM replicas on this machine: replica i talks to agent i, and agent 0 is the others' seed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

from p2pkv.demo.processes import Child, ProcessFailed, answers, free_ports
from p2pkv.errors import ConfigError

AGENT_S: Final = 60.0
REPLICA_S: Final = 420.0
"""The first start of vLLM on two cores compiles some things; later ones take 35 to 75 s."""
MODEL_S: Final = 300.0
CHUNK_TOKENS: Final = 256
SHM: Final = Path("/dev/shm")

Progress = Callable[[str], None]


@dataclass
class AgentNode:
    """One running agent."""

    child: Child
    socket: str
    http: str
    peer_port: int


@dataclass
class Replica:
    """One running vLLM server; ``shared`` says whether it has p2pkv."""

    child: Child
    url: str
    shared: bool


@dataclass
class Cluster:
    """What is running, and where its files are. A context manager: on exit everything ends and is cleaned up."""

    python: Path  # of the vLLM environment
    model: Path
    transport: str = "auto"
    capacity: str = "1GiB"
    threads: int = 2
    progress: Progress = lambda _: None
    engine_env: Mapping[str, str] = field(default_factory=dict)
    agents: list[AgentNode] = field(default_factory=list)
    replicas: list[Replica] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="p2pkv-demo-"))
        self._children: list[Child] = []

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End everything, newest first, and remove what it left behind: logs, sockets, /dev/shm files."""
        for child in reversed(self._children):
            child.stop()
        self._children.clear()
        for left in SHM.glob(f"vllm_offload_{self.directory.name}-*"):  # vLLM leaves them behind
            left.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)

    def start_agents(self, count: int) -> None:
        """Start agents and wait until they are ready and know each other."""
        ports = free_ports(2 * count)
        for i in range(count):
            self.agents.append(self._start_agent(i, ports[2 * i], ports[2 * i + 1]))
        for agent in self.agents:
            agent.child.wait_until(lambda agent=agent: answers(f"{agent.http}/readyz"), AGENT_S)  # type: ignore[misc]

    def _start_agent(self, i: int, peer_port: int, http_port: int) -> AgentNode:
        socket = str(self.directory / f"agent{i}.sock")
        command = [
            sys.executable, "-m", "p2pkv.cli", "agent",
            "--socket", socket, "--capacity", self.capacity, "--transport", self.transport,
            "--peer-port", str(peer_port), "--http-port", str(http_port), "--set", "state_dir=:memory:",
        ]  # fmt: skip
        if i:
            command += ["--seed", f"127.0.0.1:{self.agents[0].peer_port}"]
        child = self._start(f"agent {i}", command, {})
        return AgentNode(child, socket, f"http://127.0.0.1:{http_port}", peer_port)

    def start_replica(self, agent: AgentNode | None, *, name: str, cores: str = "") -> Replica:
        """Start a vLLM server, with p2pkv's tier when an agent is given. Does not wait; see :meth:`wait_for`.

        Args:
            cores: CPU list for taskset, e.g. "0"; empty = all.
        """
        (port,) = free_ports(1)
        command = [
            str(self.python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self.model), "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port),
            "--dtype", "float32", "--enforce-eager", "--max-model-len", "16384", "--max-num-batched-tokens", "16384",
            "--max-num-seqs", "8", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
        ]  # fmt: skip
        if agent is not None:
            engine_id = f"{self.directory.name}-{port}"
            command += ["--kv-transfer-config", json.dumps(kv_transfer_config(agent.socket, engine_id))]
        if cores:
            command = ["taskset", "-c", cores, *command]
        child = self._start(name, command, engine_environment(self.threads) | dict(self.engine_env))
        replica = Replica(child, f"http://127.0.0.1:{port}", agent is not None)
        self.replicas.append(replica)
        return replica

    def wait_for(self, replica: Replica, tick: Callable[[], None] = lambda: None) -> None:
        """Wait until a replica serves."""
        replica.child.wait_until(lambda: answers(f"{replica.url}/health"), REPLICA_S, tick)

    def stop_replica(self, replica: Replica) -> None:
        """End one replica."""
        replica.child.stop()
        self._children.remove(replica.child)
        self.replicas.remove(replica)

    def _start(self, name: str, command: list[str], env: Mapping[str, str]) -> Child:
        log = self.directory / (name.replace(" ", "-") + ".log")
        child = Child(name, command, log, env)
        self._children.append(child)
        return child


def kv_transfer_config(socket: str, engine_id: str) -> dict[str, object]:
    """vLLM's ``--kv-transfer-config`` for a replica beside the agent at ``socket``; ``engine_id``: of its /dev/shm file."""
    return {
        "engine_id": engine_id,
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringOffloadingSpec",
            "spec_module_path": "p2pkv.connectors.vllm_cpu",
            "cpu_bytes_to_use": 512 << 20,
            "block_size": CHUNK_TOKENS,
            "secondary_tiers": [
                {
                    "type": "P2PKVTier",
                    "module_path": "p2pkv.connectors.vllm",
                    "socket": socket,
                    "lookup_deadline_ms": 500,
                }
            ],
        },
    }


def engine_environment(threads: int) -> dict[str, str]:
    """What vLLM needs on a machine without a GPU and without a network."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "PYTHONHASHSEED": "0",
    }


def find_vllm_python() -> Path:
    """The interpreter of the vLLM environment: ``P2PKV_VLLM_PYTHON``, or ``.venv-vllm`` of this checkout.

    Raises:
        ConfigError: there is none.
    """
    named = os.environ.get("P2PKV_VLLM_PYTHON")
    checkout = Path(__file__).resolve().parents[2]
    for candidate in (
        [Path(named)] if named else [Path.cwd() / ".venv-vllm/bin/python", checkout / ".venv-vllm/bin/python"]
    ):
        if candidate.exists():
            return candidate
    raise ConfigError("vLLM's environment is not there", hint="Run `make vllm` first, or set P2PKV_VLLM_PYTHON.")


def make_model(python: Path, directory: Path) -> Path:
    """A small random-weight model, made once.

    Raises:
        ProcessFailed: the generator failed.
    """
    if not (directory / "model.safetensors").exists():
        script = Path(__file__).resolve().parents[2] / "examples" / "make_tiny_model.py"
        made = subprocess.run(
            [str(python), str(script), str(directory)], capture_output=True, text=True, timeout=MODEL_S
        )
        if made.returncode:
            raise ProcessFailed(f"cannot make the model:\n{made.stderr[-2000:]}")
    return directory
