"""Durable file operations: after a crash or a power cut, a file or folder is there as a whole, old or new.

What is written lies beside its target, as `.NAME.TOKEN.new` with 16 random hex digits, until it replaces it. Its writer
holds a lock on it, which the system releases however the process ends. A later writer in the folder thus recognises
what a killed one left, and deletes it: unlike a process id, a lock is never reused, and file systems that other hosts
share pass it on. Where the file system has no locks, nothing is deleted.
"""

import ctypes
import fcntl
import glob
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(new|old)", re.DOTALL)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_RENAME_SWAP = 2  # of macOS


def sync(path: Path) -> None:
    """Flush a file's content, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder_durably(path: Path) -> None:
    """Create a folder and its missing parents durably; do nothing if it exists."""
    if not path.is_dir():
        make_folder_durably(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def replace_durably(written: Path, target: Path) -> None:
    """Rename a finished file or folder to `target`, in the same folder, durably, and replace what has that name.

    If both are folders, the old one remains as `written`.
    """
    for path in (*written.rglob("*"), written) if written.is_dir() else (written,):
        sync(path)
    if written.is_dir() and target.is_dir():
        _exchange(written, target)
    else:
        written.replace(target)
    sync(target.parent)


def write_durably(path: Path, data: bytes, *, clean: bool = True) -> None:
    """Write bytes to a file durably, and replace it only when all are on the disk; for `clean` see `Replacement`."""
    with Replacement(path, clean=clean) as new:
        new.path.write_bytes(data)
        new.commit()


class Replacement:
    """A new file, or a new folder, at `path`; `commit` puts it in the place of `target`, as a whole and durably.

    Without `commit`, the target stays as it is, and `path` is deleted at the end of the `with` block. A symbolic link
    is followed. A pipe or a device cannot be replaced: then `path` is the target itself. With `clean`, what killed
    writers left in the folder is deleted first.
    """

    def __init__(self, target: Path, *, folder: bool = False, clean: bool = True) -> None:
        self.target = self.path = target
        self._folder = folder
        self._clean = clean
        self._is_stream = target.exists() and not target.is_file() and not target.is_dir()
        self._lock = -1

    def __enter__(self) -> Self:
        if not self._is_stream:
            self.target = Path(os.path.realpath(self.target))
            if self._clean:
                delete_leftovers(self.target.parent)
            try:
                self._create()
            except OSError as error:
                self._name_target(error)
                raise
        return self

    def _create(self) -> None:
        while True:
            self.path = _temporary(self.target, "new")
            if self._folder:
                self.path.mkdir()
            else:
                os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
            with suppress(FileNotFoundError):  # deleted before it was locked: create another
                self._lock = os.open(self.path, os.O_RDONLY if self._folder else os.O_RDWR)
                with suppress(OSError):  # no locks here
                    fcntl.flock(self._lock, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(self._lock), self.path.stat()):
                    return
                os.close(self._lock)

    def commit(self) -> None:
        """Put what was written in the place of the target, with the target's permissions if it exists."""
        if not self._is_stream:
            if self.target.exists():
                with suppress(OSError):  # a file system without permissions
                    shutil.copymode(self.target, self.path)
            replace_durably(self.path, self.target)

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not self._is_stream:
            _delete(self.path)  # a folder's old version, or what was not committed
            os.close(self._lock)
        if isinstance(error, OSError):
            self._name_target(error)

    def _name_target(self, error: OSError) -> None:
        if error.errno is not None and error.filename in (None, str(self.path)):
            error.filename = str(self.target)


def leftovers(folder: Path) -> list[Path]:
    """Return the files and folders that killed writers left in a folder."""
    return list(_abandoned(folder))


def delete_leftovers(folder: Path) -> None:
    """Delete what killed writers left in a folder; put an old version back whose target is missing."""
    for path in _abandoned(folder):
        target = _target(path)
        if path.suffix == ".old" and not target.exists():
            with suppress(OSError):
                path.replace(target)
        else:
            _delete(path)


def restore(target: Path) -> None:
    """Put a folder back if it is missing because its writer was killed between two renames, see `_exchange`."""
    for path in () if target.exists() else target.parent.glob(f".{glob.escape(target.name)}.*.old"):
        if _TEMPORARY.fullmatch(path.name):
            with suppress(OSError), _locked(path, required=False):  # OSError: read-only, or its writer is alive
                path.replace(target)


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock of a file."""
    try:
        with _locked(path):
            return False
    except OSError as error:
        return isinstance(error, BlockingIOError)


def _exchange(new: Path, target: Path) -> None:
    """Exchange two folders: in one step where the file system can, or else in three, which `restore` may complete."""
    names = os.fsencode(new), os.fsencode(target)
    with suppress(AttributeError):  # a C library without the function
        library = ctypes.CDLL(None)
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, _RENAME_SWAP)
        else:
            failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
        if not failed:
            return
    with _locked(target, required=False):  # against `restore` between the renames
        old = new.with_suffix(".old")
        target.replace(old)
        new.replace(target)
        old.replace(new)


def _temporary(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.{suffix}")


def _target(path: Path) -> Path:
    match = _TEMPORARY.fullmatch(path.name)
    assert match is not None
    return path.with_name(match[1])


def _abandoned(folder: Path) -> Iterator[Path]:
    """Iterate over what killed writers left in a folder, each locked while it is in use; ".old" comes after ".new"."""
    names = list[str]()
    with suppress(OSError):  # no such folder
        names = sorted(path.name for path in folder.iterdir() if _TEMPORARY.fullmatch(path.name))
    for name in names:
        with suppress(OSError), _locked(folder / name):
            yield folder / name


@contextmanager
def _locked(path: Path, *, required: bool = True) -> Iterator[None]:
    """Hold the lock of a file or folder, or none if the file system has no locks and it is not `required`.

    Raise OSError if another holds it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would block
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            if required:
                raise
        yield
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    with suppress(OSError):  # what stays only takes space
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
