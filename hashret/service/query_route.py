"""The route of queries: by codes and by an item, which come as JSON, and by images, one as it is or several in a form.

FastAPI's and Starlette's layers take longer than many a search. So the guard hands queries straight to `QueryRoute`,
but those of pages: they need the headers of CORS, and come through the layers to the same `answer`.
"""

from collections.abc import Sequence
from typing import Any

from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from hashret.errors import HashretError
from hashret.results import MAX_HITS, QueryOptions
from hashret.service import messages
from hashret.service.guard import Message, Receive, Send
from hashret.service.messages import parse_json, validate
from hashret.service.problems import Problem, to_problem, to_response
from hashret.service.queries import CodeQuery, ImageQuery, ItemQuery, Query
from hashret.service.uploads import read_upload
from hashret.service.work import Work


class QueryRoute:
    """ASGI application of the route, with no other layer around it."""

    def __init__(self, work: Work) -> None:
        self._work = work

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        try:
            body = await answer(self._work, scope, receive)
        except ClientDisconnect:
            await Response(status_code=400)(scope, receive, send)  # to nobody
        except (Problem, HashretError) as error:
            await to_response(to_problem(error))(scope, receive, send)
        except Exception as error:
            await to_response(to_problem(error))(scope, receive, send)
            raise  # for the log
        else:
            headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})


async def answer(work: Work, scope: Message, receive: Receive) -> bytes:
    """The answer to a request, as JSON: a list for several images or a list of codes. Raises Problem, or HashretError
    of the collection."""
    kind = _media_type(scope)
    if kind == b"application/json":
        if scope["query_string"] and (address := QueryParams(scope["query_string"])):
            raise Problem(422, f"{next(iter(address))[:40]}: put it into the JSON", "ValueError")
        queries, many = _json_queries(parse_json(await _body(receive)))
    elif kind.startswith(b"image/"):
        options, codes = _address_options(scope, {})
        queries, many = [ImageQuery(None, await _body(receive), options, codes)], False
    else:
        upload = await read_upload(Request(scope, receive))
        if upload.metadata:
            raise Problem(422, "metadata: only images that are added have any", "ValueError")
        options, codes = _address_options(scope, upload.fields)
        queries = [ImageQuery(name, image, options, codes) for name, image in upload.images]
        many = len(queries) > 1
    return await _ask(work, queries, many)


async def _ask(work: Work, queries: Sequence[Query], many: bool) -> bytes:
    gather = work.gather_for(queries)
    if not many:
        return await gather.ask(queries[0])
    if (queries[0].options.k or 0) * len(queries) > MAX_HITS:
        most = MAX_HITS // len(queries)
        raise Problem(422, f"k: at most {most} for so many queries, which is {MAX_HITS:,} in all", "ValueError")
    return b"[" + b",".join(await gather.ask_all(queries)) + b"]"


def _json_queries(params: Any) -> tuple[list[Query], bool]:
    """The queries of a JSON body, and whether their answer is a list."""
    if not isinstance(params, dict):
        raise Problem(422, "the request: give an object with code or id", "ValueError")
    if "id" in params:
        item = validate(messages.ById, params)
        return [ItemQuery(f"id:{item.id}", item.id, item.query_options(), item.codes)], False
    many = isinstance(params.get("code"), list)
    query: messages.ByCode | messages.ByCodes
    query = validate(messages.ByCodes, params) if many else validate(messages.ByCode, params)
    texts = query.code if isinstance(query.code, list) else [query.code]
    options = query.query_options()
    return [
        CodeQuery(f"hex:{text}", bytes.fromhex(text), options, query.codes, query.fingerprint) for text in texts
    ], many


_DEFAULTS = messages.ImageOptions()
_DEFAULT_OPTIONS = _DEFAULTS.query_options()


def _address_options(scope: Message, fields: dict[str, str]) -> tuple[QueryOptions, bool]:
    """The options that stand in the address or in the fields of a form, and whether codes are to be given."""
    address = scope["query_string"]
    if not address and not fields:
        return _DEFAULT_OPTIONS, _DEFAULTS.codes
    params = validate(messages.ImageOptions, dict(QueryParams(address)) | fields, text=True)
    return params.query_options(), params.codes


def _media_type(scope: Message) -> bytes:
    kind: bytes = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return kind.partition(b";")[0].strip().lower()


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
