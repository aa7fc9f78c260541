"""Who may use the service: host names, pages of other origins, and the headers that keep answers from them."""

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from hashret.collection import Collection
from hashret.hasher import Hasher

httpx = pytest.importorskip("httpx", reason="the extra hashret[serve] is not installed")
pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")

from hashret.service.access import Access  # noqa: E402  # after importorskip
from hashret.service.problems import Problem  # noqa: E402

GIVEN = "https://photos.example"
PAGE = {"sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Collection]:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    with Collection.create(tmp_path_factory.mktemp("access") / "c", Hasher("lsh", 16).fit(images)) as made:
        made.add(list(images))
        yield made


@pytest.fixture(scope="module")
def address(collection: Collection, serve: Callable[..., str]) -> str:
    return serve(collection, origins=[GIVEN])


@pytest.mark.parametrize(
    ("host", "accepted"),
    [
        ("localhost", True),
        ("LocalHost:8000", True),
        ("127.0.0.1:65535", True),
        ("[::1]", True),
        ("[::1]:8000", True),
        ("photos.example", True),
        ("photos.example:443", True),
        ("127.0.0.1:evil", False),
        ("127.0.0.1:8000.evil.example", False),
        ("127.0.0.1:", False),
        ("127.0.0.1:123456", False),
        ("127.0.0.1:1:2", False),
        ("[::1]evil", False),
        ("[::1]evil.example:80", False),
        ("[::1", False),
        ("::1", False),
        ("[::1]:", False),
        ("[localhost]", False),
        ("localhost.", False),
        ("localhost/", False),
        ("x@localhost", False),
        ("localhost, evil.example", False),
        ("localhost\xa0", False),
        ("", False),
        ("a" * 60_000, False),
        ("localhost" + ":1" * 30_000, False),
    ],
)
def test_host_names_are_parsed_strictly(address: str, host: str, accepted: bool) -> None:
    response = httpx.get(f"{address}/v1/info", headers={"host": host.encode("latin-1")}, timeout=10)
    assert response.status_code == (200 if accepted else 400)
    assert response.headers["content-type"] == f"application/{'' if accepted else 'problem+'}json"


@pytest.mark.parametrize(("path", "status"), [("/healthz", 200), ("/readyz", 200), ("/v1/info", 200), ("/no", 404)])
def test_http_1_0_without_host_is_answered(address: str, path: str, status: int) -> None:
    """A health check of a load balancer; every browser sends Host."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert int(head.split()[1]) == status and isinstance(json.loads(body), dict)
    assert (b"application/problem+json" in head) == (status == 404)


@pytest.mark.parametrize(
    ("headers", "path", "accepted"),
    [
        ({}, "/v1/info", True),  # a program
        ({"sec-fetch-site": "same-origin"}, "/v1/info", True),
        ({"sec-fetch-site": "none", **PAGE}, "/openapi.json", True),  # typed into the address bar
        ({"sec-fetch-site": "cross-site", **PAGE}, "/", True),  # a link
        ({"sec-fetch-site": "same-site", **PAGE}, "/", True),
        ({"sec-fetch-site": "cross-site", **PAGE}, "/v1/info", False),
        ({"sec-fetch-site": "cross-site", **PAGE}, "/v1/items/1/image", False),
        ({"sec-fetch-site": "cross-site", **PAGE}, "/healthz", False),
        ({"sec-fetch-site": "cross-site", **PAGE, "sec-fetch-dest": "iframe"}, "/", False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "image"}, "/", False),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors", "sec-fetch-dest": "document"}, "/", False),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, "/v1/items/1/image", False),
        ({"sec-fetch-site": "cross-site"}, "/v1/dupes", False),
        ({"sec-fetch-site": ""}, "/v1/info", False),
        ({"sec-fetch-site": "same-origin, cross-site"}, "/v1/info", False),
        ({"sec-fetch-site": "cross-site", "referer": "https://evil.example/"}, "/v1/info", False),
        ({"sec-fetch-site": "cross-site", "referer": f"{GIVEN}.evil.example/"}, "/v1/info", False),
        ({"sec-fetch-site": "cross-site", "referer": f"{GIVEN}@evil.example/"}, "/v1/info", False),
        ({"sec-fetch-site": "cross-site", "referer": f"https://evil.example/{GIVEN}/"}, "/v1/info", False),
        ({"sec-fetch-site": "cross-site", "referer": f"{GIVEN}/", "origin": "null"}, "/v1/info", False),
        ({"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, "/v1/info", False),
        ({"sec-fetch-site": "cross-site", "referer": f"{GIVEN}/album?x#y"}, "/v1/items/1/image", True),
        ({"sec-fetch-site": "cross-site", "referer": GIVEN}, "/v1/items/1/image", True),
        ({"sec-fetch-site": "cross-site", "origin": GIVEN}, "/v1/info", True),
    ],
)
def test_requests_of_pages_elsewhere_are_refused(
    address: str, headers: dict[str, str], path: str, accepted: bool
) -> None:
    response = httpx.get(address + path, headers=headers)
    assert response.status_code == (200 if accepted else 403), response.text
    is_given = accepted and GIVEN in headers.get("referer", "") + headers.get("origin", "")
    policy = response.headers["cross-origin-resource-policy"]
    assert policy == ("cross-origin" if is_given else "same-origin")
    assert response.headers.get("access-control-allow-origin") == (GIVEN if is_given else None)
    assert accepted or response.headers["content-type"] == "application/problem+json"


def test_a_page_elsewhere_cannot_post_a_form_as_a_navigation(address: str) -> None:
    response = httpx.post(address, data={"a": "b"}, headers={"sec-fetch-site": "cross-site", **PAGE})
    assert response.status_code == 403


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/page.js", 200),
        ("GET", "/v1/info", 200),
        ("GET", "/v1/items/1/image", 200),
        ("GET", "/v1/items", 200),
        ("GET", "/healthz", 200),
        ("POST", "/v1/query", 415),
        ("DELETE", "/v1/nothing", 404),
        ("PUT", "/v1/items", 405),
        ("GET", "/v1/items/0", 422),
    ],
)
def test_every_answer_has_the_headers_that_isolate_it(address: str, method: str, path: str, status: int) -> None:
    response = httpx.request(method, address + path)
    assert response.status_code == status
    policy = response.headers["content-security-policy"]
    assert all(part in policy for part in ("frame-ancestors 'none'", "base-uri 'none'", "form-action 'self'"))
    assert response.headers["cross-origin-opener-policy"] == "same-origin"
    assert response.headers["cross-origin-resource-policy"] == "same-origin"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_pages_of_a_given_origin_can_read_errors(address: str) -> None:
    for path, status in (("/v1/items/0", 422), ("/no", 404)):
        response = httpx.get(address + path, headers={"origin": GIVEN, "sec-fetch-site": "cross-site"})
        assert response.status_code == status and response.headers["access-control-allow-origin"] == GIVEN
        assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("headers", [{"access-control-request-method": "TRACE"}, {"origin": "https://evil.example"}])
def test_preflight_requests_of_other_origins_are_problems(address: str, headers: dict[str, str]) -> None:
    response = httpx.options(f"{address}/v1/items", headers={"sec-fetch-site": "cross-site"} | headers)
    assert response.status_code == 403 and response.headers["content-type"] == "application/problem+json"
    assert "access-control-allow-methods" not in response.headers


@pytest.mark.parametrize("origin", ["photos.example", "https://photos.example/", "https://A.example", "*", "null", ""])
def test_an_origin_that_no_browser_sends_is_an_error(origin: str) -> None:
    with pytest.raises(ValueError, match="an origin has the form"):
        Access(host="localhost", token=None, read_only=False, origins=[origin])


def test_the_cookie_and_other_headers_reach_no_route(address: str) -> None:
    """FastAPI parses the cookies of every request, in quadratic time in Python 3.11: this takes 18 s."""
    for _ in range(3):
        cookie = b'a="' + b"\\" * 60_000 + b'"'
        assert httpx.get(f"{address}/v1/info", headers={"cookie": cookie}, timeout=10).status_code == 200


def test_off_loopback_a_host_name_does_not_matter_but_an_origin_does() -> None:
    access = Access(host="0.0.0.0", token="secret", read_only=False, origins=[])
    scope: dict[str, Any] = {"method": "GET", "path": "/v1/info", "http_version": "1.1"}
    assert access.find_origin(scope, {b"host": b"photos.example"}) is None
    with pytest.raises(Problem, match="another origin"):
        access.find_origin(scope, {b"host": b"photos.example", b"origin": b"https://evil.example"})
    with pytest.raises(Problem, match="token"):
        access.check(scope, {})
