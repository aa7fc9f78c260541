"""Routes of items: list, add, show and remove them, and find near-duplicates."""

import sys
from functools import partial
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from hashret.codes import MAX_BITS
from hashret.collection.snapshot import values_size
from hashret.data.metadata import Metadata, check_metadata
from hashret.service import messages
from hashret.service.documents import (
    CODED_ITEM_FIELDS,
    ITEM_FIELDS,
    groups_document,
    item_document,
    select_fields,
)
from hashret.service.handlers import Addition, handlers_of
from hashret.service.memory import RequestMemory
from hashret.service.messages import json_response, parse_json, to_json, validate
from hashret.service.problems import Problem, problem_responses
from hashret.service.uploads import BINARY, image_body, read_upload

ItemId = Annotated[int, Path(ge=1, le=2**63 - 1, description="The item.")]

router = APIRouter()


@router.get(
    "/v1/items",
    summary="All items, or those that a filter lets through",
    responses={200: {"model": messages.Items}, **problem_responses(422)},
)
async def list_items(
    request: Request,
    cursor: Annotated[int, Query(ge=0, le=2**63 - 1, description="`next` of the page before.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    where: messages.Where | None = None,
    fields: messages.FieldNames | None = None,
) -> Response:
    handlers = handlers_of(request)
    batcher = handlers.reads if where is None else handlers.filtered_reads
    names, memory = select_fields(fields, ITEM_FIELDS), request.state.memory
    return json_response(await batcher.submit(partial(handlers.items, cursor, limit, where, names, memory)))


@router.post(
    "/v1/items",
    summary="Add images; one that is there already keeps its id",
    responses={200: {"model": messages.Added}, **problem_responses(415, 422)},
    openapi_extra={"requestBody": image_body({"metadata": {"type": "string", "contentMediaType": "application/json"}})},
)
async def add_items(request: Request) -> Response:
    upload = await read_upload(request)
    images = [image for _, image in upload.images]
    if upload.fields or len(upload.metadata) not in (0, len(images)):
        raise Problem(422, "metadata: give none, or a JSON object for each file", "ValueError")
    memory = request.state.memory
    metadata = await run_in_threadpool(_parse_metadata, upload.metadata, memory) or [None] * len(images)
    return to_json({"ids": await handlers_of(request).additions.submit(Addition(images, metadata))})


def _parse_metadata(texts: list[str], memory: RequestMemory) -> list[Metadata | None]:
    """Return the metadata of each image, checked before the images join a batch with those of others.

    As Python objects they take up to 12 times the bytes of their texts, so each is counted before the next is parsed.
    """
    rows: list[Metadata | None] = []
    for text in texts:
        try:
            row = parse_json(text.encode())
            metadata = None if row is None else check_metadata(row)
        except (Problem, ValueError) as error:
            raise Problem(422, f"metadata: {error}", "ValueError") from None
        if metadata is not None:
            memory.hold(sys.getsizeof(metadata) + values_size(metadata))
        rows.append(metadata)
    return rows


@router.get(
    "/v1/items/{item_id}",
    summary="An item",
    responses={200: {"model": messages.CodedItem}, **problem_responses(404, 422)},
)
async def get_item(request: Request, item_id: ItemId, fields: messages.FieldNames | None = None) -> Response:
    collection, memory = handlers_of(request).collection, request.state.memory
    names = select_fields(fields, CODED_ITEM_FIELDS)

    def get() -> bytes:
        return collection.read(lambda view: item_document(view, item_id, names, memory))

    return json_response(await handlers_of(request).reads.submit(get))


@router.delete(
    "/v1/items/{item_id}",
    summary="Forget an item; the file stays",
    responses={200: {"model": messages.Removed}, **problem_responses(422)},
)
async def remove_item(request: Request, item_id: ItemId) -> Response:
    handlers = handlers_of(request)
    return to_json({"removed": await handlers.changes.submit(partial(handlers.collection.remove, [item_id]))})


@router.get(
    "/v1/items/{item_id}/image",
    summary="The picture of an item, scaled",
    response_class=Response,
    responses={200: {"content": {"image/png": BINARY, "image/jpeg": BINARY}}, **problem_responses(404, 422)},
)
async def item_image(
    request: Request,
    item_id: ItemId,
    size: Annotated[int, Query(ge=16, le=2048, description="Of the longer side.")] = 256,
) -> Response:
    handlers = handlers_of(request)
    data, media_type = await handlers.picture_reads.submit(partial(handlers.pictures.of_item, item_id, size))
    request.state.memory.answer(len(data))
    return Response(data, media_type=media_type, headers={"Cache-Control": "private, max-age=3600"})


@router.get(
    "/v1/dupes",
    summary="Groups of near-duplicates",
    responses={200: {"model": messages.Groups}, **problem_responses(422)},
)
async def dupes(
    request: Request,
    max_distance: Annotated[int, Query(ge=0, le=MAX_BITS, description="Of two neighbours, in bits.")] = 3,
    by: Annotated[Literal["connected", "star"], Query(description="Chains, or all near the kept one.")] = "connected",
    keep: Annotated[Literal["largest", "oldest"], Query(description="Which comes first.")] = "largest",
    limit: Annotated[int, Query(ge=1, le=1000, description="How many groups.")] = 200,
    fields: messages.FieldNames | None = None,
) -> Response:
    collection, memory = handlers_of(request).collection, request.state.memory
    names = select_fields(fields, ITEM_FIELDS)

    def find() -> bytes:
        return collection.read(lambda view: groups_document(view, max_distance, by, keep, limit, names, memory))

    return json_response(await handlers_of(request).groupings.submit(find))


@router.post(
    "/v1/verdicts",
    summary="Judge a pair of items; queries and duplicates heed it",
    responses={200: {"model": messages.Verdict}, **problem_responses(404, 422)},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": messages.Verdict.model_json_schema()}},
        }
    },
)
async def judge(request: Request) -> Response:
    pair = validate(messages.Verdict, parse_json(await request.body()))
    if pair.a == pair.b:
        raise Problem(422, f"both are item {pair.a}, one content: give two different items", "ValueError")
    handlers = handlers_of(request)
    await handlers.changes.submit(partial(handlers.collection.verdict, pair.a, pair.b, pair.verdict))
    return to_json(pair.model_dump())
