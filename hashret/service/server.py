"""The uvicorn server of the service, which closes idle connections and ends whatever hangs."""

import faulthandler
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from hashret.errors import HashretError
from hashret.process import raised_file_limit, short_switch_interval
from hashret.service.http11 import MAX_HEAD_BYTES, Protocol

IDLE_SECONDS = 15.0  # between requests, or for the URL and headers of one
UPLOAD_SECONDS = 60.0  # for the body of a request
DOWNLOAD_SECONDS = 60.0  # for a response, once it has started
REQUEST_SECONDS = 300.0  # for the work on a request
SHUTDOWN_SECONDS = 60.0  # from SIGTERM or SIGINT to the end of the process
GRACE_SECONDS = 50.0  # of these, for requests in progress
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
                timeout_graceful_shutdown=GRACE_SECONDS,  # type: ignore[arg-type]  # any number of seconds
                **quiet,
            )
        )
        self._on_start = on_start
        self._states: dict[Any, tuple[object, float]] = {}  # the state of each connection, and its start time

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down. If that takes too long, print what each thread does and end the process.

        Python cannot end a thread, and waits for all of them before it exits; the thread of `faulthandler` is not one.
        Nothing is lost: what is acknowledged is committed, and a collection survives the end of a process at any time.
        """
        if not self.should_exit:
            faulthandler.dump_traceback_later(SHUTDOWN_SECONDS, exit=True, file=2)
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            self._close_idle(time.monotonic())
        return await super().on_tick(counter)

    def _close_idle(self, now: float) -> None:
        last_states, self._states = self._states, {}
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            cycle = connection.cycle
            state: tuple[object, ...] = (cycle,)
            if cycle is None or cycle.response_complete:
                limit = IDLE_SECONDS
            elif cycle.response_started:
                limit, state = DOWNLOAD_SECONDS, (cycle, "answer")
            elif cycle.more_body:
                limit, state = UPLOAD_SECONDS, (cycle, "body")
            else:
                limit, state = REQUEST_SECONDS, (cycle, "work")
            last_state, since = last_states.get(connection, (None, now))
            since = since if last_state == state else now
            self._states[connection] = state, since
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
    """Serve until SIGTERM or SIGINT, then finish the requests in progress; the process ends in `SHUTDOWN_SECONDS`."""
    # uvicorn raises the signal again after its shutdown, which these handlers ignore.
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with short_switch_interval(), raised_file_limit():
            Server(app, on_start).run([listening])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
