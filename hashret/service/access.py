"""Who may use the service: host names, pages of other origins, and the token.

A service on loopback accepts local host names only (against DNS rebinding). No service answers pages of another origin,
except for those of `origins` and for links to its own page. Requests that write need the token if there is one; on a
host other than loopback all requests need it, except for health.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from hashret.service.problems import Problem

PUBLIC_PATHS = {"/healthz", "/readyz"}  # without token, and also under load
PAGE_PATH = "/"
QUERY_PATH = "/v1/query"
READ_ONLY_POSTS = {QUERY_PATH, "/v1/encode", "/v1/reconstruct"}

COOKIE = "hashret"
# The value of `cookie_value` as browsers send it. `http.cookies` parses the whole header, in quadratic time in some
# versions of Python, and unescapes values.
COOKIE_VALUE = re.compile(rb"(?:^|;)[ \t]*%s=([0-9a-f]{64})[ \t]*(?:;|$)" % COOKIE.encode())
HOST = re.compile(rb"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::[0-9]{1,5})?", re.IGNORECASE)
ORIGIN = re.compile(r"https?://(?:\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(?::[0-9]{1,5})?")


class Access:
    """The rules of a service on `host`, which pages of `origins` may use. Raise ValueError for an invalid origin."""

    def __init__(self, *, host: str, token: str | None, read_only: bool, origins: Sequence[str]) -> None:
        for origin in origins:
            if not ORIGIN.fullmatch(origin):
                raise ValueError(f"an origin has the form https://photos.example, in lower case, not {origin!r}")
        self._read_only = read_only
        self._is_loopback = is_loopback(host)
        self._token = None if token is None else token.encode()
        self._cookie = None if token is None else cookie_value(token).encode()
        self._origins = {origin.encode() for origin in origins}
        origin_names = {urlsplit(origin).hostname or "" for origin in origins}
        self._host_names = {name.encode() for name in {"localhost", "127.0.0.1", "::1", host.lower(), *origin_names}}

    def find_origin(self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes]) -> bytes | None:
        """Return the one of the given origins whose page sends a request; None for all other requests.

        Raise Problem for another host name, and for a page of another origin.
        """
        host = headers.get(b"host")
        has_none = host is None and scope["http_version"] == "1.0"  # a health check: browsers always send Host
        if self._is_loopback and not has_none and _host_name(host or b"") not in self._host_names:
            raise Problem(400, "the service accepts localhost as host only: add --origin URL for another name")
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if origin is None and site is None:
            return None  # not a page: a program, or a browser older than 2023, whose writes have an Origin
        sender = _origin_of(headers.get(b"referer", b"")) if origin is None else origin  # images have no Origin
        if sender in self._origins:
            return sender
        is_own = (origin is None or origin.partition(b"://")[2] == host) and site in (None, b"same-origin", b"none")
        is_link = (
            headers.get(b"sec-fetch-mode") == b"navigate"
            and headers.get(b"sec-fetch-dest") == b"document"
            and (scope["method"], scope["path"]) == ("GET", PAGE_PATH)
        )
        if not is_own and not is_link:
            raise Problem(403, "pages of another origin are not allowed: start the service with --origin URL")
        return None

    def check(self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes]) -> None:
        """Raise Problem if the client may not send this request."""
        method, path = scope["method"], scope["path"]
        if path in PUBLIC_PATHS:
            return
        writes = method not in ("GET", "HEAD", "OPTIONS") and path not in READ_ONLY_POSTS
        if writes and self._read_only:
            raise Problem(403, "the service is read-only: start it without --read-only to change the collection")
        if self._token is not None and (writes or not self._is_loopback) and not self._is_authorised(scope, headers):
            raise Problem(401, "this needs the token: send Authorization: Bearer TOKEN", WWW_Authenticate="Bearer")

    def _is_authorised(self, scope: MutableMapping[str, Any], headers: Mapping[bytes, bytes]) -> bool:
        assert self._token is not None and self._cookie is not None
        scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            return hmac.compare_digest(credentials.strip(), self._token)
        if scope["path"] == PAGE_PATH and scope["query_string"].startswith(b"token="):
            return True  # the route of the page checks it
        value = COOKIE_VALUE.search(headers.get(b"cookie", b""))
        return value is not None and hmac.compare_digest(value[1], self._cookie)


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


def _host_name(host: bytes) -> bytes | None:
    """Return the name in a Host header, without the port, in lower case; None if it is none."""
    match = HOST.fullmatch(host)
    return None if match is None else (match[1] or match[2]).lower()


def _origin_of(url: bytes) -> bytes:
    """Return the origin of the URL of a page."""
    return b"/".join(url.split(b"/", 3)[:3])
