"""Arrays of images or vectors: IDX, .npy and .npz files, arrays in memory, and named data sets.

Rows are read lazily, in blocks. Nothing is unpickled here (torchvision unpickles CIFAR-10, after checking its md5).
"""

import contextlib
import gzip
import io
import math
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.data.contents import MAX_BYTES, Inputs, read_npy_header, to_float32
from hashret.data.images import MAX_PIXELS
from hashret.errors import HashretError, format_count, one_line

MAX_DIM = 2**16  # numbers of a vector
DATA_SETS = ("digits", "mnist", "fashion-mnist", "cifar10")


class LazyArray(NamedTuple):
    """An array of images or vectors that is read block by block.

    `blocks()` starts a new pass. It yields uint8 (n, h, w) or (n, h, w, 1 | 3 | 4) for images, and float32 (n, d) for
    vectors; `dim` is d, or None for images. `length` is the number of rows of all blocks, and of `labels`.
    """

    length: int
    blocks: Callable[[], Iterator[Inputs]]
    labels: list[str] | None
    dim: int | None = None


_BYTES = np.dtype(np.uint8)


def _stream(
    path: Path, open_rows: Callable[[], IO[bytes]], shape: tuple[int, ...], dtype: np.dtype[Any] = _BYTES
) -> Iterator[Inputs]:
    """Yield blocks of about a megabyte of an array of `shape`, whose data is the whole stream `open_rows()`."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    step = max(1, 2**20 // row_bytes)
    with translate_errors(path), open_rows() as file:
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            data = file.read(rows * row_bytes)
            if len(data) < rows * row_bytes:
                found = start + len(data) // row_bytes
                images = format_count(shape[0], "image")
                raise HashretError(f"{path} is broken: its header announces {images}, and it ends after {found}")
            block = np.frombuffer(data, dtype).reshape(rows, *shape[1:])
            yield to_float32(block) if dtype.kind == "f" else block
        if file.read(1):
            raise HashretError(
                f"{path} is broken: its header announces {format_count(shape[0], 'image')}, and more data follows them"
            )


def open_idx(path: Path) -> LazyArray:
    """Open images in the IDX format of MNIST, with the labels of the file beside it. Raise HashretError."""

    def open_rows() -> IO[bytes]:
        file = open_plain_or_gzip(path)
        file.read(4 + 4 * len(shape))
        return file

    with translate_errors(path), open_plain_or_gzip(path) as file:
        shape = _read_idx_header(path, file)
        check_shape(shape, _BYTES, str(path))
        if not isinstance(file, gzip.GzipFile):
            _check_length(path, file, shape, _BYTES)
    return LazyArray(shape[0], partial(_stream, path, open_rows, shape), _read_idx_labels(path, shape[0]))


def _read_idx_header(path: Path, file: IO[bytes]) -> tuple[int, ...]:
    head = file.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] != 8:
        raise HashretError(f"{path} is not an IDX file of bytes: it begins with {head.hex(' ')}, not with 00 00 08")
    sizes = file.read(4 * head[3])
    if len(sizes) < 4 * head[3]:
        raise HashretError(f"{path} is broken: it ends within its header")
    return tuple(int.from_bytes(sizes[i : i + 4]) for i in range(0, len(sizes), 4))


def _read_idx_labels(path: Path, length: int) -> list[str] | None:
    """Return the labels of the file beside a file of images, or None without one.

    `train-images-idx3-ubyte` has its labels in `train-labels-idx1-ubyte`; either may end in `.gz`.
    """
    name = path.name.replace("images", "labels").replace("idx3", "idx1").replace("idx4", "idx1")
    plain = name.removesuffix(".gz")
    beside = next((path.with_name(n) for n in (name, plain, plain + ".gz") if path.with_name(n).is_file()), path)
    if beside == path:
        return None
    with translate_errors(beside), open_plain_or_gzip(beside) as file:
        shape = _read_idx_header(beside, file)
        labels = file.read(length + 1)
    if shape != (length,) or len(labels) != length:
        raise HashretError(
            f"{beside} must have one label for each of the {length} images of {path.name}: repair or move it"
        )
    return [_DIGITS[value] for value in labels]


_DIGITS = [str(value) for value in range(256)]


def open_npy(path: Path) -> LazyArray:
    """Open the images or vectors of a .npy file. Raise HashretError."""

    def open_rows() -> IO[bytes]:
        file = path.open("rb")
        read_npy_header(file)
        return file

    with translate_errors(path), path.open("rb") as file:
        shape, dtype = _read_rows_header(file, str(path))
        _check_length(path, file, shape, dtype)
    return LazyArray(shape[0], partial(_stream, path, open_rows, shape, dtype), None, vector_dim(shape, dtype))


def open_npz(path: Path) -> LazyArray:
    """Open the images, or else the vectors, of a .npz file, with its labels. Arrays are chosen by name.

    Raise HashretError, also if several arrays qualify.
    """

    def open_rows() -> IO[bytes]:
        file = archive.open(f"{rows}.npy")
        read_npy_header(file)
        return file

    with translate_errors(path):
        archive = zipfile.ZipFile(path)
        shapes, vectors = {}, []
        for name in archive.namelist():
            with archive.open(name) as file:
                shape, _, dtype = read_npy_header(file)
            shapes[name.removesuffix(".npy")] = shape
            if vector_dim(shape, dtype) is not None:
                vectors.append(name.removesuffix(".npy"))
        candidates = [name for name, shape in shapes.items() if len(shape) in (3, 4)] or vectors
        preferred = [name for name in ("images", "vectors", "x", "x_train", "data") if name in candidates] or candidates
        if len(candidates) != 1 and preferred == candidates:
            raise HashretError(
                f"{path} has the arrays {', '.join(shapes)}: name the one with the images 'images', or the one with "
                f"the vectors 'vectors'"
            )
        rows = preferred[0]
        with archive.open(f"{rows}.npy") as file:
            shape, dtype = _read_rows_header(file, f"{path}, array {rows}")
        labels_name = next((name for name in ("labels", "y", "y_train") if name in shapes), None)
        labels = None
        if labels_name is not None:
            with archive.open(f"{labels_name}.npy") as file:
                values = np.lib.format.read_array(io.BytesIO(file.read(MAX_BYTES)), allow_pickle=False)
            if values.size != shape[0] or values.dtype.kind not in "iuU":
                raise HashretError(
                    f"{path}: '{labels_name}' must have an integer or a string for each image of '{rows}'"
                )
            labels = [str(value) for value in values.ravel()]
    return LazyArray(shape[0], partial(_stream, path, open_rows, shape, dtype), labels, vector_dim(shape, dtype))


def _read_rows_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    shape, fortran, dtype = read_npy_header(file)
    check_shape(shape, dtype, name)
    if fortran:
        raise HashretError(f"{name} is in Fortran order: save numpy.ascontiguousarray of it")
    return shape, dtype


def open_array(array: NDArray[Any]) -> LazyArray:
    """Open an array in memory. Raise ValueError unless it has the shape and dtype of images or vectors."""
    check_shape(array.shape, array.dtype, "an array of images", ValueError)
    rows = to_float32(array) if array.dtype.kind == "f" else array
    return LazyArray(len(rows), lambda: iter([rows]), None, vector_dim(array.shape, array.dtype))


def _check_length(path: Path, file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if path.stat().st_size - file.tell() != math.prod(shape) * dtype.itemsize:
        raise HashretError(f"{path} is broken: its size does not fit the shape {shape} of its header")


def vector_dim(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int | None:
    """Return d if this shape and dtype are those of vectors, floats (n, d); None otherwise."""
    return shape[1] if dtype.kind == "f" and len(shape) == 2 else None


def check_shape(shape: tuple[int, ...], dtype: np.dtype[Any], name: str, error: type[Exception] = HashretError) -> None:
    """Raise `error`, with `name` in its text, unless this shape and dtype are those of images or vectors."""
    # (n, h, 1…4) is taken for a single colour image passed by mistake, not for images up to four pixels wide.
    images = (len(shape) == 3 and shape[2] > 4) or (len(shape) == 4 and shape[3] in (1, 3, 4))
    vectors = vector_dim(shape, dtype) is not None
    if not (vectors or (images and dtype == np.uint8)) or 0 in shape[1:]:
        raise error(
            f"{name} must be uint8 of shape (n, h, w) or (n, h, w, 1 | 3 | 4), or vectors, floats of shape (n, d), not "
            f"{dtype} of {shape}"
        )
    if vectors and shape[1] > MAX_DIM:
        raise error(f"{name} has vectors of {shape[1]} numbers: more than the limit of {MAX_DIM}")
    if not vectors and shape[1] * shape[2] > MAX_PIXELS:
        raise error(f"{name} has images of {shape[1]} × {shape[2]} pixels: more than the limit of {MAX_PIXELS}")


def open_data_set(text: str, data_root: Path) -> LazyArray:
    """Open one of `DATA_SETS`, or its `:train` or `:test` part. Raise HashretError if it cannot be loaded."""
    name, colon, part = text.partition(":")
    if colon and part not in ("train", "test"):
        raise HashretError(f"{name} has no part {part!r}: give {name}:train or {name}:test")
    parts = [part] if part else ["train", "test"]
    if name == "digits":
        pairs = [_load_digits(part) for part in parts]
    else:
        pairs = [_load_torchvision(name, part, data_root) for part in parts]
    blocks = [images for images, _ in pairs]
    labels = [label for _, labels in pairs for label in labels]
    return LazyArray(len(labels), lambda: iter(blocks), labels)


def _load_digits(part: str) -> tuple[NDArray[np.uint8], list[str]]:
    """Load scikit-learn's 1,797 digits of 8 × 8 pixels; the first 1,437, by other writers, are the training part.

    Their levels 0…16 become 0…255 as (255 * level + 8) // 16.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = ((bunch.images.astype(np.int64) * 255 + 8) // 16).astype(np.uint8)
    rows = slice(0, 1437) if part == "train" else slice(1437, None)
    return images[rows], [_DIGITS[value] for value in bunch.target[rows]]


def _load_torchvision(name: str, part: str, data_root: Path) -> tuple[NDArray[np.uint8], list[str]]:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: "operator torchvision::nms does not exist"
        raise HashretError(
            f"torch and torchvision do not fit together ({one_line(error)}): "
            "install them as a pair, pip install --upgrade torch torchvision"
        ) from error
    raw = [f"{half}-{array}-ubyte.gz" for half in ("train", "t10k") for array in ("images-idx3", "labels-idx1")]
    reader, folder, files = {
        "mnist": (datasets.MNIST, data_root / "MNIST" / "raw", raw),
        "fashion-mnist": (datasets.FashionMNIST, data_root / "FashionMNIST" / "raw", raw),
        "cifar10": (datasets.CIFAR10, data_root, ["cifar-10-python.tar.gz"]),
    }[name]
    try:
        with contextlib.redirect_stdout(sys.stderr if sys.stderr.isatty() else io.StringIO()):
            # download=True checks and unpacks existing files, and downloads the missing ones.
            data = reader(data_root, train=part == "train", download=True)
    except Exception as error:  # URLError, RuntimeError, OSError, and the errors of damaged files
        raise HashretError(
            f"{name} is missing and could not be downloaded ({one_line(error)}): put {', '.join(files)} into {folder}"
        ) from error
    names = _DIGITS if name == "mnist" else data.classes
    return np.asarray(data.data), [names[int(value)] for value in data.targets]


@contextlib.contextmanager
def translate_errors(path: Path) -> Iterator[None]:
    """Turn every exception that a damaged or missing file causes into a HashretError that names the file."""
    try:
        yield
    except HashretError as error:
        if str(path) in str(error):
            raise
        raise HashretError(f"{path}: {error}") from error.__cause__
    except OSError as error:
        raise HashretError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except Exception as error:  # tarfile, zipfile, NumPy and the decompressors raise many exception types
        raise HashretError(f"{path} is broken: {one_line(error)}") from None


def open_plain_or_gzip(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed if its first bytes are those of gzip."""
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if compressed else path.open("rb")  # type: ignore[return-value]  # GzipFile reads bytes
