"""The ``p2pkv`` command: one lazily loaded module per subcommand.

``p2pkv.cli.<name>`` is imported when that subcommand runs or asks for its own help, never for ``p2pkv --help``. Such
a module holds either ``app`` (a :class:`typer.Typer`: one command, or a group) or a function named like the module,
whose annotations and docstring are the command. It ends with ``raise typer.Exit(code)`` for a code other than 0, and
raises :class:`~p2pkv.errors.P2PKVError` for what the user can fix: :func:`main` prints that as ``error:`` and ``hint:``
lines on standard error (as one JSON object where the command line has ``--json``) and exits 2.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from p2pkv.errors import P2PKVError

COMMANDS: Final[dict[str, str]] = {
    "agent": "Run this node's agent.",
    "lookup": "Ask an agent who holds a prefix.",
    "explain": "Say how an agent would get a prefix, how far, and why.",
    "warm": "Fill a cold agent with what its peers used last.",
    "doctor": "Say what works on this host, and what to do about what does not.",
    "bench": "Measure against memcpy and raw sockets, in the same run.",
    "keys": "Make and rotate the keys of a cell.",
    "sim": "Simulate a cell: visibility, deaths, partitions, restarts, chaos.",
    "demo": "One prefix, two vLLM replicas: cold, pulled, recomputed.",
}
"""Subcommands in the order that help shows them, each with its line there. The module is ``p2pkv.cli.<name>``."""

EXIT_ERROR: Final = 2
EXIT_INTERRUPTED: Final = 130


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit. ``argv`` leaves out the program's name; ``None`` = the process's own."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    from p2pkv.cli.app import command

    try:
        command().main(args=arguments, prog_name="p2pkv")
    except P2PKVError as error:
        report(error, as_json="--json" in arguments)
        raise SystemExit(EXIT_ERROR) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None
    raise SystemExit(0)


def report(error: P2PKVError, *, as_json: bool) -> None:
    """Tell the user about an error on standard error: what went wrong, and what to do about it."""
    if as_json:
        import json

        body = {
            "type": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
            "context": {name: str(value) for name, value in error.context.items()},
        }
        print(json.dumps({"error": body}), file=sys.stderr)
        return
    context = ", ".join(f"{name}={value}" for name, value in error.context.items())
    print(f"error: {error.message}" + (f" ({context})" if context else ""), file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
