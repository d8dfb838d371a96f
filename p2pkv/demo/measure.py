"""Questions to replicas and agents over HTTP: a completion and its time to first token, counters, what is visible."""

from __future__ import annotations

import http.client
import json
import random
import re
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any, Final

from p2pkv.demo.processes import ProcessFailed

REQUEST_S: Final = 300.0
_SAMPLE: Final = re.compile(r"^([a-zA-Z_:][\w:]*)(\{[^}]*\})? ([0-9.eE+-]+|NaN)$")


@dataclass(frozen=True)
class Completion:
    """One answer: time to first token and in all (seconds), token ids, prompt tokens that came from a cache."""

    ttft_s: float
    total_s: float
    tokens: list[int]
    cached_tokens: int
    prompt_tokens: int


def prompt_of(seed: int, tokens: int) -> list[int]:
    """A random prompt of so many token ids."""
    rng = random.Random(seed)
    return [rng.randrange(3, 1000) for _ in range(tokens)]


def complete(url: str, prompt: list[int], *, max_tokens: int = 16, salt: str | None = None) -> Completion:
    """Ask a replica, streaming, at temperature 0."""
    body: dict[str, Any] = {
        "model": "demo",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if salt is not None:
        body["cache_salt"] = salt
    address = urllib.parse.urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=REQUEST_S)
    started = time.perf_counter()
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise ProcessFailed(f"the replica answered {response.status}: {response.read(2000)!r}")
        first: float | None = None
        tokens: list[int] = []
        usage: dict[str, Any] = {}
        for line in response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            event = json.loads(line[6:])
            for choice in event.get("choices", []):
                new = choice.get("token_ids") or []
                if new and first is None:
                    first = time.perf_counter()
                tokens += new
                if choice.get("finish_reason") == "error":
                    raise ProcessFailed("the replica ended the answer with an error")
            usage = event.get("usage") or usage
    finally:
        connection.close()
    if first is None:
        raise ProcessFailed("the replica gave no token")
    details = usage.get("prompt_tokens_details") or {}
    return Completion(
        first - started,
        time.perf_counter() - started,
        tokens,
        int(details.get("cached_tokens") or 0),
        int(usage.get("prompt_tokens") or 0),
    )


def scrape(url: str) -> dict[str, float]:
    """Every sample of a Prometheus endpoint, by name and labels as they are printed."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10.0) as response:
        text = response.read().decode()
    samples = {}
    for line in text.splitlines():
        if match := _SAMPLE.match(line):
            samples[match[1] + (match[2] or "")] = float(match[3])
    return samples


def total(samples: dict[str, float], name: str, **labels: str) -> float:
    """Sum of a metric's samples that have these labels."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        value
        for sample, value in samples.items()
        if sample.split("{")[0] == name and all(label in sample for label in wanted)
    )


def ask_agent(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """GET, or POST a body, and decode the JSON that comes back."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10.0) as response:
        return json.loads(response.read())


def wait_visible(agent_url: str, model: str, prompt: list[int], tokens: int, timeout_s: float = 30.0) -> float:
    """Wait until an agent's index says that somebody holds so many tokens of the prompt; returns how long it took.

    Raises:
        ProcessFailed: it did not happen in time.
    """
    started = time.monotonic()
    while True:
        answer = ask_agent(agent_url, "/query", {"model": model, "token_ids": prompt, "block_size": None})
        best = max((found["longest_matched"] for nodes in answer.values() for found in nodes.values()), default=0)
        if best >= tokens:
            return time.monotonic() - started
        if time.monotonic() - started > timeout_s:
            raise ProcessFailed(f"only {best} of {tokens} tokens became visible within {timeout_s:.0f} s: {answer}")
        time.sleep(0.05)
