"""Agents on hosts of a :class:`~p2pkv.netns.Network`, and what happens to them.

with Hosts(8) as hosts:
    hosts.start_all()
    hosts.all_right()
    hosts.kill(2)
    hosts.stop(4); hosts.go_on(4)
    hosts.restart(2)
    hosts.wipe(3)                      # restarted without its state directory
"""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import time
from typing import Any

from p2pkv.client import Layout
from p2pkv.client.cache import Cache
from p2pkv.gossip import keyfile
from p2pkv.gossip.keyring import KEY_BYTES, Key, Keyring
from p2pkv.netns import Network, inside
from tests.cluster.agents import AgentProcess, Cluster, eventually, make_layout

PORT = 7841
BLOCK_BYTES = 4_096


class HostedAgent(AgentProcess):
    """An agent in a namespace."""

    def __init__(self, namespace: str, *arguments: Any, **options: Any) -> None:
        self._namespace = namespace
        super().__init__(*arguments, **options)

    def http(self, path: str, *, body: bytes | None = None, timeout_s: float = 10.0) -> tuple[int, bytes]:
        with inside(self._namespace):
            return super().http(path, body=body, timeout_s=timeout_s)


class Hosts:
    """So many hosts with an agent each, of one cell with a key. A context manager."""

    def __init__(self, count: int, transport: str = "tcp", **settings: object) -> None:
        self.network = Network(count)
        self.cluster = Cluster()
        self.agents: list[HostedAgent | None] = [None] * count
        self.caches: list[Cache | None] = [None] * count
        self.stored: list[list[bytes]] = [[] for _ in range(count)]
        self.layout: Layout = make_layout(BLOCK_BYTES)
        self._transport = transport
        self._settings = settings
        self._keys = self.cluster.directory / "keys"
        keyfile.write(self._keys, Keyring([Key(secrets.token_bytes(KEY_BYTES))]))

    def __enter__(self) -> Hosts:
        self.cluster.__enter__()
        self.network.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.cluster.__exit__(*error)
        self.network.__exit__()

    # --- the language

    def start(self, host: int, **settings: object) -> None:
        """Bring a host's agent up, and do not wait for it."""
        state = self.cluster.directory / f"state-{host}"
        pairs = {
            "state_dir": state, "peer.host": self.network.address(host), "peer.port": PORT, "peer.keys": self._keys,
            "peer.hold_ms": 0, **self._settings, **settings,
        }  # fmt: skip
        arguments = ["--capacity", "32MiB", "--transport", self._transport, "--http-port", "0"]
        for key, value in pairs.items():
            arguments += ["--set", f"{key}={value}"]
        for seed in (0, 1):
            arguments += ["--seed", f"{self.network.address(seed)}:{PORT}"]
        name = self.network.names[host]
        agent = HostedAgent(
            name,
            self.cluster.directory,
            f"h{host}-{len(self.cluster.agents)}",
            arguments,
            None,
            self.network.prefix(host),
        )
        self.cluster.agents.append(agent)
        self.agents[host] = agent
        self.stored[host] = []

    def ready(self, host: int) -> None:
        """Wait until it is up, and open a cache of it."""
        self.agent(host).ready()
        self.caches[host] = self.agent(host).open(self.layout)

    def start_all(self) -> None:
        """All of them at once."""
        for host in range(len(self.agents)):
            self.start(host)
        for host in range(len(self.agents)):
            self.ready(host)

    def agent(self, host: int) -> HostedAgent:
        """The agent that runs there."""
        agent = self.agents[host]
        assert agent is not None, f"nothing runs on host {host}"
        return agent

    def cache(self, host: int) -> Cache:
        """A cache of the agent that runs there."""
        cache = self.caches[host]
        assert cache is not None
        return cache

    def kill(self, host: int) -> None:
        """kill -9."""
        self.agent(host).end()
        self.agents[host] = self.caches[host] = None

    def leave(self, host: int) -> None:
        """SIGTERM."""
        agent = self.agent(host)
        self.agents[host] = self.caches[host] = None
        assert agent.terminate() == 0
        agent.end()

    def stop(self, host: int) -> None:
        """SIGSTOP."""
        self.agent(host).stop_tree()

    def go_on(self, host: int) -> None:
        """SIGCONT."""
        self.agent(host).continue_tree()

    def restart(self, host: int, **settings: object) -> None:
        """As a rolling upgrade does it."""
        self.leave(host)
        self.start(host, **settings)
        self.ready(host)

    def keys(self, *arguments: str) -> dict[str, Any]:
        """``p2pkv keys`` on the file that all of them watch; waits until they have read it."""
        command = [sys.executable, "-m", "p2pkv.cli", "keys", *arguments, "--file", str(self._keys), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        answer: dict[str, Any] = json.loads(done.stdout)
        ring = f"is now Keyring({', '.join(answer['installed'])})"
        for host in self.up:
            eventually(lambda h=host: ring in self.agent(h).log(), why=f"host {host} has read the keys")  # type: ignore[misc]
        return answer

    def wipe(self, host: int) -> None:
        """Killed, and back without what it knew of itself."""
        self.kill(host)
        shutil.rmtree(self.cluster.directory / f"state-{host}")
        self.start(host)
        self.ready(host)

    def put(self, host: int, blocks: int = 1) -> list[bytes]:
        """New blocks there; their keys."""
        keys = [secrets.token_bytes(16) for _ in range(blocks)]
        self.cache(host).put(keys, [bytes(BLOCK_BYTES)] * blocks)
        self.stored[host] += keys
        return keys

    # --- what is seen

    @property
    def up(self) -> list[int]:
        """Hosts whose agents run."""
        return [host for host, agent in enumerate(self.agents) if agent is not None]

    def others(self, host: int) -> dict[str, dict[str, Any]]:
        """What an agent says of the others, by node."""
        return {peer["node"]: peer for peer in self.agent(host).nodes()["peers"]}

    def right(self) -> bool:
        """Every agent shows exactly the others, each with exactly as many entries as it has blocks."""
        nodes = {self.agent(host).node: len(self.stored[host]) for host in self.up}
        for host in self.up:
            shown = {n: p["entries"] for n, p in self.others(host).items() if p["state"] == "alive"}
            expected = {n: count for n, count in nodes.items() if n != self.agent(host).node}
            if shown != expected:
                return False
        return True

    def all_right(self, deadline_s: float = 30.0) -> float:
        """Wait for that; every block is then found from everywhere. Returns the seconds that it took."""
        began = time.monotonic()
        eventually(self.right, deadline_s, why="every view is right")
        took = time.monotonic() - began
        for owner in self.up:
            for reader in self.up:
                keys = self.stored[owner][:64]
                assert self.cache(reader).match(keys).anywhere == len(keys)
        return took

    def hidden_everywhere(self, node: str, deadline_s: float = 20.0) -> float:
        """Wait until nobody shows a node; the seconds that it took."""
        began = time.monotonic()
        left = list(self.up)
        while left:
            left = [host for host in left if self.others(host).get(node, {}).get("state") == "alive"]
            assert time.monotonic() - began < deadline_s, f"{len(left)} agents still show it"
        return time.monotonic() - began

    def seen_everywhere(self, owner: int, keys: list[bytes], deadline_s: float = 10.0) -> float:
        """Wait until all others find these blocks; the seconds that it took."""
        began = time.monotonic()
        left = [host for host in self.up if host != owner]
        while left:
            left = [host for host in left if self.cache(host).match(keys).anywhere < len(keys)]
            assert time.monotonic() - began < deadline_s, f"{len(left)} agents do not find it"
        return time.monotonic() - began

    def counts(self, host: int) -> dict[str, float]:
        """Counters of an agent's gossip."""
        _, body = self.agent(host).http("/metrics")
        found = {}
        for line in body.decode().splitlines():
            if line.startswith("p2pkv_cell_events_total{"):
                name, _, value = line.partition("} ")
                found[name.partition('event="')[2].rstrip('"')] = float(value)
        return found

    def describe(self) -> str:
        """For a failed test."""
        return json.dumps({host: self.others(host) for host in self.up}, indent=1, default=str)
