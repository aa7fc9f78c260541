"""The settings of the whole process that hashret changes, each in one function that says for how long, and the version.

| setting | while | function |
|---|---|---|
| `warnings.filters` | an image is decoded | `quiet_pillow` |
| `gc` thresholds | a collection is indexed | `rarely_collected` |
| objects that `gc` leaves out (`gc.freeze`) | a service runs | `frozen_objects` |
| `sys.setswitchinterval` | codes are computed, a service runs | `short_turns` |
| PyTorch's float32 matmul precision, TF32 in cuDNN | codes are computed | `full_float32` |
| PyTorch's number of threads | codes are computed by a thread that has others beside it | `one_torch_thread` |
| FAISS's number of OpenMP threads | FAISS builds or searches | `one_faiss_thread` |
| Numba's choice of cache folders | kernels are declared | `numba_cache` |
| the limit of open files (`RLIMIT_NOFILE`) | a service runs | `many_open_files` |
| the environment variable `GOMP_SPINCOUNT` | the command line runs, to its end | `limit_spinning` |

Signal handlers are not here: the two loops that wait for signals, of training and of the server, set and restore them.
"""

import gc
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial, wraps
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
V = TypeVar("V")

COLLECT_EVERY = 50_000  # new objects, and no fewer, make the garbage collector look among them
TURN_SECONDS = 0.0005  # for which a thread keeps the interpreter while others wait for it
SPINS = "5000"  # rounds in which a thread of OpenMP waits for another before it sleeps
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(r"PIL\b"), 0)


class _Shared(Generic[V]):
    """How many are inside of a switch, and the generator that has set it and will restore it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._running: Iterator[V]
        self._value: V

    def enter(self, switch: Callable[[], Iterator[V]]) -> V:
        with self._lock:
            if not self._users:
                self._running = switch()
                self._value = next(self._running)
            self._users += 1
            return self._value

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                next(self._running, None)


class _Use(AbstractContextManager[V]):
    __slots__ = ("_shared", "_switch")

    def __init__(self, shared: _Shared[V], switch: Callable[[], Iterator[V]]) -> None:
        self._shared, self._switch = shared, switch

    def __enter__(self) -> V:
        return self._shared.enter(self._switch)

    def __exit__(self, *exc: object) -> None:
        self._shared.leave()


def shared_switch(switch: Callable[P, Iterator[V]]) -> Callable[P, AbstractContextManager[V]]:
    """A context manager that any number of threads may be inside of at once, nested too.

    `switch` is a generator function as `contextlib.contextmanager` takes: the first to enter runs it up to its `yield`,
    the last to leave runs the rest, also after an exception, which it does not see. All get what it yielded. It is
    called with the arguments of the first: let all callers give the same.
    """
    shared = _Shared[V]()

    @wraps(switch)
    def use(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[V]:
        return _Use(shared, partial(switch, *args, **kwargs))

    return use


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """No warnings from Pillow (of odd EXIF, of its own limit of pixels) while any thread is inside.

    `warnings.catch_warnings` replaces the filters of all threads and is not safe among them; here a single filter is
    added, again if a program has replaced the list meanwhile, and removed.
    """
    with _pillow_filter():
        if _PILLOW_FILTER not in warnings.filters:
            warnings.filters.insert(0, _PILLOW_FILTER)  # type: ignore[attr-defined]
        yield


@shared_switch
def _pillow_filter() -> Iterator[None]:
    yield
    while _PILLOW_FILTER in warnings.filters:  # twice if two threads added it at the same time
        warnings.filters.remove(_PILLOW_FILTER)  # type: ignore[attr-defined]


@shared_switch
def rarely_collected() -> Iterator[None]:
    """The garbage collector looks for garbage after `COLLECT_EVERY` new objects, and no fewer, while any thread is
    inside: indexing keeps images on their way in many objects, none of which is any. Where it is off it stays off."""
    before = gc.get_threshold()
    if 0 < before[0] < COLLECT_EVERY:
        gc.set_threshold(COLLECT_EVERY, *before[1:])
    yield
    gc.set_threshold(*before)


@contextmanager
def frozen_objects() -> Iterator[None]:
    """The garbage collector leaves out all objects that exist on entry, until the last user has left: to go through
    those of PyTorch and Numba stops every thread for 0.2 s. If a program has frozen objects before, they stay so."""
    with _frozen():
        gc.collect()
        gc.freeze()
        yield


@shared_switch
def _frozen() -> Iterator[None]:
    before = gc.get_freeze_count()
    yield
    if not before:
        gc.unfreeze()


@shared_switch
def short_turns() -> Iterator[None]:
    """Threads hand the interpreter on after `TURN_SECONDS`, or sooner if a program has set less, while any thread is
    inside: every layer of a network, and every connection of a service, waits for the thread that holds it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, TURN_SECONDS))
    yield
    sys.setswitchinterval(before)


@shared_switch
def full_float32() -> Iterator[int]:
    """PyTorch multiplies float32 in float32, without TF32 or bfloat16, while any thread is inside, whatever the program
    has chosen. Gives the number of threads that PyTorch had when the first entered, for `one_torch_thread`."""
    import torch

    cudnn = torch.backends.cudnn
    precision, tf32 = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    yield torch.get_num_threads()
    torch.set_float32_matmul_precision(precision)
    cudnn.allow_tf32 = tf32


@contextmanager
def one_torch_thread(before: int) -> Iterator[None]:
    """PyTorch computes in the calling thread alone what that thread asks for. Each thread has its own number, but a new
    thread begins with the number that any thread has set last: `before` is what to go back to, for both."""
    import torch

    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_faiss_thread() -> Iterator[None]:
    """FAISS starts no OpenMP threads beside ours and PyTorch's for what the calling thread asks of it. OpenMP keeps the
    number for each thread, so that nothing is shared."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@shared_switch
def numba_cache(locator: type[object]) -> Iterator[None]:
    """Let `locator`, a cache locator of Numba, choose the cache folders of functions that are declared meanwhile."""
    import numba
    from numba.core.caching import CacheImpl

    config: Any = numba.config
    classes, chosen = CacheImpl._locator_classes, getattr(config, "CACHE_LOCATOR_CLASSES", "")
    CacheImpl._locator_classes, config.CACHE_LOCATOR_CLASSES = [locator, *classes], ""
    yield
    CacheImpl._locator_classes, config.CACHE_LOCATOR_CLASSES = classes, chosen


@shared_switch
def many_open_files() -> Iterator[None]:
    """This process may open as many files, of which each connection is one, as its hard limit allows."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def limit_spinning() -> None:
    """PyTorch's threads, of GCC's OpenMP, wait for each other in a loop for `SPINS` rounds, not for milliseconds, in
    this process and those it starts, unless the user has chosen otherwise; to be called before PyTorch is loaded.

    A busy machine may not run the thread that is waited for. It costs a training that has the machine to itself 5 %.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


@cache
def version() -> str:
    """The version of hashret that is installed, which pyproject.toml gives; "0+unknown" if only a checkout is there."""
    from importlib import metadata  # late: it takes a third of the time that `hashret --help` does

    try:
        return metadata.version("hashret")
    except metadata.PackageNotFoundError:
        return "0+unknown"
