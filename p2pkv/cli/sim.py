"""``p2pkv sim``: the protocol that ships, in a simulated cell. The simulating is :mod:`p2pkv.bench.sim`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from p2pkv.bench import sim as bench
from p2pkv.bench.sim_plot import svg
from p2pkv.cli.app import CONTEXT_SETTINGS
from p2pkv.cli.bench import finish
from p2pkv.errors import InvalidArgument

app = typer.Typer(
    help="Simulate a cell: visibility, deaths, partitions, restarts, chaos.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=CONTEXT_SETTINGS,
)


@app.command()
def sim(
    nodes: Annotated[int, typer.Option(help="Of the cell.")] = 1_000,
    loss: Annotated[float, typer.Option(help="Share of frames that are lost.")] = 0.1,
    latency_ms: Annotated[float, typer.Option("--latency", help="One way, ms.")] = 0.5,
    flush_ms: Annotated[float, typer.Option("--flush", help="How long changes wait for each other, ms.")] = 100.0,
    frames_per_s: Annotated[
        float, typer.Option(help="A node sends no more than about this: large cells flush and beat less often.")
    ] = 5_000.0,
    changes_per_s: Annotated[
        float, typer.Option("--changes", help="Ownership changes of each node per second.")
    ] = 780.0,
    load_s: Annotated[float, typer.Option("--load", help="Seconds of changes; 0: none.")] = 5.0,
    pair_seconds: Annotated[float, typer.Option(help="Watch for false marks for so many.")] = 0.0,
    stall: Annotated[str, typer.Option(metavar="NODES:SECONDS", help="While watching, so many stand still.")] = "",
    partition_s: Annotated[float, typer.Option("--partition", help="Half against half, for so many seconds.")] = 0.0,
    restarts: Annotated[int, typer.Option("--restart", help="Restarts of all nodes at once.")] = 0,
    chaos: Annotated[
        int, typer.Option(help="Instead: so many seeds of small cells with everything that can go wrong.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 1,
    replay: Annotated[Path | None, typer.Option(help="Run the scenario of a report that --json wrote.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write visibility and detection over time as SVG.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output instead of tables.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 when a claim does not hold.")] = False,
) -> None:
    """Simulate a cell: visibility, deaths, partitions, restarts, chaos."""
    if chaos:
        finish(bench.run_chaos(chaos, first=seed), json=json, check=check)
    if replay is not None:
        scenario = scenario_in(replay)
    else:
        stall_nodes, stall_s = stalls(stall)
        scenario = bench.Scenario(
            nodes=nodes, seed=seed, loss=loss, latency_ms=latency_ms, flush_ms=flush_ms, frames_per_s=frames_per_s,
            changes_per_s=changes_per_s, load_s=load_s, pair_seconds=pair_seconds, stall_nodes=stall_nodes,
            stall_s=stall_s, partition_s=partition_s, restarts=restarts,
        )  # fmt: skip
    outcome = bench.run(scenario)
    if plot is not None:
        title = f"{scenario.nodes} nodes, {scenario.loss:.0%} loss, seed {scenario.seed}"
        plot.write_text(svg(title, outcome.visible_ms, outcome.detection))
    finish(outcome.report, json=json, check=check)


def stalls(text: str) -> tuple[int, float]:
    """``50:16`` as nodes and seconds.

    Raises:
        InvalidArgument: it is something else.
    """
    if not text:
        return 0, 16.0
    nodes, _, seconds = text.partition(":")
    try:
        return int(nodes), float(seconds or 16)
    except ValueError:
        raise InvalidArgument("--stall is NODES:SECONDS", value=text, hint="For example 50:16.") from None


def scenario_in(path: Path) -> bench.Scenario:
    """The scenario that a report carries.

    Raises:
        InvalidArgument: there is none in it.
    """
    try:
        rows = msgspec.json.decode(path.read_bytes())["rows"]
        text = next(row["case"] for row in rows if row["case"].startswith("scenario "))
        return msgspec.json.decode(text.removeprefix("scenario "), type=bench.Scenario)
    except (OSError, msgspec.DecodeError, KeyError, TypeError, StopIteration) as error:
        hint = "Write one with `p2pkv sim --json`."
        raise InvalidArgument(
            "this is no report of a simulation", path=path, reason=str(error)[:200], hint=hint
        ) from error
