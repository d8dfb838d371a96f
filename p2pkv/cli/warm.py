"""``p2pkv warm``: fill a cold agent with what its peers used last, ahead of its traffic."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Final

import typer

from p2pkv.client.client import AgentClient
from p2pkv.client.messages import Warming
from p2pkv.config import parse_size
from p2pkv.errors import ConfigError

LOOK_S: Final = 0.2


def warm(
    from_peers: Annotated[bool, typer.Option("--from-peers", help="From other agents' memory.")] = False,
    top: Annotated[str, typer.Option(metavar="SIZE", help="How much: 10GiB, say.")] = "",
    within: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, max=86_400, help="Give up after that.")] = 600.0,
    wait: Annotated[bool, typer.Option(help="Wait until it is done, and show how it goes.")] = True,
    stop: Annotated[bool, typer.Option("--stop", help="End a warm-up that is running.")] = False,
    socket: Annotated[str | None, typer.Option(metavar="PATH", help="The agent's Unix socket.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Have this node's agent pull what its peers used last, into memory that is free, behind all live traffic.

    Without --from-peers it only tells how the last warm-up went. Ctrl-C leaves a warm-up running. Exits 1 when it was
    stopped or its time was over before it was done; that peers have nothing is no error.
    """
    if from_peers and not top:
        raise ConfigError("how much is missing", hint="Say --top 10GiB, for instance.")
    if top and not from_peers:
        raise ConfigError("where from is missing", hint="Say --from-peers.")
    if stop and from_peers:
        raise ConfigError(
            "--from-peers begins a warm-up, and --stop ends one", hint="Give one of the two; --stop takes no --top."
        )
    size = parse_size(top, key="--top") if top else 0
    if from_peers and size <= 0:
        raise ConfigError("--top must be more than nothing", top=top, hint="Say --top 10GiB, for instance.")
    with AgentClient(socket, name="p2pkv warm") as client:
        state = client.warm(size, within_ms=int(within * 1000), stop=stop)
        shown = 0.0
        while wait and state.running:
            time.sleep(LOOK_S)
            state = client.warm()
            if time.monotonic() - shown > 1.0 and state.running:
                shown = time.monotonic()
                print(_line(state), file=sys.stderr)
    if json_:
        print(json.dumps(state._asdict()))
    else:
        print(_line(state))
    if from_peers and wait and not state.complete:
        raise typer.Exit(1)


def _line(state: Warming) -> str:
    gib = 1 << 30
    rate = state.bytes_pulled / max(1, state.took_ms) / 1e6
    said = (
        f"{state.seen_bytes / gib:.2f} of {state.top_bytes / gib:.2f} GiB of {state.peers} peers: "
        f"{state.blocks_pulled} blocks pulled, {state.blocks_here} were here, {state.blocks_failed} did not come; "
        f"{state.bytes_pulled / gib:.2f} GiB in {state.took_ms / 1000:.1f} s ({rate:.2f} GB/s)"
    )
    return said if state.running or not state.why else f"{said}: {state.why}"
