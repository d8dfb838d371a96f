"""``p2pkv doctor``: what works on this host, and what to do about what does not.

Reads only, starts no agent, needs no network. Exit code 0 when an agent with this configuration would start (warnings
included), 1 when it would not.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Final, TextIO

import msgspec
import typer

import p2pkv
from p2pkv.cli.checks import Check, Group, Status, host, memory, network, run_checks, transport
from p2pkv.config import Config, load
from p2pkv.store.memory import available_memory

MARKS: Final = {Status.OK: "ok", Status.WARN: "warn", Status.FAIL: "FAIL"}
COLOURS: Final = {Status.OK: "32", Status.WARN: "33", Status.FAIL: "31"}
NAME_WIDTH: Final = 15
LINE_MAX: Final = 140


def doctor(
    config: Annotated[
        Path | None, typer.Option(help="Configuration file to judge; default: $P2PKV_CONFIG, else none.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Say what works on this host, and what to do about what does not."""
    checks = examine(load(config))
    failed = any(check.status is Status.FAIL for check in checks)
    if json:
        report = {"version": p2pkv.__version__, "ok": not failed, "checks": checks}
        sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
    else:
        write_table(
            checks, sys.stdout, colour=wants_colour(sys.stdout), width=shutil.get_terminal_size((100, 24)).columns
        )
    raise typer.Exit(1 if failed else 0)


def examine(config: Config) -> list[Check]:
    """Every check, in the order of the report."""
    available = available_memory()
    arena = memory.arena_bytes(config.store, available)
    running = network.agent_answers(config.socket_path)
    http_port = (
        partial(network.check_port, "http port", config.http.host, config.http.port, "http.port", running=running)
        if config.http.enabled
        else partial(Check, "http port", Status.OK, "switched off")
    )
    return run_checks(
        [
            (Group.RUNTIME, "python", host.check_python),
            (Group.RUNTIME, "extensions", host.check_extensions),
            (Group.RUNTIME, "uvloop", host.check_uvloop),
            (Group.MEMORY, "arena", partial(memory.check_arena, config.store, available)),
            (Group.MEMORY, "memfd", memory.check_memfd),
            (Group.MEMORY, "memory lock", partial(memory.check_memory_lock, config.store, arena)),
            (Group.MEMORY, "huge pages", partial(memory.check_huge_pages, config.store, arena)),
            (Group.MEMORY, "shared memory", memory.check_dev_shm),
            (Group.HOST, "cpu", host.check_cpu),
            (Group.HOST, "clock", host.check_clock),
            (Group.HOST, "open files", partial(host.check_descriptors, config)),
            (Group.NETWORK, "engine socket", partial(network.check_socket_path, config.socket_path, running=running)),
            (
                Group.NETWORK,
                "peer port",
                partial(
                    network.check_port,
                    "peer port",
                    config.peer.host,
                    config.peer.port,
                    "peer.port",
                    running=running,
                    datagrams=True,
                ),
            ),
            (Group.NETWORK, "cell key", partial(network.check_keys, config.peer)),
            (Group.NETWORK, "certificates", partial(network.check_certificates, config.peer)),
            (Group.NETWORK, "http port", http_port),
            (Group.NETWORK, "kernel limits", host.check_kernel),
            (Group.TRANSPORT, "nixl", lambda: transport.check_nixl(config.transport, transport.probe_nixl())),
            (Group.TRANSPORT, "rdma", transport.check_rdma),
            (Group.TRANSPORT, "process memory", transport.check_process_memory),
        ]
    )


def wants_colour(stream: TextIO) -> bool:
    """Colour on a terminal only, and never where NO_COLOR is set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def write_table(checks: Sequence[Check], stream: TextIO, *, colour: bool, width: int) -> None:
    """Write the report: findings by group, a hint under each that has one, and a last line that sums up."""
    wrapped = textwrap.TextWrapper(width=max(40, min(width, LINE_MAX)), break_long_words=False, break_on_hyphens=False)
    margin = " " * (2 + 5 + NAME_WIDTH)
    for group in Group:
        members = [check for check in checks if check.group is group]
        if not members:
            continue
        stream.write(f"{_paint(group.value, '1', colour)}\n")
        for check in members:
            mark = _paint(f"{MARKS[check.status]:<5}", COLOURS[check.status], colour)
            wrapped.initial_indent = wrapped.subsequent_indent = margin
            lines = wrapped.wrap(check.value) or [margin]
            stream.write(f"  {mark}{check.name:<{NAME_WIDTH}}{lines[0].lstrip()}\n")
            for line in lines[1:]:
                stream.write(line + "\n")
            if check.hint:
                wrapped.initial_indent, wrapped.subsequent_indent = margin + "-> ", margin + "   "
                for line in wrapped.wrap(check.hint):
                    stream.write(_paint(line, "2", colour) + "\n")
    counts = {status: sum(check.status is status for check in checks) for status in Status}
    verdict = "An agent would not start." if counts[Status.FAIL] else "An agent would start."
    stream.write(
        f"\n{counts[Status.OK]} ok, {counts[Status.WARN]} warnings, {counts[Status.FAIL]} failures. {verdict}\n"
    )


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if colour else text
