import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("brute_force", "command_line")
if "PYTEST_XDIST_WORKER" in os.environ:  # each core has a worker: more threads only wait for each other
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A shell starts background jobs with SIGINT ignored, and Python then raises no KeyboardInterrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread: networks this small gain nothing from two, and lose much when the machine is busy."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def flip_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build and use tables at sizes that brute force can check."""
    from hashret.indexes import tables

    monkeypatch.setattr(tables, "MIN_CODES", 2)
    monkeypatch.setattr(tables, "MIN_PREFILTER_CODES", 64)
    monkeypatch.setattr(tables, "SCAN_NS", 100.0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data beside the project; skip the test if it is missing."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder ../shared/data, beside the project, is missing")
    return folder


@pytest.fixture
def hashret(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs a command line in this process and returns its `command_line.Result`."""
    from command_line import Result

    from hashret.cli.app import run

    def command(*arguments: object) -> Result:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err and "Traceback" not in err
        return Result(code, out, err)

    return command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working directory, a temporary folder filled by `command_line.fill`."""
    from command_line import fill

    monkeypatch.delenv("HASHRET_COLLECTION", raising=False)
    monkeypatch.chdir(tmp_path)
    return fill(tmp_path)


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., str]]:
    """Serve a collection on loopback, with the options of `create_app`, until the module ends; return the URL.

    Wait until the service is ready, or has failed to load: the first request would time out while kernels compile.
    """
    import httpx

    from hashret.collection import Collection
    from hashret.service.app import create_app
    from hashret.service.server import Server, listen

    @contextmanager
    def serving(collection: Collection, **options: Any) -> Iterator[str]:
        started = threading.Event()
        listening = listen("127.0.0.1", 0)
        server = Server(create_app(collection, **options), started.set)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            assert started.wait(30)
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            deadline = time.monotonic() + 300
            while "being loaded" in httpx.get(f"{address}/readyz", timeout=60).text:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield address
        finally:
            server.should_exit = True
            thread.join(30)
            listening.close()
        assert not thread.is_alive()

    with ExitStack() as stack:
        yield lambda collection, **options: stack.enter_context(serving(collection, **options))
