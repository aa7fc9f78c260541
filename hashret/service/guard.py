"""ASGI middleware around all routes: access control, limits and request metrics.

A service on loopback accepts local host names only (against DNS rebinding), and no requests of pages from another
origin. Requests that write need the token if there is one; on a host other than loopback all requests need it, except
for health.
"""

import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from hashret.service.memory import MAX_REQUEST_BYTES, Memory, RequestMemory, too_large
from hashret.service.metrics import Metrics
from hashret.service.problems import Busy, Problem, to_response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

MAX_IN_FLIGHT = 512  # requests in progress
SENT_BYTES = 2**18  # of a response at a time: what a slow client has not received stays counted
PUBLIC_PATHS = {"/healthz", "/readyz"}  # without token, and also under load
QUERY_PATH = "/v1/query"
READ_ONLY_POSTS = {QUERY_PATH, "/v1/encode", "/v1/reconstruct"}


class Guard:
    """ASGI middleware around `app`. Queries go to `queries` instead, except for those of pages, which need CORS."""

    def __init__(
        self,
        app: App,
        *,
        queries: App,
        metrics: Metrics,
        host: str,
        token: str | None,
        read_only: bool,
        origins: Sequence[str],
    ) -> None:
        self._app, self._queries, self._metrics, self._read_only = app, queries, metrics, read_only
        self._loopback = is_loopback(host)
        self._token = None if token is None else token.encode()
        self._cookie = None if token is None else cookie_value(token).encode()
        self._origins = set(origins)
        origin_names = {urlsplit(origin).hostname or "" for origin in origins}
        self._host_names = {"localhost", "127.0.0.1", "::1", host.lower(), *origin_names}
        self._in_flight = 0
        self._memory = Memory()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status, is_query = time.perf_counter(), 500, False
        memory = scope.setdefault("state", {})["memory"] = RequestMemory(self._memory)
        is_public = scope["path"] in PUBLIC_PATHS

        async def receive_limited() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                memory.receive(len(message.get("body", b"")))
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            elif len(body := message.get("body", b"")) > SENT_BYTES:
                for position in range(0, len(body) - SENT_BYTES, SENT_BYTES):
                    part = body[position : position + SENT_BYTES]
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                message["body"] = body[position + SENT_BYTES :]
            await send(message)

        self._in_flight += 1
        try:
            if self._in_flight > MAX_IN_FLIGHT and not is_public:
                raise Busy("requests")
            is_query = self._admit(scope, is_public)
            await (self._queries if is_query else self._app)(scope, receive_limited, send_with_headers)
        except Problem as problem:
            await to_response(problem)(scope, receive, send_with_headers)
        finally:
            self._in_flight -= 1
            memory.release()
            route = QUERY_PATH if is_query else getattr(scope.get("route"), "path", "other")
            self._metrics.count_response(route, scope["method"], status, time.perf_counter() - start)

    def _admit(self, scope: MutableMapping[str, Any], is_public: bool) -> bool:
        """Return whether a request is a query that no page sent. Raise Problem if it is not allowed."""
        host = origin = authorization = cookie = b""
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"authorization":
                authorization = value
            elif name == b"cookie":
                cookie = value
            elif name == b"content-length" and int(value) > MAX_REQUEST_BYTES:
                raise too_large()
        if self._loopback and _host_name(host) not in self._host_names:
            raise Problem(400, "the service accepts localhost as host only: add --origin URL for another name")
        method, path = scope["method"], scope["path"]
        if origin:
            text = origin.decode("latin-1")
            if text not in self._origins and (b"://" not in origin or origin.split(b"://", 1)[1] != host):
                raise Problem(403, "pages of another origin are not allowed: start the service with --origin URL")
            if method == "OPTIONS":
                return False  # a CORS preflight request, which has no token
        if is_public:
            return False
        writes = method not in ("GET", "HEAD", "OPTIONS") and path not in READ_ONLY_POSTS
        if writes and self._read_only:
            raise Problem(403, "the service is read-only: start it without --read-only to change the collection")
        if (
            self._token is not None
            and (writes or not self._loopback)
            and not self._is_authorised(authorization, cookie, scope)
        ):
            raise Problem(401, "this needs the token: send Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")
        return path == QUERY_PATH and method == "POST" and not origin

    def _is_authorised(self, authorization: bytes, cookie: bytes, scope: MutableMapping[str, Any]) -> bool:
        assert self._token is not None and self._cookie is not None
        scheme, _, credentials = authorization.partition(b" ")
        if scheme.lower() == b"bearer":
            return hmac.compare_digest(credentials.strip(), self._token)
        if scope["path"] == "/" and scope["query_string"].startswith(b"token="):
            return True  # the route of the page checks it
        value = COOKIE_VALUE.search(cookie)
        return value is not None and hmac.compare_digest(value[1], self._cookie)


COOKIE = "hashret"
# The value of `cookie_value` as browsers send it. `http.cookies` parses the whole header, in quadratic time in some
# versions of Python, and unescapes values.
COOKIE_VALUE = re.compile(rb"(?:^|;)[ \t]*%s=([0-9a-f]{64})[ \t]*(?:;|$)" % COOKIE.encode())
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


def cookie_value(token: str) -> str:
    """Return the value of the cookie, from which the token cannot be computed."""
    return hashlib.sha256(b"hashret cookie " + token.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Return whether a service on this host can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(host: bytes) -> str:
    """Return the name in a Host header, without the port."""
    text = host.decode("latin-1").lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
