"""Durable file operations: after a power cut a file is there whole or not at all."""

import os
from pathlib import Path


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
    """Rename a finished file or folder to `target`, in the same folder, durably, and replace what has that name."""
    for path in (*written.iterdir(), written) if written.is_dir() else (written,):
        sync(path)
    written.replace(target)
    sync(target.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write bytes to a file durably, and replace it only when all are on the disk."""
    written = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        written.write_bytes(data)
        replace_durably(written, path)
    finally:
        written.unlink(missing_ok=True)
