"""The command line, run in the process of a test, and a folder with photos and a collection for it to work in."""

import functools
import io
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hashret.collection import Collection
from hashret.hasher import Hasher

MAIN = [sys.executable, "-m", "hashret"]
PHOTOS = 40


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@functools.cache
def photos() -> dict[str, bytes]:
    """Return digits as PNG files, by paths whose folders are their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    files = {}
    for i in range(PHOTOS):
        file = io.BytesIO()
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(file, "PNG")
        files[f"{digits.target[i]}/{i:02d}.png"] = file.getvalue()
    return files


@functools.cache
def hasher(model: str = "lsh", bits: int = 32) -> Hasher:
    """Return a model that is fitted to the photos."""
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in photos().values()])
    return Hasher(model, bits).fit(pixels)


def fill(folder: Path) -> Path:
    """Write the photos, files that are not images, another model, and a collection of the photos."""
    for name, data in photos().items():
        (folder / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "photos" / name).write_bytes(data)
    (folder / "broken.png").write_bytes(b"Dear diary, this is no photo.")
    (folder / "empty").mkdir()
    (folder / "notes").mkdir()
    (folder / "notes/a.txt").write_text("nothing to see")
    hasher("pca", 16).save(folder / "other")
    with Collection.create(folder / ".hashret", hasher()) as collection:
        collection.index(folder / "photos")
    return folder


def check_failed(result: Result, code: int, pattern: str) -> None:
    """Assert that a command printed one line with this pattern on stderr, and nothing on stdout."""
    assert result.code == code and result.out == ""
    assert re.fullmatch(f"hashret: .*{pattern}.*\n", result.err), result.err


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files in a folder but SQLite's log and its index, which a reader leaves."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.endswith(("-wal", "-shm"))
    }


def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a command that reacts to Ctrl-C, even if this process ignores it, as one in the background does."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, text=True, **options)
    finally:
        signal.signal(signal.SIGINT, previous)
