"""The ASGI application of the service: middleware, error handlers, routes and the web page.

Routes parse bodies and write answers by hand, because FastAPI takes several times as long. The OpenAPI document is made
from the same pydantic models.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from hmac import compare_digest
from importlib import resources
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp

from hashret.collection import Collection
from hashret.errors import HashretError
from hashret.process import version
from hashret.service import routes_health, routes_items, routes_queries
from hashret.service.access import COOKIE, Access, cookie_value, is_loopback
from hashret.service.guard import Guard
from hashret.service.handlers import Handlers
from hashret.service.load import Load
from hashret.service.metrics import Metrics
from hashret.service.problems import Problem, to_problem, to_response
from hashret.service.query_route import QueryRoute

PAGE = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}


class Service(FastAPI):
    """FastAPI whose outermost layer is the `Guard`."""

    guard: Callable[[ASGIApp], Guard]

    def build_middleware_stack(self) -> ASGIApp:
        return self.guard(super().build_middleware_stack())


def create_app(
    collection: Collection, *, host: str = "127.0.0.1", token: str | None = None, origins: Sequence[str] = ()
) -> FastAPI:
    """Return the application that serves a collection on `host`; it is read-only if the collection is.

    Requests that write need `token`; on a host other than loopback all requests need it, except for health. None means
    no token. Browser pages from `origins` may use the service. Raise ValueError for an invalid origin, or for no token
    on a host other than loopback.
    """
    if token is None and not is_loopback(host):
        raise ValueError(f"a service on {host} needs a token")
    access = Access(host=host, token=token, read_only=collection.read_only, origins=origins)
    metrics, load = Metrics(), Load()
    handlers = Handlers(collection, metrics)
    app = Service(
        title="hashret",
        version=version(),
        description="Find similar images by compact binary codes.",
        lifespan=_lifespan,
        docs_url=None,  # both pages load scripts from other hosts
        redoc_url=None,
    )
    app.state.handlers, app.state.metrics, app.state.load = handlers, metrics, load
    app.guard = partial(Guard, queries=QueryRoute(handlers), access=access, load=load, metrics=metrics)
    _add_error_handlers(app)
    for routes in (routes_queries, routes_items, routes_health):
        app.include_router(routes.router)
    _add_page(app, token)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
    handlers: Handlers = app.state.handlers
    metrics: Metrics = app.state.metrics
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, handlers.warm_up)
        # http11.Protocol uses them to reject requests.
        yield {"load": app.state.load, "count_rejected": partial(metrics.count_response, "other", "other", 503, 0.0)}
    await anyio.to_thread.run_sync(handlers.close)


def _add_error_handlers(app: FastAPI) -> None:
    for error_type in (Problem, HashretError, Exception):
        app.add_exception_handler(error_type, _respond)
    app.add_exception_handler(HTTPException, _respond_http)
    app.add_exception_handler(RequestValidationError, _respond_invalid)
    app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=400))  # not received


async def _respond(request: Request, error: Exception) -> Response:
    return to_response(to_problem(error))


async def _respond_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    details = {
        404: "there is no such route: see /openapi.json",
        405: "this route has no such method: see /openapi.json",
    }
    problem = Problem(error.status_code, details.get(error.status_code, str(error.detail)))
    problem.headers = dict(error.headers or {})
    return to_response(problem)


async def _respond_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return to_response(Problem(422, f"{first['loc'][-1]}: {first['msg']}", "ValueError"))


def _add_page(app: FastAPI, token: str | None) -> None:
    folder = resources.files("hashret.service") / "page"
    files = {name: (folder / name).read_bytes() for name in ("index.html", *PAGE)}

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        query_token = request.query_params.get("token")
        if query_token is None or token is None:
            return Response(files["index.html"], media_type="text/html")
        if not compare_digest(query_token.encode(), token.encode()):
            raise Problem(401, "this is not the token: take the one that hashret serve printed or was given")
        response = RedirectResponse("/", 303)
        response.set_cookie(COOKIE, cookie_value(token), httponly=True, samesite="strict")
        return response

    for name, media_type in PAGE.items():
        response = Response(files[name], media_type=media_type)
        app.add_api_route(f"/{name}", lambda response=response: response, include_in_schema=False)
