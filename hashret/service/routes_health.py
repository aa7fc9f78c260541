"""Routes that say how the collection and the service are."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from hashret.service import messages
from hashret.service.messages import to_json
from hashret.service.metrics import Metrics
from hashret.service.problems import Problem, documented
from hashret.service.work import work_of

router = APIRouter()


@router.get("/v1/info", summary="What the collection holds", responses={200: {"model": messages.Info}, **documented()})
async def info(request: Request) -> Response:
    work = work_of(request)
    return to_json(await work.reads.ask(work.info))


@router.get(
    "/v1/calibration",
    summary="What each radius means on these images, if hashret calibrate has measured it",
    responses={200: {"model": messages.Calibration}, **documented(404)},
)
async def calibration(request: Request) -> Response:
    work = work_of(request)
    return to_json((await work.reads.ask(work.collection.calibration))._asdict())


@router.get("/healthz", summary="Whether the service is alive", responses={200: {"model": messages.Health}})
async def healthz() -> Response:
    return to_json({"status": "alive"})


@router.get(
    "/readyz",
    summary="Whether model and index are loaded and the database can be read",
    responses={200: {"model": messages.Health}, **documented()},
)
async def readyz(request: Request) -> Response:
    work = work_of(request)
    if not work.ready.is_set():
        raise Problem(503, work.trouble or "the model and the index are being loaded: wait", Retry_After="1")
    await work.reads.ask(lambda: work.collection.generation)
    return to_json({"status": "ready"})


@router.get(
    "/metrics",
    summary="Figures for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented()},
)
async def figures(request: Request) -> Response:
    work, metrics = work_of(request), request.app.state.metrics
    assert isinstance(metrics, Metrics)
    collection = work.collection
    counts = await work.reads.ask(lambda: (len(collection), collection.generation, collection.searched))
    return Response(metrics.page(*counts), media_type="text/plain; version=0.0.4; charset=utf-8")
