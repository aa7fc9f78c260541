"""Error responses: problem details of RFC 9457, with the error texts of Python and the command line."""

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
    """An error response. `error` names the exception that the Python client raises."""

    def __init__(self, status: int, detail: str, error: str = "HashretError", **headers: str) -> None:
        super().__init__(detail)
        self.status, self.detail, self.error = status, detail, error
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Busy(Problem):
    """The response to a request beyond a limit of the service; `items` names what is too many."""

    def __init__(self, items: str) -> None:
        super().__init__(503, f"too many {items} at once: try again in a second", Retry_After="1")


def to_problem(error: Exception) -> Problem:
    """Return an error as a problem. Errors of the collection that the request did not cause have status 503."""
    text = one_line(error)
    if isinstance(error, Problem):
        return error
    if isinstance(error, NotFound):
        return Problem(404, text, "NotFound")
    if isinstance(error, TooLarge):
        return Problem(413, text, "TooLarge")
    if isinstance(error, HashretError):
        return Problem(503, text, Retry_After="1")
    return Problem(500, f"internal error ({type(error).__name__}): see the log of the service")


def to_response(problem: Problem) -> Response:
    """Return a problem as a response."""
    status = HTTPStatus(problem.status)
    document = {"type": "about:blank", "title": status.phrase, "status": status.value, "detail": problem.detail}
    return Response(
        json.dumps(document | {"error": problem.error}),
        status,
        headers=problem.headers,
        media_type=MEDIA_TYPE,
    )


def problem_responses(*statuses: int) -> Mapping[int | str, dict[str, Any]]:
    """Return the error responses with these statuses, and those of every route, for the OpenAPI document."""
    content = {MEDIA_TYPE: {"schema": SCHEMA}}
    all_statuses = {400, 401, 403, 413, 500, 503, *statuses}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in sorted(all_statuses)}
