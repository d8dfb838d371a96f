"""The transports that tests of whole agents run over."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

HAVE_NIXL = any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13"))
_marks = [
    pytest.mark.nixl,
    pytest.mark.skipif(not HAVE_NIXL, reason="NIXL IS NOT INSTALLED (make nixl): this is not tested over it"),
]

TCP = "tcp"
NIXL = pytest.param("nixl", marks=_marks)
NIXL_TCP = pytest.param("nixl-tcp", marks=_marks)
"""NIXL made to use its TCP: the owner's process takes part in every read, as it does in none between processes of one
host that may copy straight out of each other's memory."""


def options(kind: str, **settings: object) -> dict[str, Any]:
    """Options of :meth:`Cluster.start` for a transport."""
    if kind != "tcp":
        # Small blocks, too, and none out of the other's memory: NIXL is what is tested.
        settings = {"transport.one_sided_min": "0", "transport.neighbour_max": "0", **settings}
    if kind == "nixl-tcp":
        settings |= {"transport.nixl_tls": "tcp", "transport.nixl_devices": "lo"}
    return {"transport": kind.partition("-")[0], "settings": settings}
