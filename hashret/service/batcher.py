"""Batch requests that wait at the same time, and process the batches in threads."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from hashret.service.metrics import Metrics
from hashret.service.problems import Busy

T = TypeVar("T")
R = TypeVar("R")


class Batcher(Generic[T, R]):
    """Call `process` with batches of at most `max_batch_size` items, in `threads` threads.

    `process` returns a result or an exception for each item. An item never waits for a batch to fill: the items that
    arrive while all threads are busy are the next batch. Raise `Busy` for items beyond the `max_queue` that may wait.
    """

    def __init__(
        self,
        name: str,
        process: Callable[[list[T]], Sequence[R | Exception]],
        metrics: Metrics,
        *,
        max_batch_size: int = 1,
        threads: int = 1,
        max_queue: int = 1024,
    ) -> None:
        self.name = name
        self._process, self._metrics = process, metrics
        self._max_batch_size, self._max_queue = max_batch_size, max_queue
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"hashret-{name}")
        self._queue: deque[tuple[T, asyncio.Future[R], float]] = deque()
        self._idle_threads = threads
        self._is_scheduled = False

    async def submit(self, item: T) -> R:
        """Return the result of `item`, or raise its exception."""
        (result,) = await self.submit_all([item])
        return result

    async def submit_all(self, items: Sequence[T]) -> list[R]:
        """Return the result of each item, or raise the first exception."""
        if len(self._queue) + len(items) > max(self._max_queue, len(items)):
            raise Busy(self.name)
        loop, now = asyncio.get_running_loop(), time.monotonic()
        futures: list[asyncio.Future[R]] = [loop.create_future() for _ in items]
        self._queue += ((item, future, now) for item, future in zip(items, futures, strict=True))
        if self._idle_threads and not self._is_scheduled:
            self._is_scheduled = True
            loop.call_soon(self._start, loop)  # after other requests that have arrived submit their items
        try:
            return [await futures[0]] if len(futures) == 1 else await asyncio.gather(*futures)
        finally:
            for future in futures:  # after an error, the items that are still queued are not processed
                future.cancel()

    def close(self) -> None:
        """Wait for the batches in progress."""
        self._pool.shutdown()

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._is_scheduled = False
        while self._idle_threads and self._queue:
            batch = [self._queue.popleft() for _ in range(min(self._max_batch_size, len(self._queue)))]
            batch = [entry for entry in batch if not entry[1].done()]  # cancelled if the client has disconnected
            if batch:
                self._idle_threads -= 1
                self._pool.submit(self._run, loop, batch)

    def _run(self, loop: asyncio.AbstractEventLoop, batch: list[tuple[T, asyncio.Future[R], float]]) -> None:
        start = time.monotonic()
        results: Sequence[R | Exception]
        try:
            results = self._process([item for item, _, _ in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{self.name}: {len(results)} results for {len(batch)} items")
        except BaseException as error:  # a panic of a Rust library is no Exception; this thread has to go on
            results = [as_exception(error)] * len(batch)
        self._metrics.observe_batch(self.name, len(batch), start - batch[0][2], time.monotonic() - start)
        loop.call_soon_threadsafe(self._finish, loop, batch, results)

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: list[tuple[T, asyncio.Future[R], float]],
        results: Sequence[R | Exception],
    ) -> None:
        self._idle_threads += 1
        for (_, future, _), result in zip(batch, results, strict=True):
            if not future.done():
                if isinstance(result, Exception):
                    future.set_exception(as_exception(result))
                else:
                    future.set_result(result)
        self._start(loop)


def as_exception(error: BaseException) -> Exception:
    """Return an error as one that a future accepts and a request can raise."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    failure = RuntimeError(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
