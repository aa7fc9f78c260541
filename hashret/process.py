"""The process-wide settings that hashret changes, each in one function, and the version of hashret.

| setting | changed while | function |
|---|---|---|
| `warnings.filters` | an image is decoded | `quiet_pillow` |
| `gc` thresholds | a collection is indexed | `raised_gc_threshold` |
| objects that `gc` ignores (`gc.freeze`) | a service runs | `frozen_objects` |
| `sys.setswitchinterval` | codes are computed, a service runs | `short_switch_interval` |
| PyTorch's float32 matmul precision, TF32 in cuDNN | codes are computed | `full_float32` |
| PyTorch's number of threads | codes are computed by one of several threads | `one_torch_thread` |
| PyTorch's number of threads | a forked child runs | `_adapt_to_fork` |
| FAISS's number of OpenMP threads | FAISS builds or searches | `one_faiss_thread` |
| Numba's cache locators | kernels are declared | `numba_cache` |
| the limit of open files (`RLIMIT_NOFILE`) | a service runs | `raised_file_limit` |
| the environment variable `GOMP_SPINCOUNT` | the command line runs | `limit_spinning` |

Signal handlers are set and restored elsewhere, in the loops of training and of the server. The command line, whose
process ends with it, also replaces `warnings.formatwarning` and the error handler of `sys.stdout`.
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

GC_THRESHOLD = 50_000  # new objects before the garbage collector runs
SWITCH_INTERVAL = 0.0005  # seconds for which a thread keeps the interpreter lock while others wait for it
SPIN_COUNT = "5000"  # iterations for which an OpenMP thread polls before it sleeps
_PILLOW_FILTER = ("ignore", None, Warning, re.compile(r"PIL\b"), 0)
_shared_settings: list["_SharedSetting[Any]"] = []
_is_forked = False


class _SharedSetting(Generic[V]):
    """The number of users of a setting, and the generator that changed it and will restore it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        _shared_settings.append(self)
        self._generator: Iterator[V]
        self._value: V

    def enter(self, setting: Callable[[], Iterator[V]]) -> V:
        with self._lock:
            if not self._users:
                self._generator = setting()
                self._value = next(self._generator)
            self._users += 1
            return self._value

    def leave(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                next(self._generator, None)

    def renew_lock(self) -> None:
        self._lock = threading.Lock()


class _SettingContext(AbstractContextManager[V]):
    __slots__ = ("_setting", "_shared")

    def __init__(self, shared: _SharedSetting[V], setting: Callable[[], Iterator[V]]) -> None:
        self._shared, self._setting = shared, setting

    def __enter__(self) -> V:
        return self._shared.enter(self._setting)

    def __exit__(self, *exc: object) -> None:
        self._shared.leave()


def shared_setting(setting: Callable[P, Iterator[V]]) -> Callable[P, AbstractContextManager[V]]:
    """Make a context manager that several threads can be inside of at once, also nested.

    `setting` is a generator function as for `contextlib.contextmanager`. The first thread to enter runs it up to its
    `yield`, the last to leave runs the rest, also after an exception, which it does not see. All get the value that it
    yielded. It is called with the arguments of the first, so all callers must pass the same.
    """
    shared = _SharedSetting[V]()

    @wraps(setting)
    def use(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[V]:
        return _SettingContext(shared, partial(setting, *args, **kwargs))

    return use


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence the warnings of Pillow (about odd EXIF data, about its pixel limit) while any thread is inside.

    `warnings.catch_warnings` replaces the filters of all threads and is not thread-safe. This adds one filter, adds it
    again if a program has replaced the list meanwhile, and removes it at the end.
    """
    with _pillow_filter():
        if _PILLOW_FILTER not in warnings.filters:
            warnings.filters.insert(0, _PILLOW_FILTER)  # type: ignore[attr-defined]
        yield


@shared_setting
def _pillow_filter() -> Iterator[None]:
    yield
    while _PILLOW_FILTER in warnings.filters:  # twice if two threads added it at the same time
        warnings.filters.remove(_PILLOW_FILTER)  # type: ignore[attr-defined]


@shared_setting
def raised_gc_threshold() -> Iterator[None]:
    """Run the garbage collector only after `GC_THRESHOLD` new objects while any thread is inside.

    Images being indexed are many live objects, which the collector would traverse in vain. If it is off it stays off.
    """
    before = gc.get_threshold()
    if 0 < before[0] < GC_THRESHOLD:
        gc.set_threshold(GC_THRESHOLD, *before[1:])
    yield
    gc.set_threshold(*before)


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Exempt all objects that exist on entry from garbage collection until the last user leaves.

    Traversing the objects of PyTorch and Numba stops every thread for 0.2 s. Objects frozen before stay frozen.
    """
    with _frozen():
        gc.collect()
        gc.freeze()
        yield


@shared_setting
def _frozen() -> Iterator[None]:
    before = gc.get_freeze_count()
    yield
    if not before:
        gc.unfreeze()


@shared_setting
def short_switch_interval() -> Iterator[None]:
    """Lower the interpreter's switch interval to `SWITCH_INTERVAL`, unless it is lower, while any thread is inside.

    Every layer of a network and every connection of a service waits for the thread that holds the interpreter lock.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_INTERVAL))
    yield
    sys.setswitchinterval(before)


@shared_setting
def full_float32() -> Iterator[int]:
    """Make PyTorch multiply float32 matrices without TF32 or bfloat16 while any thread is inside.

    Yield the number of threads that PyTorch had when the first thread entered, for `one_torch_thread`.
    """
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
    """Make PyTorch compute in the calling thread alone; restore `before` threads afterwards.

    PyTorch keeps the number of threads per thread, but a new thread starts with the number set last by any thread.
    """
    import torch

    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(1 if _is_forked else before)


def _adapt_to_fork() -> None:
    """Make PyTorch compute in the calling thread alone, and release locks that threads of the parent held.

    A forked child has OpenMP's records of the parent's threads, but not the threads, and would wait for them for ever.
    """
    global _is_forked
    _is_forked = True
    for setting in _shared_settings:
        setting.renew_lock()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_adapt_to_fork)


@contextmanager
def one_faiss_thread() -> Iterator[None]:
    """Keep FAISS from starting OpenMP threads for calls from this thread; OpenMP keeps the number per thread."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@shared_setting
def numba_cache(locator: type[object]) -> Iterator[None]:
    """Make Numba ask `locator`, a cache locator, first for the cache folders of the functions declared meanwhile."""
    import numba
    from numba.core.caching import CacheImpl

    config: Any = numba.config
    classes, chosen = CacheImpl._locator_classes, getattr(config, "CACHE_LOCATOR_CLASSES", "")
    CacheImpl._locator_classes, config.CACHE_LOCATOR_CLASSES = [locator, *classes], ""
    yield
    CacheImpl._locator_classes, config.CACHE_LOCATOR_CLASSES = classes, chosen


@shared_setting
def raised_file_limit() -> Iterator[None]:
    """Raise the limit of open files, which count connections too, to the hard limit of the process."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def limit_spinning() -> None:
    """Limit the busy waiting of PyTorch's OpenMP threads to `SPIN_COUNT` iterations, instead of milliseconds.

    This holds in the current process, if it has not loaded PyTorch yet, and in its children, unless the user has set
    OMP_WAIT_POLICY or GOMP_SPINCOUNT. On a busy machine the thread waited for may not be running. Training on an idle
    machine takes 5 % longer.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


@cache
def version() -> str:
    """Return the installed version of hashret, or "0+unknown" for a checkout that is not installed."""
    from importlib import metadata  # here, as it takes a third of the time of `hashret --help`

    try:
        return metadata.version("hashret")
    except metadata.PackageNotFoundError:
        return "0+unknown"
