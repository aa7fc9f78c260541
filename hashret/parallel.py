"""Work on many items: an ordered map on a pool of threads, batches, and progress reports."""

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
    """How much of a long task is done."""

    stage: str  # "reading", "training", "indexing"
    done: int
    total: int | None  # None if unknown
    terms: dict[str, float]  # metrics by name, for example the running mean of each loss term


def batches(items: Iterable[T], size: int, weight_of: Callable[[T], float] | None = None) -> Iterator[list[T]]:
    """Yield lists of `size` items, the last one shorter; with `weight_of`, a list also ends once it weighs 1."""
    items = iter(items)
    if weight_of is None:
        yield from iter(lambda: list(islice(items, size)), [])
        return
    batch, weight = list[T](), 0.0
    for item in items:
        batch.append(item)
        weight += weight_of(item)
        if len(batch) == size or weight >= 1:
            yield batch
            batch, weight = [], 0.0
    if batch:
        yield batch


def ordered_map(
    function: Callable[[T], R],
    items: Iterable[T],
    *,
    threads: int | None = None,
    max_pending: int = 64,
    weight_of: Callable[[T], float] = lambda item: 1,
    caller_runs: bool = False,
) -> Generator[R, None, None]:
    """Yield `function(item)` for each item, computed by a pool of threads, in the order of the items.

    The calling thread reads `items`. It stops reading while the items without a yielded result weigh `max_pending` or
    more in total, or as much as there are threads if that is more. An exception in `function` or `items` is raised at
    its turn. Closing the generator drops the items that no thread has begun and waits for the others.

    With `caller_runs` the calling thread counts as one thread of the pool: instead of waiting, it runs `function` on
    items that no thread has begun. That avoids one thread too many where the caller itself has much to compute.
    """
    threads = threads or _available_cores()
    max_weight, weight = max(max_pending, threads), 0.0
    tasks: deque[_Task[T, R]] = deque()
    pool = ThreadPoolExecutor(max(1, threads - caller_runs), thread_name_prefix="hashret-map")

    def first_result() -> R:
        while caller_runs and not tasks[0].future.done() and _run_pending(tasks, function):
            pass
        return tasks.popleft().future.result()

    try:
        for item in items:
            tasks.append(_Task(item, weight_of(item), pool.submit(function, item)))
            weight += tasks[-1].weight
            while weight >= max_weight:
                weight -= tasks[0].weight
                yield first_result()
        while tasks:
            yield first_result()
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(slots=True)
class _Task(Generic[T, R]):
    item: T
    weight: float
    future: Future[R]


def _run_pending(tasks: Iterable[_Task[T, R]], function: Callable[[T], R]) -> bool:
    """Run the first task that the pool has not begun in this thread; return False if it has begun all of them."""
    task = next((task for task in tasks if task.future.cancel()), None)  # a future that has begun cannot be cancelled
    if task is None:
        return False
    task.future = Future()
    try:
        task.future.set_result(function(task.item))
    except Exception as error:
        task.future.set_exception(error)
    return True


def _available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
