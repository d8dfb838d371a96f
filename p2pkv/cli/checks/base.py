"""The words of a diagnosis: a check's answer, its status, and how checks are run without one stopping the rest."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from p2pkv.errors import P2PKVError


class Status(enum.StrEnum):
    """OK: nothing to do. WARN: works, but slower or in part. FAIL: an agent so configured does not start."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Group(enum.StrEnum):
    """Headings of the report, in its order."""

    RUNTIME = "runtime"
    MEMORY = "memory"
    HOST = "host"
    NETWORK = "network"
    TRANSPORT = "transport"


class Check(msgspec.Struct, frozen=True):
    """One finding. ``value`` is what was seen; ``hint`` says what to do and is empty when there is nothing to do."""

    name: str
    status: Status
    value: str
    hint: str = ""
    group: Group = Group.HOST


def run_checks(checks: Iterable[tuple[Group, str, Callable[[], Check]]]) -> list[Check]:
    """Run every check, in order. One that breaks is a failed check that says how, and never stops the others."""
    found = []
    for group, name, look in checks:
        try:
            check = look()
        except P2PKVError as error:
            check = Check(name, Status.FAIL, error.message, error.hint)
        except Exception as error:  # a doctor must not die of what it examines
            check = Check(
                name, Status.FAIL, f"{type(error).__name__}: {error}", "This check itself broke: please report it."
            )
        found.append(msgspec.structs.replace(check, group=group))
    return found


def read_text(path: Path) -> str | None:
    """A small file of ``/proc`` or ``/sys``, stripped; ``None`` when it is not there or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def read_int(path: Path) -> int | None:
    """The same as a number; ``None`` also when it is none (``max``, ``unlimited``)."""
    text = read_text(path)
    return int(text) if text is not None and text.lstrip("-").isdigit() else None


def size(count: int) -> str:
    """Bytes as a person reads them: ``1.5 GiB``."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if amount >= 10 or unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
