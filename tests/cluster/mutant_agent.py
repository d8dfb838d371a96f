"""``p2pkv agent`` with a guard taken out, to show that the tests that rely on the guard would notice.

    python mutant_agent.py no-hold,no-check --socket ...

``no-hold``: a lease does not keep its blocks in their slots. ``no-check``: blocks that fail their checksum are taken.

``small-parts``: no guard; engines are told of what comes in as small parts as on a host of many processors.

Owners that lie about leases over NIXL. ``boast``: every lease is said to last an hour, and to have held when it is
given back. ``wrong-places``: each block is said to lie where another one does. ``no-places``: beyond the arena.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from p2pkv.agent import daemon, transports
from p2pkv.cli import main
from p2pkv.store.dram import DramStore
from p2pkv.transport.base import PullRequest, PullResult
from p2pkv.transport.movers import MANY_PROCESSORS_PARTS
from p2pkv.transport.nixl import NixlTransport
from p2pkv.transport.tcp import TcpTransport
from p2pkv.types import Status
from p2pkv.wire.fields import Extent
from p2pkv.wire.peer import Pin, Pinned, Release, Released


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


def lie(change: Callable[[Pinned], Pinned]) -> None:
    """What an owner says about a lease is changed before it is sent."""
    pin, release = NixlTransport._on_pin, NixlTransport._on_release

    def on_pin(self: NixlTransport, asker: Any, asked: Pin) -> Pinned:
        return change(pin(self, asker, asked))

    def on_release(self: NixlTransport, asker: Any, asked: Release) -> Released:
        release(self, asker, asked)
        return Released(True)

    NixlTransport._on_pin = on_pin  # type: ignore[method-assign, assignment]
    NixlTransport._on_release = on_release  # type: ignore[method-assign, assignment]


def moved(pinned: Pinned, by: int) -> Pinned:
    """Each block where the next one is (``by`` 0), or so many bytes further on."""
    places = pinned.extents
    elsewhere = [Extent(e.offset + by, e.length) for e in places] if by else [*places[1:], *places[:1]]
    return replace(pinned, extents=elsewhere)


def small_parts() -> None:
    for module in (daemon, transports):
        module.parts_here = lambda: MANY_PROCESSORS_PARTS  # type: ignore[assignment]


MUTATIONS: dict[str, Callable[[], None]] = {
    "no-hold": no_hold,
    "no-check": no_check,
    "small-parts": small_parts,
    "boast": lambda: lie(lambda pinned: replace(pinned, ttl_ms=3_600_000)),
    "wrong-places": lambda: lie(lambda pinned: moved(pinned, 0)),
    "no-places": lambda: lie(lambda pinned: moved(pinned, 1 << 40)),
}

if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        MUTATIONS[name]()
    main(["agent", *sys.argv[2:]])
