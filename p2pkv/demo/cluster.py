"""Agents and vLLM replicas on this machine: replica i talks to agent i, and agent 0 is the others' seed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final

from p2pkv.demo.measure import ask_agent
from p2pkv.demo.processes import Child, ProcessFailed, answers, free_ports
from p2pkv.demo.progress import Progress, working
from p2pkv.errors import ConfigError

AGENT_S: Final = 60.0
REPLICA_S: Final = 420.0
"""The first start of vLLM on two cores compiles some things; later ones take 35 to 75 s."""
MODEL_S: Final = 300.0
CHUNK_TOKENS: Final = 256
MODEL_TOKENS_MAX: Final = 16_384
SHM: Final = Path("/dev/shm")
LOOPBACK: Final = "127.0.0.1"
THREADS_MAX: Final = 16
"""A model this small gains nothing from more."""
ENGINE_TIMER_SLACK_S: Final = 0.010
"""PyTorch's Gloo looks for news every 10 ms in each of vLLM's 13 process groups: an idle engine uses 1.7 to 2 % of a
core for that, with or without p2pkv. Timers that may be late fire together: half of it. (systemd: TimerSlackNSec.)"""


@dataclass
class AgentNode:
    """One running agent, and how to start it again."""

    child: Child
    socket: str
    http: str
    peer_port: int
    command: list[str]


@dataclass
class Replica:
    """One running vLLM server; ``shared`` says whether it has p2pkv."""

    child: Child
    url: str
    shared: bool


@dataclass
class Cluster:
    """What is running, and where its files are. A context manager: on exit everything ends and is cleaned up.

    Args:
        python: the interpreter of vLLM's environment.
        threads: per replica, where the engines compute on the CPU; 0 = one per core. Requests come one at a time, so
            each replica may have all cores.
        engines_may_be_stopped: they are now and then; see :class:`Child`.
        gpu: whether the engines compute on a GPU; None = look.
    """

    python: Path
    model: Path
    transport: str = "auto"
    capacity: str = "1GiB"
    threads: int = 0
    gpu: bool | None = None
    engines_may_be_stopped: bool = False
    progress: Progress = lambda _: None
    agents: list[AgentNode] = field(default_factory=list)
    replicas: list[Replica] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="p2pkv-demo-"))
        self._children: list[Child] = []
        self._gpus = gpus() if self.gpu is None else gpus() if self.gpu else 0
        self._started = 0

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End everything, newest first, and remove what it left behind: logs, sockets, /dev/shm files."""
        if self._children:
            self.progress("ending everything")
        try:
            for replica in self.replicas:
                replica.child.terminate()  # all at once: each takes seconds
            for child in reversed(self._children):
                child.stop()
        finally:
            for child in self._children:
                child.kill()  # those that an interrupt left; nothing where they have ended
            self._children.clear()
            for left in SHM.glob(f"vllm_offload_{self.directory.name}-*"):  # vLLM leaves them behind
                left.unlink(missing_ok=True)
            shutil.rmtree(self.directory, ignore_errors=True)

    def logs(self) -> Iterator[tuple[str, str]]:
        """Name and the end of the log of everything that was started."""
        for child in self._children:
            yield child.name, child.tail()

    # --- agents ---

    def start_agents(self, count: int, *, cores: str = "") -> None:
        """Start agents and wait until they are ready and all see each other.

        Args:
            cores: CPU list for taskset, e.g. "1"; empty = all.
        """
        ports = free_ports(2 * count)
        for i in range(count):
            self.agents.append(self._start_agent(len(self.agents), ports[2 * i], ports[2 * i + 1], cores))
        for agent in self.agents:
            self.wait_for_agent(agent)

    def restart_agent(self, agent: AgentNode) -> None:
        """Start an agent that has ended again, at the same addresses, and wait until it is back in the cell."""
        self._children.remove(agent.child)
        agent.child = self._start(agent.child.name, agent.command, {})
        self.wait_for_agent(agent)

    def wait_for_agent(self, agent: AgentNode) -> None:
        """Wait until an agent takes requests and sees all the others that run."""
        others = sum(other.child.alive for other in self.agents) - 1

        def ready() -> bool:
            if not answers(f"{agent.http}/readyz"):
                return False
            peers = ask_agent(agent.http, "/v1/nodes")["peers"]
            return len([peer for peer in peers if peer["state"] == "alive"]) >= others

        agent.child.wait_until(ready, AGENT_S)

    def _start_agent(self, i: int, peer_port: int, http_port: int, cores: str) -> AgentNode:
        socket = str(self.directory / f"agent{i}.sock")
        command = [
            *self._prefix(i), *pinned(cores), sys.executable, "-m", "p2pkv.cli", "agent",
            "--socket", socket, "--capacity", self.capacity, "--transport", self.transport,
            "--peer-port", str(peer_port), "--http-port", str(http_port), "--set", "state_dir=:memory:",
        ]  # fmt: skip
        if self._host(i) != LOOPBACK:
            command += ["--set", f"peer.host={self._host(i)}", "--set", "peer.insecure=true"]
        if i:
            command += ["--seed", f"{self._host(0)}:{self.agents[0].peer_port}"]
        child = self._start(f"agent {i}", command, {})
        return AgentNode(child, socket, f"http://127.0.0.1:{http_port}", peer_port, command)

    def _host(self, i: int) -> str:
        """Where agent ``i`` listens for peers."""
        return LOOPBACK

    def _prefix(self, i: int) -> list[str]:
        """In front of the command of agent ``i``."""
        return []

    # --- replicas ---

    def start_replica(self, agent: AgentNode | None, *, name: str, cores: str = "") -> Replica:
        """Start a vLLM server, with p2pkv's tier when an agent is given. Does not wait; see :meth:`wait_for`.

        Args:
            cores: CPU list for taskset, e.g. "0"; empty = all.
        """
        (port,) = free_ports(1)
        command = [
            *pinned(cores), str(self.python), "-m", "vllm.entrypoints.openai.api_server",
            "--model", str(self.model), "--served-model-name", "demo", "--host", "127.0.0.1", "--port", str(port),
            "--dtype", "float32", "--enforce-eager", "--max-model-len", str(MODEL_TOKENS_MAX),
            "--max-num-batched-tokens", str(MODEL_TOKENS_MAX), "--max-num-seqs", "8",
            "--enable-prompt-tokens-details", "--disable-uvicorn-access-log",
        ]  # fmt: skip
        if agent is not None:
            config = kv_transfer_config(agent.socket, f"{self.directory.name}-{port}", gpu=bool(self._gpus))
            command += ["--kv-transfer-config", json.dumps(config)]
        env = engine_environment() | {"TMPDIR": str(self.directory)}  # sockets and locks that vLLM forgets to remove
        if self._gpus:
            # Two of the demo's models fit on any GPU; vLLM would otherwise take all of it for one.
            command += ["--gpu-memory-utilization", "0.3"]
            if "CUDA_VISIBLE_DEVICES" not in os.environ:
                env["CUDA_VISIBLE_DEVICES"] = str(self._started % self._gpus)
        else:
            env |= cpu_environment(self.threads or min(THREADS_MAX, len(os.sched_getaffinity(0))))
        self._started += 1
        child = self._start(name, command, env, ENGINE_TIMER_SLACK_S, self.engines_may_be_stopped)
        replica = Replica(child, f"http://127.0.0.1:{port}", agent is not None)
        self.replicas.append(replica)
        return replica

    def wait_for(self, *replicas: Replica) -> None:
        """Wait until replicas serve."""
        with working(self.progress, "vLLM is starting"):
            for replica in replicas:
                replica.child.wait_until(lambda url=replica.url: answers(f"{url}/health"), REPLICA_S)  # type: ignore[misc]

    def stop_replica(self, replica: Replica) -> None:
        """End one replica."""
        replica.child.stop()
        self._children.remove(replica.child)
        self.replicas.remove(replica)

    def _start(
        self,
        name: str,
        command: Sequence[str],
        env: Mapping[str, str],
        timer_slack_s: float = 0.0,
        may_be_stopped: bool = False,
    ) -> Child:
        log = self.directory / (name.replace(" ", "-") + ".log")
        child = Child(name, command, log, env, timer_slack_s, may_be_stopped)
        self._children.append(child)
        return child


def pinned(cores: str) -> list[str]:
    """What stands before a command that may use these cores only."""
    return ["taskset", "-c", cores] if cores else []


def kv_transfer_config(socket: str, engine_id: str, *, gpu: bool) -> dict[str, object]:
    """vLLM's ``--kv-transfer-config`` for a replica beside the agent at ``socket``.

    Args:
        engine_id: names the replica's file in /dev/shm.
        gpu: vLLM's own offloading spec instead of the one for CPUs.
    """
    cpu_spec = {"spec_name": "CpuTieringOffloadingSpec", "spec_module_path": "p2pkv.connectors.vllm_cpu"}
    return {
        "engine_id": engine_id,
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            **({"spec_name": "TieringOffloadingSpec"} if gpu else cpu_spec),
            "cpu_bytes_to_use": 512 << 20,
            "block_size": CHUNK_TOKENS,
            "secondary_tiers": [
                {
                    "type": "P2PKVTier",
                    "module_path": "p2pkv.connectors.vllm",
                    "socket": socket,
                    # Two replicas, two agents and a client on two cores, where a prefill takes ten seconds and more.
                    "lookup_deadline_ms": 500,
                    "cost_aware": True,
                    "load_deadline_ms": 10_000,
                }
            ],
        },
    }


def engine_environment() -> dict[str, str]:
    """What vLLM needs on a machine without a network."""
    return {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "",  # without bytecode every start compiles a quarter of a gigabyte of sources
    }


def cpu_environment(threads: int) -> dict[str, str]:
    """What vLLM needs on a machine without a GPU."""
    return {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }


def gpus() -> int:
    """How many NVIDIA GPUs vLLM is to use: what ``scripts/setup-vllm.sh`` goes by; ``SETUP_VLLM=cpu`` says none."""
    if os.environ.get("SETUP_VLLM") == "cpu" or not (tool := shutil.which("nvidia-smi")):
        return 0
    try:
        listed = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


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


def make_model(python: Path, directory: Path, progress: Progress = lambda _: None) -> Path:
    """A small random-weight model, made once: ``directory`` is there as a whole or not at all.

    Raises:
        ConfigError: there is something else at ``directory``, or this is not a checkout.
        ProcessFailed: the generator failed.
    """
    if (directory / "model.safetensors").exists():
        return directory
    if directory.exists():
        raise ConfigError("this directory holds no model", hint="Remove it, or name another.", directory=directory)
    script = Path(__file__).resolve().parents[2] / "examples" / "make_tiny_model.py"
    if not script.exists():
        raise ConfigError("the model's generator is not there", hint="Run the demo from a checkout.", script=script)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".model-", dir=directory.parent) as scratch:
        made = Path(scratch) / "model"
        log = Path(scratch) / "log"
        child = Child("the model's generator", [str(python), str(script), str(made)], log)
        try:
            with working(progress, "making a small random-weight model"):
                code = child.wait(MODEL_S)
        finally:
            child.stop()
        if code:
            raise ProcessFailed(f"cannot make the model:\n{child.tail()}")
        made.rename(directory)
    return directory
