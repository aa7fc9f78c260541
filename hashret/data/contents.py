"""Contents: the bytes of an image file, the pixels of an image in memory, or a vector.

Only this module reads files, computes the SHA-256 of contents and converts them to bytes; `hashret.data.images` decodes
them.
"""

import hashlib
import io
import os
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.errors import HashretError, TooLarge, one_line

Inputs = NDArray[np.uint8 | np.float32]  # pixels of images, or vectors; one or many
Content = bytes | Inputs

MAX_BYTES = 2**30  # of a content
NPY_MAGIC = b"\x93NUMPY"


class Prepared(NamedTuple):
    """One content as the input of a model, and its original size.

    `pixels` is uint8 (height, width, channels) for an image, and float32 (d,) for a vector, whose size is d × 1.
    """

    pixels: Inputs
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class PreparedImages:
    """A batch of images, preprocessed for the model with this `fingerprint`.

    `pixels` has one row per image, as the model's preprocessing returns it; `digests` are the SHA-256 of the contents
    as hex, in the same order. A slice of it is a `PreparedImages` of these rows.
    """

    pixels: Inputs
    digests: list[str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, rows: slice) -> "PreparedImages":
        return PreparedImages(self.pixels[rows], self.digests[rows], self.fingerprint)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a file of at most `MAX_BYTES`.

    Raise HashretError; its cause is an OSError if reading may succeed later.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe may never end
            raise HashretError("cannot be read: not a regular file")
        if status.st_size > MAX_BYTES:
            raise TooLarge(too_large(status.st_size))
        return Path(path).read_bytes()
    except OSError as error:
        raise HashretError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a null byte in the name
        raise HashretError(f"cannot be read: {error}") from error


def content_bytes(content: Content) -> bytes:
    """Return the canonical bytes of a content: those of the file, or for an array those of a `.npy` file, format 1.0.

    The header is written here because the padding of NumPy's own depends on its version. Raise ValueError for an array
    that is neither an image nor a vector.
    """
    if isinstance(content, bytes):
        return content
    array = check_content(content)
    return _npy_header(array.shape, array.dtype.str) + array.tobytes()


def sha256(content: Content) -> str:
    """Return the SHA-256 of `content_bytes(content)` as lower-case hex, which identifies a content."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    array = to_float32(content) if is_vector(content) else content
    digest = _npy_digest(array.shape, array.dtype).copy()
    digest.update(array.tobytes())
    return str(digest.hexdigest())


def to_float32(array: NDArray[Any]) -> NDArray[np.float32]:
    """Convert floats of any width to contiguous little-endian float32; values out of range become infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, "<f4")


def to_vector(content: Content) -> NDArray[np.float32]:
    """Return a content as a vector, float32 (d,). Raise HashretError unless it is one, or a `.npy` file of one."""
    array = read_npy(content) if isinstance(content, bytes) and content.startswith(NPY_MAGIC) else content
    if isinstance(array, bytes) or not is_vector(array):
        raise HashretError("no vector: give floats (d,) in an array or a .npy file")
    return to_float32(array)


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of a `.npy` file, and return shape, Fortran order and dtype; the file is then at its data.

    Raise HashretError for any other file.
    """
    try:
        if np.lib.format.read_magic(file) == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)
    except Exception as error:  # NumPy raises many exception types for malformed headers
        raise HashretError(f"broken .npy: {one_line(error)}") from None


def read_npy(data: bytes) -> Inputs:
    """Return the image or the vector in the bytes of a `.npy` file. Raise HashretError for any other array."""
    file = io.BytesIO(data)
    shape, fortran, dtype = read_npy_header(file)
    if dtype != np.uint8 and not (dtype.kind == "f" and len(shape) == 1):
        raise HashretError(f"no image: an array of {dtype} {shape}, and pixels are uint8")
    try:
        values = np.frombuffer(data, dtype, offset=file.tell())
        return check_content(values.reshape(shape, order="F" if fortran else "C"))
    except ValueError as error:
        raise HashretError(f"no image: {one_line(error)}") from None


def describe_value(value: Any) -> str:
    """Return the dtype and shape of an array, or the type of any other value, for error texts."""
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def is_vector(array: NDArray[Any]) -> bool:
    """Return whether an array is a vector: floats (d,), not empty."""
    return array.ndim == 1 and array.dtype.kind == "f" and array.size > 0


def check_content(array: NDArray[Any]) -> Inputs:
    """Return an image unchanged, and a vector as float32. Raise ValueError for any other array."""
    return to_float32(array) if is_vector(array) else check_array(array)


def check_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Return the array unchanged. Raise ValueError unless it is an image, uint8 (h, w) or (h, w, 1 | 3 | 4)."""
    shape = array.shape
    valid = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not valid or not array.size:
        raise ValueError(
            "an image array is uint8 (h, w) or (h, w, 1 | 3 | 4), and a vector floats (d,), "
            f"not {describe_value(array)}"
        )
    return array


def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return NPY_MAGIC + b"\x01\x00" + len(text).to_bytes(2, "little") + text.encode("ascii")  # 128 bytes


@lru_cache(maxsize=256)
def _npy_digest(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """Return the SHA-256 state after the header. Raise ValueError unless a content may have this shape and dtype."""
    check_content(np.broadcast_to(np.zeros((), dtype), shape))
    return hashlib.sha256(_npy_header(shape, dtype.str))


def too_large(size: int) -> str:
    """Return the error text for a file of this many bytes."""
    return f"{size / 2**30:.1f} GiB: more than the limit of {MAX_BYTES // 2**30} GiB"
