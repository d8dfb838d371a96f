"""Others' systems beside ours, for ``--rival``: each in processes of its own, and asked in turn with everything else.

A rival is a file ``rival_NAME.py``, which is its processes' program too, and an entry of :data:`RIVALS`. Its wheel is
imported in its processes only, and nothing else of the project needs it: ``make rivals`` installs the versions that
this was written for. What a rival's program says and is asked is in :mod:`p2pkv.bench.rival_child`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Final, NamedTuple, Protocol

from p2pkv.bench import rival_kvcr, rival_mooncake
from p2pkv.bench.child import Child
from p2pkv.bench.rival_child import Shape, first_line
from p2pkv.errors import InvalidArgument, Unavailable

HINT: Final = "`make rivals`, or `pip install --no-deps -r requirements/rivals.txt` beside p2pkv."


class Rival(Protocol):
    """A holder with a ring of blocks and a reader without any, started, connected, and through the ring once."""

    def read(self, blocks: int) -> float | None:
        """Get the next blocks of the ring; seconds from the call to its result, or None where one did not come.

        Raises:
            IntegrityError: other bytes came. Unavailable, DeadlineExceeded: a process of the rival is gone, or stuck.
        """

    def __enter__(self) -> Rival: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


class Offer(NamedTuple):
    """``package``: what is imported. ``call``: what is timed. ``transport``: beside which of ours it is measured.

    ``needs``: a hint where its wheel is installed and does not run. ``faster``: the cases of which an issue says that
    ours is the faster one.
    """

    package: str
    call: str
    transport: str
    start: Callable[[Shape], Rival]
    needs: str
    faster: tuple[str, ...] = ()


RIVALS: Final[Mapping[str, Offer]] = {
    "mooncake": Offer(
        package="mooncake",
        call="Mooncake Store's get_into",
        transport="tcp",
        start=rival_mooncake.Mooncake,
        needs=rival_mooncake.NEEDS,
        faster=("256KiB", "1MiB", "4MiB"),
    ),
    "kvcr": Offer(
        package="kvcr",
        call="KVCR's deliver",
        transport="nixl",
        start=rival_kvcr.Kvcr,
        needs=rival_kvcr.NEEDS,
    ),
}


def choose(rivals: Sequence[str], transports: Sequence[str]) -> Sequence[str]:
    """The rivals to measure, each seen to run here.

    Raises:
        InvalidArgument: no such rival, or the transport beside which it is measured is not.
        Unavailable: it is not installed, or its wheel cannot be loaded on this host.
    """
    for name in rivals:
        if name not in RIVALS:
            raise InvalidArgument("unknown rival", rival=name, hint=f"There are {', '.join(RIVALS)}.")
        offer = RIVALS[name]
        if importlib.util.find_spec(offer.package) is None:
            raise Unavailable("the rival is not installed", rival=name, hint=HINT)
        if offer.transport not in transports:
            hint = f"It is measured beside {offer.transport}: --transport {offer.transport}."
            raise InvalidArgument("the rival's transport is not measured", rival=name, hint=hint)
        with Child(f"rival_{name}", "probe") as child:
            first_line(name, child, offer.needs)
    return tuple(dict.fromkeys(rivals))


def version(name: str) -> str:
    """The wheel that is measured, and its version."""
    package = RIVALS[name].package
    found = importlib.metadata.packages_distributions().get(package, [package])
    return f"{found[0]} {importlib.metadata.version(found[0])}"
