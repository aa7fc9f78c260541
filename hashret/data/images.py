"""Decode contents to pixels, crop and resize them.

The module is long because all decoding and resizing is here, so that codes depend on it alone. A content (see
`hashret.data.contents`) gives the same pixels whichever form it comes in.
"""

import errno
import io
import logging
import os
import re
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# These imports register the formats, so that Pillow does not load its other plugins.
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, PpmImagePlugin  # noqa: F401  isort: skip
from PIL import Jpeg2KImagePlugin, MpoImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401  isort: skip

from hashret.data.contents import (
    MAX_BYTES,
    NPY_MAGIC,
    Content,
    check_array,
    check_content,
    is_vector,
    read_file,
    read_npy,
    too_large,
)
from hashret.errors import HashretError, TooLarge, format_count, one_line
from hashret.process import quiet_pillow

try:
    from PIL import AvifImagePlugin
except ImportError:  # Pillow before 11.3
    _AVIF = False
else:
    _AVIF = AvifImagePlugin.SUPPORTED

MAX_PIXELS = 100_000_000
DECODE_SECONDS = 30.0  # limit per file, plus two seconds per megabyte: far more than an ordinary file takes

# The only formats to open: Pillow has others that run a program (EPS) or match almost any bytes (TGA).
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

# Pillow logs some damage besides raising an error; without a handler Python prints these records.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class Decoded(NamedTuple):
    """Upright pixels, uint8 (h, w, 1 | 3), possibly reduced or cropped, and the size of the original in pixels."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


def to_content(image: Any) -> Content:
    """Return the content of an image.

    An image is a path, bytes, a PIL image, a uint8 array (h, w) or (h, w, 1 | 3 | 4), or a vector, floats (d,).
    The content of a path is the file's bytes, that of a PIL image its upright pixels, and that of a vector is float32.
    Raise ValueError for anything else, and HashretError for a file that cannot be read or a
    PIL image that cannot be decoded.
    """
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray):
        return check_content(image)
    if isinstance(image, Image.Image):
        _check_size(*image.size)
        try:
            with quiet_pillow():
                image.load()
                return np.asarray(_upright(image))
        except Exception as error:  # see _decode_file
            raise HashretError(_reason(b"image", error)) from None
    if isinstance(image, str | os.PathLike):
        return read_file(image)
    raise ValueError(f"an image is a path, bytes, a PIL image, a uint8 array or a vector, not {type(image).__name__}")


def as_batch(images: Any) -> Any:
    """Return a batch unchanged, and a single path, PIL image or bytes object as a batch of one."""
    return [images] if isinstance(images, str | os.PathLike | bytes | Image.Image) else images


def decode(content: Content, at_least: tuple[int, int] | None = None) -> Decoded:
    """Decode a content to upright pixels, uint8: (h, w, 1) for grey images, (h, w, 3) for others.

    EXIF orientation is applied, alpha is blended over white, and 16-bit grey is scaled to 8 bits; an animation gives
    its first frame. With `at_least` = (height, width), a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as
    its centre crop to that aspect ratio has at least twice that height and width.

    Raise HashretError, with a text of one line, for a content that cannot be decoded completely, and TooLarge for one
    of more than `MAX_PIXELS` pixels or `MAX_BYTES` bytes.
    """
    array = _as_array(content)
    if array is not None:
        return Decoded(array, array.shape[1], array.shape[0])
    image, width, height = _decode_file(content, at_least)  # type: ignore[arg-type]  # bytes here
    return Decoded(_pixels(image), width, height)


def resize(content: Content, height: int, width: int) -> Decoded:
    """Decode a content, crop its centre to the aspect ratio of (height, width), and resize it to that size.

    Resizing is one antialiased pass over the decoded image: a triangle filter whose width grows with the reduction.
    Grey images stay grey. Raise as `decode` does.
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
    if scale == 1:  # only crop, at integer positions: a shift by half a pixel would blur
        left, top = (w - width) // 2, (h - height) // 2
        image = image.crop((left, top, left + width, top + height))
    else:
        # Rounding must not exceed the image.
        right, bottom = min((w + width * scale) / 2, w), min((h + height * scale) / 2, h)
        image = image.resize((width, height), Image.Resampling.BILINEAR, (w - right, h - bottom, right, bottom))
    return Decoded(_pixels(image), original_width, original_height)


def has_colour(pixels: NDArray[np.uint8], tolerance: int = 4) -> bool:
    """Return whether the channels of any pixel, uint8 (…, 1 | 3), differ by more than `tolerance` levels.

    In a grey JPEG they differ by up to 4 levels, if both chroma values are rounded one step away from grey.
    """
    if pixels.shape[-1] == 1:
        return False
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]  # much faster than max(axis=-1)
    brightest, darkest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    return bool((brightest - darkest > tolerance).any())


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TooLarge(_too_many(width * height))


def _too_many(pixels: int) -> str:
    return f"{-(-pixels // 1_000_000)} megapixels: more than the limit of {MAX_PIXELS // 1_000_000}"


def _as_array(content: Content) -> NDArray[np.uint8] | None:
    """Return the pixels, uint8 (h, w, 1 | 3), of an array or a `.npy` file; None for the bytes of any other file."""
    if isinstance(content, np.ndarray):
        values = check_content(content)
    elif content.startswith(NPY_MAGIC):
        values = read_npy(content)
    else:
        return None
    if is_vector(values):
        raise HashretError(f"no image: a vector of {format_count(len(values), 'number')}, which has no picture")
    array = check_array(values)
    _check_size(array.shape[1], array.shape[0])
    if array.ndim == 2:
        return array[..., None]
    return array if array.shape[2] != 4 else _pixels(_flatten(Image.fromarray(array)))


def _decode_file(data: bytes, at_least: tuple[int, int] | None) -> tuple[Image.Image, int, int]:
    """Return an upright image in mode L or RGB, possibly reduced, and the width and height of the original."""
    if len(data) > MAX_BYTES:
        raise TooLarge(too_large(len(data)))
    try:
        with quiet_pillow():
            image: Image.Image = Image.open(_TimedFile(data), formats=_FORMATS)
            _check_size(*image.size)
            width, height = image.size
            if image.format == "PNG" and width * height * data[24] > 8 * 1032 * len(data):
                # zlib compresses by 1032 : 1 at most, so pixels (of data[24] bits) are missing; Pillow would fill
                # them with black.
                raise HashretError("truncated PNG")
            if at_least and isinstance(image, JpegImagePlugin.JpegImageFile):
                transposed = _orientation(image) >= 5
                image.draft(None, (2 * at_least[not transposed], 2 * at_least[transposed]))
            image.load()
            # Read after load(): a PNG may store EXIF at its end, and load() rotates a TIFF.
            transposed = _orientation(image) >= 5
            return _upright(image), *((height, width) if transposed else (width, height))
    except HashretError:
        raise
    except Image.DecompressionBombError as error:  # over twice Pillow's own limit; its text has the pixel count
        raise TooLarge(_too_many(int(re.findall(r"\d+", str(error))[0]))) from None
    except MemoryError:  # the machine's state, not a fault of the file: decoding may succeed later
        raise HashretError("cannot be read: not enough memory") from OSError(errno.ENOMEM, "not enough memory")
    except Exception as error:  # Pillow raises many exception types, even ZeroDivisionError, for broken files
        raise HashretError(_reason(data, error)) from None


class _TimedFile(io.BytesIO):
    """A file in memory whose `read` raises once decoding has taken too long: a few kilobytes can take hours.

    It counts the CPU time of this thread, so that other programs cannot exhaust the limit.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._limit = DECODE_SECONDS + len(data) / 2**19
        self._end = time.thread_time() + self._limit

    def read(self, size: int | None = -1, /) -> bytes:
        if time.thread_time() > self._end:
            raise HashretError(f"decoding takes longer than the limit of {self._limit:.0f} seconds")
        return super().read(size)


def _upright(image: Image.Image) -> Image.Image:
    method = _TRANSPOSE.get(_orientation(image))
    image = _flatten(image)
    return image if method is None else image.transpose(method)


_TRANSPOSE = {  # by EXIF orientation
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
    except Exception:  # broken EXIF does not make the pixels unreadable
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _flatten(image: Image.Image) -> Image.Image:
    """Convert an image to mode L or RGB: alpha blended over white, palettes applied, 16 bits scaled to 8."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _scale_16_bits(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined white; save it with 8 or 16 bits")
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
    transparent_level = image.info.get("transparency")
    pixels = np.empty(wide.shape, np.uint8)
    for start in range(0, wide.size, 2**20):  # in blocks: the whole image would take gigabytes
        levels = wide.reshape(-1)[start : start + 2**20].astype(np.int32)
        part = pixels.reshape(-1)[start : start + 2**20]
        part[...] = (levels + 128) // 257  # 65535 / 257 = 255
        if isinstance(transparent_level, int):
            part[levels == transparent_level] = 255
    return Image.fromarray(pixels)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _reason(data: bytes, error: Exception) -> str:
    """Return the error text for data that a decoder failed on."""
    format_name = next((name for magic, name in _MAGIC.items() if data.startswith(magic)), None)
    format_name = "AVIF" if data[4:12] == b"ftypavif" else format_name
    if not data:
        return "no image: an empty file"
    if isinstance(error, UnidentifiedImageError):
        if format_name:
            return f"broken {format_name}: its header is invalid"
        return f"no image: no format begins with {data[:8]!r}"
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return f"truncated {format_name or 'image'}"
    return f"broken {format_name or 'image'}: {one_line(error)}"
