"""What a request is told when it is refused: RFC 9457, with the texts of Python and the command line."""

import json
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

from hashret.errors import HashretError, NotFound, TooLarge, one_line

MEDIA_TYPE = "application/problem+json"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "error"],
    "properties": {
        "type": {"type": "string", "const": "about:blank"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "One line that says what to do."},
        "error": {"type": "string", "description": "The exception that the Python client raises of it."},
    },
}


class Problem(Exception):
    """A request that is refused; `error` names the exception that the Python client raises of it."""

    def __init__(self, status: int, detail: str, error: str = "HashretError", **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.error = status, detail, error
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Busy(Problem):
    """More is waiting already than can be answered soon."""

    def __init__(self, what: str) -> None:
        super().__init__(503, f"too many {what} at once: try again in a second", Retry_After="1")


def to_problem(error: Exception) -> Problem:
    """How the errors of a collection are told; those that are not the request's fault are a 503."""
    text = one_line(error)
    if isinstance(error, Problem):
        return error
    if isinstance(error, NotFound):
        return Problem(404, text, "NotFound")
    if isinstance(error, TooLarge):
        return Problem(413, text, "TooLarge")
    if isinstance(error, HashretError):
        return Problem(503, text, Retry_After="1")
    return Problem(500, f"an error of the service ({type(error).__name__}): its log says more")


def to_response(problem: Problem) -> Response:
    status = HTTPStatus(problem.status)
    told = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": problem.detail}
    return Response(
        json.dumps(told | {"error": problem.error}),
        status,
        headers=problem.headers,
        media_type=MEDIA_TYPE,
    )


def documented(*statuses: int) -> Mapping[int | str, dict[str, Any]]:
    """These refusals, and those that any route may give, for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": SCHEMA}}
    every = {400, 401, 403, 413, 500, 503, *statuses}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in sorted(every)}
