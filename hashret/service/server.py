"""uvicorn around the service, with an eye on connections that do nothing."""

import re
import signal
import socket
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from hashret.errors import HashretError
from hashret.process import many_open_files, short_turns
from hashret.service import guard
from hashret.service.problems import Busy, Problem, to_response

IDLE_SECONDS = 15.0  # without a request, or within the head of one
UPLOAD_SECONDS = 60.0  # for the body of one
REQUEST_SECONDS = 300.0  # for a request and its answer
HEAD_BYTES = 2**16  # of a request's address and headers
WAITING = 4096  # connections that have come and have not been looked at
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
    """HTTP, whose requests are turned away unread while as many are being answered as may be.

    To read a request and refuse it takes a good part of the time that answering it does, and those who are refused wait
    for all others who are. Health is told whatever else is being done.
    """

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


class Server(uvicorn.Server):
    """A server that tells when it has begun, and closes connections that hold a place and do nothing with it."""

    def __init__(self, app: FastAPI, begun: Callable[[], None]) -> None:
        quiet: dict[str, Any] = {"log_level": "error", "access_log": False, "server_header": False}
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                backlog=WAITING,
                h11_max_incomplete_event_size=HEAD_BYTES,
                proxy_headers=False,
                ws="none",
                timeout_keep_alive=30,
                timeout_graceful_shutdown=60,
                **quiet,
            )
        )
        self._begun = begun
        self._since: dict[Any, tuple[object, float]] = {}  # what each connection is at, and since when

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._begun()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._close_idle(time.monotonic())
        return await super().on_tick(counter)

    def _close_idle(self, now: float) -> None:
        last, self._since = self._since, {}
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            cycle = connection.cycle
            running = cycle is not None and not cycle.response_complete
            before, since = last.get(connection, (None, now))
            since = since if before == (cycle, running) else now
            self._since[connection] = (cycle, running), since
            most = (UPLOAD_SECONDS if cycle.more_body else REQUEST_SECONDS) if running else IDLE_SECONDS
            if now - since > most:
                connection.transport.abort()


def is_whole(data: bytes) -> bool:
    """Whether these are the bytes of one request that may be refused, beyond doubt, so that the next follows them."""
    head = WHOLE_HEAD.match(data)
    if head is None or data.startswith(HEALTH):
        return False
    names = head[0].lower()
    lengths = LENGTH.findall(names)
    known = len(lengths) == names.count(b"content-length") <= 1 and not UNUSUAL.search(names)
    return known and len(data) == head.end() + sum(map(int, lengths))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; raises HashretError if that cannot be had. Port 0 is any that is free."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named, and answers would wait 40 ms each with it.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(WAITING)
        return listening
    except (OSError, UnicodeError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise HashretError(f"{host} port {port} cannot be listened on ({reason}): choose another --port") from None


def serve(app: FastAPI, listening: socket.socket, begun: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was asked."""
    # uvicorn raises the signal that ended it once more, when it is done.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with short_turns(), many_open_files():
            Server(app, begun).run([listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
