"""Where images, or vectors, come from: a folder, an archive, an IDX or NumPy file, an array, or a data set by name.

`open_source` makes of any of them the same thing: a stream of `Record`s in an order that never changes, which holds a
few images at a time however many there are. What is read of a source is read in place: nothing is extracted, and
nothing is unpickled.
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
    """The images of a folder, an archive, an IDX, .npy or .npz file, an array (n, h, w[, c]), or a data set by name; or
    the vectors of a .npy or .npz file or an array of floats (n, d), which become float32.

    Something that exists as a path is one; other text is looked up in `DATA_SETS`, alone or with `:train` or `:test`.
    torchvision's data sets are looked for in `data_root` (by default hashret's folder in the user's cache) and
    downloaded to it. The folder `exclude` is passed over. A source that is open already comes back as it is. Raises
    HashretError for what is no source, and ValueError for an array that holds neither.
    """
    if isinstance(source, Source):
        return source
    if isinstance(source, np.ndarray):
        # An array has no date by which an unchanged one could be known: with this one, its contents are compared.
        return ArrayRows(Root.of_rows("array"), open_array(source), time.time_ns())
    text = os.fspath(source)
    path = Path(text)
    if not text.strip():
        raise HashretError(f"SOURCE is empty: give {_KINDS}")
    try:
        if path.is_dir():
            return Folder(path, exclude)
        if path.is_file():
            return _open_file(path)
        exists = path.exists()
    except OSError as error:
        raise HashretError(f"{text}: cannot be read: {error.strerror}") from error
    if exists:
        raise HashretError(f"{text} is neither a file nor a folder: give {_KINDS}")
    if text.partition(":")[0] in DATA_SETS:
        root = Path(data_root) if data_root else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "hashret"
        return ArrayRows(Root.of_rows(text), open_data_set(text, root.expanduser()), 0)
    raise HashretError(f"there is no {text!r}: give {_KINDS}")


_KINDS = (
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
        raise HashretError(f"{path} is a single image: give the folder it lies in")
    with translate_errors(path), open_plain_or_gzip(path) as file:
        is_idx = file.read(2) == b"\0\0"
    openers = {".npz": open_npz, ".npy": open_npy}
    if path.suffix.lower() not in openers and not is_idx:
        raise HashretError(f"{path} is no source of images: give {_KINDS}")
    opened = openers.get(path.suffix.lower(), open_idx)(path)
    return ArrayRows(Root.of_rows(absolute(path)), opened, path.stat().st_mtime_ns)
