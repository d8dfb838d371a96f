"""Real agents, each in a process of its own, on loopback with ports that the system picks."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from p2pkv.bench.child import die_with_parent, environment, stop
from p2pkv.client import AgentClient, Cache
from p2pkv.errors import AgentUnavailable, DeadlineExceeded, P2PKVError
from p2pkv.types import Layout

START_S: Final = 60.0
VISIBLE_S: Final = 30.0
LOG_TAIL_LINES: Final = 8


class Ready(msgspec.Struct):
    """What an agent writes to ``--ready-fd``; other fields of it are of no interest here."""

    pid: int
    peer_port: int
    http_port: int
    transports: list[str]


class AgentProcess:
    """``p2pkv agent`` with an identity that lasts as long as it does. Started by :meth:`Fleet.start`."""

    def __init__(self, name: str, directory: Path, arguments: Sequence[str], prefix: Sequence[str] = ()) -> None:
        self.name = name
        self.host = "127.0.0.1"
        self.socket = str(directory / f"{name}.sock")
        self._log = directory / f"{name}.log"
        ours, theirs = os.pipe()
        command = [*prefix, sys.executable, "-m", "p2pkv.cli", "agent", "--socket", self.socket]
        command += ["--ready-fd", str(theirs)]
        try:
            with self._log.open("wb") as log:
                self.process = subprocess.Popen(
                    [*command, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=(theirs,),
                    env=environment(),
                    preexec_fn=die_with_parent,
                )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        try:
            self.ready = self._wait_ready(ours)
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(ours)

    def _wait_ready(self, descriptor: int) -> Ready:
        deadline = time.monotonic() + START_S
        data = b""
        while b"\n" not in data:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise DeadlineExceeded("an agent did not start in time", seconds=START_S, log=self._log_tail())
            part = os.read(descriptor, 4096)
            if not part:
                raise AgentUnavailable("an agent did not start", log=self._log_tail())
            data += part
        return msgspec.json.decode(data, type=Ready)

    def _log_tail(self) -> str:
        return " | ".join(self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    def kill(self) -> None:
        """SIGKILL, without waiting for it to be gone."""
        self.process.kill()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL if that does not do."""
        stop(self.process, number=signal.SIGTERM)

    def metrics(self) -> dict[str, float]:
        """Its Prometheus samples, by name with labels.

        Raises:
            AgentUnavailable: it does not answer.
        """
        url = f"http://127.0.0.1:{self.ready.http_port}/metrics"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                text = response.read().decode()
        except OSError as error:
            raise AgentUnavailable("an agent's metrics cannot be read", reason=error) from error
        samples = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}


class Fleet:
    """Agents of one cell and the clients connected to them. Made by :func:`fleet`."""

    def __init__(self, directory: Path, exits: contextlib.ExitStack) -> None:
        self._directory = directory
        self._exits = exits
        self._agents: list[AgentProcess] = []

    def start(
        self,
        name: str,
        *,
        capacity_bytes: int,
        transport: str,
        http: bool = False,
        settings: Mapping[str, str] = {},
        host: str = "127.0.0.1",
        prefix: Sequence[str] = (),
    ) -> AgentProcess:
        """Start one more agent; its seeds are those that were started before it and live.

        ``host``: where it listens for peers. ``prefix``: in front of its command, to run it on another host.

        Raises:
            AgentUnavailable, DeadlineExceeded: it did not come up; the end of its log says why.
        """
        seeds = [f"{agent.host}:{agent.ready.peer_port}" for agent in self._agents if agent.process.poll() is None]
        merged = {"state_dir": ":memory:", "http.enabled": "true" if http else "false"}
        if host != "127.0.0.1":
            merged |= {"peer.host": host, "peer.insecure": "true"}
        merged |= settings
        arguments = [
            "--capacity",
            str(capacity_bytes),
            "--peer-port",
            "0",
            "--http-port",
            "0",
            "--transport",
            transport,
        ]
        for seed in seeds:
            arguments += ["--seed", seed]
        for key, value in merged.items():
            arguments += ["--set", f"{key}={value}"]
        agent = AgentProcess(name, self._directory, arguments, prefix)
        agent.host = host
        self._exits.callback(agent.stop)
        self._agents.append(agent)
        return agent

    def open(self, agent: AgentProcess, layout: Layout) -> tuple[AgentClient, Cache]:
        """A client of an agent, and a cache of it."""
        client = self._exits.enter_context(AgentClient(agent.socket, name="p2pkv bench"))
        return client, client.open(layout)


@contextlib.contextmanager
def fleet() -> Iterator[Fleet]:
    """A place for agents; they and their files are gone afterwards."""
    with contextlib.ExitStack() as exits:
        directory = Path(exits.enter_context(tempfile.TemporaryDirectory(prefix="p2pkv-bench-")))
        yield Fleet(directory, exits)


def layout_of(block_bytes: int, name: str = "bench") -> Layout:
    """A layout of blocks of so many bytes."""
    return Layout(model=name, revision="0", kv_dtype="uint8", block_tokens=256, block_bytes=block_bytes, engine="bench")


def wait_until(what: str, condition: Callable[[], bool], timeout_s: float = VISIBLE_S) -> None:
    """Look every 10 ms until something that other processes do has happened.

    Raises:
        DeadlineExceeded: it has not.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"waited in vain: {what}", seconds=timeout_s)
        time.sleep(0.01)


def put_all(cache: Cache, keys: Sequence[bytes], blocks: Sequence[bytes]) -> None:
    """Put blocks, all of them.

    Raises:
        P2PKVError: some did not go in.
    """
    stored = cache.put(keys, blocks, deadline_ms=30_000)
    if not all(stored):
        raise P2PKVError("blocks could not be put", stored=sum(stored), of=len(stored))


def wait_remote(cache: Cache, keys: Sequence[bytes]) -> None:
    """Wait until a reader's agent knows a peer that holds each of these."""
    wait_until(
        "the owner's blocks to be known at the reader",
        lambda: all(present is not None for present in cache.match(keys).present),
    )
