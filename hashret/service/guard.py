"""What stands before every route: who may ask, how much at a time, and how it is counted.

A service on loopback answers to local names only, so that no page elsewhere can reach it under a name of its own, and
refuses what comes from pages of another origin. Whatever writes needs the token if there is one; off loopback
everything but health does.
"""

import hashlib
import hmac
import ipaddress
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from hashret.service.metrics import Metrics
from hashret.service.problems import Busy, Problem, to_response

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Any, Any], Awaitable[None]]

MOST_BYTES = 64 * 2**20  # of one request
MOST_HELD = 512 * 2**20  # of all requests that are being answered
MOST_RUNNING = 512  # requests at a time
OPEN = {"/healthz", "/readyz"}  # to all, whatever else is being done
QUERY = "/v1/query"
READING = {QUERY, "/v1/encode", "/v1/reconstruct"}  # by POST


class Guard:
    """ASGI middleware around the application `app`; queries, but those of pages, go to `queries` instead."""

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
        self._cookie = None if token is None else cookie_of(token).encode()
        self._origins = set(origins)
        named = {urlsplit(origin).hostname or "" for origin in origins}
        self._names = {"localhost", "127.0.0.1", "::1", host.lower(), *named}
        self.running = 0
        self._held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, held, to_queries = time.perf_counter(), 500, 0, False
        open_to_all = scope["path"] in OPEN

        async def receive_some() -> Message:
            nonlocal held
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                held += size
                self._held += size
                if held > MOST_BYTES:
                    raise _too_large()
                if self._held > MOST_HELD:
                    raise Busy("bytes")
            return message

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        self.running += 1
        try:
            if self.running > MOST_RUNNING and not open_to_all:
                raise Busy("requests")
            to_queries = self._admit(scope, open_to_all)
            await (self._queries if to_queries else self._app)(scope, receive_some, send_guarded)
        except Problem as problem:
            await to_response(problem)(scope, receive, send_guarded)
        finally:
            self.running -= 1
            self._held -= held
            route = QUERY if to_queries else getattr(scope.get("route"), "path", "other")
            self._metrics.answered(route, scope["method"], status, time.perf_counter() - began)

    def _admit(self, scope: MutableMapping[str, Any], open_to_all: bool) -> bool:
        """Raises Problem unless this request may be made; whether it is a query that is no page's."""
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
            elif name == b"content-length" and int(value) > MOST_BYTES:
                raise _too_large()
        if self._loopback and _name(host) not in self._names:
            raise Problem(400, "the service answers to localhost only: add --origin URL for another name")
        method, path = scope["method"], scope["path"]
        if origin:
            text = origin.decode("latin-1")
            if text not in self._origins and (b"://" not in origin or origin.split(b"://", 1)[1] != host):
                raise Problem(403, "pages of another origin may not ask: add --origin URL to let them")
            if method == "OPTIONS":
                return False  # which asks what may be asked, and brings no token
        if open_to_all:
            return False
        writes = method not in ("GET", "HEAD", "OPTIONS") and path not in READING
        if writes and self._read_only:
            raise Problem(403, "the service is read-only: start it without --read-only to change the collection")
        if self._token is not None and (writes or not self._loopback) and not self._knows(authorization, cookie, scope):
            raise Problem(401, "this needs the token: send Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")
        return path == QUERY and method == "POST" and not origin

    def _knows(self, authorization: bytes, cookie: bytes, scope: MutableMapping[str, Any]) -> bool:
        assert self._token is not None and self._cookie is not None
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() == b"bearer":
            return hmac.compare_digest(given.strip(), self._token)
        if scope["path"] == "/" and scope["query_string"].startswith(b"token="):
            return True  # the page looks at it
        value = COOKIE_VALUE.search(cookie)
        return value is not None and hmac.compare_digest(value[1], self._cookie)


COOKIE = "hashret"
# As `cookie_of` makes it and browsers send it. `http.cookies` would read all of the header, in quadratic time in some
# versions of Python, and undo escapes.
COOKIE_VALUE = re.compile(rb"(?:^|;)[ \t]*%s=([0-9a-f]{64})[ \t]*(?:;|$)" % COOKIE.encode())
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]


def cookie_of(token: str) -> str:
    """What a browser keeps instead of the token."""
    return hashlib.sha256(b"hashret cookie " + token.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether a service on this host can be reached from this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name(host: bytes) -> str:
    """The name in a Host header, without the port."""
    text = host.decode("latin-1").lower()
    return text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]


def _too_large() -> Problem:
    text = f"more than the {MOST_BYTES // 2**20} MiB that a request may have"
    return Problem(413, text, "TooLarge")
