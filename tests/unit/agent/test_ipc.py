"""The engines' door when the process is out of descriptors. (The rest of it: tests/cluster.)"""

from __future__ import annotations

import asyncio
import errno
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest

from p2pkv.agent.ipc import ACCEPT_PAUSE_S, EngineServer


async def test_after_a_failed_accept_there_is_a_pause_and_then_another_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listener stays readable: without the pause the loop would do nothing else, and fill the log."""
    loop = asyncio.get_running_loop()
    tries: list[float] = []
    third = asyncio.Event()

    def accept(_: socket.socket) -> tuple[socket.socket, Any]:
        tries.append(loop.time())
        if len(tries) == 3:
            third.set()
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", accept)
    server = EngineServer(
        cast(Any, None), path=str(tmp_path / "s"), epoch=1, connections_max=1, in_flight_max=1, regions_max=1,
        lane=cast(Any, None),
    )  # fmt: skip
    await server.start()
    with socket.socket(socket.AF_UNIX) as engine:
        engine.connect(server.path)
        await asyncio.wait_for(third.wait(), 60.0)
    await server.stop()
    assert [later - earlier > 0.8 * ACCEPT_PAUSE_S for earlier, later in pairwise(tries)] == [
        True, True,
    ]  # fmt: skip
