"""Bytes → pixels: the one decoder and the one preprocessing of everything that becomes a code.

A *content* is what an image is known by: a file's bytes, or an array of pixels. `decode` makes upright pixels of
either; `Preprocessing` makes of either the small picture that a model sees, and the same one whichever form it came in.
A content may also be a vector, which `hashret.data.vectors` prepares; here it only has its bytes.
The file is longer than most because nothing outside it may decode, resize or hash an image in another way.
"""

import errno
import hashlib
import io
import logging
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# Importing these registers their formats: Pillow then never loads the plugins we do not read with.
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, PpmImagePlugin  # noqa: F401  isort: skip
from PIL import Jpeg2KImagePlugin, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401  isort: skip

from hashret.errors import HashretError, TooLarge, one_line

try:
    from PIL import AvifImagePlugin
except ImportError:  # Pillow before 11.3
    _AVIF = False
else:
    _AVIF = AvifImagePlugin.SUPPORTED

Inputs = NDArray[np.uint8 | np.float32]  # pixels, or the numbers of vectors
Content = bytes | Inputs

MAX_PIXELS = 100_000_000
MAX_BYTES = 2**30
DECODE_SECONDS = 30.0  # that a file may take, and two more for each megabyte: far more than any honest one does

# Pillow also reads formats that run a program or fit nearly any bytes (EPS, TGA, …); these are all we open.
_FORMATS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000", *(["AVIF"] if _AVIF else [])]
_MAGIC = {
    b"\xff\xd8": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"RIFF": "WebP",
    b"\0\0\0\x0cjP": "JPEG 2000",
}

_SUFFIXES = "jpg jpeg jpe jfif png apng gif bmp tif tiff webp ppm pgm pbm pnm jp2 j2k"
SUFFIXES = frozenset(f".{suffix}" for suffix in (_SUFFIXES + " avif" * _AVIF).split())

_NPY_MAGIC = b"\x93NUMPY"

# Pillow logs some damage as an error besides raising it; without any handler Python would print that.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class Decoded(NamedTuple):
    """An upright image: uint8 (h, w, 1 | 3), perhaps reduced or cropped, and the size of the original."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


class Prepared(NamedTuple):
    """What a model sees of an image: uint8 (height, width, channels), and the size of the original. Of a vector it is
    float32 (d,), and its size is d × 1."""

    pixels: Inputs
    width: int
    height: int


@dataclass(frozen=True, eq=False)
class PreparedImages:
    """A batch of images as a model sees them: `pixels` as its preprocessing gives, one row an image, and the `sha256`
    of each content, in the same order."""

    pixels: Inputs
    digests: list[str]

    def __len__(self) -> int:
        return len(self.digests)


def to_content(image: Any) -> Content:
    """The content of an image given as a path, bytes, a PIL image (its upright pixels), a uint8 array, or a vector.

    Arrays are (h, w) or (h, w, 1 | 3 | 4); a vector is an array of floats (d,), and becomes float32. Raises ValueError
    for anything else, and HashretError for a file that cannot be read or a PIL image that cannot be decoded.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        return _check_content(image)
    if isinstance(image, Image.Image):
        _check_size(*image.size)
        try:
            with _quiet():
                image.load()
                return np.asarray(_upright(image))
        except Exception as error:  # see _decode_file
            raise HashretError(_reason(b"image", error)) from None
    if isinstance(image, str | os.PathLike):
        return read_file(image)
    raise ValueError(f"an image is a path, bytes, a PIL image, a uint8 array or a vector, not {type(image).__name__}")


def to_float32(numbers: NDArray[Any]) -> NDArray[np.float32]:
    """Floats of any width as they are in contents: infinite where they are beyond float32."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(numbers, "<f4")


def to_vector(content: Content) -> NDArray[np.float32]:
    """The numbers, float32 (d,), of a content that is a vector or a `.npy` file of one; HashretError for any other."""
    array = _read_npy(content) if isinstance(content, bytes) and content.startswith(_NPY_MAGIC) else content
    if isinstance(array, bytes) or not _is_vector(array):
        raise HashretError("no vector: give floats in an array or a .npy file")
    return to_float32(array)


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a file of at most `MAX_BYTES`.

    Raises HashretError; it is caused by an OSError where the file could not be read now but might be later.
    """
    try:
        status = Path(path).stat()
        if not stat.S_ISREG(status.st_mode):  # a folder, or a pipe that would never end
            raise HashretError("cannot be read: not a regular file")
        if status.st_size > MAX_BYTES:
            raise TooLarge(_too_large(status.st_size))
        return Path(path).read_bytes()
    except OSError as error:
        raise HashretError(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # a null byte in the name
        raise HashretError(f"cannot be read: {error}") from error


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


def as_batch(images: Any) -> Any:
    """The images of a batch, which a path, a PIL image or bytes is by itself."""
    return [images] if isinstance(images, str | os.PathLike | bytes | Image.Image) else images


def content_bytes(content: Content) -> bytes:
    """The bytes that stand for a content: a file's own, and for an array those of a `.npy` file (format 1.0).

    The header is written here, because NumPy pads its own differently from release to release.
    """
    if isinstance(content, bytes):
        return content
    array = _check_content(content)
    return _npy_header(array.shape, array.dtype.str) + array.tobytes()


def sha256(content: Content) -> str:
    """The SHA-256 of `content_bytes(content)` as lower-case hex: what a content is known by."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    array = to_float32(content) if _is_vector(content) else content
    digest = _npy_digest(array.shape, array.dtype).copy()
    digest.update(array.tobytes())
    return str(digest.hexdigest())


def decode(content: Content, at_least: tuple[int, int] | None = None) -> Decoded:
    """The upright pixels of a content: uint8 (h, w, 1) for grey images, (h, w, 3) for others.

    EXIF orientation is applied, alpha laid over white, 16-bit grey scaled to 8; of an animation it is the first frame.
    With `at_least` = (height, width) a JPEG may come at a half, a quarter or an eighth of its size, while its centre
    crop to that aspect ratio still has twice that height and width. Raises HashretError, in one line, for anything that
    cannot be decoded whole, has more than `MAX_PIXELS` pixels or more than `MAX_BYTES` bytes.
    """
    array = _as_array(content)
    if array is not None:
        return Decoded(array, array.shape[1], array.shape[0])
    image, width, height = _decode_file(content, at_least)  # type: ignore[arg-type]  # bytes, as it is no array
    return Decoded(_pixels(image), width, height)


def resize(content: Content, height: int, width: int) -> Decoded:
    """The centre of a content, cropped to the aspect ratio of (height, width) and resized to it, in its own channels.

    Resizing is one antialiased pass (a triangle filter as wide as the reduction) over the decoded image. Raises as
    `decode` does.
    """
    array = _as_array(content)
    if array is not None:
        original_height, original_width = array.shape[:2]
        if (original_height, original_width) == (height, width):
            return Decoded(array, width, height)
        image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    else:
        image, original_width, original_height = _decode_file(content, (height, width))  # type: ignore[arg-type]
    w, h = image.size
    scale = min(w / width, h / height)
    if scale == 1:  # a crop alone, on whole pixels: a shift by half a pixel would blur
        left, top = (w - width) // 2, (h - height) // 2
        image = image.crop((left, top, left + width, top + height))
    else:
        right, bottom = min((w + width * scale) / 2, w), min((h + height * scale) / 2, h)  # never over the edge
        image = image.resize((width, height), Image.Resampling.BILINEAR, (w - right, h - bottom, right, bottom))
    return Decoded(_pixels(image), original_width, original_height)


def has_colour(pixels: NDArray[np.uint8], tolerance: int = 4) -> bool:
    """Whether the channels of any pixel, uint8 (…, 1 | 3), differ by more than `tolerance` levels.

    4 is what JPEG makes of grey at worst when both chroma values are rounded one step away from it.
    """
    if pixels.shape[-1] == 1:
        return False
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]  # by planes: far faster than max(axis=-1)
    brightest, darkest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    return bool((brightest - darkest > tolerance).any())


@dataclass(frozen=True)
class Preprocessing:
    """What every image goes through before a model sees it, as stored with the model.

    Centre crop to the aspect ratio of (height, width), antialiased resize, then grey ↔ colour (ITU-R 601 luma).
    """

    height: int
    width: int
    channels: int

    dtype: ClassVar = np.dtype(np.uint8)
    numbers: ClassVar = None  # as for `Source.numbers`: no vectors

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what a model sees: (height, width, channels)."""
        return self.height, self.width, self.channels

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, not {self.channels!r}")
        if self.height * self.width > MAX_PIXELS:
            raise ValueError(f"height × width must be at most {MAX_PIXELS}, not {self.height} × {self.width}")

    def __call__(self, content: Content) -> Prepared:
        """The content as the model sees it, uint8 (height, width, channels); raises as `decode` does."""
        pixels, width, height = resize(content, self.height, self.width)
        return Prepared(self._convert(pixels), width, height)

    def batch(self, rows: NDArray[Any]) -> NDArray[np.uint8]:
        """Images of one size, uint8 (n, h, w, 1 | 3 | 4), as the model sees them: the same as one by one, but faster.

        When nothing has to change the result is `rows` itself.
        """
        if not isinstance(rows, np.ndarray) or rows.dtype != np.uint8 or rows.ndim != 4:
            raise ValueError(f"rows must be a uint8 array of shape (n, h, w, channels), not {_describe(rows)}")
        if rows.shape[1:3] == (self.height, self.width) and rows.shape[3] in (1, 3):
            return self._convert(rows)
        out = np.empty((len(rows), self.height, self.width, self.channels), np.uint8)
        for row, image in zip(out, rows, strict=True):
            row[...] = self(_check_array(image)).pixels
        return out

    def to_dict(self) -> dict[str, int]:
        """The three numbers by name, for `config.json`."""
        return asdict(self)

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """What is too long for `config.json`: nothing."""
        return {}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """The inverse of `to_dict`; raises ValueError for other names or values."""
        if set(values) != {"height", "width", "channels"}:
            raise ValueError(f"preprocessing has height, width and channels, not {sorted(values)}")
        return cls(**values)

    def _convert(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if pixels.shape[-1] == self.channels:
            return pixels
        if self.channels == 3:
            return np.repeat(pixels, 3, axis=-1)
        # ITU-R 601-2 luma in the same integers as Pillow's convert("L").
        weighted = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
        return ((weighted + 0x8000) >> 16).astype(np.uint8)[..., None]


def _describe(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


def _is_vector(array: NDArray[Any]) -> bool:
    return array.ndim == 1 and array.dtype.kind == "f" and array.size > 0


def _check_content(array: NDArray[Any]) -> Inputs:
    return to_float32(array) if _is_vector(array) else _check_array(array)


def _check_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    shape = array.shape
    fits = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not fits or not array.size:
        raise ValueError(
            f"an image array is uint8 (h, w) or (h, w, 1 | 3 | 4), and a vector floats (d,), not {_describe(array)}"
        )
    return array


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TooLarge(_too_many(width * height))


def _too_many(pixels: int) -> str:
    return f"{-(-pixels // 1_000_000)} megapixels: more than the {MAX_PIXELS // 1_000_000} that are read"


def _too_large(size: int) -> str:
    return f"{size / 2**30:.1f} GiB: more than the {MAX_BYTES // 2**30} that is read"


def _npy_header(shape: tuple[int, ...], dtype: str) -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return _NPY_MAGIC + b"\x01\x00" + len(text).to_bytes(2, "little") + text.encode("ascii")  # 128 bytes


@lru_cache(maxsize=256)
def _npy_digest(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """The SHA-256 so far, before the numbers; raises ValueError unless contents have that shape and dtype."""
    _check_content(np.broadcast_to(np.zeros((), dtype), shape))
    return hashlib.sha256(_npy_header(shape, dtype.str))


def _as_array(content: Content) -> NDArray[np.uint8] | None:
    """The pixels, uint8 (h, w, 1 | 3), of a content that is an array or the bytes of one; None for another file."""
    if isinstance(content, np.ndarray):
        found = _check_content(content)
    elif content.startswith(_NPY_MAGIC):
        found = _read_npy(content)
    else:
        return None
    if _is_vector(found):
        raise HashretError(f"no image: a vector of {len(found)} numbers, which has no picture")
    array = _check_array(found)
    _check_size(array.shape[1], array.shape[0])
    if array.ndim == 2:
        return array[..., None]
    return array if array.shape[2] != 4 else _pixels(_flatten(Image.fromarray(array)))


def _read_npy(data: bytes) -> Inputs:
    file = io.BytesIO(data)
    shape, fortran, dtype = read_npy_header(file)
    if dtype != np.uint8 and not (dtype.kind == "f" and len(shape) == 1):
        raise HashretError(f"no image: an array of {dtype} {shape}, and pixels are uint8")
    try:
        values = np.frombuffer(data, dtype, offset=file.tell())
        return _check_content(values.reshape(shape, order="F" if fortran else "C"))
    except ValueError as error:
        raise HashretError(f"no image: {one_line(error)}") from None


def _decode_file(data: bytes, at_least: tuple[int, int] | None) -> tuple[Image.Image, int, int]:
    """An upright image in mode L or RGB, perhaps reduced, and the width and height of the original."""
    if len(data) > MAX_BYTES:
        raise TooLarge(_too_large(len(data)))
    try:
        with _quiet():
            image: Image.Image = Image.open(_Watched(data), formats=_FORMATS)
            _check_size(*image.size)
            width, height = image.size
            if image.format == "PNG" and width * height * data[24] > 8 * 1032 * len(data):
                # zlib packs no more than 1032 : 1, so its pixels (of data[24] bits) cannot all be there; Pillow would
                # make the missing ones black.
                raise HashretError("truncated PNG")
            if at_least and isinstance(image, JpegImagePlugin.JpegImageFile):
                turned = _orientation(image) >= 5
                image.draft(None, (2 * at_least[not turned], 2 * at_least[turned]))
            image.load()
            turned = _orientation(image) >= 5  # only now: a PNG may say it at its end, and a TIFF was turned by loading
            return _upright(image), *((height, width) if turned else (width, height))
    except HashretError:
        raise
    except Image.DecompressionBombError as error:  # more than twice Pillow's own limit; its text has the number
        raise TooLarge(_too_many(int(re.findall(r"\d+", str(error))[0]))) from None
    except MemoryError:  # which is said of the computer as it is now, not of the file
        raise HashretError("cannot be read: not enough memory") from OSError(errno.ENOMEM, "not enough memory")
    except Exception as error:  # Pillow raises a dozen kinds, down to ZeroDivisionError, for files that are broken
        raise HashretError(_reason(data, error)) from None


class _Watched(io.BytesIO):
    """A file that Pillow may read from for so long: a few kilobytes can keep a decoder busy for hours.

    The time is that of this thread on its processor, so that it does not run out because other programs do.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._most = DECODE_SECONDS + len(data) / 2**19
        self._end = time.thread_time() + self._most

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._end:
            raise HashretError(f"takes more than the {self._most:.0f} seconds that it may take to decode")
        return super().read(size)


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image))
    image = _flatten(image)
    return image if turn is None else image.transpose(turn)


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(0x0112)
    except Exception:  # EXIF is a remark beside the image: a broken one must not cost us the image
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _flatten(image: Image.Image) -> Image.Image:
    """The same image in mode L or RGB: alpha over white, palette looked up, 16 bits scaled to 8."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _scale_16_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no white; save it with 8 or 16 bits")
    grey = image.mode in ("1", "L", "LA", "La")
    if not image.has_transparency_data:
        return image.convert("L" if grey else "RGB")
    layers = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layers, mask=layers)
    return white.convert("L") if grey else white


def _scale_16_bits(image: Image.Image) -> Image.Image:
    wide = np.asarray(image)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError("pixels beyond 16 bits; save it with 8 or 16 bits")
    clear = image.info.get("transparency")
    pixels = np.empty(wide.shape, np.uint8)
    for start in range(0, wide.size, 2**20):  # all at once would take gigabytes
        levels = wide.reshape(-1)[start : start + 2**20].astype(np.int32)
        part = pixels.reshape(-1)[start : start + 2**20]
        part[...] = (levels + 128) // 257  # 65535 / 257 = 255
        if isinstance(clear, int):
            part[levels == clear] = 255
    return Image.fromarray(pixels)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _reason(data: bytes, error: Exception) -> str:
    kind = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)
    kind = "AVIF" if data[4:12] == b"ftypavif" else kind
    if not data:
        return "no image: an empty file"
    if isinstance(error, UnidentifiedImageError):
        return f"broken {kind}: its header is not one" if kind else f"no image: no format begins with {data[:8]!r}"
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return f"truncated {kind or 'image'}"
    return f"broken {kind or 'image'}: {one_line(error)}"


# Pillow warns of much that does not matter here (odd EXIF, our own limit). `warnings.catch_warnings` swaps the filters
# of the whole process and is not safe in threads, so this one filter stands while any thread decodes.
_QUIET = ("ignore", None, Warning, re.compile(r"PIL\b"), 0)
_quiet_lock = threading.Lock()
_quiet_threads = 0


@contextmanager
def _quiet() -> Iterator[None]:
    global _quiet_threads
    with _quiet_lock:
        _quiet_threads += 1
        if _QUIET not in warnings.filters:
            warnings.filters.insert(0, _QUIET)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_threads -= 1
            if not _quiet_threads and _QUIET in warnings.filters:
                warnings.filters.remove(_QUIET)  # type: ignore[attr-defined]
