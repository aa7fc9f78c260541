"""The uvicorn server of the service, which closes idle connections."""

import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from hashret.errors import HashretError
from hashret.process import raised_file_limit, short_switch_interval
from hashret.service.http11 import MAX_HEAD_BYTES, Protocol

IDLE_SECONDS = 15.0  # between requests, or for the URL and headers of one
UPLOAD_SECONDS = 60.0  # for the body of a request
REQUEST_SECONDS = 300.0  # for a request and its response
BACKLOG = 4096  # connections that are not accepted yet


class Server(uvicorn.Server):
    """A server that calls `on_start` once it listens, and closes idle connections."""

    def __init__(self, app: FastAPI, on_start: Callable[[], None]) -> None:
        quiet: dict[str, Any] = {"log_level": "error", "access_log": False, "server_header": False}
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                backlog=BACKLOG,
                h11_max_incomplete_event_size=MAX_HEAD_BYTES,
                proxy_headers=False,
                ws="none",
                timeout_keep_alive=30,
                timeout_graceful_shutdown=60,
                **quiet,
            )
        )
        self._on_start = on_start
        self._states: dict[Any, tuple[object, float]] = {}  # the state of each connection, and its start time

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._close_idle(time.monotonic())
        return await super().on_tick(counter)

    def _close_idle(self, now: float) -> None:
        last_states, self._states = self._states, {}
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            cycle = connection.cycle
            in_progress = cycle is not None and not cycle.response_complete
            last_state, since = last_states.get(connection, (None, now))
            since = since if last_state == (cycle, in_progress) else now
            self._states[connection] = (cycle, in_progress), since
            limit = (UPLOAD_SECONDS if cycle.more_body else REQUEST_SECONDS) if in_progress else IDLE_SECONDS
            if now - since > limit:
                connection.transport.abort()


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 chooses a free port. Raise HashretError if it cannot listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm, which delays responses by 40 ms, only if the protocol is explicit.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(BACKLOG)
        return listening
    except (OSError, UnicodeError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise HashretError(f"cannot listen on {host} port {port} ({reason}): choose another --port") from None


def serve(app: FastAPI, listening: socket.socket, on_start: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests in progress."""
    # uvicorn raises the signal again after its shutdown, which these handlers ignore.
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with short_switch_interval(), raised_file_limit():
            Server(app, on_start).run([listening])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
