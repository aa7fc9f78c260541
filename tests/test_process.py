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
from hashret.process import COLLECT_EVERY, TURN_SECONDS, shared_switch

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


# Each switch, how its setting is read and set, a value that a program may have chosen, and what stands meanwhile.
HARD = open_files()[1]
SWITCHES: dict[
    str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], Any], Callable[[Any], None], Any, Any]
] = {
    "rarely_collected": (
        process.rarely_collected,
        gc.get_threshold,
        lambda value: gc.set_threshold(*value),
        (500, 5, 5),
        (COLLECT_EVERY, 5, 5),
    ),
    "short_turns": (process.short_turns, sys.getswitchinterval, sys.setswitchinterval, 0.004, TURN_SECONDS),
    "full_float32": (process.full_float32, precision, set_precision, ("medium", True), ("highest", False)),
    "numba_cache": (
        lambda: process.numba_cache(int),
        locators,
        set_locators,
        ((str,), "theirs"),
        ((int, str), ""),
    ),
    "many_open_files": (process.many_open_files, open_files, set_open_files, (min(256, HARD), HARD), (HARD, HARD)),
}


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """A program has set the setting to a value of its own."""
    _, get, put, value, _ = SWITCHES[name]
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@pytest.mark.parametrize("name", SWITCHES)
def test_the_first_in_sets_and_the_last_out_restores(name: str) -> None:
    switch, get, _, value, meanwhile = SWITCHES[name]
    with chosen(name):
        first, second = ExitStack(), ExitStack()
        for stack in (first, second):
            stack.enter_context(switch())
            assert get() == meanwhile
        with switch():
            assert get() == meanwhile
        first.close()  # who came first may go first
        assert get() == meanwhile
        second.close()
        assert get() == value
        with switch():
            assert get() == meanwhile
        assert get() == value


@pytest.mark.parametrize("name", SWITCHES)
def test_an_exception_restores_too(name: str) -> None:
    switch, get, _, value, meanwhile = SWITCHES[name]
    with chosen(name):
        with pytest.raises(ZeroDivisionError), switch(), switch():
            raise ZeroDivisionError
        assert get() == value
        with switch():
            assert get() == meanwhile
        assert get() == value


@pytest.mark.parametrize("name", SWITCHES)
def test_threads_share_one_switch(name: str) -> None:
    """Thirty-two threads go in and out; whoever is inside sees the setting, and in the end it is what it was."""
    switch, get, _, value, meanwhile = SWITCHES[name]
    seen = set()

    def use(number: int) -> None:
        for _ in range(20):
            with switch():
                seen.add(get())

    with chosen(name):
        with ThreadPoolExecutor(32) as pool:
            list(pool.map(use, range(32)))
        assert seen == {meanwhile} and get() == value


def test_all_users_get_what_the_switch_yields_and_one_that_fails_counts_for_nothing() -> None:
    calls: list[str] = []

    @shared_switch
    def switch(fail: bool = False) -> Iterator[int]:
        if fail:
            raise OSError("refused")
        calls.append("on")
        yield len(calls)
        calls.append("off")

    with pytest.raises(OSError, match="refused"), switch(True):
        pass
    with switch() as outer, switch() as inner:
        assert (outer, inner, calls) == (1, 1, ["on"])
    assert calls == ["on", "off"]
    with switch() as later:
        assert later == 3


def test_who_comes_while_the_first_is_setting_waits_for_it() -> None:
    entered, go = threading.Event(), threading.Event()
    state = ["before"]

    @shared_switch
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


def test_a_program_without_garbage_collection_keeps_doing_without() -> None:
    gc.disable()
    before = gc.get_threshold()
    gc.set_threshold(0)
    try:
        with process.rarely_collected():
            assert gc.get_threshold()[0] == 0 and not gc.isenabled()
    finally:
        gc.set_threshold(*before)
        gc.enable()


def test_a_program_that_has_set_shorter_turns_keeps_them() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    shorter = sys.getswitchinterval()  # which may be off by a microsecond
    try:
        with process.short_turns():
            assert sys.getswitchinterval() == pytest.approx(shorter, abs=2e-6)
    finally:
        sys.setswitchinterval(before)


def warn() -> None:
    """A warning as if of Pillow."""
    warnings.warn_explicit("odd", UserWarning, "Image.py", 1, module="PIL.Image")


def test_the_filter_for_pillow_is_added_again_where_a_program_has_replaced_the_filters() -> None:
    """Warnings are errors here."""
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
            warn()  # somebody is inside still
    assert list(warnings.filters) == before
    with pytest.raises(UserWarning):
        warn()


def test_the_filter_for_pillow_goes_though_two_threads_have_added_it() -> None:
    before = list(warnings.filters)
    with process.quiet_pillow():
        warnings.filters.insert(0, warnings.filters[0])  # type: ignore[attr-defined]
    assert list(warnings.filters) == before


def test_objects_are_frozen_until_the_last_user_has_left_and_those_of_the_program_stay_so() -> None:
    gc.unfreeze()
    first, second = ExitStack(), ExitStack()
    first.enter_context(process.frozen_objects())
    frozen = gc.get_freeze_count()
    more = [[i] for i in range(1000)]
    second.enter_context(process.frozen_objects())
    assert gc.get_freeze_count() >= frozen + len(more) > 1000  # what came meanwhile is too
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


def test_pytorch_is_left_with_its_threads() -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with process.full_float32() as threads, process.one_torch_thread(threads):
            assert (threads, torch.get_num_threads()) == (3, 1)
            with process.full_float32() as again:  # not what `one_torch_thread` has set meanwhile
                assert again == 3
        with pytest.raises(ZeroDivisionError), process.one_torch_thread(3):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_each_thread_has_its_own_number_of_faiss_threads() -> None:
    import faiss

    def number() -> tuple[int, int, int]:
        faiss.omp_set_num_threads(2)
        with process.one_faiss_thread():
            inside = faiss.omp_get_max_threads()
            barrier.wait(30)  # the other is inside too
        after = faiss.omp_get_max_threads()
        with pytest.raises(ZeroDivisionError), process.one_faiss_thread():
            raise ZeroDivisionError
        return inside, after, faiss.omp_get_max_threads()

    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        assert [future.result() for future in [pool.submit(number) for _ in range(2)]] == [(1, 2, 2)] * 2


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
        assert getenv(b"GOMP_SPINCOUNT") == (None if expected is None else expected.encode())  # what a library reads
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


def test_the_version_is_that_of_pyproject() -> None:
    import hashret

    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert process.version() == hashret.__version__ == stated


def test_a_checkout_that_is_not_installed_has_a_version_too(tmp_path: Path) -> None:
    """`python -I -S` sees no installed package; what an installation leaves in the checkout is not beside the link."""
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
