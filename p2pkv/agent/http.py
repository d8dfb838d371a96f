"""The HTTP endpoint: health, metrics, who is there, who holds what. FastAPI under uvicorn, on the daemon's own loop.

Nothing here changes state, so nothing needs a token yet; it is bound to loopback unless told otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Final

import uvicorn
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field

import p2pkv
from p2pkv.agent import metrics, query
from p2pkv.errors import ConfigError, InvalidArgument
from p2pkv.types import Layout

if TYPE_CHECKING:
    from p2pkv.agent.daemon import Agent

log = logging.getLogger(__name__)

STOP_S: Final = 2.0
BODY_BYTES_MAX: Final = 16 << 20
"""2 million token ids in JSON."""
CONCURRENCY_MAX: Final = 256
BLOCKS_LIMIT_MAX: Final = 10_000

Token = Annotated[int, Field(ge=0, lt=1 << 32)]
Hash = Annotated[str, Field(min_length=16, max_length=128)] | Annotated[int, Field(ge=0, lt=1 << 64)]
Name = Annotated[str, Field(max_length=512)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: Name = Field(description="Model name as the engines' layouts have it.")
    lora_name: Name | None = None
    tenant_id: Name | None = Field(None, description='Missing or "default": no tenant.')
    instance_id: Name | None = Field(None, description="Only this node (16 hexadecimal digits).")
    block_size: int | None = Field(
        None, ge=1, le=1 << 20, description="Tokens per hashed block; missing: the layout's."
    )
    cache_salt: Name | None = None


class QueryByTokens(_Asked):
    """The conductor's ``POST /query``."""

    token_ids: list[Token] = Field(max_length=query.TOKENS_MAX)


class QueryByHash(_Asked):
    """The conductor's ``POST /query_by_hash``: the engine's own block hashes, hexadecimal or integers."""

    seq_hashes: list[Hash] = Field(max_length=query.HASHES_MAX)


class Lookup(BaseModel):
    """``POST /v1/lookup``: a chain of block hashes within one namespace."""

    namespace: str = Field(pattern="^[0-9a-f]{16}$")
    hashes: list[Hash] = Field(max_length=query.HASHES_MAX)


class Problem(BaseModel):
    """Why a request was refused."""

    error: str
    hint: str = ""


_REFUSALS: Final[dict[int | str, dict[str, Any]]] = {400: {"model": Problem}, 413: {"model": Problem}}


def build_app(agent: Agent) -> FastAPI:
    """The application of one agent."""
    app = FastAPI(title="p2pkv agent", version=p2pkv.__version__, docs_url=None, redoc_url=None)

    @app.exception_handler(InvalidArgument)
    async def refuse(_: Request, error: InvalidArgument) -> JSONResponse:
        return JSONResponse({"error": error.message, "hint": error.hint}, status_code=400)

    @app.get("/healthz", response_class=PlainTextResponse, summary="The process runs and its loop turns.")
    async def healthz() -> str:
        return "ok"

    @app.get("/readyz", summary="The agent takes requests.", responses={503: {"description": "starting or draining"}})
    async def readyz() -> JSONResponse:
        state = "draining" if agent.draining else ("ready" if agent.ready else "starting")
        return JSONResponse({"state": state}, status_code=200 if state == "ready" else 503)

    @app.get("/metrics", summary="Prometheus metrics.", response_class=PlainTextResponse)
    async def scrape() -> Response:
        return Response(metrics.render(agent), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/nodes", summary="This node and its peers, as seen from here.")
    async def nodes() -> dict[str, Any]:
        return _nodes(agent)

    @app.get("/v1/blocks", summary="This node's blocks, by namespace.", responses=_REFUSALS)
    async def blocks(
        namespace: Annotated[str | None, Query(pattern="^[0-9a-f]{16}$")] = None,
        limit: Annotated[int, Query(ge=0, le=BLOCKS_LIMIT_MAX)] = 100,
    ) -> dict[str, Any]:
        return _blocks(agent, None if namespace is None else int(namespace, 16), limit)

    @app.post("/v1/lookup", summary="Who holds how much of a chain, in blocks.", responses=_REFUSALS)
    async def lookup(body: Lookup) -> dict[str, Any]:
        return query.lookup(agent, int(body.namespace, 16), query.parse_hashes(body.hashes))

    @app.post("/query", summary="Who holds how much of a prompt, in tokens (conductor).", responses=_REFUSALS)
    async def by_tokens(body: QueryByTokens) -> dict[str, dict[str, Any]]:
        lora, salt = body.lora_name or "", body.cache_salt or ""
        layouts = _select(agent, body)

        def hashed() -> list[tuple[Layout, list[bytes]]]:
            tokens, block_tokens = body.token_ids, body.block_size
            return [
                (layout, query.hashes_of_tokens(layout, tokens, block_tokens=block_tokens, lora=lora, cache_salt=salt))
                for layout in layouts
            ]

        # Seconds for the longest prompts: engines and peers are not to wait for that.
        asked = await asyncio.to_thread(hashed)
        return _only(query.query_layouts(agent, asked), body.instance_id)

    @app.post("/query_by_hash", summary="Who holds how much of a chain, in tokens (conductor).", responses=_REFUSALS)
    async def by_hash(body: QueryByHash) -> dict[str, dict[str, Any]]:
        hashes = query.parse_hashes(body.seq_hashes)
        return _only(
            query.query_layouts(agent, ((layout, hashes) for layout in _select(agent, body))), body.instance_id
        )

    return app


def _select(agent: Agent, body: _Asked) -> list[Layout]:
    return query.select_layouts(
        agent,
        model=body.model,
        tenant=body.tenant_id or "",
        lora=body.lora_name or "",
        cache_salt=body.cache_salt or "",
        block_tokens=body.block_size,
    )


def _only(answer: dict[str, dict[str, Any]], instance: str | None) -> dict[str, dict[str, Any]]:
    if instance is None:
        return answer
    return {tenant: {k: v for k, v in found.items() if k == instance} for tenant, found in answer.items()}


def _nodes(agent: Agent) -> dict[str, Any]:
    stats = agent.store.stats()
    peers = [
        {
            "node": str(peer.node),
            "epoch": peer.epoch,
            "address": f"{peer.address.host}:{peer.address.port}",
            "http": peer.card.http,
            "state": peer.state.name.lower(),
            "age_ms": peer.age_ms,
            "rtt_ms": peer.rtt_ms,
            "seq": peer.seq,
            "entries": peer.entries,
            "transports": peer.card.transports,
            "transport": agent.transports.pick(int(peer.node)).name,
            "layout_conflicts": list(peer.conflicts),
        }
        for peer in agent.network.peers()
    ]
    return {
        "self": {
            "node": f"{agent.node:016x}",
            "epoch": agent.identity.epoch,
            "address": f"{agent.network.card.address.host}:{agent.network.card.address.port}",
            "socket": agent.config.socket_path,
            "transports": agent.transports.names(),
            "why_no_nixl": agent.transports.why_no_nixl,
            "arena_bytes": stats.capacity_bytes,
            "live_bytes": stats.live_bytes,
            "blocks": stats.blocks_live,
            "engines": [connection.name for connection in agent.engines.connections],
        },
        "peers": peers,
    }


def _blocks(agent: Agent, namespace: int | None, limit: int) -> dict[str, Any]:
    found = []
    for layout in agent.service.layouts:
        if namespace is None or layout.namespace == namespace:
            keys = agent.store.keys(layout.namespace, limit)
            found.append(
                {
                    "namespace": f"{layout.namespace:016x}",
                    "layout": layout.asdict(),
                    "count": agent.store.count(layout.namespace),
                    "hashes": [key.hex() for key in keys],
                }
            )
    return {"node": f"{agent.node:016x}", "namespaces": found}


class _Server(uvicorn.Server):
    """uvicorn without its signal handling: SIGTERM is the daemon's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _BodyLimit:
    """ASGI middleware: refuses a body over the limit before it has been read into memory."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        got = 0

        async def limited() -> Any:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > BODY_BYTES_MAX:
                raise _TooLarge
            return message

        declared = dict(scope["headers"]).get(b"content-length", b"0")
        try:
            if declared.isdigit() and int(declared) > BODY_BYTES_MAX:
                raise _TooLarge
            await self._app(scope, limited, send)
        except _TooLarge:
            response = JSONResponse({"error": "the body is too large", "hint": f"At most {BODY_BYTES_MAX} bytes."}, 413)
            await response(scope, receive, send)


class _TooLarge(HTTPException):
    """The body is over the limit. An HTTPException, because FastAPI turns any other into 400 while it reads a body."""

    def __init__(self) -> None:
        super().__init__(413, "the body is too large")


class HttpServer:
    """uvicorn as a task of the daemon."""

    def __init__(self, agent: Agent) -> None:
        settings = agent.config.http
        self._host, self._wanted_port = settings.host, settings.port
        config = uvicorn.Config(
            _BodyLimit(build_app(agent)),
            log_config=None,
            access_log=False,
            lifespan="off",
            limit_concurrency=CONCURRENCY_MAX,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
            server_header=False,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None

    @property
    def port(self) -> int:
        """The port that is listened on."""
        assert self._socket is not None
        port: int = self._socket.getsockname()[1]
        return port

    async def start(self) -> None:
        """Bind and serve.

        Raises:
            ConfigError: the port is in use, or the host is not this machine's.
        """
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((self._host, self._wanted_port))
        except OSError as error:
            self._socket.close()
            raise ConfigError(
                "cannot bind the HTTP port",
                host=self._host,
                port=self._wanted_port,
                reason=error.strerror,
                hint="Set http.port to a free port (0 = any), or http.enabled to false.",
            ) from error
        self._socket.listen(128)  # from now on nobody is refused: uvicorn does it some milliseconds from now
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))

    async def stop(self) -> None:
        """Finish answers under way, then close; bounded."""
        self._server.should_exit = True
        if self._task is not None:
            done, _ = await asyncio.wait([self._task], timeout=STOP_S)
            if not done:
                self._task.cancel()
                await asyncio.gather(self._task, return_exceptions=True)
        if self._socket is not None:
            self._socket.close()
