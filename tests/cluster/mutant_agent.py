"""``p2pkv agent`` with a guard taken out, to show that the tests that rely on the guard would notice.

    python mutant_agent.py no-hold,no-check --socket ...

``no-hold``: a lease does not keep its blocks in their slots. ``no-check``: blocks that fail their checksum are taken.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from p2pkv.cli import main
from p2pkv.store.dram import DramStore
from p2pkv.transport.base import PullRequest, PullResult
from p2pkv.transport.nixl import NixlTransport
from p2pkv.transport.tcp import TcpTransport
from p2pkv.types import Status


def no_hold() -> None:
    """The one question that every eviction asks is always answered with no."""
    made = DramStore.__init__

    def make(store: DramStore, *args: Any, **options: Any) -> None:
        made(store, *args, **options)
        store.core.ignore_leases_for_tests(True)

    DramStore.__init__ = make  # type: ignore[method-assign]


def no_check() -> None:
    """What was rejected counts as good, in the reports and in the result; no pull goes the short way, whose check is
    native code (``test_short_way.py`` has the test that would notice if that were gone)."""
    os.environ["P2PKV_ENGINE_SHORT_WAY"] = "false"
    for transport in (TcpTransport, NixlTransport):
        original = transport.pull

        async def pull(
            self: TcpTransport | NixlTransport,
            request: PullRequest,
            original: Callable[..., object] = original,
        ) -> PullResult:
            def on_block(index: int, status: Status, checksum: bytes) -> None:
                request.on_block(index, Status.OK if status is Status.REJECTED else status, checksum)

            result = await original(self, request._replace(on_block=on_block))  # type: ignore[misc]
            assert isinstance(result, PullResult)
            return result._replace(
                statuses=[Status.OK if status is Status.REJECTED else status for status in result.statuses]
            )

        transport.pull = pull  # type: ignore[method-assign, assignment]


MUTATIONS = {"no-hold": no_hold, "no-check": no_check}

if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        MUTATIONS[name]()
    main(["agent", *sys.argv[2:]])
