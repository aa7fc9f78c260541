"""The application of the service: its layers, what becomes of errors, and its page.

Bodies are read and answers written by hand in the routes, because that costs a fraction of what FastAPI takes for it;
the OpenAPI document is made of the same models.
"""

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from hmac import compare_digest
from importlib import resources
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp

from hashret.collection import Collection
from hashret.errors import HashretError
from hashret.process import version
from hashret.service import routes_health, routes_items, routes_queries
from hashret.service.guard import COOKIE, Guard, cookie_of, is_loopback
from hashret.service.metrics import Metrics
from hashret.service.problems import Problem, to_problem, to_response
from hashret.service.query_route import QueryRoute
from hashret.service.work import Work

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'"
PAGE = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}


class Service(FastAPI):
    """FastAPI with a guard around all of its own layers."""

    guard: Callable[[ASGIApp], Guard]

    def build_middleware_stack(self) -> ASGIApp:
        return self.guard(super().build_middleware_stack())


def create_app(
    collection: Collection, *, host: str = "127.0.0.1", token: str | None = None, origins: Sequence[str] = ()
) -> FastAPI:
    """The service of a collection on `host`, read-only if that is.

    `token` is what whoever writes must know, and off loopback whoever asks anything: ValueError if it is None there.
    Pages of the `origins` may use the service from a browser.
    """
    if token is None and not is_loopback(host):
        raise ValueError(f"a service on {host} needs a token")
    metrics = Metrics()
    work = Work(collection, metrics)
    app = Service(
        title="hashret",
        version=version(),
        description="Find similar images by compact binary codes.",
        lifespan=_lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
    )
    app.state.work, app.state.metrics = work, metrics
    app.guard = partial(
        Guard,
        metrics=metrics,
        queries=QueryRoute(work),
        host=host,
        token=token,
        read_only=collection.read_only,
        origins=origins,
    )
    _let_pages_ask(app, origins)
    _add_error_handlers(app)
    for routes in (routes_queries, routes_items, routes_health):
        app.include_router(routes.router)
    _add_page(app, token)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    work: Work = app.state.work
    metrics: Metrics = app.state.metrics
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, work.warm_up)
        yield {"turned_away": partial(metrics.answered, "other", "other", 503, 0.0)}  # which the server calls
    await anyio.to_thread.run_sync(work.close)


def _let_pages_ask(app: FastAPI, origins: Sequence[str]) -> None:
    for origin in origins:
        if not re.fullmatch(r"https?://[^/@?#]+", origin):
            raise ValueError(f"an origin is such as https://photos.example, not {origin!r}")
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )


def _add_error_handlers(app: FastAPI) -> None:
    for kind in (Problem, HashretError, Exception):
        app.add_exception_handler(kind, _tell)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=400))  # to nobody


async def _tell(request: Request, error: Exception) -> Response:
    return to_response(to_problem(error))


async def _tell_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    names = {404: "there is no such route: see /openapi.json", 405: "this route has no such method: see /openapi.json"}
    problem = Problem(error.status_code, names.get(error.status_code, str(error.detail)))
    problem.headers = dict(error.headers or {})
    return to_response(problem)


async def _tell_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return to_response(Problem(422, f"{first['loc'][-1]}: {first['msg']}", "ValueError"))


def _add_page(app: FastAPI, token: str | None) -> None:
    folder = resources.files("hashret.service") / "page"
    files = {name: (folder / name).read_bytes() for name in ("index.html", *PAGE)}

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        given = request.query_params.get("token")
        if given is None or token is None:
            return Response(files["index.html"], media_type="text/html", headers={"Content-Security-Policy": POLICY})
        if not compare_digest(given.encode(), token.encode()):
            raise Problem(401, "this is not the token: look where the service was started")
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, cookie_of(token), httponly=True, samesite="strict")
        return response

    for name, media_type in PAGE.items():
        response = Response(files[name], media_type=media_type)
        app.add_api_route(f"/{name}", lambda response=response: response, include_in_schema=False)
