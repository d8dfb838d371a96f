"""``p2pkv lookup``: ask a running agent who holds a prompt's prefix."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from typing import Annotated, Any, Final

import typer

from p2pkv.errors import AgentUnavailable, ConfigError, InvalidArgument

TIMEOUT_S: Final = 5.0
ANSWER_BYTES_MAX: Final = 64 << 20
REASON_BYTES_MAX: Final = 2_000


def lookup(
    model: Annotated[str, typer.Option(help="Model name as the engines serve it.")],
    tokens: Annotated[
        str | None, typer.Option(help="Token ids, separated by commas or spaces; - reads them from stdin.")
    ] = None,
    hashes: Annotated[
        str | None, typer.Option(help="Block hashes in hexadecimal, separated by commas or spaces; - for stdin.")
    ] = None,
    agent: Annotated[str, typer.Option(metavar="HOST:PORT", help="The agent's HTTP endpoint.")] = "127.0.0.1:7840",
    tenant: Annotated[str | None, typer.Option(help="Tenant of the cache.")] = None,
    lora: Annotated[str | None, typer.Option(help="LoRA adapter's name.")] = None,
    salt: Annotated[str | None, typer.Option(help="Cache salt of the request.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the agent's answer as it is.")] = False,
) -> None:
    """Show how much of a prompt each node holds, by one agent's own index (no network beyond that agent)."""
    body: dict[str, Any] = {"model": model, "tenant_id": tenant, "lora_name": lora, "cache_salt": salt}
    body |= question(tokens, hashes, hashes_as="seq_hashes")
    path = "/query" if tokens is not None else "/query_by_hash"
    answer, age_s = ask(f"http://{agent}{path}", body)
    if json_:
        print(json.dumps(answer))
        return
    if age_s is not None:
        print(f"note: some of this is from before the agent's start, up to {age_s} s old", file=sys.stderr)
    rows = [
        (tenant_name, instance, str(found["longest_matched"]), str(found["GPU"]), str(found["CPU"]), str(found["DISK"]))
        for tenant_name, instances in answer.items()
        for instance, found in sorted(instances.items(), key=lambda item: -item[1]["longest_matched"])
    ]
    if not rows:
        print("nobody holds the first block of this prompt")
        return
    table([("tenant", "node", "tokens", "in HBM", "in DRAM", "on disk"), *rows])


def question(tokens: str | None, hashes: str | None, *, hashes_as: str) -> dict[str, Any]:
    """What is asked about: the body's field, from the one of the two options that was given.

    Raises:
        ConfigError: both were given, or neither. InvalidArgument: a token id is no number.
    """
    if (tokens is None) == (hashes is None):
        raise ConfigError(
            "give either --tokens or --hashes",
            hint="For instance --tokens 1,2,3; - reads them from standard input.",
        )
    if tokens is None:
        return {hashes_as: words(hashes or "")}
    try:
        return {"token_ids": [int(word) for word in words(tokens)]}
    except ValueError as error:
        hint = "Give the tokenizer's numbers, not text, separated by commas or spaces."
        raise InvalidArgument("token ids are integers", reason=error, hint=hint) from error


def words(text: str) -> list[str]:
    """What an option holds, or, for ``-``, standard input."""
    if text == "-":
        text = sys.stdin.read()
    return text.replace(",", " ").split()


def ask(url: str, body: dict[str, Any]) -> tuple[Any, str | None]:
    """POST a body to an agent: the answer, and its Age header.

    Raises:
        InvalidArgument: the agent refuses. AgentUnavailable: none answers.
    """
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return json.loads(response.read(ANSWER_BYTES_MAX)), response.headers.get("age")
    except urllib.error.HTTPError as error:
        reason, hint = _told(error.read(REASON_BYTES_MAX))
        raise InvalidArgument("the agent refused the question", status=error.code, reason=reason, hint=hint) from error
    except (OSError, ValueError) as error:
        raise AgentUnavailable(
            "no agent answers", url=url, reason=error, hint="Is it running, with http.enabled, and is --agent right?"
        ) from error


def _told(body: bytes) -> tuple[str, str]:
    """An agent's refusal: what is wrong, and what to do about it. Of whoever else answers: its text."""
    try:
        told = json.loads(body)
        return str(told["error"]), str(told.get("hint") or "Correct what the reason names, and ask again.")
    except (ValueError, TypeError, KeyError):
        return body[:500].decode(errors="replace"), "Is --agent an agent's HTTP endpoint, of this version?"


def table(rows: list[tuple[str, ...]]) -> None:
    """Print rows, the first of which is the head, in columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
