"""``p2pkv bench``: measure what this project promises, on this machine. The measuring is :mod:`p2pkv.bench`'s."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from p2pkv.bench.report import Report, write_tables
from p2pkv.cli.app import CONTEXT_SETTINGS

app = typer.Typer(
    help="Measure against memcpy and raw sockets, in the same run.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT_SETTINGS,
)

Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output instead of tables.")]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer samples: for CI, and to see that it works.")]
Check = Annotated[bool, typer.Option("--check", help="Exit with 1 when a claim does not hold.")]


def finish(report: Report, *, json: bool, check: bool) -> None:
    """Print a report and end."""
    if json:
        print(report.to_json())
    else:
        write_tables(report, sys.stdout)
    raise typer.Exit(1 if check and not report.ok else 0)


@contextlib.contextmanager
def cleaning_up() -> Iterator[None]:
    """SIGTERM is an interrupt meanwhile, as SIGINT is, even where a shell started this in the background with SIGINT
    ignored: engines that stand still and hosts made of namespaces are not to be left behind."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            if handler is not None:  # it was not Python's
                signal.signal(number, handler)


@app.command()
def fetch(
    transport: Annotated[str, typer.Option(help="tcp, nixl or tcp,nixl; default: what is installed.")] = "",
    rival: Annotated[str, typer.Option(help="mooncake, kvcr or mooncake,kvcr: beside these too (make rivals).")] = "",
    quick: Quick = False,
    json: Json = False,
    check: Check = False,
) -> None:
    """A get from a peer, beside memcpy, raw TCP and raw NIXL of the same bytes."""
    from p2pkv.bench import fetch as bench

    finish(bench.run(transports=_names(transport), rival=_names(rival), quick=quick), json=json, check=check)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@app.command()
def failover(
    transport: Annotated[
        str, typer.Option(help="tcp or nixl (as shipped: small gets on one host come over tcp).")
    ] = "tcp",
    quick: Quick = False,
    json: Json = False,
    check: Check = False,
) -> None:
    """Local gets while a peer is killed, and the first get of what only the dead peer had."""
    from p2pkv.bench import failover as bench

    finish(bench.run(quick=quick, transport=transport), json=json, check=check)


@app.command()
def stress(
    reads: Annotated[
        int | None, typer.Option(min=1, help="Blocks to read; default: a million, quick: 100,000.")
    ] = None,
    transport: Annotated[
        str, typer.Option(help="tcp, nixl, or memory: gets out of the owner's, loads over nixl.")
    ] = "tcp",
    quick: Quick = False,
    json: Json = False,
    check: Check = False,
) -> None:
    """4 KiB reads from a peer that keeps evicting and reusing slots, and is stopped and killed: not one wrong block."""
    from p2pkv.bench import stress as bench

    count = reads or (bench.READS_QUICK if quick else bench.READS)
    finish(bench.run(reads=count, transport=transport), json=json, check=check)


@app.command()
def idle(quick: Quick = False, json: Json = False, check: Check = False) -> None:
    """CPU time of agents that have nothing to do."""
    from p2pkv.bench import idle as bench

    finish(bench.run(quick=quick), json=json, check=check)


@app.command()
def index(
    rival: Annotated[str, typer.Option(help="dynamo: beside its radix tree too (pip install ai-dynamo-runtime).")] = "",
    quick: Quick = False,
    json: Json = False,
    check: Check = False,
) -> None:
    """The prefix index: lookups, stores and memory of a hundred nodes, beside a dict and the reference."""
    from p2pkv.bench import index as bench

    finish(bench.run(quick=quick, rival=rival), json=json, check=check)


@app.command()
def gossip(quick: Quick = False, json: Json = False, check: Check = False) -> None:
    """What the news of a thousand-node cell costs one agent, with real sockets and seals."""
    from p2pkv.bench import gossip as bench

    finish(bench.run(quick=quick), json=json, check=check)


@app.command()
def faults(quick: Quick = False, json: Json = False, check: Check = False) -> None:
    """A long prefix from four holders behind 1 Gb/s links, and what a bad one among them costs (needs root)."""
    from p2pkv.bench import faults as bench

    with cleaning_up():
        measured = bench.run(quick=quick)
    finish(measured, json=json, check=check)


@app.command()
def ttft(
    model: Annotated[Path, typer.Option(help="Where the small model is kept between runs.")] = Path(
        ".cache/demo-model"
    ),
    quick: Quick = False,
    json: Json = False,
    check: Check = False,
) -> None:
    """Real vLLM, with p2pkv and without: prompt lengths against link speeds (needs `make vllm`, and root)."""
    from p2pkv.bench import ttft as bench
    from p2pkv.bench.progress import Progress
    from p2pkv.demo.ttft import throttled

    progress = Progress()
    with cleaning_up(), throttled(model_dir=model, progress=progress.say) as scene:
        measured = bench.run(scene, quick=quick, progress=progress)
    finish(measured, json=json, check=check)


@app.command()
def busy(
    transport: Annotated[str, typer.Option(help="auto, tcp or nixl.")] = "auto",
    model: Annotated[Path, typer.Option(help="Where the small model is kept between runs.")] = Path(
        ".cache/demo-model"
    ),
    quick: Quick = False,
    json: Json = False,
    check: Check = False,
) -> None:
    """Pulls from beside a vLLM engine that is idle, inside a long prefill, stopped, dead (needs `make vllm`)."""
    from p2pkv.bench import busy as bench
    from p2pkv.bench.progress import Progress
    from p2pkv.demo.busy import busy_source

    progress = Progress()
    with (
        cleaning_up(),
        busy_source(
            transport=transport, prompt_tokens=bench.PROMPT_TOKENS, model_dir=model, progress=progress.say
        ) as scene,
    ):
        measured = bench.run(scene, quick=quick, progress=progress)
    finish(measured, json=json, check=check)
