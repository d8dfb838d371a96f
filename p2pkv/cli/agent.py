"""``p2pkv agent``: run the daemon in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from p2pkv import config as configuration
from p2pkv.config import Config, Log
from p2pkv.errors import ConfigError

if TYPE_CHECKING:
    from p2pkv.agent.daemon import Agent


def agent(
    config: Annotated[str | None, typer.Option(help="YAML file; P2PKV_CONFIG names one too.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Set one key; repeatable.")
    ] = None,
    socket: Annotated[str | None, typer.Option(help="Unix socket for engines (engine.socket).")] = None,
    capacity: Annotated[str | None, typer.Option(help='Arena: a size, or "25%" of free memory.')] = None,
    seed: Annotated[
        list[str] | None, typer.Option(metavar="HOST:PORT", help="A member of the cell; repeatable.")
    ] = None,
    peer_port: Annotated[int | None, typer.Option(help="TCP port for peers; 0 = any.")] = None,
    http_port: Annotated[int | None, typer.Option(help="HTTP port; 0 = any.")] = None,
    transport: Annotated[str | None, typer.Option(help="auto, tcp or nixl.")] = None,
    insecure: Annotated[bool, typer.Option(help="Allow peers beyond loopback without authentication.")] = False,
    show_config: Annotated[bool, typer.Option(help="Print the effective configuration and exit.")] = False,
    ready_fd: Annotated[
        int | None, typer.Option(metavar="FD", help="Write a JSON line (node, ports) to this descriptor when up.")
    ] = None,
) -> None:
    """Run the agent of this node until SIGTERM or Ctrl-C."""
    overrides: list[tuple[str, object]] = []
    for pair in set_ or []:
        key, separator, value = pair.partition("=")
        if not separator:
            raise ConfigError("--set takes SECTION.FIELD=VALUE", got=pair)
        overrides.append((key, value))
    flags: dict[str, object] = {
        "engine.socket": socket,
        "store.capacity": capacity,
        "peer.seeds": seed or None,
        "peer.port": peer_port,
        "http.port": http_port,
        "transport.kind": transport,
        "peer.insecure": insecure or None,
    }
    overrides += [(key, value) for key, value in flags.items() if value is not None]
    settings = configuration.load(config, overrides=overrides)
    if show_config:
        print(json.dumps(msgspec.to_builtins(settings), indent=2))
        return
    set_up_logging(settings.log)
    run(settings, ready_fd)


def run(settings: Config, ready_fd: int | None = None) -> None:
    """Run an agent until it is told to stop; ``ready_fd`` is written to and closed once it is up."""
    import uvloop

    from p2pkv.agent.daemon import Agent

    async def main() -> None:
        daemon = Agent(settings)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal(number: int, frame: object) -> None:
            loop.call_soon_threadsafe(stop.set)

        # Not ``loop.add_signal_handler``: taking that away goes through the default action, and a second signal that
        # comes just then turns a clean end into a death.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        await daemon.start()
        try:
            if ready_fd is not None:
                tell_ready(daemon, ready_fd)
            await stop.wait()
        finally:
            await daemon.stop()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)

    uvloop.run(main())


def tell_ready(daemon: Agent, descriptor: int) -> None:
    """One JSON line: who this agent is and which ports it got (they may have been asked for as 0)."""
    line = {
        "node": f"{daemon.node:016x}",
        "epoch": daemon.identity.epoch,
        "pid": os.getpid(),
        "socket": daemon.config.socket_path,
        "peer_port": daemon.network.port,
        "http_port": daemon.http_port,
        "transports": daemon.transports.names(),
    }
    with open(descriptor, "w", encoding="ascii") as out, contextlib.suppress(BrokenPipeError):
        print(json.dumps(line), file=out, flush=True)


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time in seconds, level, logger, message, and the traceback where there is one."""
        entry = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_logging(settings: Log) -> None:
    """Log to standard error, as text or JSON."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        formatter = logging.Formatter("%(asctime)s.%(msecs)03d %(levelname).1s %(name)s: %(message)s", "%H:%M:%S")
        formatter.converter = time.gmtime
        handler.setFormatter(formatter)
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
