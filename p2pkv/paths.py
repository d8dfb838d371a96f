"""Where an agent and its engines find each other, and where an agent keeps its state, unless they are told otherwise.

Apart from :mod:`p2pkv.config` because engines need the socket's path and none of the settings.
"""

from __future__ import annotations

import os


def default_socket_path() -> str:
    """Where an agent listens for engines by default: ``P2PKV_SOCKET``, else a per-user run-time directory."""
    if path := os.environ.get("P2PKV_SOCKET"):
        return path
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return f"{runtime}/p2pkv/agent.sock"
    if os.geteuid() == 0:
        return "/run/p2pkv/agent.sock"
    temporary = os.environ.get("TMPDIR", "/tmp")
    return f"{temporary}/p2pkv-{os.geteuid()}/agent.sock"


def default_state_dir() -> str:
    """Where an agent keeps its identity (node id and epoch) unless told otherwise."""
    if state := os.environ.get("XDG_STATE_HOME"):
        return f"{state}/p2pkv"
    if os.geteuid() == 0:
        return "/var/lib/p2pkv"
    return os.path.expanduser("~/.local/state/p2pkv")
