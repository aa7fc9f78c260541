"""The number of threads that search a batch, and the split of the batch among them."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

Result = TypeVar("Result")

_threads = os.cpu_count() or 1
_MIN_PART = 8  # queries: waking a thread for fewer takes longer
_MAX_PART = 1024  # queries: more take more memory and are no faster


def set_threads(count: int) -> None:
    """Set the number of threads that search a batch, by default the number of cores; raise ValueError below 1."""
    global _threads
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"the number of threads must be at least 1, not {count!r}")
    _threads = count


def get_threads() -> int:
    """Return the number of threads that search a batch."""
    return _threads


def split(count: int, work: Callable[[int, int], Result]) -> list[Result]:
    """Return the results of work(low, high) for consecutive parts of range(count), run on the threads that are set."""
    parts = max(min(_threads, count // _MIN_PART), -(-count // _MAX_PART))
    if parts <= 1:
        return [work(0, count)]
    bounds = [count * part // parts for part in range(parts + 1)]
    if _threads == 1:
        return list(map(work, bounds[:-1], bounds[1:]))
    pool = _pool(_threads - 1, os.getpid())
    others = [pool.submit(work, low, high) for low, high in pairwise(bounds[1:])]
    own = [work(bounds[0], bounds[1])]  # in this thread, as waking one and waiting for it takes as long as some queries
    left = len(others)
    while left and others[left - 1].cancel():  # no thread has begun it
        left -= 1
        own.append(work(bounds[left + 1], bounds[left + 2]))
    return [own[0], *(other.result() for other in others[:left]), *reversed(own[1:])]


@cache
def _pool(
    threads: int, process: int
) -> ThreadPoolExecutor:  # by process, as a forked one inherits the pool without its threads
    return ThreadPoolExecutor(threads, thread_name_prefix="hashret-search")
