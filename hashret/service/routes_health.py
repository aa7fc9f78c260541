"""Routes about the collection and the service: info, calibration, health and metrics."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from hashret.service import messages
from hashret.service.handlers import handlers_of
from hashret.service.messages import to_json
from hashret.service.metrics import Metrics
from hashret.service.problems import Problem, problem_responses

router = APIRouter()


@router.get(
    "/v1/info", summary="What the collection holds", responses={200: {"model": messages.Info}, **problem_responses()}
)
async def info(request: Request) -> Response:
    handlers = handlers_of(request)
    return to_json(await handlers.reads.submit(handlers.info))


@router.get(
    "/v1/calibration",
    summary="What each radius means on these images, if hashret calibrate has measured it",
    responses={200: {"model": messages.Calibration}, **problem_responses(404)},
)
async def calibration(request: Request) -> Response:
    handlers = handlers_of(request)
    return to_json((await handlers.reads.submit(handlers.collection.calibration))._asdict())


@router.get("/healthz", summary="Whether the service is alive", responses={200: {"model": messages.Health}})
async def healthz() -> Response:
    return to_json({"status": "alive"})


@router.get(
    "/readyz",
    summary="Whether queries can be answered",
    responses={200: {"model": messages.Health}, **problem_responses()},
)
async def readyz(request: Request) -> Response:
    handlers = handlers_of(request)
    if not handlers.ready.is_set():
        raise Problem(503, handlers.startup_error or "the model and the index are being loaded: wait", Retry_After="1")
    await handlers.reads.submit(handlers.collection.check_ready)
    return to_json({"status": "ready"})


@router.get(
    "/metrics",
    summary="Figures for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **problem_responses()},
)
async def figures(request: Request) -> Response:
    handlers, metrics = handlers_of(request), request.app.state.metrics
    assert isinstance(metrics, Metrics)
    collection = handlers.collection
    counts = await handlers.reads.submit(lambda: (len(collection), collection.generation, collection.searched))
    return Response(metrics.render(*counts), media_type="text/plain; version=0.0.4; charset=utf-8")
