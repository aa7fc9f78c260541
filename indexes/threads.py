"""How many threads search a batch, and how the batch is split among them."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import TypeVar

Result = TypeVar("Result")

_threads = os.cpu_count() or 1
_SHARE = 8  # fewer queries are not worth waking a thread
_MOST = 1024  # more at once take more memory, and are no faster


def set_threads(count: int) -> None:
    """Search every batch with `count` threads from now on (as many as the machine has cores, unless set)."""
    global _threads
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"the number of threads must be at least 1, not {count!r}")
    _threads = count


def get_threads() -> int:
    """The number of threads that search a batch."""
    return _threads


def split(count: int, work: Callable[[int, int], Result]) -> list[Result]:
    """The results of work(low, high) over consecutive parts of range(count), in as many threads as are set."""
    parts = max(min(_threads, count // _SHARE), -(-count // _MOST))
    if parts <= 1:
        return [work(0, count)]
    bounds = [count * part // parts for part in range(parts + 1)]
    if _threads == 1:
        return list(map(work, bounds[:-1], bounds[1:]))
    pool = _pool(_threads - 1, os.getpid())
    others = [pool.submit(work, low, high) for low, high in pairwise(bounds[1:])]
    own = [work(bounds[0], bounds[1])]  # here, for to wake a thread and to wait for it takes as long as some queries
    left = len(others)
    while left and others[left - 1].cancel():  # nobody has begun with it
        left -= 1
        own.append(work(bounds[left + 1], bounds[left + 2]))
    return [own[0], *(other.result() for other in others[:left]), *reversed(own[1:])]


@cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:  # a forked process has the pool but not its threads
    return ThreadPoolExecutor(threads, thread_name_prefix="hashret-search")
