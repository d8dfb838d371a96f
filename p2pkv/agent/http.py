"""The HTTP endpoint: health, metrics, who is there, who holds what. FastAPI under uvicorn, on the daemon's own loop.

Nothing here changes state, so nothing needs a token yet; it is bound to loopback unless told otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import msgspec
import uvicorn
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

import p2pkv
from p2pkv.agent import metrics, query
from p2pkv.agent.explain import explain
from p2pkv.agent.http_middleware import BodyLimit, Headers, ShortWay
from p2pkv.agent.http_types import (
    Blocks,
    Conductor,
    Lookup,
    LookupAnswer,
    Nodes,
    PlanAnswer,
    PlanQuestion,
    Problem,
    QueryByHash,
    QueryByTokens,
    Readiness,
    Score,
    ScoreAnswer,
    ScoreCompletions,
    Scores,
    complete,
)
from p2pkv.agent.remembered import Recalled
from p2pkv.agent.tokenizers import UnknownModel
from p2pkv.errors import ConfigError, InvalidArgument
from p2pkv.index.hashing import index_keys, parse_hashes, salted
from p2pkv.types import Layout

if TYPE_CHECKING:
    from p2pkv.agent.daemon import Agent

log = logging.getLogger(__name__)

STOP_S: Final = 2.0
CONCURRENCY_MAX: Final = 256
BLOCKS_LIMIT_MAX: Final = 10_000


def _schema(kind: Any) -> dict[str, Any]:
    [schema], components = msgspec.json.schema_components([kind], ref_template="#/components/schemas/{name}")
    _COMPONENTS.update(components)
    return schema


_COMPONENTS: Final[dict[str, Any]] = {}


def _described(answer: Any, body: Any = None, *refusals: int) -> dict[str, Any]:
    """For a route: the OpenAPI of its answer, of the body that it takes, and of how it refuses."""

    def content(kind: Any) -> dict[str, Any]:
        return {"application/json": {"schema": _schema(kind)}}

    described: dict[str, Any] = {"responses": {200: {"description": "The answer.", "content": content(answer)}}}
    if body is not None:
        described["openapi_extra"] = {"requestBody": {"required": True, "content": content(body)}}
        refusals = (400, 413, 422, *refusals)
    for status in refusals:
        described["responses"][status] = {"description": _REFUSALS[status], "content": content(Problem)}
    return described


_REFUSALS: Final = {
    400: "What is asked cannot be answered.",
    404: "No tokenizer is configured for this model.",
    413: "The body is too large.",
    422: "The body is not what its schema says.",
    503: "Starting or draining.",
}


_Body = TypeVar("_Body")


class _Refused(Exception):
    """The request is wrong, and this says how."""

    def __init__(self, problem: Problem, status: int) -> None:
        super().__init__(problem.error)
        self.response = _json(problem, status)


def _json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")


async def _read(request: Request, kind: type[_Body]) -> _Body:
    data = await request.body()
    try:
        try:
            return msgspec.json.decode(data, type=kind)
        except msgspec.ValidationError as error:
            if "got `float`" not in str(error):
                raise
        # In JSON 16.0 is an integer, and some who write it have no other numbers.
        return await asyncio.to_thread(lambda: msgspec.convert(_integral(msgspec.json.decode(data)), kind))
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise _Refused(Problem(f"the body is not what it should be: {error}", "See /openapi.json."), 422) from error


def _integral(value: Any) -> Any:
    """The same with whole numbers for floats that are."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else value
    if isinstance(value, list):
        return [_integral(each) for each in value]
    if isinstance(value, dict):
        return {name: _integral(each) for name, each in value.items()}
    return value


def build_app(agent: Agent) -> FastAPI:
    """The application of one agent."""
    app = FastAPI(title="p2pkv agent", version=p2pkv.__version__, docs_url=None, redoc_url=None)

    @app.exception_handler(InvalidArgument)
    async def refuse(_: Request, error: InvalidArgument) -> Response:
        return _json(Problem(error.problem, error.hint), 404 if isinstance(error, UnknownModel) else 400)

    @app.exception_handler(_Refused)
    async def refused(_: Request, error: _Refused) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        return _json(Problem(problems, "See /openapi.json."), 422)

    @app.get("/healthz", response_class=PlainTextResponse, summary="The process runs and its loop turns.")
    async def healthz() -> str:
        return "ok"

    @app.get("/readyz", summary="The agent takes requests.", **_described(Readiness, None, 503))
    async def readyz() -> Response:
        state = "draining" if agent.draining else ("ready" if agent.ready else "starting")
        return _json(Readiness(state), 200 if state == "ready" else 503)

    @app.get("/metrics", summary="Prometheus metrics.", response_class=PlainTextResponse)
    async def scrape() -> Response:
        return Response(metrics.render(agent), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/nodes", summary="This node and its peers, as seen from here.", **_described(Nodes))
    async def nodes() -> Response:
        return _json(_nodes(agent))

    @app.get("/v1/blocks", summary="This node's blocks, by namespace.", **_described(Blocks, None, 422))
    async def blocks(
        namespace: Annotated[str | None, Query(pattern="^[0-9a-f]{16}$")] = None,
        limit: Annotated[int, Query(ge=0, le=BLOCKS_LIMIT_MAX)] = 100,
    ) -> Response:
        return _json(_blocks(agent, None if namespace is None else int(namespace, 16), limit))

    @app.post("/v1/lookup", summary="Who holds how much of a chain, in blocks.", **_described(LookupAnswer, Lookup))
    async def lookup(request: Request) -> Response:
        body = await _read(request, Lookup)
        return _json(query.lookup(agent, int(body.namespace, 16), query.whole_hashes(body.hashes)))

    @app.post("/v1/score", summary="What each node would have to do for a prompt.", **_described(ScoreAnswer, Score))
    async def score(request: Request) -> Response:
        body = await _read(request, Score)
        tokens: int | None = None
        if body.token_ids is not msgspec.UNSET and body.hashes is msgspec.UNSET:
            asked = await _hashed(agent, body, body.token_ids)
            tokens = len(body.token_ids)
        elif body.hashes is not msgspec.UNSET and body.token_ids is msgspec.UNSET:
            asked = _salted(agent, body, body.hashes)
        else:
            raise InvalidArgument("a prompt is either token_ids or hashes")
        return _json(query.score(agent, asked, tokens=tokens, candidates=body.candidates))

    @app.post(
        "/v1/plan", summary="From where this node would get a prompt, how far, and why.",
        **_described(list[PlanAnswer], PlanQuestion),
    )  # fmt: skip
    async def plan(request: Request) -> Response:
        body = await _read(request, PlanQuestion)
        if body.token_ids is not msgspec.UNSET and body.hashes is msgspec.UNSET:
            asked = await _chains(agent, body, body.token_ids)
        elif body.hashes is not msgspec.UNSET and body.token_ids is msgspec.UNSET:
            hashes = query.whole_hashes(body.hashes)
            asked = [(layout, hashes) for layout in _select(agent, body)]
        else:
            raise InvalidArgument("a prompt is either token_ids or hashes")
        return _json(explain(agent, asked, prefill_ms=body.prefill_ms))

    @app.post(
        "/query",
        summary="Who holds how much of a prompt, in tokens (conductor).",
        **_described(Conductor, QueryByTokens),
    )
    async def by_tokens(request: Request) -> Response:
        body = await _read(request, QueryByTokens)
        asked = await _hashed(agent, body, body.token_ids)
        found, age_s = query.query_layouts(agent, asked, only=body.instance_id)
        return _json(found, headers=_age(age_s))

    @app.post(
        "/query_by_hash",
        summary="Who holds how much of a chain, in tokens (conductor).",
        **_described(Conductor, QueryByHash),
    )
    async def by_hash(request: Request) -> Response:
        found, age_s = _by_hash(agent, await _read(request, QueryByHash))
        return _json(found, headers=_age(age_s))

    @app.post(
        "/score_completions",
        summary="How many blocks of a text's prefix each node holds, weighed by tier (llm-d).",
        **_described(Scores, ScoreCompletions, 404),
    )
    async def score_completions(request: Request) -> Response:
        body = await _read(request, ScoreCompletions)
        tokens = await agent.tokenizers.encode(body.model, body.prompt)
        found, age_s = query.weighed(agent, await _hashed(agent, body, tokens))
        return _json(found, headers=_age(age_s))

    generated = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schemas = generated().setdefault("components", {}).setdefault("schemas", {})
            schemas.update(_COMPONENTS)
            complete(schemas)
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


_Prompt = QueryByTokens | QueryByHash | Score | ScoreCompletions | PlanQuestion


def _select(agent: Agent, body: _Prompt) -> list[Layout]:
    return query.select_layouts(
        agent,
        model=body.model,
        tenant=body.tenant_id or "",
        lora=body.lora_name or "",
        cache_salt=body.cache_salt or "",
        block_tokens=body.block_size,
    )


async def _chains(agent: Agent, body: _Prompt, tokens: list[int]) -> list[tuple[Layout, list[bytes]]]:
    """A prompt's block hashes in each of its layouts."""
    lora, salt, block_tokens = body.lora_name or "", body.cache_salt or "", body.block_size
    layouts = _select(agent, body)

    def chains() -> list[tuple[Layout, list[bytes]]]:
        return [
            (layout, query.hashes_of_tokens(layout, tokens, block_tokens=block_tokens, lora=lora, cache_salt=salt))
            for layout in layouts
        ]

    # Seconds for the longest prompts: engines and peers are not to wait for that.
    return await asyncio.to_thread(chains)


async def _hashed(agent: Agent, body: _Prompt, tokens: list[int]) -> list[tuple[Layout, bytes]]:
    """A prompt's packed index keys in each of its layouts."""
    chains = await _chains(agent, body, tokens)
    return [(layout, index_keys(layout.namespace, hashes)) for layout, hashes in chains]


def _salted(agent: Agent, body: _Prompt, hashes: Sequence[str | int]) -> list[tuple[Layout, bytes]]:
    packed = parse_hashes(hashes)
    return [(layout, salted(packed, layout.namespace)) for layout in _select(agent, body)]


def _by_hash(agent: Agent, body: QueryByHash) -> tuple[query.Conductor, float]:
    return query.query_layouts(agent, _salted(agent, body, body.seq_hashes), only=body.instance_id)


def _quick_by_hash(agent: Agent) -> Callable[[bytes], tuple[bytes, Headers]]:
    """The same for bytes."""
    decode, encode = msgspec.json.Decoder(QueryByHash).decode, msgspec.json.Encoder().encode

    def answer(body: bytes) -> tuple[bytes, Headers]:
        found, age_s = _by_hash(agent, decode(body))
        return encode(found), [(name.encode(), value.encode()) for name, value in _age(age_s).items()]

    return answer


def _age(age_s: float) -> dict[str, str]:
    """HTTP's own word (RFC 9111) for an answer that is not of now."""
    return {"age": f"{age_s:.0f}"} if age_s else {}


def _nodes(agent: Agent) -> dict[str, Any]:
    stats = agent.store.stats()
    remembered = {recalled.node: recalled for recalled in agent.remembered}
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
            "remembered": remembered.pop(peer.node, None) is not None,
        }
        for peer in agent.network.peers()
    ]
    peers += map(_recalled, remembered.values())
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


def _recalled(recalled: Recalled) -> dict[str, Any]:
    card = recalled.card
    return {
        "node": str(recalled.node),
        "epoch": card.epoch,
        "address": f"{card.address.host}:{card.address.port}",
        "http": card.http,
        "state": "unreachable",
        "age_ms": recalled.age_ms,
        "rtt_ms": None,
        "seq": 0,
        "entries": 0,
        "transports": card.transports,
        "transport": "",
        "layout_conflicts": [],
        "remembered": True,
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


class HttpServer:
    """uvicorn as a task of the daemon."""

    def __init__(self, agent: Agent) -> None:
        settings = agent.config.http
        self._host, self._wanted_port = settings.host, settings.port
        config = uvicorn.Config(
            BodyLimit(ShortWay(build_app(agent), "/query_by_hash", _quick_by_hash(agent))),
            log_config=None,
            access_log=False,
            lifespan="off",
            limit_concurrency=CONCURRENCY_MAX,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=1,
            server_header=False,
            proxy_headers=False,  # nothing here depends on who asks
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
