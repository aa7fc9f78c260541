"""Bytes → pixels: the one decoder, and the one way to crop and resize.

`decode` makes upright pixels of a content (see `hashret.data.contents`), whichever form it came in, and `resize` those
of a size. The file is longer than most because nothing outside it may decode or resize an image in another way.
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

# Importing these registers their formats: Pillow then never loads the plugins we do not read with.
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
from hashret.errors import HashretError, TooLarge, one_line
from hashret.process import quiet_pillow

try:
    from PIL import AvifImagePlugin
except ImportError:  # Pillow before 11.3
    _AVIF = False
else:
    _AVIF = AvifImagePlugin.SUPPORTED

MAX_PIXELS = 100_000_000
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

# Pillow logs some damage as an error besides raising it; without any handler Python would print that.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class Decoded(NamedTuple):
    """An upright image: uint8 (h, w, 1 | 3), perhaps reduced or cropped, and the size of the original."""

    pixels: NDArray[np.uint8]
    width: int
    height: int


def to_content(image: Any) -> Content:
    """The content of an image given as a path, bytes, a PIL image (its upright pixels), a uint8 array, or a vector.

    Arrays are (h, w) or (h, w, 1 | 3 | 4); a vector is an array of floats (d,), and becomes float32. Raises ValueError
    for anything else, and HashretError for a file that cannot be read or a PIL image that cannot be decoded.
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
    """The images of a batch, which a path, a PIL image or bytes is by itself."""
    return [images] if isinstance(images, str | os.PathLike | bytes | Image.Image) else images


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


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise TooLarge(_too_many(width * height))


def _too_many(pixels: int) -> str:
    return f"{-(-pixels // 1_000_000)} megapixels: more than the {MAX_PIXELS // 1_000_000} that are read"


def _as_array(content: Content) -> NDArray[np.uint8] | None:
    """The pixels, uint8 (h, w, 1 | 3), of a content that is an array or the bytes of one; None for another file."""
    if isinstance(content, np.ndarray):
        found = check_content(content)
    elif content.startswith(NPY_MAGIC):
        found = read_npy(content)
    else:
        return None
    if is_vector(found):
        raise HashretError(f"no image: a vector of {len(found)} numbers, which has no picture")
    array = check_array(found)
    _check_size(array.shape[1], array.shape[0])
    if array.ndim == 2:
        return array[..., None]
    return array if array.shape[2] != 4 else _pixels(_flatten(Image.fromarray(array)))


def _decode_file(data: bytes, at_least: tuple[int, int] | None) -> tuple[Image.Image, int, int]:
    """An upright image in mode L or RGB, perhaps reduced, and the width and height of the original."""
    if len(data) > MAX_BYTES:
        raise TooLarge(too_large(len(data)))
    try:
        with quiet_pillow():
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
