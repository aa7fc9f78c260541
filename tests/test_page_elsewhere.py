"""Pages of other origins in Chromium: what they can do to a service on loopback."""

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from browser import launch

from hashret.collection import Collection
from hashret.hasher import Hasher

httpx = pytest.importorskip("httpx", reason="the extra hashret[serve] is not installed")
pytest.importorskip("fastapi", reason="the extra hashret[serve] is not installed")


class EmptyPage(BaseHTTPRequestHandler):
    """Answer every request with an empty page."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name in the base class
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Return the port of a server of pages on loopback."""
    with ThreadingHTTPServer(("127.0.0.1", 0), EmptyPage) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory, port: int, serve: Callable[..., str]) -> Iterator[str]:
    """Serve a collection; one origin is given."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    with Collection.create(tmp_path_factory.mktemp("isolated") / "c", Hasher("lsh", 16).fit(images)) as collection:
        collection.add(list(images))
        yield serve(collection, origins=[f"http://given.localhost:{port}"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launch() as browser:
        yield browser


PROBE = """async (address) => {
  const loads = (tag, path) => new Promise((resolve) => {
    const element = document.createElement(tag);
    element.onload = () => resolve(tag === "img" ? element.naturalWidth : "loaded");
    element.onerror = () => resolve("refused");
    element.src = address + path;
    document.body.append(element);
  });
  const reads = (path, options) => fetch(address + path, options).then((response) => response.status, () => "refused");
  return {
    image: await loads("img", "/v1/items/1/image"),
    unknown: await loads("img", "/v1/items/99/image"),
    script: await loads("script", "/page.js"),
    read: await reads("/v1/info"),
    opaque: await reads("/v1/dupes", { mode: "no-cors" }),
    query: await reads("/v1/query", { method: "POST", mode: "no-cors", body: "{}" }),
    json: await reads("/v1/query", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: '{"id": 1}',
    }),
  };
}"""


@pytest.fixture(params=["localhost", "127.0.0.1", "given.localhost"])
def page(request: Any, browser: Any, port: int) -> Iterator[Any]:
    """Open a page that is cross-site, one that is same-site but of another origin, and one of a given origin."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"http://{request.param}:{port}/")
    page.is_given = request.param.startswith("given")
    yield page
    context.close()


def responses(address: str) -> dict[str, float]:
    """Return the number of responses by route and status."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    totals = [line for line in lines if line.startswith("hashret_requests_total") and "/metrics" not in line]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in totals}


def test_a_page_elsewhere_can_neither_read_nor_run_anything(page: Any, address: str) -> None:
    before = responses(address)
    results = page.evaluate(PROBE, address)
    if page.is_given:
        expected: dict[str, Any] = {"image": 8, "unknown": "refused", "script": "loaded", "read": 200, "json": 200}
        assert results == expected | {"opaque": 0, "query": 0}
        return
    assert set(results.values()) == {"refused"}
    after = responses(address)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed and all('route="other"' in name and 'status="403"' in name for name in changed)


@pytest.mark.parametrize("path", ["/", "/v1/items/1/image"])
def test_nothing_can_be_framed(page: Any, address: str, path: str) -> None:
    page.evaluate(
        """(url) => new Promise((resolve) => {
          const frame = document.createElement("iframe");
          frame.onload = resolve;
          frame.src = url;
          document.body.append(frame);
        })""",
        address + path,
    )
    deadline = time.monotonic() + 20
    while not page.frames[1].url and time.monotonic() < deadline:  # Playwright learns of it after `onload`
        page.wait_for_timeout(20)
    assert page.frames[1].url.startswith("chrome-error://")


def test_a_link_opens_the_page_out_of_reach_of_its_opener(page: Any, address: str) -> None:
    with page.expect_popup() as opened:
        page.evaluate("(url) => { window.popup = window.open(url); }", address)
    popup = opened.value
    popup.locator("article").first.wait_for()
    assert popup.evaluate("() => window.opener") is None
    page.wait_for_function("() => window.popup.closed")


def test_a_link_to_anything_else_is_refused(page: Any, address: str) -> None:
    with page.expect_popup() as opened:
        page.evaluate("(url) => { window.open(url); }", f"{address}/v1/info")
    opened.value.wait_for_load_state()
    assert ("another origin" in opened.value.content()) == (not page.is_given)
