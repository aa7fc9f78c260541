"""HTTP/1.1 by uvicorn and h11, whose requests are turned away unread while too many are being answered.

`uvicorn.Config(limit_concurrency=…)` refuses a request only after h11 has read it: at 4,096 connections that took
180 µs each, and the refused waited for each other (`benchmarks/service.py --parts overload` measures it). uvicorn has
no public way to look at the bytes before h11 does, so `Protocol` uses private attributes of its `H11Protocol`, as
nothing else in hashret does: `conn`, `cycle`, `tasks`, `transport`, `app_state`, and the method `send_400_response`.
"""

import re
from http import HTTPStatus

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hashret.service import guard
from hashret.service.problems import Busy, Problem, to_response

# The usual request: others are left to h11.
WHOLE_HEAD = re.compile(rb"(?:GET|POST|DELETE) /[!-~]* HTTP/1\.1\r\n(?:[A-Za-z0-9_-]+:[ \t]*[!-~][ -~]*\r\n)+\r\n")
LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]{1,9})\r\n")
UNUSUAL = re.compile(rb"\r\n(?:transfer-encoding|connection|expect|upgrade)")
HEALTH = tuple(f"{method} {path}".encode() for method in ("GET", "HEAD") for path in guard.OPEN)


def _whole(problem: Problem) -> bytes:
    """The whole of an answer that is not left to h11."""
    response = to_response(problem)
    headers = [*response.raw_headers, *guard.HEADERS]
    lines = b"".join(b"%s: %s\r\n" % header for header in headers)
    phrase = HTTPStatus(problem.status).phrase.encode()
    return b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (problem.status, phrase, lines, response.body)


TURNED_AWAY = _whole(Busy("requests"))
LONG = "this is no HTTP request, or its address and headers are over 64 KiB: send a shorter one"
UNREADABLE = _whole(Problem(400, LONG, "ValueError", Connection="close"))


class Protocol(H11Protocol):
    """HTTP/1.1; a request is turned away unread while `guard.MOST_RUNNING` are being answered, but not if it asks for
    health."""

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.ERROR:
            return  # see `send_400_response`
        if len(self.tasks) >= guard.MOST_RUNNING and self._is_between() and is_whole(data):
            self.transport.write(TURNED_AWAY)
            if count := self.app_state.get("turned_away"):
                count()
        else:
            super().data_received(data)

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read. What follows it is passed over until the client closes, or is idle for too long:
        were the connection closed here, the answer would be lost to who is still sending."""
        answered = self._has_answered()
        if answered or not self.cycle.response_started:
            self.transport.write(UNREADABLE)
        if answered and self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def _is_between(self) -> bool:
        """Whether the next byte is the first of a request."""
        return self._has_answered() and not self.conn.trailing_data[0]

    def _has_answered(self) -> bool:
        return self.cycle is None or self.cycle.response_complete


def is_whole(data: bytes) -> bool:
    """Whether these are the bytes of one request that may be refused, beyond doubt, so that the next follows them."""
    head = WHOLE_HEAD.match(data)
    if head is None or data.startswith(HEALTH):
        return False
    names = head[0].lower()
    lengths = LENGTH.findall(names)
    known = len(lengths) == names.count(b"content-length") <= 1 and not UNUSUAL.search(names)
    return known and len(data) == head.end() + sum(map(int, lengths))
