"""Hosts that are network namespaces of our own, on a bridge that is one too: nothing of the machine's is touched.

For benchmarks and tests; needs root.

    with Network(8) as network:
        network.loss(0.1)                  # of every packet that comes in, anywhere
        network.cut(0, 3)                  # host 3 hears nothing from host 0
        network.apart([0, 1], [2, 3])      # both ways, between all of them
        network.heal()
        network.rate(1, 1e9)               # bits per second that host 1 can send

Loss and cuts are nftables rules on INPUT; delay is not there (netem may be absent in a kernel). Namespaces carry their
maker's process id: what one that was killed has left behind, the next one removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from p2pkv.errors import P2PKVError

CLONE_NEWNET = 0x40000000  # linux/sched.h
NAMED = Path("/run/netns")
HINT = "Namespaces need root and iproute2; a link's rate, a kernel with the qdisc tbf (CONFIG_NET_SCH_TBF, sch_tbf)."
_libc = ctypes.CDLL(None, use_errno=True)


def missing(*, rates: bool = False) -> str:
    """What stands in the way of namespaces here, and with ``rates`` of :meth:`Network.rate`; empty: nothing."""
    if os.geteuid() != 0:
        return "not root"
    for program in ("ip", "nft", "tc"):
        if shutil.which(program) is None:
            return f"no {program}"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode != 0:
        return "the kernel gives no network namespaces"
    if rates:
        bucket = "tc qdisc add dev lo root tbf rate 1mbit burst 16384 limit 32768"  # a loopback device of its own
        if subprocess.run(["unshare", "--net", *bucket.split()], capture_output=True, check=False).returncode != 0:
            return "the kernel has no token bucket (qdisc tbf)"
    return ""


def left_behind(names: Iterable[str], proc: Path = Path("/proc")) -> list[str]:
    """Of these namespaces, those of a :class:`Network` whose process is gone."""
    found = []
    for name in names:
        tag, _, rest = name.partition("-")
        pid, _, host = rest.partition("-")
        ours = tag == "p2pkv" and pid.isdigit() and (host.isdigit() or host == "switch")
        if ours and not (proc / pid).exists():
            found.append(name)
    return sorted(found)


def run(*command: str) -> None:
    """Run a command; its words are in the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise P2PKVError("a command failed", command=" ".join(command), reason=done.stderr.strip(), hint=HINT)


def delete(name: str) -> None:
    """Remove a namespace, if it is there; processes that are in it keep it alive, without a name."""
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """This thread's new sockets belong to the namespace."""
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    there = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        _setns(there)
        yield
    finally:
        _setns(here)
        os.close(here)
        os.close(there)


def _setns(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET) != 0:
        raise P2PKVError("cannot change the network namespace", reason=os.strerror(ctypes.get_errno()))


class Network:
    """So many hosts, 10.77.0.1 and up. A context manager."""

    def __init__(self, hosts: int) -> None:
        self._tag = f"p2pkv-{os.getpid()}"
        self._switch = f"{self._tag}-switch"
        self.names = [f"{self._tag}-{i}" for i in range(hosts)]
        self._cuts: set[tuple[int, int]] = set()
        self._loss = 0.0

    def address(self, host: int) -> str:
        """Of a host."""
        return f"10.77.0.{host + 1}"

    def prefix(self, host: int) -> list[str]:
        """In front of a command that is to run on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def __enter__(self) -> Network:
        for name in left_behind(path.name for path in (NAMED.iterdir() if NAMED.is_dir() else ())):
            delete(name)
        try:
            run("ip", "netns", "add", self._switch)
            run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
            run("ip", "-n", self._switch, "link", "set", "bridge", "up")
            for host, name in enumerate(self.names):
                run("ip", "netns", "add", name)
                run(
                    "ip",
                    "-n",
                    self._switch,
                    "link",
                    "add",
                    f"port{host}",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    name,
                )
                run("ip", "-n", self._switch, "link", "set", f"port{host}", "master", "bridge", "up")
                run("ip", "-n", name, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
                run("ip", "-n", name, "link", "set", "eth0", "up")
                run("ip", "-n", name, "link", "set", "lo", "up")
            self._rules()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in (*self.names, self._switch):
            delete(name)

    def rate(self, host: int, bits_per_s: float | None) -> None:
        """What a host's link can send (token bucket); None: as much as it can. What is queued is kept short (20 ms)."""
        device = [*self.prefix(host), "tc", "qdisc"]
        if bits_per_s is None:
            run(*device, "del", "dev", "eth0", "root")
            return
        burst = max(16_384, int(bits_per_s / 8 / 1000))  # of a millisecond
        limit = burst + int(bits_per_s / 8 * 0.02)
        bucket = ["tbf", "rate", f"{int(bits_per_s)}bit", "burst", str(burst), "limit", str(limit)]
        run(*device, "replace", "dev", "eth0", "root", *bucket)

    def loss(self, share: float) -> None:
        """Of all packets that come in from other hosts."""
        self._loss = share
        self._rules()

    def cut(self, source: int, to: int) -> None:
        """One way: ``to`` hears nothing from ``source``."""
        self._cuts.add((source, to))
        self._rules([to])

    def apart(self, some: Iterable[int], others: Iterable[int]) -> None:
        """Both ways, between all of these and all of those."""
        others = list(others)
        for a in some:
            self._cuts |= {(a, b) for b in others} | {(b, a) for b in others}
        self._rules()

    def heal(self) -> None:
        """No cuts any more; loss stays."""
        self._cuts.clear()
        self._rules()

    def _rules(self, hosts: Iterable[int] | None = None) -> None:
        for host in range(len(self.names)) if hosts is None else hosts:
            lines = ["table inet test", "delete table inet test", "table inet test {", "chain input {"]
            lines.append("type filter hook input priority 0;")
            lines += [f"ip saddr {self.address(source)} drop;" for source, to in self._cuts if to == host]
            if self._loss:
                lines.append(f'iifname "eth0" numgen random mod 1000 < {int(self._loss * 1000)} drop;')
            lines += ["}", "}"]
            done = subprocess.run(
                [*self.prefix(host), "nft", "-f", "-"],
                input="\n".join(lines),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode != 0:
                raise P2PKVError("nft failed", reason=done.stderr.strip())
