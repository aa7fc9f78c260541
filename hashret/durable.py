"""Files that are there whole or not at all, whenever the power goes."""

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Make what was written to a file, or the list of names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, that a power cut does not take away; nothing if it is there."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def put_in_place(written: Path, target: Path) -> None:
    """Give a finished file or folder its name, durably, in place of what had it; both lie in the same folder."""
    for path in (*written.iterdir(), written) if written.is_dir() else (written,):
        sync(path)
    written.replace(target)
    sync(target.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a file of these bytes."""
    written = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        written.write_bytes(data)
        put_in_place(written, path)
    finally:
        written.unlink(missing_ok=True)
