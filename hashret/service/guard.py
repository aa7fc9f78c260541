"""ASGI middleware around all routes: access control, limits, the headers of every answer, and request metrics."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import Response

from hashret.service.access import PUBLIC_PATHS, QUERY_PATH, Access
from hashret.service.load import Load
from hashret.service.memory import MAX_REQUEST_BYTES, Memory, RequestMemory, too_large
from hashret.service.metrics import Metrics
from hashret.service.problems import Busy, Problem, to_response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

SENT_BYTES = 2**18  # of a response at a time: what a slow client has not received stays counted
MAX_PARAMETERS = 100  # in the URL
MAX_TYPE_BYTES = 512  # Content-Type, which some versions of form parsers read in quadratic time
# Routes and libraries see no other headers: Starlette's parser of cookies can take 20 s for 60 kB.
PASSED_HEADERS = {b"host", b"content-type", b"content-length", b"connection"}
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    b"frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", POLICY),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": "authorization, content-type",
    "Access-Control-Max-Age": "600",
}


class Guard:
    """ASGI middleware around `app`. Queries go to `queries` instead, which is faster."""

    def __init__(self, app: App, *, queries: App, access: Access, load: Load, metrics: Metrics) -> None:
        self._app, self._queries, self._access, self._load, self._metrics = app, queries, access, load, metrics
        self._memory = Memory()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, is_query = time.perf_counter(), False
        memory = scope.setdefault("state", {})["memory"] = RequestMemory(self._memory)
        exchange = _Exchange(receive, send, memory, self._load)
        self._load.requests += 1
        try:
            app = self._admit(scope, exchange)
            is_query = app is self._queries
            await app(scope, exchange.receive, exchange.send)
        except Problem as problem:
            await to_response(problem)(scope, receive, exchange.send)
        finally:
            self._load.requests -= 1
            memory.release()
            route = QUERY_PATH if is_query else getattr(scope.get("route"), "path", "other")
            self._metrics.count_response(route, scope["method"], exchange.status, time.perf_counter() - start)

    def _admit(self, scope: MutableMapping[str, Any], exchange: "_Exchange") -> App:
        """Return the application that answers a request. Raise Problem if it is not allowed."""
        headers = dict(scope["headers"])
        origin = self._access.find_origin(scope, headers)
        if origin is not None:
            exchange.allow(origin)
            if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
                return Response(headers=PREFLIGHT_HEADERS)  # browsers send no token with it
        if scope["path"] not in PUBLIC_PATHS and self._load.is_full(self._load.requests - 1):
            raise Busy("requests")
        self._access.check(scope, headers)
        length = headers.get(b"content-length", b"0")
        if len(length) > 12 or int(length) > MAX_REQUEST_BYTES:
            raise too_large()
        if len(headers.get(b"content-type", b"")) > MAX_TYPE_BYTES:
            raise Problem(415, f"Content-Type has more than {MAX_TYPE_BYTES} bytes: send a shorter one", "ValueError")
        if scope["query_string"].count(b"&") >= MAX_PARAMETERS:
            raise Problem(422, f"the URL has more than {MAX_PARAMETERS} parameters: send less", "ValueError")
        scope["headers"] = [header for header in scope["headers"] if header[0] in PASSED_HEADERS]
        return self._queries if scope["path"] == QUERY_PATH and scope["method"] == "POST" else self._app


class _Exchange:
    """The messages of one request and its answer: `receive` and `send` count their bytes and add headers."""

    def __init__(self, receive: Receive, send: Send, memory: RequestMemory, load: Load) -> None:
        self._receive, self._send, self._memory, self._load = receive, send, memory, load
        self._headers = HEADERS
        self.status = 500

    def allow(self, origin: bytes) -> None:
        """Allow pages of an origin to read and to show the answer."""
        self._headers = [
            *HEADERS[:-1],
            (b"cross-origin-resource-policy", b"cross-origin"),
            (b"access-control-allow-origin", origin),
            (b"vary", b"Origin, Referer, Sec-Fetch-Site"),
        ]

    async def receive(self) -> Message:
        self._load.waiting += 1
        try:
            message = await self._receive()
        finally:
            self._load.waiting -= 1
        if message["type"] == "http.request":
            self._memory.receive(len(message.get("body", b"")))
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), *self._headers]
        elif len(body := message.get("body", b"")) > SENT_BYTES:
            for position in range(0, len(body) - SENT_BYTES, SENT_BYTES):
                part = body[position : position + SENT_BYTES]
                await self._send_in_turn({"type": "http.response.body", "body": part, "more_body": True})
            message["body"] = body[position + SENT_BYTES :]
        await self._send_in_turn(message)

    async def _send_in_turn(self, message: Message) -> None:
        """Send a message once the client has read most of the messages before."""
        self._load.waiting += 1
        try:
            await self._send(message)
        finally:
            self._load.waiting -= 1
