"""Contents: what an image, or a vector, is known by, which is a file's bytes or an array.

A content is read, hashed and given as the bytes of a file here, and nowhere else; what pixels it has is known by
`hashret.data.images`.
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

Inputs = NDArray[np.uint8 | np.float32]  # pixels, or the numbers of vectors
Content = bytes | Inputs

MAX_BYTES = 2**30
NPY_MAGIC = b"\x93NUMPY"


class Prepared(NamedTuple):
    """What a model sees of an image: uint8 (height, width, channels), and the size of the original. Of a vector it is
    float32 (d,), and its size is d × 1."""

    pixels: Inputs
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class PreparedImages:
    """A batch of images as the model of a fingerprint sees them: `pixels` as its preprocessing gives, one row an image,
    and the `sha256` of each content, in the same order."""

    pixels: Inputs
    digests: list[str]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, rows: slice) -> "PreparedImages":
        """Some of the images."""
        return PreparedImages(self.pixels[rows], self.digests[rows], self.fingerprint)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file of at most `MAX_BYTES`.

    Raises HashretError; it is caused by an OSError where the file could not be read now but might be later.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):  # a folder, or a pipe that would never end
            raise HashretError("cannot be read: not a regular file")
        if status.st_size > MAX_BYTES:
            raise TooLarge(too_large(status.st_size))
        return Path(path).read_bytes()
    except OSError as error:
        raise HashretError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a null byte in the name
        raise HashretError(f"cannot be read: {error}") from error


def content_bytes(content: Content) -> bytes:
    """The bytes that stand for a content: a file's own, and for an array those of a `.npy` file (format 1.0).

    The header is written here, because NumPy pads its own differently from release to release.
    """
    if isinstance(content, bytes):
        return content
    array = check_content(content)
    return _npy_header(array.shape, array.dtype.str) + array.tobytes()


def sha256(content: Content) -> str:
    """The SHA-256 of `content_bytes(content)` as lower-case hex: what a content is known by."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    array = to_float32(content) if is_vector(content) else content
    digest = _npy_digest(array.shape, array.dtype).copy()
    digest.update(array.tobytes())
    return str(digest.hexdigest())


def to_float32(numbers: NDArray[Any]) -> NDArray[np.float32]:
    """Floats of any width as they are in contents: infinite where they are beyond float32."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(numbers, "<f4")


def to_vector(content: Content) -> NDArray[np.float32]:
    """The numbers, float32 (d,), of a content that is a vector or a `.npy` file of one; HashretError for any other."""
    array = read_npy(content) if isinstance(content, bytes) and content.startswith(NPY_MAGIC) else content
    if isinstance(array, bytes) or not is_vector(array):
        raise HashretError("no vector: give floats in an array or a .npy file")
    return to_float32(array)


def read_npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype at the beginning of a `.npy` file, which is read up to its data.

    Raises HashretError for anything else.
    """
    try:
        if np.lib.format.read_magic(file) == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)
    except Exception as error:  # whatever NumPy makes of bytes that lie
        raise HashretError(f"broken .npy: {one_line(error)}") from None


def read_npy(data: bytes) -> Inputs:
    """The pixels, or the numbers of a vector, that the bytes of a `.npy` file hold; HashretError for others."""
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
    """The dtype and shape of an array, or else the type, for errors."""
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def is_vector(array: NDArray[Any]) -> bool:
    """Whether it is floats (d,), and not empty."""
    return array.ndim == 1 and array.dtype.kind == "f" and array.size > 0


def check_content(array: NDArray[Any]) -> Inputs:
    """The array as contents have it, vectors as float32; raises ValueError if it is neither a vector nor an image."""
    return to_float32(array) if is_vector(array) else check_array(array)


def check_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """The same array; raises ValueError unless it is an image, uint8 (h, w) or (h, w, 1 | 3 | 4)."""
    shape = array.shape
    fits = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not fits or not array.size:
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
    """The SHA-256 so far, before the numbers; raises ValueError unless contents have that shape and dtype."""
    check_content(np.broadcast_to(np.zeros((), dtype), shape))
    return hashlib.sha256(_npy_header(shape, dtype.str))


def too_large(size: int) -> str:
    """Why a file of so many bytes is not read."""
    return f"{size / 2**30:.1f} GiB: more than the {MAX_BYTES // 2**30} that is read"
