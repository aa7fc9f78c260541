"""uvicorn around the service, with an eye on connections that do nothing."""

import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from hashret.errors import HashretError
from hashret.process import raised_file_limit, short_switch_interval
from hashret.service.http11 import Protocol

IDLE_SECONDS = 15.0  # without a request, or within the head of one
UPLOAD_SECONDS = 60.0  # for the body of one
REQUEST_SECONDS = 300.0  # for a request and its answer
HEAD_BYTES = 2**16  # of a request's address and headers
WAITING = 4096  # connections that have come and have not been looked at


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
        with short_switch_interval(), raised_file_limit():
            Server(app, begun).run([listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
