import ctypes
import gc
import os
import resource
import subprocess
import sys
import threading
import tomllib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from hashret import process
from hashret.process import GC_THRESHOLD, SWITCH_INTERVAL, shared_setting

ROOT = Path(__file__).resolve().parents[1]


def precision() -> Any:
    import torch

    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def set_precision(value: Any) -> None:
    import torch

    torch.set_float32_matmul_precision(value[0])
    torch.backends.cudnn.allow_tf32 = value[1]


def numba_config() -> Any:
    import numba

    return numba.config


def locators() -> Any:
    from numba.core.caching import CacheImpl

    return tuple(CacheImpl._locator_classes), getattr(numba_config(), "CACHE_LOCATOR_CLASSES", "")


def set_locators(value: Any) -> None:
    from numba.core.caching import CacheImpl

    CacheImpl._locator_classes, numba_config().CACHE_LOCATOR_CLASSES = list(value[0]), value[1]


def open_files() -> Any:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def set_open_files(value: Any) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, value)


# Each context manager, the functions that read and set its setting, a value of the program, and the value inside.
HARD = open_files()[1]
SETTINGS: dict[
    str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], Any], Callable[[Any], None], Any, Any]
] = {
    "raised_gc_threshold": (
        process.raised_gc_threshold,
        gc.get_threshold,
        lambda value: gc.set_threshold(*value),
        (500, 5, 5),
        (GC_THRESHOLD, 5, 5),
    ),
    "short_switch_interval": (
        process.short_switch_interval,
        sys.getswitchinterval,
        sys.setswitchinterval,
        0.004,
        SWITCH_INTERVAL,
    ),
    "full_float32": (process.full_float32, precision, set_precision, ("medium", True), ("highest", False)),
    "numba_cache": (
        lambda: process.numba_cache(int),
        locators,
        set_locators,
        ((str,), "theirs"),
        ((int, str), ""),
    ),
    "raised_file_limit": (process.raised_file_limit, open_files, set_open_files, (min(256, HARD), HARD), (HARD, HARD)),
}


@contextmanager
def program_setting(name: str) -> Iterator[None]:
    """Set the setting to a value of the program's own."""
    _, get, set_, value, _ = SETTINGS[name]
    before = get()
    set_(value)
    try:
        yield
    finally:
        set_(before)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_first_in_sets_and_the_last_out_restores(name: str) -> None:
    setting, get, _, value, inside = SETTINGS[name]
    with program_setting(name):
        first, second = ExitStack(), ExitStack()
        for stack in (first, second):
            stack.enter_context(setting())
            assert get() == inside
        with setting():
            assert get() == inside
        first.close()  # the first to enter may leave first
        assert get() == inside
        second.close()
        assert get() == value
        with setting():
            assert get() == inside
        assert get() == value


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_restored_after_an_exception(name: str) -> None:
    setting, get, _, value, inside = SETTINGS[name]
    with program_setting(name):
        with pytest.raises(ZeroDivisionError), setting(), setting():
            raise ZeroDivisionError
        assert get() == value
        with setting():
            assert get() == inside
        assert get() == value


@pytest.mark.parametrize("name", SETTINGS)
def test_threads_share_one_setting(name: str) -> None:
    """Thirty-two threads enter and leave; each sees the setting while it is inside, and the end restores it."""
    setting, get, _, value, inside = SETTINGS[name]
    seen = set()

    def use(number: int) -> None:
        for _ in range(20):
            with setting():
                seen.add(get())

    with program_setting(name):
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(use, range(32)))
        assert seen == {inside} and get() == value


def test_all_users_get_the_value_yielded_and_a_failed_entry_does_not_count() -> None:
    calls: list[str] = []

    @shared_setting
    def setting(fail: bool = False) -> Iterator[int]:
        if fail:
            raise OSError("refused")
        calls.append("on")
        yield len(calls)
        calls.append("off")

    with pytest.raises(OSError, match="refused"), setting(True):
        pass
    with setting() as outer, setting() as inner:
        assert (outer, inner, calls) == (1, 1, ["on"])
    assert calls == ["on", "off"]
    with setting() as later:
        assert later == 3


def test_a_second_user_waits_until_the_first_has_changed_the_setting() -> None:
    entered, go = threading.Event(), threading.Event()
    state = ["before"]

    @shared_setting
    def slow() -> Iterator[None]:
        entered.set()
        assert go.wait(30)
        state[0] = "set"
        yield
        state[0] = "before"

    def use() -> str:
        with slow():
            return state[0]

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(use)
        assert entered.wait(30)
        second = pool.submit(use)
        go.set()
        assert first.result(30) == second.result(30) == "set"
    assert state == ["before"]


def test_garbage_collection_that_is_off_stays_off() -> None:
    gc.disable()
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        with process.raised_gc_threshold():
            assert gc.get_threshold()[0] == 0 and not gc.isenabled()
    finally:
        gc.set_threshold(*before)
        gc.enable()


def test_a_shorter_switch_interval_of_the_program_is_kept() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    shorter = sys.getswitchinterval()  # rounded to a microsecond
    try:
        with process.short_switch_interval():
            assert sys.getswitchinterval() == pytest.approx(shorter, abs=2e-6)
    finally:
        sys.setswitchinterval(before)


def warn() -> None:
    """Warn as Pillow does."""
    warnings.warn_explicit("odd", UserWarning, "Image.py", 1, module="PIL.Image")


def test_the_filter_for_pillow_is_added_again_after_a_program_replaced_the_filters() -> None:
    """Unfiltered warnings are errors in the tests."""
    with pytest.raises(UserWarning):
        warn()
    before = list(warnings.filters)
    with process.quiet_pillow():
        warn()
        with pytest.raises(UserWarning):
            warnings.warn_explicit("odd", UserWarning, "Image.py", 1, module="pillow_of_another")
        with warnings.catch_warnings():
            warnings.resetwarnings()
            warnings.simplefilter("error")
            with pytest.raises(UserWarning):
                warn()
            with process.quiet_pillow():
                warn()
            warn()  # the first context is still open
    assert list(warnings.filters) == before
    with pytest.raises(UserWarning):
        warn()


def test_the_filter_for_pillow_is_removed_even_if_two_threads_added_it() -> None:
    before = list(warnings.filters)
    with process.quiet_pillow():
        warnings.filters.insert(0, warnings.filters[0])  # type: ignore[attr-defined]
    assert list(warnings.filters) == before


def test_objects_are_frozen_until_the_last_user_leaves_and_those_of_the_program_stay_frozen() -> None:
    gc.unfreeze()
    first, second = ExitStack(), ExitStack()
    first.enter_context(process.frozen_objects())
    frozen = gc.get_freeze_count()
    more = [[i] for i in range(1000)]
    second.enter_context(process.frozen_objects())
    assert gc.get_freeze_count() >= frozen + len(more) > 1000  # new objects are frozen too
    first.close()
    assert gc.get_freeze_count() > 1000
    second.close()
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        with process.frozen_objects():
            pass
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


def test_the_number_of_pytorch_threads_is_restored() -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with process.full_float32() as threads, process.one_torch_thread(threads):
            assert (threads, torch.get_num_threads()) == (3, 1)
            with process.full_float32() as again:  # not the number that `one_torch_thread` has set
                assert again == 3
        with pytest.raises(ZeroDivisionError), process.one_torch_thread(3):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_each_thread_has_its_own_number_of_faiss_threads() -> None:
    import faiss

    def thread_counts() -> tuple[int, int, int]:
        faiss.omp_set_num_threads(2)
        with process.one_faiss_thread():
            inside = faiss.omp_get_max_threads()
            barrier.wait(30)  # until the other thread is inside too
        after = faiss.omp_get_max_threads()
        with pytest.raises(ZeroDivisionError), process.one_faiss_thread():
            raise ZeroDivisionError
        return inside, after, faiss.omp_get_max_threads()

    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        assert [future.result() for future in [pool.submit(thread_counts) for _ in range(2)]] == [(1, 2, 2)] * 2


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "5000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_spinning_is_limited_unless_the_user_has_chosen(
    environment: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    process.limit_spinning()
    try:
        assert os.environ.get("GOMP_SPINCOUNT") == expected
        getenv = ctypes.CDLL(None).getenv
        getenv.restype = ctypes.c_char_p
        assert getenv(b"GOMP_SPINCOUNT") == (None if expected is None else expected.encode())  # as a library reads it
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


def test_the_version_is_that_of_pyproject() -> None:
    import hashret

    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert process.version() == hashret.__version__ == stated


def test_a_checkout_that_is_not_installed_has_a_version(tmp_path: Path) -> None:
    """`python -I -S` sees no installed package; the link hides metadata that an installation left behind."""
    (tmp_path / "hashret").symlink_to(ROOT / "hashret")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import hashret\n"
        "assert 'importlib.metadata' not in sys.modules\n"
        "from hashret import __version__\n"
        "print(__version__)"
    )
    done = subprocess.run([sys.executable, "-ISc", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("0+unknown\n", "")
