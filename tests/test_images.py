import hashlib
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pictures import Pixels, pixel_arrays, save, smooth
from PIL import Image

from hashret.data import images
from hashret.data.contents import MAX_BYTES, content_bytes, sha256
from hashret.data.images import decode, has_colour, to_content
from hashret.data.preprocessing import ImagePreprocessing
from hashret.errors import HashretError


def png_header(width: int, height: int) -> bytes:
    """Return a PNG whose header announces this size and whose data has two rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(bytes(2 * (width + 1)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_the_content_of_a_path_is_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(save(smooth(5, 7), "PNG"))
    assert to_content(path) == to_content(str(path)) == to_content(path.read_bytes()) == path.read_bytes()


@given(pixel_arrays)
def test_the_content_of_an_array_is_the_array(array: Pixels) -> None:
    assert to_content(array) is array


@pytest.mark.parametrize(
    ("array", "description"),
    [
        (np.zeros((4, 4), np.bool_), r"bool \(4, 4\)"),
        (np.zeros((4, 4), np.float32), r"float32 \(4, 4\)"),
        (np.zeros((4, 4), np.int8), r"int8 \(4, 4\)"),
        (np.zeros((4, 4, 2), np.uint8), r"uint8 \(4, 4, 2\)"),
        (np.zeros((2, 4, 4, 3), np.uint8), r"uint8 \(2, 4, 4, 3\)"),
        (np.zeros(4, np.uint8), r"uint8 \(4,\)"),
        (np.zeros((0, 4), np.uint8), r"uint8 \(0, 4\)"),
    ],
)
def test_an_array_of_another_dtype_or_shape_is_refused(array: NDArray[Any], description: str) -> None:
    for function in (to_content, decode, sha256, content_bytes):
        with pytest.raises(ValueError, match=description):
            function(array)


@pytest.mark.parametrize("value", [None, 7, [1, 2], object()])
def test_another_type_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="an image is a path"):
        to_content(value)


def test_the_content_of_a_pil_image_is_its_upright_pixels() -> None:
    image = Image.fromarray(smooth(6, 9))
    assert np.array_equal(to_content(image), smooth(6, 9))
    exif = Image.Exif()
    exif[0x0112] = 3
    opened = Image.open(io.BytesIO(save(image, "PNG", exif=exif)))
    assert np.array_equal(to_content(opened), smooth(6, 9)[::-1, ::-1])
    assert np.array_equal(to_content(Image.new("1", (3, 2), 1)), np.full((2, 3), 255))


def test_a_pil_image_that_cannot_be_decoded_is_refused() -> None:
    with pytest.raises(HashretError, match="truncated"):
        to_content(Image.open(io.BytesIO(save(smooth(60, 90), "PNG")[:400])))
    with pytest.raises(HashretError, match="megapixels"):
        to_content(Image.new("1", (10_001, 10_000)))


@pytest.mark.parametrize("name", ["missing.jpg", "a\0b.jpg", "", "x" * 300])
def test_a_path_without_a_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(HashretError, match="cannot be read"):
        to_content(str(tmp_path / name))


def test_a_pipe_and_a_huge_file_are_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(HashretError, match="not a regular file"):
        to_content(tmp_path / "pipe.jpg")
    (tmp_path / "big.jpg").touch()
    os.truncate(tmp_path / "big.jpg", MAX_BYTES + 1)  # a hole: it takes no space
    with pytest.raises(HashretError, match=r"1\.0 GiB: more than the limit of 1 GiB"):
        to_content(tmp_path / "big.jpg")


def test_the_bytes_of_an_array_are_golden() -> None:
    data = content_bytes(np.arange(6, dtype=np.uint8).reshape(2, 3))
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 3), }"
    assert data == b"\x93NUMPY\x01\x00\x76\x00" + header + b" " * (117 - len(header)) + b"\n" + bytes(range(6))
    assert sha256(np.arange(6, dtype=np.uint8).reshape(2, 3)) == (
        "1aa49be8db2728d7ecdcc4ec0f3f18181827aaeffc9b890db59bda865076448a"
    )


@given(pixel_arrays)
def test_the_bytes_of_an_array_are_a_npy_file(array: Pixels) -> None:
    data = content_bytes(array)
    assert (np.load(io.BytesIO(data)) == array).all()
    assert sha256(array) == hashlib.sha256(data).hexdigest() == sha256(data)
    assert (decode(data).pixels == decode(array).pixels).all()


def test_memory_order_does_not_change_a_content() -> None:
    array = smooth(12, 9)
    for other in (np.asfortranarray(array), np.ascontiguousarray(array[:, ::-1])[:, ::-1]):
        assert not other.flags.c_contiguous
        assert sha256(other) == sha256(array)
        assert content_bytes(other) == content_bytes(array)


def test_npy_files_of_images_are_decoded_and_others_refused() -> None:
    def npy(array: NDArray[Any]) -> bytes:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=True)
        return file.getvalue()

    array = smooth(4, 5)
    assert (decode(npy(array)).pixels == array).all()
    assert (decode(npy(np.asfortranarray(array))).pixels == array).all()
    for broken in (
        npy(array.astype(float)),
        npy(np.array([[{}]])),
        npy(array)[:-1],
        npy(array)[:20],
        npy(array) + b"!",
    ):
        with pytest.raises(HashretError, match="npy|array"):
            decode(broken)
    false_shape = npy(array).replace(b"(4, 5, 3)", b"(9999999, 99999)")
    with pytest.raises(HashretError, match="npy|no image"):
        decode(false_shape)


def test_size_and_channels_of_a_file_are_kept() -> None:
    grey, colour = smooth(6, 9, 1), smooth(6, 9)
    for format_name in ("PNG", "TIFF", "BMP", "PPM"):
        assert decode(save(grey, format_name)).pixels.tolist() == grey.tolist()
        assert decode(save(colour, format_name))[1:] == (9, 6)
        assert decode(save(colour, format_name)).pixels.tolist() == colour.tolist()
    grey_as_colour = np.repeat(grey, 3, axis=2)
    assert decode(save(grey_as_colour, "PNG")).pixels.tolist() == grey_as_colour.tolist()
    assert decode(save(grey, "JPEG")).pixels.shape == (6, 9, 1)
    assert decode(save(colour, "JPEG")).pixels.shape == (6, 9, 3)


def over_white(colour: Pixels, alpha: Pixels) -> NDArray[np.float64]:
    opacity = alpha[..., None] / 255.0
    return np.asarray(colour * opacity + 255 * (1 - opacity))


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
def test_alpha_is_blended_over_white(format_name: str) -> None:
    colour, alpha = smooth(8, 8), smooth(8, 8, 1)[..., 0]
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    for content in (save(rgba, format_name), np.asarray(rgba)):
        assert np.abs(decode(content).pixels - over_white(colour, alpha)).max() < 1
    grey = Image.merge("LA", [Image.fromarray(colour[..., 1]), Image.fromarray(alpha)])
    decoded = decode(save(grey, format_name)).pixels
    assert decoded.shape == (8, 8, 1)
    assert np.abs(decoded - over_white(colour[..., 1:2], alpha)).max() < 1


def test_transparent_colours_are_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    assert decode(save(palette, "PNG")).pixels.tolist() == [[[10, 20, 30], [200, 100, 50]]]
    assert decode(save(palette, "PNG", transparency=1)).pixels.tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert decode(save(palette, "GIF", transparency=0)).pixels.tolist() == [[[255, 255, 255], [200, 100, 50]]]
    half = save(palette, "PNG", transparency=bytes([0, 128]))
    assert decode(half).pixels.tolist() == [[[255, 255, 255], [227, 177, 152]]]
    assert decode(save(np.array([[7, 9]], np.uint8), "PNG", transparency=7)).pixels.tolist() == [[[255], [9]]]
    colour = np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8)
    assert decode(save(colour, "PNG", transparency=(1, 2, 3))).pixels.tolist() == [[[255, 255, 255], [1, 2, 4]]]


def test_sixteen_bits_are_scaled_to_eight() -> None:
    wide = np.linspace(0, 65535, 640).astype(np.uint16).reshape(20, 32)
    expected = np.rint(wide / 65535 * 255)[..., None]
    files = [save(Image.fromarray(wide), format_name) for format_name in ("PNG", "TIFF", "PPM")]
    files.append(save(Image.frombytes("I;16B", (32, 20), wide.astype(">u2").tobytes()), "TIFF"))
    files.append(save(Image.fromarray(wide.astype(np.int32)), "TIFF"))
    for data in files:
        assert decode(data).pixels.tolist() == expected.tolist()
    transparent = decode(save(Image.fromarray(wide), "PNG", transparency=0)).pixels
    assert transparent[0, 0] == 255 and transparent[0, 1:].tolist() == expected[0, 1:].tolist()


@pytest.mark.parametrize(
    "values", [np.array([[0, 70_000]], np.int32), np.array([[-1]], np.int32), np.ones((2, 2), "f4")]
)
def test_pixels_without_a_defined_white_are_refused(values: NDArray[Any]) -> None:
    with pytest.raises(HashretError, match="save it with 8 or 16 bits"):
        decode(save(Image.fromarray(values), "TIFF"))


def test_one_bit_is_black_and_white() -> None:
    bits = Image.fromarray(np.eye(9, dtype=np.uint8) * 255).convert("1")
    for data in (save(bits, "TIFF"), save(bits, "TIFF", compression="group4"), save(bits, "PNG"), save(bits, "PPM")):
        assert decode(data).pixels[..., 0].tolist() == (np.eye(9) * 255).tolist()


def test_cmyk_is_converted_to_rgb() -> None:
    colour = smooth(32, 32)
    cmyk = Image.fromarray(colour).convert("CMYK")
    for data in (save(cmyk, "JPEG", quality=98), save(cmyk, "TIFF")):
        assert np.abs(decode(data).pixels.astype(int) - colour).mean() < 2


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_decodes_to_its_first_frame(format_name: str) -> None:
    first, second = (Image.new("RGB", (12, 10), colour) for colour in ("red", "blue"))
    options: dict[str, Any] = {"lossless": True} if format_name == "WEBP" else {}
    data = save(first, format_name, save_all=True, append_images=[second], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 2
    assert decode(data).pixels.tolist() == [[[255, 0, 0]] * 12] * 10


# The stored form of an upright image for each EXIF orientation (TIFF 6.0, tag 274).
STORED: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation_is_undone(orientation: int) -> None:
    upright = smooth(10, 17)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](upright))
    lossless: list[tuple[str, dict[str, Any]]] = [
        ("PNG", {}),
        ("WEBP", {"lossless": True, "exact": True}),
        ("TIFF", {}),
    ]
    for format_name, options in lossless:
        decoded = decode(save(stored, format_name, exif=exif, **options))
        assert decoded.pixels.tolist() == upright.tolist(), format_name
        assert decoded[1:] == (17, 10), format_name
    plain = decode(save(stored, "JPEG")).pixels
    decoded = decode(save(stored, "JPEG", exif=exif))
    assert STORED[orientation](decoded.pixels).tolist() == plain.tolist()
    assert decoded[1:] == (17, 10)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_invalid_orientation_is_ignored(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert decode(save(smooth(10, 17), "PNG", exif=exif)).pixels.tolist() == smooth(10, 17).tolist()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_reduced_to_no_less_than_twice_the_target(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = smooth(900, 1400)
    data = save(np.ascontiguousarray(STORED[orientation](upright)), "JPEG", quality=95, exif=exif)
    sizes = set()
    for height, width in [
        (28, 28),
        (56, 64),
        (64, 56),
        (64, 64),
        (100, 180),
        (180, 100),
        (113, 1),
        (225, 5),
        (226, 5),
        (450, 700),
    ]:
        decoded = decode(data, at_least=(height, width))
        h, w = decoded.pixels.shape[:2]
        sizes.add((h, w))
        assert decoded[1:] == (1400, 900)
        assert (h, w) == (900, 1400) or min(h / height, w / width) >= 2
        assert (h, w) == (113, 175) or min((h // 2) / height, (w // 2) / width) < 2  # half of it would be too small
    assert sizes == {(113, 175), (225, 350), (450, 700), (900, 1400)}
    reduced = ImagePreprocessing(64, 64, 3)(data).pixels.astype(int)
    whole = ImagePreprocessing(64, 64, 3)(decode(data).pixels).pixels
    assert np.abs(reduced - whole).mean() < 1
    assert decode(data).pixels.shape == (900, 1400, 3)


BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no image: an empty file"),
    "text": (b"Dear diary, this is no photo.\n" * 20, "no image: no format begins with b'Dear dia'"),
    "zeros": (bytes(5000), "no image"),
    "jpeg cut": (save(smooth(200, 300), "JPEG")[:2000], "truncated JPEG"),
    "jpeg without its end": (save(smooth(200, 300), "JPEG")[:-1], "truncated JPEG"),
    "jpeg marker alone": (b"\xff\xd8", "broken JPEG|no image"),
    "png cut": (save(smooth(60, 90), "PNG")[:600], "truncated PNG"),
    "png signature alone": (b"\x89PNG\r\n\x1a\n", "broken PNG"),
    "png of no rows": (png_header(3, 2).replace(zlib.compress(bytes(8)), b"x" * 12), "PNG"),
    "gif cut": (save(smooth(60, 90), "GIF")[:1500], "truncated GIF"),
    "webp cut": (save(smooth(60, 90), "WEBP")[:90], "broken WebP"),
    "tiff cut": (save(smooth(60, 90), "TIFF")[:-50], "truncated TIFF"),
    "bmp cut": (save(smooth(60, 90), "BMP")[:-50], "truncated BMP"),
    "jpeg 2000 cut": (save(smooth(60, 90), "JPEG2000")[:-50], "broken JPEG 2000"),
    "says 120 megapixels": (png_header(12_000, 10_000), "^120 megapixels: more than the limit of 100$"),
    "says 100 and a bit": (png_header(10_000, 10_001), "^101 megapixels"),
    "says 4 billion": (png_header(2**16, 2**16), "^4295 megapixels"),
    "says 95 and has none": (png_header(9_500, 10_000), "truncated PNG"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image"),
    "pdf": (b"%PDF-1.4\n", "no image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_one_line(name: str) -> None:
    data, reason = BROKEN[name]
    with pytest.raises(HashretError, match=reason) as caught:
        decode(data)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM"])
def test_a_truncated_file_is_refused_unless_no_pixel_is_missing(format_name: str) -> None:
    data = save(smooth(40, 30), format_name)
    whole = decode(data).pixels
    refused = 0
    for length in range(0, len(data), max(1, len(data) // 150)):
        try:
            assert (decode(data[:length]).pixels == whole).all(), length
        except HashretError:
            refused += 1
    assert refused > 100


FILES = [
    save(smooth(20, 30), format_name)
    for format_name in ("JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP", "PPM", "JPEG2000")
]


@settings(max_examples=3000 if "HASHRET_SOAK" in os.environ else 100, deadline=None)
@given(st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=12))
def test_damage_raises_nothing_but_a_hashret_error(data: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for offset, value in changes:
        damaged[offset % len(damaged)] = value
    try:
        decode(bytes(damaged), at_least=(4, 4))
    except HashretError as error:
        assert "\n" not in str(error)


def corrupt_exif() -> bytes:
    """Return a valid JPEG with EXIF that makes Pillow warn."""
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 3, 0x0112, 3, 900, 5000) + b"\1\2\3"
    return save(smooth(16, 16), "JPEG", exif=exif)


def test_warnings_of_pillow_are_suppressed_in_all_threads() -> None:
    data = corrupt_exif()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(data)) as image:
            image.getexif()
    assert caught  # Pillow does warn
    before = list(warnings.filters)  # pytest turns warnings into errors
    with ThreadPoolExecutor(8) as pool:
        shapes = [decoded.pixels.shape for decoded in pool.map(decode, [data] * 200)]
    assert shapes == [(16, 16, 3)] * 200
    assert list(warnings.filters) == before


def test_decoding_in_threads_gives_equal_pixels() -> None:
    files = [save(smooth(20 + i, 30), format_name) for i in range(30) for format_name in ("JPEG", "PNG", "GIF", "WEBP")]
    alone = [sha256(decode(data).pixels) for data in files]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda data: sha256(decode(data).pixels), files)) == alone


def test_colour_is_found_in_pixels_not_in_modes() -> None:
    grey = smooth(64, 64, 1)
    assert not has_colour(grey)
    assert not has_colour(np.repeat(grey, 3, axis=2))
    assert not has_colour(decode(save(np.repeat(grey, 3, axis=2), "JPEG", quality=30)).pixels)
    touched = np.repeat(grey, 3, axis=2)
    touched[5, 7] = [100, 100, 104]
    assert not has_colour(touched)
    touched[5, 7] = [100, 100, 105]
    assert has_colour(touched)


def test_every_suffix_is_of_a_format_that_is_decoded(tmp_path: Path) -> None:
    usual = {".jpg", ".jpeg", ".jpe", ".png", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm"}
    assert usual <= images.SUFFIXES
    for suffix in images.SUFFIXES:
        Image.fromarray(smooth(16, 16)).convert("1" if suffix == ".pbm" else "RGB").save(tmp_path / f"a{suffix}")
        assert decode(to_content(tmp_path / f"a{suffix}")).pixels.shape[:2] == (16, 16)
