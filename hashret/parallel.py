"""Work on many items: in order on a pool of threads, in batches, and how far it has come."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

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
    threads = threads or _cores()
    most, weight = max(ahead, threads), 0.0
    tasks: deque[_Task[T, R]] = deque()
    pool = ThreadPoolExecutor(max(1, threads - helping), thread_name_prefix="hashret-order")

    def first() -> R:
        while helping and not tasks[0].future.done() and _take_over(tasks, function):
            pass
        return tasks.popleft().future.result()

    try:
        for item in items:
            tasks.append(_Task(item, weigh(item), pool.submit(function, item)))
            weight += tasks[-1].weight
            while weight >= most:
                weight -= tasks[0].weight
                yield first()
        while tasks:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(slots=True)
class _Task(Generic[T, R]):
    item: T
    weight: float
    future: Future[R]


def _take_over(tasks: Iterable[_Task[T, R]], function: Callable[[T], R]) -> bool:
    """Do the first task that the pool has not begun, in this thread; False if it has begun all of them."""
    task = next((task for task in tasks if task.future.cancel()), None)  # only what has not begun can be cancelled
    if task is None:
        return False
    task.future = Future()
    try:
        task.future.set_result(function(task.item))
    except Exception as error:
        task.future.set_exception(error)
    return True


def _cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
