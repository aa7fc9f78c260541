"""Requests that wait at the same time are answered together, in threads of their own."""

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


class Gather(Generic[T, R]):
    """Calls `work` with lists of at most `most` items, in `threads` threads; `ask` gives the result of one item.

    `work` gives a result or an exception for each item. Nothing waits for others to come: what comes while the threads
    are at work is the next list. More than `waiting` items are refused with `Busy`.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[list[T]], Sequence[R | Exception]],
        metrics: Metrics,
        *,
        most: int = 1,
        threads: int = 1,
        waiting: int = 1024,
    ) -> None:
        self.name = name
        self._work, self._metrics, self._most, self._limit = work, metrics, most, waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"hashret-{name}")
        self._waiting: deque[tuple[T, asyncio.Future[R], float]] = deque()
        self._free = threads
        self._called = False

    async def ask(self, item: T) -> R:
        """The result of `item`; raises what `work` gave instead."""
        (result,) = await self.ask_all([item])
        return result

    async def ask_all(self, items: Sequence[T]) -> list[R]:
        """The result of each item; raises the first that `work` gave instead."""
        if len(self._waiting) + len(items) > max(self._limit, len(items)):
            raise Busy(self.name)
        loop, now = asyncio.get_running_loop(), time.monotonic()
        futures: list[asyncio.Future[R]] = [loop.create_future() for _ in items]
        self._waiting += ((item, future, now) for item, future in zip(items, futures, strict=True))
        if self._free and not self._called:
            self._called = True
            loop.call_soon(self._start, loop)  # when the other requests that have come by now have asked as well
        return [await futures[0]] if len(futures) == 1 else await asyncio.gather(*futures)

    def close(self) -> None:
        """Wait for what is being done."""
        self._pool.shutdown()

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._called = False
        while self._free and self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(self._most, len(self._waiting)))]
            batch = [asked for asked in batch if not asked[1].done()]  # by a client that has gone
            if batch:
                self._free -= 1
                self._pool.submit(self._run, loop, batch)

    def _run(self, loop: asyncio.AbstractEventLoop, batch: list[tuple[T, asyncio.Future[R], float]]) -> None:
        began = time.monotonic()
        results: Sequence[R | Exception]
        try:
            results = self._work([item for item, _, _ in batch])
        except Exception as error:
            results = [error] * len(batch)
        self._metrics.worked(self.name, len(batch), began - batch[0][2], time.monotonic() - began)
        loop.call_soon_threadsafe(self._done, loop, batch, results)

    def _done(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: list[tuple[T, asyncio.Future[R], float]],
        results: Sequence[R | Exception],
    ) -> None:
        self._free += 1
        for (_, future, _), result in zip(batch, results, strict=True):
            if not future.done():
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)
        self._start(loop)
