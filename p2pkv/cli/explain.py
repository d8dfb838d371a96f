"""``p2pkv explain``: how an agent would get a prompt's blocks, how far that pays, and why."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from p2pkv.cli.lookup import ask, question, table


def explain(
    model: Annotated[str, typer.Option(help="Model name as the engines serve it.")],
    tokens: Annotated[
        str | None, typer.Option(help="Token ids, separated by commas or spaces; - reads them from stdin.")
    ] = None,
    hashes: Annotated[
        str | None, typer.Option(help="Block hashes in hexadecimal, separated by commas or spaces; - for stdin.")
    ] = None,
    agent: Annotated[str, typer.Option(metavar="HOST:PORT", help="The agent's HTTP endpoint.")] = "127.0.0.1:7840",
    prefill_ms: Annotated[
        float | None,
        typer.Option(
            min=0.001, max=1e9, help="What computing one block takes; default: what an engine there has said last."
        ),
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant of the cache.")] = None,
    lora: Annotated[str | None, typer.Option(help="LoRA adapter's name.")] = None,
    salt: Annotated[str | None, typer.Option(help="Cache salt of the request.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the agent's answer as it is.")] = False,
) -> None:
    """Show from where an agent would get a prompt's blocks now, how far, and why. Nothing is pulled for it."""
    body: dict[str, Any] = {"model": model, "tenant_id": tenant, "lora_name": lora, "cache_salt": salt}
    body["prefill_ms"] = prefill_ms
    body |= question(tokens, hashes, hashes_as="hashes")
    plans, _ = ask(f"http://{agent}/v1/plan", body)
    if json_:
        print(json.dumps(plans))
        return
    if not plans:
        print("no engine of this cell keeps a cache of this model")
    for plan in plans:
        _show(plan)


def _show(plan: dict[str, Any]) -> None:
    size = plan["block_bytes"] / (1 << 20)
    print(f"namespace {plan['namespace']}: {plan['blocks']} blocks of {plan['block_tokens']} tokens, {size:.3g} MiB")
    said = f"get {plan['stop']} of them, in {plan['pull_ms']:.3g} ms"
    if plan["without_ms"] is not None:
        said += f", and compute the rest in {plan['rest_ms']:.3g} ms; computing all: {plan['without_ms']:.3g} ms"
    print(f"{said}\nno further: {plan['why']}")
    runs = [
        (
            _name(run),
            run["tier"],
            str(run["first"]),
            str(run["blocks"]),
            f"{run['ends_ms']:.3g}",
        )
        for run in plan["runs"]
    ]
    if runs:
        table([("from", "tier", "first block", "blocks", "here after ms"), *runs])
    sources = [
        (
            source["node"],
            source["tier"],
            str(source["blocks"]),
            f"{source['bytes_per_s'] / 1e6:.4g}",
            f"{source['first_byte_ms']:.3g}",
            f"{source['busy_ms']:.3g}",
            f"{source['setup_ms']:.3g}",
            f"{100 * source['spread']:.0f} %",
            f"{100 * source['failing']:.0f} %",
            "never" if source["age_s"] is None else f"{source['age_s']:.0f} s ago",
            "yes" if source["answers"] else "NO",
        )
        for source in plan["sources"]
    ]
    if sources:
        expected = ("MB/s", "first byte ms", "busy ms", "connecting ms", "unsure", "failing")
        table([("source", "tier", "blocks", *expected, "last pulled from", "answers"), *sources])


def _name(run: dict[str, Any]) -> str:
    return f"{run['node']} (itself)" if run["self"] else str(run["node"])
