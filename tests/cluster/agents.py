"""Real agents for tests: ``p2pkv agent`` processes on ports of the kernel's choice, told apart by nothing but
their pid.

    with Cluster() as cluster:
        a, b = cluster.start(2)
        cluster.connected()
        a.kill()

Every process is ended by its id and reaped, with its NIXL child, whatever state it was left in.
Nothing here sleeps in order to wait for something: :func:`eventually` polls with a deadline.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import p2pkv
from p2pkv.client import AgentClient, Layout
from p2pkv.client.cache import Cache
from p2pkv.types import Tier

READY_S = 60.0
"""A start takes 1 s alone and 5 s (NIXL: 10 s) on a machine whose cores are all busy."""
EXIT_S = 20.0
POLL_S = 0.005

T = TypeVar("T")


def eventually(what: Callable[[], T], deadline_s: float = 10.0, *, why: str = "") -> T:
    """Call ``what`` until it returns something true, and return that; fails after ``deadline_s``."""
    deadline = time.monotonic() + deadline_s
    while True:
        if found := what():
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {deadline_s} s: {why or what} (last answer: {found!r})")
        time.sleep(POLL_S)


def make_layout(block_bytes: int = 65_536, **changes: Any) -> Layout:
    """A layout for tests; blocks of ``block_bytes``, a model of its own for each size so that no two conflict."""
    fields: dict[str, Any] = {"model": f"m{block_bytes}", "revision": "r", "kv_dtype": "float32", "block_tokens": 16}
    return Layout(block_bytes=block_bytes, **(fields | changes))


class AgentProcess:
    """One agent. Made by :meth:`Cluster.start`; attributes that need a running agent are there after :meth:`ready`."""

    def __init__(
        self,
        directory: Path,
        name: str,
        arguments: list[str],
        program: list[str] | None = None,
        prefix: list[str] | None = None,
    ) -> None:
        self.name = name
        self.socket = str(directory / f"{name}.sock")
        self.log_path = directory / f"{name}.log"
        self.arguments = arguments
        self.node = ""
        self.peer_port = 0
        self.http_port = 0
        self.transports: list[str] = []
        self._prefix = prefix or []  # of the command; it must execute the rest in its place
        self._program = program or ["-m", "p2pkv.cli", "agent"]
        self._clients: list[AgentClient] = []
        self._ready = -1
        self.launch()

    # --- life

    def launch(self) -> None:
        """Start the process (again, after it has ended). Does not wait."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("P2PKV_")}
        root = str(Path(p2pkv.__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._ready, write_end = os.pipe()
        command = [*self._prefix, sys.executable, *self._program, "--socket", self.socket, "--ready-fd", str(write_end)]
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                command + self.arguments, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=(write_end,),
            )  # fmt: skip
        os.close(write_end)

    def ready(self) -> AgentProcess:
        """Wait until the agent has told its ports."""
        deadline = time.monotonic() + READY_S
        line = b""
        told = select.poll()  # select() takes no descriptor above 1024
        told.register(self._ready, select.POLLIN)
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if not told.poll(max(0.0, left) * 1000):
                raise AssertionError(f"agent {self.name} was not ready within {READY_S} s\n{self.log()}")
            piece = os.read(self._ready, 4096)
            if not piece:
                raise AssertionError(f"agent {self.name} ended with {self.wait()} before it was ready\n{self.log()}")
            line += piece
        self._close_pipe()
        said = json.loads(line)
        self.node, self.peer_port, self.http_port = said["node"], said["peer_port"], said["http_port"]
        self.transports = said["transports"]
        return self

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def address(self) -> str:
        """Where peers reach it."""
        return f"127.0.0.1:{self.peer_port}"

    def children(self) -> list[int]:
        """Pids of its children (the NIXL process)."""
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except OSError:
            return []

    def signal(self, number: int) -> None:
        """Send one signal to the agent alone."""
        self.process.send_signal(number)

    def stop_tree(self) -> None:
        """SIGSTOP the agent and its children, and wait until the kernel says that they stand still."""
        pids = [self.pid, *self.children()]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            eventually(lambda pid=pid: state_of(pid) in "TtZ", why=f"pid {pid} stops")  # type: ignore[misc]

    def continue_tree(self) -> None:
        """SIGCONT everything that :meth:`stop_tree` stopped."""
        for pid in [self.pid, *self.children()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def kill(self) -> None:
        """kill -9, and reap. Its NIXL child ends by itself, or is killed when it is stopped."""
        children = self.children()
        self.process.kill()
        self.process.wait(EXIT_S)
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._close_pipe()

    def terminate(self, deadline_s: float = EXIT_S) -> int:
        """SIGTERM, and wait for the end; the exit status."""
        self.process.terminate()
        return self.wait(deadline_s)

    def wait(self, deadline_s: float = EXIT_S) -> int:
        """The exit status."""
        return self.process.wait(deadline_s)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        """Whatever state it is in: gone and reaped, and nothing of ours holds on to it."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        if self.alive:
            self.kill()
        self._close_pipe()

    def _close_pipe(self) -> None:
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1

    # --- talk

    def client(self, name: str = "test") -> AgentClient:
        """A client of this agent, closed with the agent."""
        client = AgentClient(self.socket, name=name)
        self._clients.append(client)
        return client

    def open(self, layout: Layout | None = None) -> Cache:
        """A cache of a new client."""
        return self.client().open(layout or make_layout(), deadline_ms=10_000)

    def http(self, path: str, *, body: bytes | None = None, timeout_s: float = 10.0) -> tuple[int, bytes]:
        """One HTTP request: (status, body)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http_port, timeout=timeout_s)
        try:
            headers = {"content-type": "application/json"} if body is not None else {}
            connection.request("GET" if body is None else "POST", path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def nodes(self) -> dict[str, Any]:
        """``/v1/nodes``."""
        status, body = self.http("/v1/nodes")
        assert status == 200, body
        answer: dict[str, Any] = json.loads(body)
        return answer

    def metric(self, name: str) -> float:
        """The value of one metric, labels included in its name as the exposition writes them; 0 if it is not there."""
        status, body = self.http("/metrics")
        assert status == 200, body
        for line in body.decode().splitlines():
            if line.startswith(name + " "):
                return float(line.rpartition(" ")[2])
        return 0.0

    def log(self) -> str:
        """The last of what it wrote."""
        try:
            return self.log_path.read_text(errors="replace")[-6_000:]
        except OSError:
            return ""


class Cluster:
    """Agents that are started and ended together. A context manager."""

    def __init__(self) -> None:
        # Not pytest's tmp_path: a Unix socket's path has 107 bytes.
        self.directory = Path(tempfile.mkdtemp(prefix="p2pkv-test-"))
        self.agents: list[AgentProcess] = []

    def launch(
        self,
        *,
        transport: str = "tcp",
        capacity: str = "64MiB",
        seeds: tuple[str, ...] = (),
        http_on: bool = True,
        program: list[str] | None = None,
        settings: Mapping[str, object] | None = None,
    ) -> AgentProcess:
        """Start one agent and return at once."""
        # What is stored becomes visible to peers in milliseconds instead of 0.3 s: most of a test's time otherwise.
        quick = {"peer.flush_ms": 5, "peer.hold_ms": 0}
        pairs = {"state_dir": ":memory:", "http.enabled": str(http_on).lower(), **quick, **(settings or {})}
        arguments = ["--capacity", capacity, "--transport", transport, "--peer-port", "0", "--http-port", "0"]
        for key, value in pairs.items():
            arguments += ["--set", f"{key}={value}"]
        for seed in seeds:
            arguments += ["--seed", seed]
        agent = AgentProcess(self.directory, f"a{len(self.agents)}", arguments, program)
        self.agents.append(agent)
        return agent

    def start(self, count: int = 1, **options: Any) -> list[AgentProcess]:
        """Start agents that know each other: the first is the others' seed."""
        seeds = options.pop("seeds", ())
        first = self.launch(seeds=seeds, **options).ready()
        others = [self.launch(seeds=(*seeds, first.address), **options) for _ in range(count - 1)]
        return [first, *(agent.ready() for agent in others)]

    def connected(self, *agents: AgentProcess, deadline_s: float = 20.0) -> None:
        """Wait until these agents (default: all) see each other alive."""
        group = agents or tuple(agent for agent in self.agents if agent.alive)
        for agent in group:
            others = {other.node for other in group} - {agent.node}
            eventually(lambda a=agent, o=others: o <= alive_peers(a), deadline_s, why=f"{agent.name} sees its peers")  # type: ignore[misc]

    def logs(self) -> Iterator[tuple[str, str]]:
        """(name, last of the log) of every agent."""
        for agent in self.agents:
            yield f"agent {agent.name} (pid {agent.pid}, exit {agent.process.poll()})", agent.log()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents:
            agent.end()
        shutil.rmtree(self.directory, ignore_errors=True)


def alive_peers(agent: AgentProcess) -> set[str]:
    """Node ids of the peers that this agent reads now."""
    return {peer["node"] for peer in agent.nodes()["peers"] if peer["state"] == "alive"}


def visible(cache: Cache, keys: list[bytes], deadline_s: float = 20.0) -> None:
    """Wait until an agent's index knows a holder of every key."""
    eventually(lambda: cache.match(keys).anywhere == len(keys), deadline_s, why="blocks become visible")


def all_have(cache: Cache, keys: list[bytes], count: int, deadline_s: float = 20.0) -> None:
    """Wait until an agent's index knows that so many nodes have every key, itself included if it has."""

    def known() -> bool:
        depths = [depths[Tier.GONE] for depths in cache.match(keys).nodes.values()]
        return depths == [len(keys)] * count

    eventually(known, deadline_s, why=f"{count} nodes are known to have all of it")


def state_of(pid: int) -> str:
    """One letter: R, S, T (stopped), Z (dead, not reaped); Z too when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"
