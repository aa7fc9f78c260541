"""Routes that take images or codes and change nothing: queries, codes and reconstructions."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hashret.service import messages
from hashret.service.messages import parse_json, to_json, validate
from hashret.service.problems import Problem, documented
from hashret.service.query_route import answer
from hashret.service.uploads import BINARY, documented_body, media_type, read_images
from hashret.service.work import work_of

FIELDS: dict[str, Any] = messages.ImageOptions.model_json_schema()["properties"]
OPTIONS = [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in FIELDS.items()]
BY_JSON = {"anyOf": [model.model_json_schema() for model in (messages.ByCode, messages.ByCodes, messages.ById)]}
BY_ID = {"type": "object", "required": ["id"], "properties": {"id": {"type": "integer", "minimum": 1}}}

router = APIRouter()


@router.post(
    "/v1/query",
    summary="Similar images",
    description="A list of answers for several images or a list of codes, and else one answer. Options of a "
    "form or an image may stand in the address.",
    responses={200: {"model": messages.Answer | list[messages.Answer]}, **documented(404, 409, 415, 422)},
    openapi_extra={
        "parameters": OPTIONS,
        "requestBody": documented_body(FIELDS, {"application/json": {"schema": BY_JSON}}),
    },
)
async def query(request: Request) -> Response:
    """Queries of pages: the guard answers all others by `QueryRoute`."""
    return Response(await answer(work_of(request), request.scope, request.receive), media_type="application/json")


@router.post(
    "/v1/encode",
    summary="Codes of images",
    responses={200: {"model": messages.Encoded}, **documented(415, 422)},
    openapi_extra={"requestBody": documented_body({})},
)
async def encode(request: Request) -> Response:
    coded = await work_of(request).images.ask_all(await read_images(request))
    fingerprints = {fingerprint for fingerprint, _ in coded}
    if len(fingerprints) > 1:
        raise Problem(503, "the collection has just changed to another model: ask again", Retry_After="0")
    codes = [code.hex() for _, code in coded]
    return to_json({"fingerprint": fingerprints.pop(), "bits": 4 * len(codes[0]), "codes": codes})


@router.post(
    "/v1/reconstruct",
    summary="What the model remembers of an image, as a PNG or JPEG of the size that it sees",
    response_class=Response,
    responses={200: {"content": {"image/png": BINARY, "image/jpeg": BINARY}}, **documented(404, 415, 422)},
    openapi_extra={"requestBody": documented_body({}, {"application/json": {"schema": BY_ID}})},
)
async def reconstruct(request: Request) -> Response:
    image: bytes | int
    if media_type(request) == "application/json":
        image = validate(messages.OneItem, parse_json(await request.body())).id
    else:
        image = (await read_images(request))[0]
    work = work_of(request)
    data, kind = await work.memories.ask(partial(work.pictures.reconstruction, image))
    return Response(data, media_type=kind)
