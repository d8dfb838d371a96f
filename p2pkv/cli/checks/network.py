"""Where the agent would listen (two ports, and the Unix socket for engines), and what it proves to peers."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

from p2pkv.cli.checks.base import Check, Status
from p2pkv.config import Peer, is_loopback
from p2pkv.gossip import keyfile
from p2pkv.gossip.tls import Tls

SOCKET_PATH_BYTES_MAX: Final = 107
"""``sun_path`` holds 108 bytes with the final zero."""


def agent_answers(path: str) -> bool:
    """Whether something accepts connections on the Unix socket: most likely this host's running agent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def check_port(
    name: str, host: str, port: int, setting: str, *, running: bool = False, datagrams: bool = False
) -> Check:
    """The port can be bound. ``running``: an agent runs on this host, so that a port in use is no surprise.
    ``datagrams``: for UDP as well."""
    if port == 0:
        return Check(name, Status.OK, f"{host}: any free port")
    value = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
        if datagrams:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            if running:
                return Check(name, Status.OK, f"{value}: in use; an agent runs here")
            return Check(
                name,
                Status.FAIL,
                f"{value}: in use",
                f"Stop what listens there (ss -ltnp), or set {setting}; 0 = any free port.",
            )
        if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            host_setting = setting.replace(".port", ".host")
            return Check(
                name, Status.FAIL, f"{value}: not an address of this host", f"Set {host_setting} to one (ip address)."
            )
        return Check(name, Status.FAIL, f"{value}: {error.strerror}", f"Set {setting} to a port above 1023.")
    return Check(name, Status.OK, f"{value}: free")


def check_keys(peer: Peer) -> Check:
    """The cell's key can be read, and others cannot read it; P2PKVError says what is wrong with it."""
    name = "cell key"
    if not peer.keys:
        if is_loopback(peer.host):
            return Check(name, Status.OK, "none: the agent stays on loopback")
        return Check(name, Status.WARN, "none: whoever reaches the port can join", "p2pkv keys generate --file PATH")
    ring = keyfile.read(peer.keys)
    mode = Path(peer.keys).stat().st_mode
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        return Check(name, Status.WARN, f"{peer.keys}: mode {mode & 0o777:04o}", f"chmod 0600 {peer.keys}")
    return Check(name, Status.OK, f"{ring.in_use.id:08x} in use, {len(ring)} installed")


def check_certificates(peer: Peer) -> Check:
    """The certificates can be used; P2PKVError says what is wrong with them."""
    tls = Tls.from_settings(peer)
    return Check(
        "certificates", Status.OK, "none: TCP between agents is not encrypted" if tls is None else "mutual TLS"
    )


def check_socket_path(path: str, *, running: bool = False) -> Check:
    """The Unix socket can be made where it is configured, and by nobody else's leave."""
    name = "engine socket"
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        return Check(
            name,
            Status.FAIL,
            f"{path}: {len(os.fsencode(path))} bytes",
            f"At most {SOCKET_PATH_BYTES_MAX}: set engine.socket.",
        )
    if running:
        return Check(name, Status.OK, f"{path}: an agent answers")
    directory = Path(path).parent
    nearest = directory
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return Check(
            name,
            Status.FAIL,
            f"{nearest}: not writable",
            "Set engine.socket or P2PKV_SOCKET to a place that this user owns.",
        )
    facts = nearest.stat()
    if nearest == directory and facts.st_mode & stat.S_IWOTH and not facts.st_mode & stat.S_ISVTX:
        return Check(
            name,
            Status.WARN,
            f"{directory}: anybody may replace files there",
            f"chmod o-w {directory}, or set engine.socket.",
        )
    if Path(path).exists() and not stat.S_ISSOCK(Path(path).stat().st_mode):
        return Check(name, Status.FAIL, f"{path}: exists and is no socket", "Move it away, or set engine.socket.")
    left = "; a stale socket is there and will be replaced" if Path(path).exists() else ""
    return Check(name, Status.OK, path + left)
