"""Routes that read images or codes and change nothing: queries, codes and reconstructions."""

from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from hashret.service import messages
from hashret.service.handlers import handlers_of
from hashret.service.messages import parse_json, to_json, validate
from hashret.service.problems import Problem, problem_responses
from hashret.service.query_route import answer
from hashret.service.uploads import BINARY, image_body, media_type, read_images

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
    responses={200: {"model": messages.Answer | list[messages.Answer]}, **problem_responses(404, 409, 415, 422)},
    openapi_extra={
        "parameters": OPTIONS,
        "requestBody": image_body(FIELDS, {"application/json": {"schema": BY_JSON}}),
    },
)
async def query(request: Request) -> Response:
    """Answer a query of a page; the guard passes all others to `QueryRoute`."""
    return Response(await answer(handlers_of(request), request.scope, request.receive), media_type="application/json")


@router.post(
    "/v1/encode",
    summary="Codes of images",
    responses={200: {"model": messages.Encoded}, **problem_responses(415, 422)},
    openapi_extra={"requestBody": image_body({})},
)
async def encode(request: Request) -> Response:
    results = await handlers_of(request).images.submit_all(await read_images(request))
    fingerprints = {fingerprint for fingerprint, _ in results}
    if len(fingerprints) > 1:
        raise Problem(503, "the model of the collection has just changed: repeat the request", Retry_After="0")
    codes = [code.hex() for _, code in results]
    return to_json({"fingerprint": fingerprints.pop(), "bits": 4 * len(codes[0]), "codes": codes})


@router.post(
    "/v1/reconstruct",
    summary="What the model remembers of an image, as a PNG or JPEG of the size that it sees",
    response_class=Response,
    responses={200: {"content": {"image/png": BINARY, "image/jpeg": BINARY}}, **problem_responses(404, 415, 422)},
    openapi_extra={"requestBody": image_body({}, {"application/json": {"schema": BY_ID}})},
)
async def reconstruct(request: Request) -> Response:
    image: bytes | int
    if media_type(request) == "application/json":
        image = validate(messages.ItemReference, parse_json(await request.body())).id
    else:
        image = (await read_images(request))[0]
    handlers = handlers_of(request)
    data, picture_type = await handlers.reconstructions.submit(partial(handlers.pictures.reconstruction, image))
    request.state.memory.answer(len(data))
    return Response(data, media_type=picture_type)
