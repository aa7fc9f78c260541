"""Open sources: folders, archives, IDX and NumPy files, arrays, and named data sets.

`open_source` returns the same interface for all of them: a `Source`, which yields `Record`s in a fixed order and holds
few images in memory. Sources are read in place: nothing is extracted or unpickled.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hashret.data.archives import Tar, Zip
from hashret.data.arrays import (
    DATA_SETS,
    open_array,
    open_data_set,
    open_idx,
    open_npy,
    open_npz,
    open_plain_or_gzip,
    translate_errors,
)
from hashret.data.folders import Folder
from hashret.data.images import SUFFIXES
from hashret.data.records import Source, absolute
from hashret.data.rows import ArrayRows
from hashret.errors import HashretError
from hashret.results import Root


def open_source(
    source: str | os.PathLike[str] | NDArray[Any] | Source,
    *,
    data_root: str | os.PathLike[str] | None = None,
    exclude: Path | None = None,
) -> Source:
    """Open a source of images or vectors.

    `source` is a folder, an archive, an IDX, .npy or .npz file, or a data set by name; an array of images, uint8
    (n, h, w) or (n, h, w, 1 | 3 | 4), or of vectors, floats (n, d), which become float32; or an open source, which is
    returned unchanged. Text that is not an existing path is looked up in `DATA_SETS`, with an optional `:train` or
    `:test`. Data sets of torchvision are read from `data_root` (by default hashret's folder in the user's cache), and
    downloaded to it if they are missing. The folder `exclude` is left out.

    Raise HashretError if the source cannot be opened, and ValueError for an array of another shape or dtype.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, np.ndarray):
        # An array has no modification time: with the present one, its contents are compared again.
        return ArrayRows(Root.of_rows("array"), open_array(source), time.time_ns())
    text = os.fspath(source)
    path = Path(text)
    if not text.strip():
        raise HashretError(f"SOURCE is empty: give {_SOURCES}")
    try:
        if path.is_dir():
            return Folder(path, exclude)
        if path.is_file():
            return _open_file(path)
        exists = path.exists()
    except OSError as error:
        raise HashretError(f"{text}: cannot be read: {error.strerror}") from error
    if exists:
        raise HashretError(f"{text} is neither a file nor a folder: give {_SOURCES}")
    if text.partition(":")[0] in DATA_SETS:
        root = Path(data_root) if data_root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hashret"
        return ArrayRows(Root.of_rows(text), open_data_set(text, root.expanduser()), 0)
    raise HashretError(f"there is no {text!r}: give {_SOURCES}")


_SOURCES = (
    "a folder, an archive (.zip, .tar, .tar.gz), an IDX, .npy or .npz file, or a data set "
    f"({', '.join(DATA_SETS)}; :train or :test for a part)"
)


def _open_file(path: Path) -> Source:
    name = path.name.lower()
    if name.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")):
        return Tar(path)
    if name.endswith(".zip"):
        return Zip(path)
    if path.suffix.lower() in SUFFIXES:
        raise HashretError(f"{path} is a single image: give the folder that holds it")
    with translate_errors(path), open_plain_or_gzip(path) as file:
        is_idx = file.read(2) == b"\0\0"
    openers = {".npz": open_npz, ".npy": open_npy}
    if path.suffix.lower() not in openers and not is_idx:
        raise HashretError(f"{path} is not a source of images: give {_SOURCES}")
    array = openers.get(path.suffix.lower(), open_idx)(path)
    return ArrayRows(Root.of_rows(absolute(path)), array, path.stat().st_mtime_ns)
