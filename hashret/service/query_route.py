"""The query route: JSON with codes or an item, the bytes of an image, or a form with images.

The middleware of FastAPI and Starlette takes longer than most searches, so the guard passes queries to `QueryRoute`
directly. Queries of pages need CORS headers: they pass the middleware and reach the same `answer`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hashret.errors import HashretError
from hashret.results import MAX_HITS, QueryOptions
from hashret.service import messages
from hashret.service.documents import HIT_FIELDS, Fields, select_fields
from hashret.service.guard import Message, Receive, Send
from hashret.service.handlers import Handlers
from hashret.service.memory import RequestMemory
from hashret.service.messages import parse_json, validate
from hashret.service.problems import Problem, to_problem, to_response
from hashret.service.queries import CodeQuery, ImageQuery, ItemQuery, Query
from hashret.service.uploads import read_upload


class QueryRoute:
    """The query route as an ASGI application without middleware."""

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            body = await answer(self._handlers, scope, receive)
        except ClientDisconnect:
            await Response(status_code=400)(scope, receive, send)  # not received
        except (Problem, HashretError) as error:
            await to_response(to_problem(error))(scope, receive, send)
        except Exception as error:
            await to_response(to_problem(error))(scope, receive, send)
            raise  # uvicorn logs it
        else:
            headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})


async def answer(handlers: Handlers, scope: Message, receive: Receive) -> bytes:
    """Return the answer to a request as JSON: a list for several images or a list of codes.

    Raise Problem, or an HashretError of the collection.
    """
    media_type = _media_type(scope)
    if media_type == b"application/json":
        if scope["query_string"] and (url_params := QueryParams(scope["query_string"])):
            raise Problem(422, f"{next(iter(url_params))[:40]}: put it into the JSON", "ValueError")
        queries, is_list = _json_queries(parse_json(await _body(receive)), scope["state"]["memory"])
    elif media_type.startswith(b"image/"):
        options = _url_options(scope, {})
        queries, is_list = [ImageQuery(None, await _body(receive), *options)], False
    else:
        upload = await read_upload(Request(scope, receive))
        if upload.metadata:
            raise Problem(422, "metadata: a query has none, only images to add have", "ValueError")
        options = _url_options(scope, upload.fields)
        queries = [ImageQuery(name, image, *options) for name, image in upload.images]
        is_list = len(queries) > 1
    return await _submit(handlers, queries, is_list)


async def _submit(handlers: Handlers, queries: Sequence[Query], is_list: bool) -> bytes:
    batcher = handlers.batcher_for(queries)
    if not is_list:
        return await batcher.submit(queries[0])
    if (queries[0].options.k or 0) * len(queries) > MAX_HITS:
        limit = MAX_HITS // len(queries)
        raise Problem(422, f"k: at most {limit} for {len(queries)} queries, {MAX_HITS:,} hits in all", "ValueError")
    return b"".join(_as_list(await batcher.submit_all(queries)))


def _as_list(answers: list[bytes]) -> Iterator[bytes]:
    """Yield the parts of a JSON list."""
    for position, part in enumerate(answers):
        yield b"," if position else b"["
        yield part
    yield b"]"


def _json_queries(params: Any, memory: RequestMemory) -> tuple[list[Query], bool]:
    """Return the queries of a JSON body, and whether their answer is a list."""
    if not isinstance(params, dict):
        raise Problem(422, "the request: give an object with code or id", "ValueError")
    if "id" in params:
        item = validate(messages.ById, params)
        fields = select_fields(item.fields, HIT_FIELDS)
        return [ItemQuery(f"id:{item.id}", item.id, item.query_options(), item.codes, fields, memory)], False
    is_list = isinstance(params.get("code"), list)
    query: messages.ByCode | messages.ByCodes
    query = validate(messages.ByCodes, params) if is_list else validate(messages.ByCode, params)
    texts = query.code if isinstance(query.code, list) else [query.code]
    options, fields = query.query_options(), select_fields(query.fields, HIT_FIELDS)
    return [
        CodeQuery(f"hex:{text}", bytes.fromhex(text), options, query.codes, query.fingerprint, fields, memory)
        for text in texts
    ], is_list


_DEFAULTS = messages.ImageOptions()
_DEFAULT_OPTIONS = _DEFAULTS.query_options()


def _url_options(scope: Message, form: dict[str, str]) -> tuple[QueryOptions, bool, Fields, RequestMemory]:
    """Return what follows the image in an `ImageQuery`, from the URL and the fields of a form."""
    query_string, memory = scope["query_string"], scope["state"]["memory"]
    if not query_string and not form:
        return _DEFAULT_OPTIONS, _DEFAULTS.codes, HIT_FIELDS, memory
    params = validate(messages.ImageOptions, dict(QueryParams(query_string)) | form, text=True)
    return params.query_options(), params.codes, select_fields(params.fields, HIT_FIELDS), memory


def _media_type(scope: Message) -> bytes:
    value: bytes = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return value.partition(b";")[0].strip().lower()


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
