"""Work on many items: in order on a pool of threads, in batches, and how far it has come."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Progress(NamedTuple):
    """How far long work has come."""

    stage: str  # "reading", "training", "indexing"
    done: int
    total: int | None  # None when it is not known
    terms: dict[str, float]  # numbers worth watching, such as the running mean of each loss term


def batches(items: Iterable[T], size: int, weigh: Callable[[T], float] | None = None) -> Iterator[list[T]]:
    """Lists of `size` items, or fewer that together weigh 1 or more, the last one shorter."""
    items = iter(items)
    if weigh is None:
        yield from iter(lambda: list(islice(items, size)), [])
        return
    batch, weight = list[T](), 0.0
    for item in items:
        batch.append(item)
        weight += weigh(item)
        if len(batch) == size or weight >= 1:
            yield batch
            batch, weight = [], 0.0
    if batch:
        yield batch


def in_order(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    threads: int | None = None,
    ahead: int = 64,
    weigh: Callable[[T], float] = lambda item: 1,
    helping: bool = False,
) -> Generator[R, None, None]:
    """`function` of each item, from a pool of threads, in the order of the items.

    `items` is taken in the caller's thread, at most `ahead` items before the result that is given out, or fewer that
    together weigh as much. An error in either comes out in its place. Closing the generator drops what has not begun
    and waits for what has. With `helping` the caller's thread is one of the pool's, for it does what has not begun
    while it would have to wait: where taking the items and using the results is much of the work, no core is asked to
    do two things at once.
    """
    threads = threads or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    most, weight = max(ahead, threads), 0.0
    pending: deque[tuple[Future[R], T, float]] = deque()
    pool = ThreadPoolExecutor(max(1, threads - helping), thread_name_prefix="hashret-order")

    def first() -> R:
        while helping and not pending[0][0].done():
            mine = next((i for i, (future, *_) in enumerate(pending) if future.cancel()), None)
            if mine is None:
                break
            done: Future[R] = Future()
            _, item, weighs = pending[mine]
            try:
                done.set_result(function(item))
            except Exception as error:
                done.set_exception(error)
            pending[mine] = done, item, weighs
        return pending.popleft()[0].result()

    try:
        for item in items:
            pending.append((pool.submit(function, item), item, weigh(item)))
            weight += pending[-1][2]
            while weight >= most:
                weight -= pending[0][2]
                yield first()
        while pending:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)
