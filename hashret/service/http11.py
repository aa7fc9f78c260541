"""HTTP/1.1 by uvicorn and h11, with limits for what comes before a request is known.

- `BoundedBuffer` rejects heads and chunks that are too large, or that h11 would read in quadratic time: it takes 28 s
  for a header of 60,000 spaces before a NUL, and limits only what arrives in parts.
- `Protocol` limits the number of connections, and rejects requests before parsing while too many are in progress.
  `uvicorn.Config(limit_concurrency=…)` rejects a request only after h11 has parsed it: with 4,096 connections that took
  180 µs each, and rejected requests waited for each other (`benchmarks/service.py --parts overload` measures it).

uvicorn and h11 have no public access to the bytes before parsing, so this file uses private attributes of them, which
nothing else in hashret does: `conn`, `cycle`, `connections`, `tasks`, `transport`, `app_state` and the method
`send_400_response` of uvicorn's `H11Protocol`, and `h11._receivebuffer` and `_receive_buffer` of `h11.Connection`.
"""

import asyncio
import re
import resource
from http import HTTPStatus

import h11
from h11._receivebuffer import ReceiveBuffer
from uvicorn.protocols.http.h11_impl import H11Protocol

from hashret.service.access import PUBLIC_PATHS
from hashret.service.guard import HEADERS
from hashret.service.load import Load
from hashret.service.problems import Busy, Problem, to_response

MAX_HEAD_BYTES = 2**16  # URL and headers of a request
MAX_HEADERS = 100
MAX_CHUNK_HEAD_BYTES = 256  # size and extensions of a chunk
MAX_READ_BYTES = 2**16  # bytes of a connection that are parsed before others have their turn
MAX_CONNECTIONS = 10_000
RESERVED_FILES = 256  # of the limit of open files, for the collection

# The form of usual requests; h11 parses all others.
WHOLE_HEAD = re.compile(rb"(?:GET|POST|DELETE) /[!-~]* HTTP/1\.1\r\n(?:[A-Za-z0-9_-]+:[ \t]*[!-~][ -~]*\r\n)+\r\n")
LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]{1,9})\r\n")
# In a header that holds one of them, h11 tries every division of a run of spaces between two expressions.
CONTROL_CHARACTERS = re.compile(rb"[\0\v\f\r]")
UNSUPPORTED_HEADERS = re.compile(rb"\r\n(?:transfer-encoding|connection|expect|upgrade)")
HEALTH = tuple(f"{method} {path}".encode() for method in ("GET", "HEAD") for path in PUBLIC_PATHS)


def _serialise(problem: Problem) -> bytes:
    """Return the bytes of a response that is sent without h11."""
    response = to_response(problem)
    headers = [*response.raw_headers, *HEADERS]
    lines = b"".join(b"%s: %s\r\n" % header for header in headers)
    phrase = HTTPStatus(problem.status).phrase.encode()
    return b"HTTP/1.1 %d %s\r\n%s\r\n%s" % (problem.status, phrase, lines, response.body)


BUSY_RESPONSE = _serialise(Busy("requests"))
UNREADABLE_DETAIL = (
    f"not an HTTP request, or URL and headers are over {MAX_HEAD_BYTES // 2**10} KiB or {MAX_HEADERS} headers: "
    "send a valid or shorter one"
)
UNREADABLE_RESPONSE = _serialise(Problem(400, UNREADABLE_DETAIL, "ValueError", Connection="close"))


class BoundedBuffer(ReceiveBuffer):
    """The bytes of a connection, from which h11 reads only what it can parse in linear time."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        """Return the lines of a head, or of the trailer of a body, if they are complete."""
        lines = super().maybe_extract_lines()
        if lines is not None and (
            len(lines) > 1 + MAX_HEADERS
            or sum(map(len, lines)) > MAX_HEAD_BYTES
            or any(CONTROL_CHARACTERS.search(line) for line in lines)
        ):
            raise h11.RemoteProtocolError("too many or too long headers", error_status_hint=431)
        return lines

    def maybe_extract_next_line(self) -> bytearray | None:
        """Return the head of a chunk if it is complete."""
        line = super().maybe_extract_next_line()
        if line is not None and len(line) > MAX_CHUNK_HEAD_BYTES:
            raise h11.RemoteProtocolError("too long a chunk header")
        return line


class Protocol(H11Protocol):
    """HTTP/1.1 that rejects requests before parsing while too many are in progress, except for health."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn._receive_buffer = BoundedBuffer()
        transport.max_size = MAX_READ_BYTES  # type: ignore[attr-defined]
        open_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if len(self.connections) > min(MAX_CONNECTIONS, open_files - RESERVED_FILES):
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.conn.their_state is h11.ERROR:
            return  # after `send_400_response`
        load: Load = self.app_state["load"]
        if load.is_full(len(self.tasks)) and self._is_between_requests() and is_complete_request(data):
            self.transport.write(BUSY_RESPONSE)
            self.app_state["count_rejected"]()
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
