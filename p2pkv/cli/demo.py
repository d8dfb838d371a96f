"""``p2pkv demo``: one prefix, two vLLM replicas."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer


def demo(
    replicas: Annotated[int, typer.Option(min=2, max=8, help="vLLM replicas, each with an agent.")] = 2,
    prompts: Annotated[int, typer.Option(min=1, max=64, help="Prompts, each with a prefix of its own.")] = 3,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prefix.")] = 4096,
    transport: Annotated[str, typer.Option(help="auto, tcp or nixl.")] = "auto",
    model: Annotated[Path, typer.Option(help="Where the small model is kept between runs.")] = Path(
        ".cache/demo-model"
    ),
    scale_out: Annotated[
        bool, typer.Option("--scale-out", help="At the end a node joins, and is warm before its first request.")
    ] = False,
    keep: Annotated[bool, typer.Option(help="Leave the cluster up afterwards, until Ctrl-C.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Send the same prompts cold to A, pulled to B, and recomputed on B without p2pkv; compare time and tokens.

    Exits 1 when anything is not as promised, 2 when something does not start.
    """
    from p2pkv.demo.cluster import Cluster
    from p2pkv.demo.report import Outcome, table
    from p2pkv.demo.run import run_demo, wait_for_interrupt

    started = time.monotonic()
    # However it is asked to end, and even where a shell started it in the background with SIGINT ignored: clean up.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {text}", file=sys.stderr, flush=True)

    def show(outcome: Outcome) -> None:
        if json_:
            print(msgspec.json.encode({**msgspec.to_builtins(outcome), "ok": outcome.ok}).decode(), flush=True)
        else:
            print(table(outcome), flush=True)

    def show_and_wait(cluster: Cluster, outcome: Outcome) -> None:
        show(outcome)
        wait_for_interrupt(cluster, say)

    outcome = run_demo(
        replicas=replicas,
        prompts=prompts,
        prompt_tokens=prompt_tokens,
        transport=transport,
        model_dir=model,
        progress=say,
        scale_out=scale_out,
        keep=show_and_wait if keep else None,
    )
    if not keep:
        show(outcome)
    if not outcome.ok:
        raise typer.Exit(1)
