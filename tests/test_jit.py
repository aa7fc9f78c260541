"""Kernels are compiled once per machine, whichever checkout they lie in, and again when their sources change."""

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import hashret
from hashret.indexes import kernel_cache

PACKAGE = Path(hashret.__file__).parent
PRELUDE = """
import json, sys
before = {*sys.modules}
import numpy as np
from hashret.indexes import BitFlipIndex, FaissIndex, kernel_cache
from hashret.indexes.kernels_heap import sort_heaps
"""
# It calls `sift_down`, so that two kernels are compiled.
SORT = "sort_heaps(np.zeros((1, 2), np.int32), np.zeros((1, 2), np.int64), np.array([2]))"
SEARCH = """
index = BitFlipIndex(64)
codes = np.arange(3000 * 8, dtype=np.uint32).astype(np.uint8).reshape(3000, 8)
index.add(codes, np.arange(3000))
index.search(codes[:2], 3), index.within(codes[:2], 3)
"""
REPORT = """
kernels = [module for name, module in sys.modules.items() if name.startswith("hashret.indexes.kernels")]
compiled = {id(k): k for module in kernels for k in vars(module).values() if hasattr(k, "stats")}.values()
print(json.dumps({
    "file": kernel_cache.__file__,
    "folder": kernel_cache.FOLDER and str(kernel_cache.FOLDER),
    "misses": sum(sum(kernel.stats.cache_misses.values()) for kernel in compiled),
    "hits": sum(sum(kernel.stats.cache_hits.values()) for kernel in compiled),
    "heavy": sorted({"torch", "sqlite3", "faiss"} & (sys.modules.keys() - before)),
}))
"""


def run(root: Path, code: str, **variables: str) -> dict[str, Any]:
    """Run code in a new process that imports hashret from `root`; return what it reports of its kernels."""
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    if variables:
        environment.pop("NUMBA_CACHE_DIR", None)
    command = [sys.executable, "-c", PRELUDE + code + "\n" + REPORT]
    done = subprocess.run(command, cwd=root, env=environment | variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert Path(result["file"]).is_relative_to(root)
    return result


def copy_package(root: Path) -> Path:
    """Copy the modules that kernels need to a folder; they have new modification times there."""
    for source in [*PACKAGE.glob("*.py"), *PACKAGE.glob("indexes/*.py")]:
        target = root / "hashret" / source.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return root


def contents(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_copies_of_the_sources_share_compiled_kernels(tmp_path: Path) -> None:
    first, second = copy_package(tmp_path / "a"), copy_package(tmp_path / "b/c")
    for folder in (second / "hashret/indexes", second / "hashret"):
        folder.chmod(0o555)  # as installed for all users
    for source in (second / "hashret/indexes").iterdir():
        os.utime(source, (1, 1))
    compiled = run(first, SORT, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert compiled["misses"] == 2 and compiled["folder"].startswith(str(tmp_path / "cache"))
    files = contents(tmp_path / "cache")
    loaded = run(second, SORT, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert (loaded["misses"], loaded["hits"], loaded["folder"]) == (0, 1, compiled["folder"])
    assert len(files) == 4 and contents(tmp_path / "cache") == files
    assert not list(tmp_path.rglob("__pycache__"))
    with (first / "hashret/indexes/kernels_items.py").open("a") as kernels:  # another file than that of `sort_heaps`
        kernels.write("\nEDITED = True\n")
    edited = run(first, SORT, XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert edited["misses"] == 2 and edited["folder"] != compiled["folder"]


def test_a_second_process_compiles_no_kernel(tmp_path: Path) -> None:
    """Kernels are taken from, or compiled into, the cache of the user, as one that is empty costs minutes."""
    run(PACKAGE.parent, SEARCH)
    again = run(copy_package(tmp_path), SEARCH)
    assert again["misses"] == 0 and again["hits"] > 0 and again["heavy"] == []


def test_the_folder_is_where_numba_and_the_system_want_caches(tmp_path: Path) -> None:
    numba, xdg = tmp_path / "numba", tmp_path / "xdg"
    both = run(PACKAGE.parent, "", NUMBA_CACHE_DIR=str(numba), XDG_CACHE_HOME=str(xdg))
    assert Path(both["folder"]).parent == numba / "hashret/kernels" and not xdg.exists()
    report = run(PACKAGE.parent, "", XDG_CACHE_HOME=str(xdg))
    assert Path(report["folder"]).parent == xdg / "hashret/kernels"
    (tmp_path / "file").touch()
    assert run(PACKAGE.parent, SORT, XDG_CACHE_HOME=str(tmp_path / "file"))["folder"] is None


def test_a_locator_chosen_by_the_user_does_not_hide_edits(tmp_path: Path) -> None:
    chosen = {"NUMBA_CACHE_LOCATOR_CLASSES": "InTreeCacheLocator", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    assert run(copy_package(tmp_path / "a"), SORT, **chosen)["misses"] == 2
    assert len(contents(tmp_path / "cache")) == 4 and not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize("name", ["jit.py", *sorted(path.name for path in (PACKAGE / "indexes").glob("kernels*.py"))])
def test_the_key_depends_on_every_kernel_source(name: str, tmp_path: Path) -> None:
    folder = copy_package(tmp_path) / "hashret/indexes"
    before = kernel_cache.digest(folder)
    assert before == kernel_cache.digest(PACKAGE / "indexes")
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content.replace(b"def ", b"dex ", 1))  # as long as before
    assert kernel_cache.digest(folder) != before


def test_the_key_depends_on_what_compiles_and_on_no_other_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_package(tmp_path) / "hashret/indexes"
    keys = {kernel_cache.digest(folder)}
    (folder / "segments.py").write_text("")
    assert kernel_cache.digest(folder) in keys
    for change in ("numba.__version__", "llvmlite.__version__"):
        with monkeypatch.context() as patch:
            patch.setattr(change, "0.1")
            keys.add(kernel_cache.digest(folder))
    with monkeypatch.context() as patch:
        patch.setattr("platform.python_version", lambda: "3.0")
        keys.add(kernel_cache.digest(folder))
    assert len(keys) == 4


def make_cache(root: Path, key: str, age: float) -> Path:
    folder = root / key
    folder.mkdir(parents=True)
    (folder / "kernels.sort-1.py311.nbi").write_bytes(b"index")
    used = time.time() - age
    os.utime(folder, (used, used))
    return folder


def test_folders_that_nobody_uses_are_deleted(tmp_path: Path) -> None:
    root, month = tmp_path / "cache/hashret/kernels", kernel_cache.UNUSED_SECONDS
    unused = make_cache(root, "0" * 16, month + 100)
    kept = [make_cache(root, "1" * 16, month - 100), make_cache(root, "2" * 16, month + 100)]
    kept += [make_cache(root, "photos", month + 100), make_cache(tmp_path, "elsewhere", month + 100)]
    (root / ("3" * 16)).symlink_to(kept[-1])
    descriptor = os.open(kept[1], os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # as a process that has run for longer does
        own = Path(run(PACKAGE.parent, "", XDG_CACHE_HOME=str(tmp_path / "cache"))["folder"])
    finally:
        os.close(descriptor)
    assert not unused.exists() and all((folder / "kernels.sort-1.py311.nbi").exists() for folder in kept)
    assert sorted(path.name for path in root.iterdir()) == sorted([own.name, "1" * 16, "2" * 16, "3" * 16, "photos"])
    kernel_cache.delete_unused(root, time.time() - month)
    assert not kept[1].exists() and own.exists()


def test_use_keeps_a_folder(tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    folder = Path(run(PACKAGE.parent, SORT, **cache)["folder"])
    os.utime(folder, (1, 1))
    assert run(PACKAGE.parent, SORT, **cache)["misses"] == 0
    assert folder.stat().st_mtime > time.time() - 600
    delete = "import time; kernel_cache.delete_unused(kernel_cache.FOLDER.parent, time.time() + 9)"
    run(PACKAGE.parent, delete, **cache)
    assert folder.exists()
    descriptor = kernel_cache.use_folder(folder)
    kernel_cache.delete_unused(tmp_path / "hashret/kernels", time.time() + 1)
    assert folder.exists()
    os.close(descriptor)


def test_a_process_that_waited_for_a_deletion_locks_the_new_folder(tmp_path: Path) -> None:
    folder = make_cache(tmp_path, "0" * 16, 100)
    deleting = os.open(folder, os.O_RDONLY)
    fcntl.flock(deleting, fcntl.LOCK_EX)
    descriptors: list[int] = []
    user = threading.Thread(target=lambda: descriptors.append(kernel_cache.use_folder(folder)))
    user.start()
    time.sleep(0.1)
    assert not descriptors
    (folder / "kernels.sort-1.py311.nbi").unlink()
    folder.rmdir()
    folder.mkdir()  # by another process that needs it
    os.close(deleting)
    user.join(30)
    assert os.path.samestat(os.fstat(descriptors[0]), folder.stat()) and not list(folder.iterdir())
    os.close(descriptors[0])
