"""The routes of the service.

Bodies are read and answers written here by hand, because that costs a fraction of what FastAPI takes for it; the
OpenAPI document is made of the same models.
"""

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from hmac import compare_digest
from importlib import resources
from typing import Annotated, Any, Literal, NamedTuple

import anyio.to_thread
from fastapi import FastAPI, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from hashret.codes import MAX_BITS, to_hex
from hashret.collection import Collection
from hashret.errors import HashretError
from hashret.process import version
from hashret.service import MOST_K, MOST_QUERIES, messages
from hashret.service.guard import COOKIE, Guard, cookie_of, is_loopback
from hashret.service.messages import parse_json, to_json, validate
from hashret.service.metrics import Metrics
from hashret.service.problems import Problem, documented, to_problem, to_response
from hashret.service.queries import Queries, answer, answer_json, wanted_of
from hashret.service.work import Addition, Question, Work

BINARY = {"schema": {"type": "string", "contentMediaType": "application/octet-stream"}}
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'"
PAGE = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}

ItemId = Annotated[int, Path(ge=1, le=2**63 - 1, description="The item.")]


class Upload(NamedTuple):
    """Images that came in a request, each with its name, and the fields that came with them."""

    images: list[tuple[str | None, bytes]]
    fields: dict[str, str]
    metadata: list[str]


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
    for origin in origins:
        if not re.fullmatch(r"https?://[^/@?#]+", origin):
            raise ValueError(f"an origin is such as https://photos.example, not {origin!r}")
    metrics = Metrics()
    work = Work(collection, metrics)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, work.warm_up)
            yield {"turned_away": partial(metrics.answered, "other", "other", 503, 0.0)}  # which the server calls
        await anyio.to_thread.run_sync(work.close)

    app = Service(
        title="hashret",
        version=version(),
        description="Find similar images by compact binary codes.",
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
    )
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type"],
        )
    app.guard = partial(
        Guard,
        metrics=metrics,
        queries=Queries(work),
        host=host,
        token=token,
        read_only=collection.read_only,
        origins=origins,
    )
    for kind in (Problem, HashretError, Exception):
        app.add_exception_handler(kind, _tell)
    app.add_exception_handler(HTTPException, _tell_http)
    app.add_exception_handler(RequestValidationError, _tell_invalid)
    app.add_exception_handler(ClientDisconnect, lambda request, error: Response(status_code=400))  # to nobody
    _add_queries(app, work)
    _add_items(app, work)
    _add_copies(app, work)
    _add_health(app, work, metrics)
    _add_page(app, token)
    return app


def _add_queries(app: FastAPI, work: Work) -> None:
    fields = messages.ImageOptions.model_json_schema()["properties"]
    options = [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in fields.items()]
    by_json = {"anyOf": [model.model_json_schema() for model in (messages.ByCode, messages.ByCodes, messages.ById)]}

    async def query(request: Request) -> Response:
        if _media_type(request) == "application/json":
            if request.query_params:
                raise Problem(422, f"{next(iter(request.query_params))[:40]}: put it into the JSON", "ValueError")
            return Response(await answer_json(work, await request.body()), media_type="application/json")
        upload = await _upload(request)
        if upload.metadata:
            raise Problem(422, "metadata: only images that are added have any", "ValueError")
        wanted = wanted_of(validate(messages.ImageOptions, dict(request.query_params) | upload.fields, text=True))
        questions = [Question(name, image, False, wanted) for name, image in upload.images]
        told = await answer(work, questions, several=len(questions) > 1)
        return Response(told, media_type="application/json")

    app.router.routes.append(Route("/v1/query", query, methods=["POST"]))  # FastAPI's own would cost as much again
    app.post(
        "/v1/query",
        summary="Similar images",
        description="A list of answers for several images or a list of codes, and else one answer. Options of a "
        "form or an image may stand in the address.",
        responses={
            200: {"model": messages.Answer | list[messages.Answer]},
            **documented(404, 409, 415, 422),
        },
        openapi_extra={"parameters": options, "requestBody": _body(fields, {"application/json": {"schema": by_json}})},
    )(query)

    @app.post(
        "/v1/encode",
        summary="Codes of images",
        responses={200: {"model": messages.Encoded}, **documented(415, 422)},
        openapi_extra={"requestBody": _body({})},
    )
    async def encode(request: Request) -> Response:
        upload = await _images_alone(request)
        coded = await work.images.ask_all([image for _, image in upload.images])
        fingerprints = {fingerprint for fingerprint, _ in coded}
        if len(fingerprints) > 1:
            raise Problem(503, "the collection has just changed to another model: ask again", Retry_After="0")
        codes = [code.hex() for _, code in coded]
        return to_json({"fingerprint": fingerprints.pop(), "bits": 4 * len(codes[0]), "codes": codes})

    by_id = {"type": "object", "required": ["id"], "properties": {"id": {"type": "integer", "minimum": 1}}}

    @app.post(
        "/v1/reconstruct",
        summary="What the model remembers of an image, as a PNG or JPEG of the size that it sees",
        response_class=Response,
        responses={200: {"content": {"image/png": BINARY, "image/jpeg": BINARY}}, **documented(404, 415, 422)},
        openapi_extra={"requestBody": _body({}, {"application/json": {"schema": by_id}})},
    )
    async def reconstruct(request: Request) -> Response:
        image: bytes | int
        if _media_type(request) == "application/json":
            image = validate(messages.OneItem, parse_json(await request.body())).id
        else:
            upload = await _images_alone(request)
            image = upload.images[0][1]
        data, media_type = await work.memories.ask(partial(work.remembered, image))
        return Response(data, media_type=media_type)


def _add_items(app: FastAPI, work: Work) -> None:
    there = work.collection

    @app.get(
        "/v1/items",
        summary="All items, or those that a filter lets through",
        responses={200: {"model": messages.Items}, **documented(422)},
    )
    async def list_items(
        cursor: Annotated[int, Query(ge=0, le=2**63 - 1, description="`next` of the page before.")] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        where: messages.Where | None = None,
    ) -> Response:
        gather = work.reads if where is None else work.filtered_reads
        items = await gather.ask(partial(work.items, cursor, limit, where))
        following = items[-1].id if len(items) == limit else None
        return to_json({"items": [item._asdict() for item in items], "next": following})

    @app.post(
        "/v1/items",
        summary="Add images; one that is there already keeps its id",
        responses={200: {"model": messages.Added}, **documented(415, 422)},
        openapi_extra={"requestBody": _body({"metadata": {"type": "string", "contentMediaType": "application/json"}})},
    )
    async def add_items(request: Request) -> Response:
        upload = await _upload(request)
        if upload.fields or len(upload.metadata) not in (0, len(upload.images)):
            raise Problem(422, "metadata: give none, or a JSON object for each file", "ValueError")
        metadata = [parse_json(text.encode()) for text in upload.metadata] or [None] * len(upload.images)
        if not all(told is None or isinstance(told, dict) for told in metadata):
            raise Problem(422, "metadata: give none, or a JSON object for each file", "ValueError")
        addition = Addition([image for _, image in upload.images], metadata)
        return to_json({"ids": await work.additions.ask(addition)})

    @app.get(
        "/v1/items/{item_id}", summary="An item", responses={200: {"model": messages.CodedItem}, **documented(404, 422)}
    )
    async def get_item(item_id: ItemId) -> Response:
        def get() -> dict[str, Any]:
            return there.get(item_id)._asdict() | {"code": to_hex(there.codes([item_id]))[0]}

        return to_json(await work.reads.ask(get))

    @app.delete(
        "/v1/items/{item_id}",
        summary="Forget an item; the file stays",
        responses={200: {"model": messages.Removed}, **documented(422)},
    )
    async def remove_item(item_id: ItemId) -> Response:
        return to_json({"removed": await work.changes.ask(partial(there.remove, [item_id]))})

    @app.get(
        "/v1/items/{item_id}/image",
        summary="The picture of an item, scaled",
        response_class=Response,
        responses={200: {"content": {"image/png": BINARY, "image/jpeg": BINARY}}, **documented(404, 422)},
    )
    async def item_image(
        item_id: ItemId, size: Annotated[int, Query(ge=16, le=2048, description="Of the longer side.")] = 256
    ) -> Response:
        data, media_type = await work.reads.ask(partial(work.picture, item_id, size))
        return Response(data, media_type=media_type, headers={"Cache-Control": "private, max-age=3600"})


def _add_copies(app: FastAPI, work: Work) -> None:
    @app.get(
        "/v1/dupes", summary="Groups of near-duplicates", responses={200: {"model": messages.Groups}, **documented(422)}
    )
    async def dupes(
        max_distance: Annotated[int, Query(ge=0, le=MAX_BITS, description="Of two neighbours, in bits.")] = 3,
        by: Annotated[
            Literal["connected", "star"], Query(description="Chains, or all near the kept one.")
        ] = "connected",
        keep: Annotated[Literal["largest", "oldest"], Query(description="Which comes first.")] = "largest",
        limit: Annotated[int, Query(ge=1, le=1000, description="How many groups.")] = 200,
    ) -> Response:
        groups = await work.groupings.ask(partial(work.collection.dupes, max_distance, by=by, keep=keep))
        documents = [
            {
                "size": len(group.items),
                "items": [item._asdict() for item in group.items[:MOST_K]],
                "distances": group.distances[:MOST_K],
            }
            for group in groups[:limit]
        ]
        return to_json({"groups": documents, "more": len(groups) > limit})

    @app.post(
        "/v1/verdicts",
        summary="Judge a pair of items; queries and duplicates heed it",
        responses={200: {"model": messages.Verdict}, **documented(404, 422)},
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": messages.Verdict.model_json_schema()}},
            }
        },
    )
    async def judge(request: Request) -> Response:
        told = validate(messages.Verdict, parse_json(await request.body()))
        if told.a == told.b:
            raise Problem(422, f"both are item {told.a}, one content: a verdict is of two", "ValueError")
        await work.changes.ask(partial(work.collection.verdict, told.a, told.b, told.verdict))
        return to_json(told.model_dump())


def _add_health(app: FastAPI, work: Work, metrics: Metrics) -> None:
    there = work.collection

    @app.get("/v1/info", summary="What the collection holds", responses={200: {"model": messages.Info}, **documented()})
    async def info() -> Response:
        return to_json(await work.reads.ask(work.info))

    @app.get(
        "/v1/calibration",
        summary="What each radius means on these images, if hashret calibrate has measured it",
        responses={200: {"model": messages.Calibration}, **documented(404)},
    )
    async def calibration() -> Response:
        return to_json((await work.reads.ask(there.calibration))._asdict())

    @app.get("/healthz", summary="Whether the service is alive", responses={200: {"model": messages.Health}})
    async def healthz() -> Response:
        return to_json({"status": "alive"})

    @app.get(
        "/readyz",
        summary="Whether model and index are loaded and the database can be read",
        responses={200: {"model": messages.Health}, **documented()},
    )
    async def readyz() -> Response:
        if not work.ready.is_set():
            raise Problem(503, work.trouble or "the model and the index are being loaded: wait", Retry_After="1")
        await work.reads.ask(lambda: there.generation)
        return to_json({"status": "ready"})

    @app.get(
        "/metrics",
        summary="Figures for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented()},
    )
    async def figures() -> Response:
        told = await work.reads.ask(lambda: (len(there), there.generation, there.searched))
        return Response(metrics.page(*told), media_type="text/plain; version=0.0.4; charset=utf-8")


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


def _body(fields: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, Any]:
    """The OpenAPI of a body of images, by a form with these fields besides, or a single one as it is."""
    files = {"type": "array", "items": BINARY["schema"], "minItems": 1, "maxItems": MOST_QUERIES}
    form = {"type": "object", "required": ["file"], "properties": {"file": files, **fields}}
    content = {"multipart/form-data": {"schema": form}, "image/*": BINARY, "application/octet-stream": BINARY}
    return {"required": True, "content": content | (more or {})}


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _upload(request: Request) -> Upload:
    """The images of a request that is one, or a form with files."""
    media_type = _media_type(request)
    if media_type.startswith("image/") or media_type == "application/octet-stream":
        return Upload([(None, await request.body())], {}, [])
    if media_type != "multipart/form-data":
        raise Problem(415, "send an image as image/*, images as multipart/form-data, or codes and ids as JSON")
    images: list[tuple[str | None, bytes]] = []
    fields: dict[str, str] = {}
    metadata: list[str] = []
    try:
        form = await request.form(max_files=MOST_QUERIES, max_fields=MOST_QUERIES + 16, max_part_size=2**16)
    except HTTPException as error:
        raise Problem(422 if "Too many" in str(error.detail) else 400, str(error.detail), "ValueError") from None
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name != "file":
                    raise Problem(422, f"{name[:40]}: files go in the field 'file'", "ValueError")
                images.append((value.filename or None, await value.read()))
            elif name == "metadata":
                metadata.append(value)
            elif name == "file":
                raise Problem(422, "file: give a file, with a name, not a text", "ValueError")
            else:
                fields[name] = value
    finally:
        await form.close()
    if not images:
        raise Problem(422, "file: give an image", "ValueError")
    return Upload(images, fields, metadata)


async def _images_alone(request: Request) -> Upload:
    upload = await _upload(request)
    if upload.fields or upload.metadata:
        raise Problem(422, f"{next(iter(upload.fields), 'metadata')}: there is no such field here", "ValueError")
    return upload
