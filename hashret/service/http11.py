"""HTTP/1.1 by uvicorn and h11, with requests rejected before parsing while too many are in progress.

`uvicorn.Config(limit_concurrency=…)` rejects a request only after h11 has parsed it: with 4,096 connections that took
180 µs each, and rejected requests waited for each other (`benchmarks/service.py --parts overload` measures it). uvicorn
has no public access to the bytes before h11, so `Protocol` uses private attributes of its `H11Protocol`, which nothing
else in hashret does: `conn`, `cycle`, `tasks`, `transport`, `app_state`, and the method `send_400_response`.
"""

import re
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hashret.service import guard
from hashret.service.problems import Busy, Problem, to_response

# The form of usual requests; h11 parses all others.
WHOLE_HEAD = re.compile(rb"(?:GET|POST|DELETE) /[!-~]* HTTP/1\.1\r\n(?:[A-Za-z0-9_-]+:[ \t]*[!-~][ -~]*\r\n)+\r\n")
LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]{1,9})\r\n")
UNSUPPORTED_HEADERS = re.compile(rb"\r\n(?:transfer-encoding|connection|expect|upgrade)")
HEALTH = tuple(f"{method} {path}".encode() for method in ("GET", "HEAD") for path in guard.PUBLIC_PATHS)


def _serialise(problem: Problem) -> bytes:
    """Return the bytes of a response that is sent without h11."""
    response = to_response(problem)
    headers = [*response.raw_headers, *guard.HEADERS]
    lines = b"".join(b"%s: %s\r\n" % header for header in headers)
    phrase = HTTPStatus(problem.status).phrase.encode()
    return b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (problem.status, phrase, lines, response.body)


BUSY_RESPONSE = _serialise(Busy("requests"))
UNREADABLE_DETAIL = "not an HTTP request, or URL and headers are over 64 KiB: send a valid or shorter one"
UNREADABLE_RESPONSE = _serialise(Problem(400, UNREADABLE_DETAIL, "ValueError", Connection="close"))


class Protocol(H11Protocol):
    """HTTP/1.1 that rejects requests before parsing while `guard.MAX_IN_FLIGHT` are in progress, except for health."""

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.ERROR:
            return  # after `send_400_response`
        if len(self.tasks) >= guard.MAX_IN_FLIGHT and self._is_between_requests() and is_complete_request(data):
            self.transport.write(BUSY_RESPONSE)
            if count_rejected := self.app_state.get("count_rejected"):
                count_rejected()
        else:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Respond to bytes that h11 cannot parse. Later bytes are ignored until the client closes the connection or is
        idle for too long: closing it here would lose the response if the client is still sending."""
        is_idle = self._is_idle()
        if is_idle or not self.cycle.response_started:
            self.transport.write(UNREADABLE_RESPONSE)
        if is_idle and self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def _is_between_requests(self) -> bool:
        """Return whether the next byte is the first of a request."""
        return self._is_idle() and not self.conn.trailing_data[0]

    def _is_idle(self) -> bool:
        """Return whether every request has its response."""
        return self.cycle is None or self.cycle.response_complete


def is_complete_request(data: bytes) -> bool:
    """Return whether the bytes are certainly one complete request, and not one for health."""
    head = WHOLE_HEAD.match(data)
    if head is None or data.startswith(HEALTH):
        return False
    lines = head[0].lower()
    lengths = LENGTH.findall(lines)
    has_length = len(lengths) == lines.count(b"content-length") <= 1 and not UNSUPPORTED_HEADERS.search(lines)
    return has_length and len(data) == head.end() + sum(map(int, lengths))
