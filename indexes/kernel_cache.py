"""The folder of compiled kernels, which all checkouts and environments with the same kernel sources share.

Numba's own cache names its folders after the folder of the sources, so a fresh clone compiles every kernel again, and
notices no edit in another file whose functions a kernel calls. Here a digest of all kernel sources and of the versions
of Python, Numba and llvmlite names the folder, in ``$NUMBA_CACHE_DIR``, ``$XDG_CACHE_HOME`` or ``~/.cache``. Numba's
index in that folder keeps the code of each CPU model apart.

A process updates the modification time of the folder that it uses and holds a shared lock on it. Folders that nobody
holds and nobody has used for `UNUSED_SECONDS` are deleted. File systems without locks keep all folders.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import llvmlite
import numba
from numba.core.caching import _CacheLocator

UNUSED_SECONDS = 30 * 24 * 3600
_KEY = re.compile(r"[0-9a-f]{16}")
_SOURCES = Path(__file__).parent
_config: Any = numba.config


def digest(sources: Path) -> str:
    """Return a digest, 16 hex digits, of the kernel sources in a folder and of the versions of what compiles them."""
    versions = (platform.python_implementation(), platform.python_version(), numba.__version__, llvmlite.__version__)
    result = hashlib.sha256(repr(versions).encode())
    for source in sorted([*sources.glob("kernels*.py"), sources / "jit.py"]):
        content = source.read_bytes()
        result.update(f"{source.name} {len(content)}\n".encode() + content)
    return result.hexdigest()[:16]


def use_folder(folder: Path) -> int:
    """Create a folder, mark it as used now, and lock it against deletion until the descriptor returned is closed."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # it is being deleted: create it again
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                with suppress(OSError):  # no locks here
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                if os.path.samestat(os.fstat(descriptor), folder.stat()):
                    os.utime(folder)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def delete_unused(root: Path, oldest: float) -> None:
    """Delete the cache folders in `root` that no process holds and that were last used before `oldest`, in seconds."""
    for folder in root.iterdir():
        if _KEY.fullmatch(folder.name):
            with suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(descriptor).st_mtime < oldest:
                        shutil.rmtree(folder)
                finally:
                    os.close(descriptor)


def _open_folder() -> Path | None:
    """Return the folder for compiled kernels, or None if it cannot be written: then each process compiles its own."""
    try:
        root = Path(_config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = root / "hashret" / "kernels" / digest(_SOURCES)
        use_folder(folder)  # its descriptor, and so the lock, stays open until the process ends
        with suppress(OSError):
            delete_unused(folder.parent, time.time() - UNUSED_SECONDS)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home; OSError also if there are no sources
        return None
    return folder if os.access(folder, os.W_OK) else None


FOLDER = _open_folder()


class KernelLocator(_CacheLocator):
    """Tell Numba where to keep a kernel, and that its code is stale once any kernel source changes."""

    def __init__(self, function: Callable[..., Any], file: str) -> None:
        self._py_file = file  # which Numba reads for its warnings
        self._line = function.__code__.co_firstlineno

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> Self | None:
        """Return the locator of a function in this file; None if it is no kernel of ours, and Numba locates it."""
        return cls(function, file) if Path(file).parent == _SOURCES else None

    def get_cache_path(self) -> str:
        return str(FOLDER)

    def get_source_stamp(self) -> str:
        return "" if FOLDER is None else FOLDER.name  # the digest

    def get_disambiguator(self) -> str:
        return str(self._line)
