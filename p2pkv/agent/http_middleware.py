"""What stands before the application: ASGI middlewares that bound a body, and that answer one question without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec
from fastapi import HTTPException
from fastapi.responses import JSONResponse

from p2pkv.errors import InvalidArgument

BODY_BYTES_MAX: Final = 16 << 20
"""2 million token ids in JSON."""

Headers = list[tuple[bytes, bytes]]


class BodyLimit:
    """Refuses a body over the limit before it has been read into memory."""

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


class ShortWay:
    """Answers the question that routers ask for every request, without the layers of the framework.

    Which are half of what it costs. Whatever cannot be answered like that is the application's, body and all.

    Args:
        path: of the question.
        answer: its answer and headers, from its body; a body that it refuses is the application's to refuse.
    """

    def __init__(self, app: Any, path: str, answer: Callable[[bytes], tuple[bytes, Headers]]) -> None:
        self._app = app
        self._path = path
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != self._path or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        parts, more = [], True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the asker has gone
            parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        body = b"".join(parts)
        try:
            answer, headers = self._answer(body)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, InvalidArgument):
            whole = {"type": "http.request", "body": body, "more_body": False}
            await self._app(scope, _first(whole, receive), send)
            return
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


def _first(message: Any, receive: Any) -> Any:
    """Receive this, and then what comes."""
    waiting = [message]

    async def received() -> Any:
        return waiting.pop() if waiting else await receive()

    return received


class _TooLarge(HTTPException):
    """The body is over the limit. An HTTPException, because FastAPI turns any other into 400 while it reads a body."""

    def __init__(self) -> None:
        super().__init__(413, "the body is too large")
