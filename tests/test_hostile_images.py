"""Index and query thousands of damaged and malicious files, in a process of their own that must not crash."""

import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hashret.collection import Collection
from hashret.data import images
from hashret.data.images import decode
from hashret.errors import HashretError
from hashret.hasher import Hasher

SOAK = "HASHRET_SOAK" in os.environ
MUTANTS, GOOD = (45_000, 900) if SOAK else (330, 33)
MAX_MEMORY = 2**31  # bytes of a run beyond those of the loaded model

# Index a folder twice, query with every file in it, and print the result of each file.
SCRIPT = """
import json, resource, sys, warnings
from pathlib import Path
import numpy as np
from hashret.collection import Collection
from hashret.errors import HashretError

def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

lines, queried = [], {}
with Collection.open(sys.argv[1]) as collection:
    collection.query(np.zeros((8, 8), np.uint8))
    warnings.simplefilter("error")
    before = peak_memory()
    collection.index(sys.argv[2], committed=lines.extend)
    again = collection.index(sys.argv[2])
    for file in Path(sys.argv[2]).iterdir():
        try:
            queried[str(file)] = collection.query(file, 1)[0].distance
        except HashretError as error:
            queried[str(file)] = str(error)
print(json.dumps({"lines": lines, "again": again, "queried": queried, "memory": peak_memory() - before}))
"""


def run(folder: Path, files: dict[str, bytes]) -> dict[str, Any]:
    """Run the script on these files, and return what it prints."""
    (folder / "photos").mkdir()
    for name, data in files.items():
        (folder / "photos" / name).write_bytes(data)
    pixels = np.random.default_rng(0).integers(0, 256, (100, 8, 8), np.uint8)
    Collection.create(folder / "c", Hasher("lsh", 32).fit(pixels)).close()
    command = [sys.executable, "-X", "faulthandler", "-c", SCRIPT, str(folder / "c"), str(folder / "photos")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600 if SOAK else 300)
    assert done.returncode == 0, done.stderr  # libtiff may write to stderr without a failure
    results: dict[str, Any] = json.loads(done.stdout)
    return results


def check(results: dict[str, Any], files: dict[str, bytes]) -> dict[str, str | None]:
    """Check that every file was reported once, with the result of a query by it, and return the reasons by name."""
    reasons = {Path(path).name: reason for path, _, _, reason in results["lines"]}
    assert sorted(reasons) == sorted(files) and len(results["lines"]) == len(files)
    for path, status, _, reason in results["lines"]:
        assert status == ("added" if reason is None else "failed")
        assert results["queried"][path] == (0 if reason is None else reason)
        assert reason is None or (reason.isprintable() and 0 < len(reason) < 300)
    added, unchanged, updated, removed, failed, decoded, _, failures, *_ = results["again"]
    assert (added, updated, removed, decoded, failures) == (0, 0, 0, 0, [])
    assert failed == sum(reason is not None for reason in reasons.values()) and unchanged == len(files) - failed
    assert results["memory"] < MAX_MEMORY
    return reasons


def picture(seed: int, channels: int = 3) -> Image.Image:
    """Return a smooth image; every seed gives another."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, channels), np.uint8)
    image = Image.fromarray(small[..., 0] if channels == 1 else small)
    return image.resize((int(rng.integers(9, 40)), int(rng.integers(9, 40))), Image.Resampling.BICUBIC)


def save(image: Image.Image, format_name: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def adam7(seed: int) -> bytes:
    """Return an interlaced PNG, which Pillow reads but cannot write."""
    pixels = np.asarray(picture(seed, 1))
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    parts = [pixels[y::dy, x::dx] for y, x, dy, dx in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 0, 0, 0, 1)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    whole = (name + data for name, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in whole
    )


def rle(width: int, height: int, data: bytes) -> bytes:
    """Return a BMP with run-length encoding."""
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(data), 0, 0, 256, 0)
    head = b"BM" + struct.pack("<IHHI", 54 + 1024 + len(data), 0, 0, 54 + 1024)
    return head + info + bytes(range(256)) * 4 + data


# (suffix, function that makes a file from a seed) for each variant of a format that Pillow reads.
VARIANTS: list[tuple[str, Callable[[int], bytes]]] = [
    ("jpg", lambda i: save(picture(i), "JPEG", quality=40 + i % 60)),
    ("jpg", lambda i: save(picture(i), "JPEG", progressive=True)),
    ("jpg", lambda i: save(picture(i, 1), "JPEG", restart_marker_blocks=1)),
    ("jpg", lambda i: save(picture(i, 4).convert("CMYK"), "JPEG")),
    ("jpg", lambda i: save(picture(i), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0")),
    ("jpg", lambda i: save(picture(i), "MPO", save_all=True, append_images=[picture(i + 1)])),
    ("png", lambda i: save(picture(i), "PNG")),
    ("png", lambda i: save(picture(i, 4), "PNG")),
    ("png", lambda i: save(picture(i).quantize(16), "PNG", transparency=3)),
    ("png", lambda i: save(picture(i, 1).convert("1"), "PNG")),
    ("png", lambda i: save(Image.fromarray(np.asarray(picture(i, 1)).astype(np.uint16) * 257), "PNG")),
    ("png", lambda i: save(picture(i), "PNG", save_all=True, append_images=[picture(i).rotate(90)])),
    ("png", adam7),
    ("gif", lambda i: save(picture(i).quantize(32), "GIF")),
    ("gif", lambda i: save(picture(i), "GIF", save_all=True, append_images=[picture(i).rotate(90)], comment=b"x" * 99)),
    ("tif", lambda i: save(picture(i), "TIFF")),
    ("tif", lambda i: save(picture(i), "TIFF", compression="tiff_lzw")),
    ("tif", lambda i: save(picture(i), "TIFF", compression="tiff_deflate", big_tiff=True)),
    ("tif", lambda i: save(picture(i), "TIFF", compression="jpeg")),
    ("tif", lambda i: save(picture(i, 1).convert("1"), "TIFF", compression="group4")),
    ("tif", lambda i: save(picture(i, 4), "TIFF", compression="packbits")),
    ("tif", lambda i: save(picture(i, 1).convert("I;16"), "TIFF", save_all=True, append_images=[picture(i)])),
    ("webp", lambda i: save(picture(i), "WEBP")),
    ("webp", lambda i: save(picture(i, 4), "WEBP", lossless=True)),
    ("webp", lambda i: save(picture(i), "WEBP", save_all=True, append_images=[picture(i).rotate(90)])),
    ("bmp", lambda i: save(picture(i), "BMP")),
    ("bmp", lambda i: save(picture(i, 1).convert("1"), "BMP")),
    ("bmp", lambda i: rle(6, 4, b"\6\1\0\0\2\7\0\3abc\0\1\5\0\0\0\2\1\1" + bytes([3, i % 256]) + b"\0\0\6\2\0\1")),
    ("ppm", lambda i: save(picture(i), "PPM")),
    ("pgm", lambda i: b"P2 # text\n4 3\n200\n" + b" ".join(b"%d" % (i * j % 200) for j in range(12))),
    ("jp2", lambda i: save(picture(i), "JPEG2000")),
    ("j2k", lambda i: save(picture(i, 1), "JPEG2000", no_jp2=True, tile_size=(8, 8), irreversible=True)),
    *([("avif", lambda i: save(picture(i), "AVIF"))] if images._AVIF else []),
]
NUMBERS = [0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 10_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]


def flip(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def replace_number(data: bytearray, rng: random.Random) -> None:
    """Overwrite a number, mostly in the first bytes, which hold sizes and offsets."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = rng.choice((1, 2, 4))
        start = rng.randrange(rng.choice((32, 64, 200, len(data))))
        number = rng.choice(NUMBERS) & (256**size - 1)
        data[start : start + size] = number.to_bytes(size, rng.choice(("little", "big")))


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data)) :]


def drop(data: bytearray, rng: random.Random) -> None:
    begin = rng.randrange(len(data))
    del data[begin : begin + rng.choice((1, 2, 16, 100))]


def repeat(data: bytearray, rng: random.Random) -> None:
    begin = rng.randrange(len(data))
    data[begin:begin] = data[begin : begin + rng.choice((4, 16, 100))] * rng.choice((1, 3, 50))


def blank(data: bytearray, rng: random.Random) -> None:
    begin = rng.randrange(len(data))
    end = min(len(data), begin + rng.choice((2, 16, 200)))
    data[begin:end] = bytes([rng.choice((0, 255))]) * (end - begin)


def append(data: bytearray, rng: random.Random) -> None:
    data += rng.randbytes(rng.choice((1, 100, 5000)))


def splice(data: bytearray, rng: random.Random) -> None:
    """Continue with the end of another image file."""
    other = rng.choice(VARIANTS)[1](rng.randrange(1000))
    data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]


MUTATIONS = (flip, *[replace_number] * 3, truncate, drop, repeat, blank, append, splice)


def with_checksums(data: bytes) -> bytes:
    """Return a PNG whose chunks have valid checksums, so that decoders accept their data."""
    out, start = bytearray(data), 8
    while start + 12 <= len(out):
        end = start + 8 + int.from_bytes(out[start : start + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = zlib.crc32(out[start + 4 : end]).to_bytes(4, "big")
        start = end + 4
    return bytes(out)


def mutants(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield names and bytes of mutated image files; some stay valid, and some have a wrong suffix."""
    rng = random.Random(seed)
    for i in range(count):
        suffix, make = VARIANTS[i % len(VARIANTS)]
        data = bytearray(make(i))
        for _ in range(rng.choice((0, 1, 1, 1, 2))):
            if data:
                rng.choice(MUTATIONS)(data, rng)
        if suffix == "png" and rng.random() < 0.8:
            data = bytearray(with_checksums(bytes(data)))
        yield f"m{i:05}.{rng.choice(VARIANTS)[0] if rng.random() < 0.1 else suffix}", bytes(data)


def test_damaged_images_fail_alone_and_crash_nothing(tmp_path: Path) -> None:
    good = {
        f"good{i:03}.{VARIANTS[i % len(VARIANTS)][0]}": VARIANTS[i % len(VARIANTS)][1](5 * MUTANTS + i)
        for i in range(GOOD)
    }
    files = dict(mutants(MUTANTS, 0)) | good
    reasons = check(run(tmp_path, files), files)
    assert {reasons[name] for name in good} == {None}
    failed = sum(reason is not None for reason in reasons.values())
    assert MUTANTS // 4 < failed < MUTANTS * 3 // 4  # both outcomes are tested


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def scans(count: int, side: int) -> bytes:
    """Return a progressive JPEG of many empty scans, each over all blocks."""
    blocks = (-(-side // 8)) ** 2
    bits = ("0" + "1" * 14) * -(-blocks // 32767)  # runs of 32,767 blocks without a coefficient
    runs = int(bits.ljust(-(-len(bits) // 8) * 8, "1"), 2).to_bytes(-(-len(bits) // 8)).replace(b"\xff", b"\xff\0")
    frame = segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    tables = segment(0xDB, b"\0" + b"\1" * 64) + b"".join(
        segment(0xC4, bytes([table, 1, *[0] * 15, symbol])) for table, symbol in ((0, 0), (0x10, 0xE0))
    )
    return b"\xff\xd8" + frame + tables + (segment(0xDA, b"\1\1\0\1\x3f\0") + runs) * count + b"\xff\xd9"


SLOW = {
    "a JPEG of 16,000 scans": lambda: scans(16_000, 1000),
    "a BMP whose rows Pillow fills pixel by pixel": lambda: rle(3000, 3000, b"\1\5\0\0" * 3000),
}


@pytest.mark.parametrize("name", SLOW)
def test_a_file_that_decodes_too_slowly_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = SLOW[name]()
    monkeypatch.setattr(images, "DECODE_SECONDS", 0.0)  # leaves two seconds per megabyte
    with pytest.raises(HashretError, match="^decoding takes longer than the limit of 0 seconds$"):
        decode(data)
    assert decode(save(picture(0), "PNG")).width > 0  # a small file is still decoded


def test_a_lack_of_memory_is_a_temporary_error(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(save(Image.new("RGB", (9000, 9000)), "PNG"))
    script = (
        "import resource, sys; from pathlib import Path; from hashret.errors import HashretError\n"
        "from hashret.data.images import decode, read_file\n"
        "data = read_file(sys.argv[1])\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**27,) * 2)\n"
        "try:\n    decode(data)\n"
        "except HashretError as error:\n    print(error, type(error.__cause__).__name__)"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("/proc does not tell the memory of this process")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "large.png")], capture_output=True, text=True)
    assert done.stdout == "cannot be read: not enough memory OSError\n", done.stderr


def pixels_of_16_bits(height: int, width: int) -> bytes:
    row = b"\0" + struct.pack(">H", 514) * width
    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(row * 100) for _ in range(height // 100)) + packer.flush()
    return png((b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))


def test_sixteen_bits_are_scaled_in_blocks(tmp_path: Path) -> None:
    decoded = decode(pixels_of_16_bits(1500, 2000))  # more than one block
    assert decoded.pixels.shape == (1500, 2000, 1) and (decoded.pixels == 2).all()


@pytest.mark.skipif(not SOAK, reason="takes minutes and gigabytes: make soak")
def test_huge_images_are_decoded_or_refused(tmp_path: Path) -> None:
    files = {
        "16bit.png": pixels_of_16_bits(10_000, 10_000),
        "alpha.png": save(Image.new("RGBA", (10_000, 10_000), (9, 9, 9, 9)), "PNG"),
        "palette.png": save(Image.new("P", (10_000, 10_000)), "PNG", transparency=0),
        "strip.png": save(Image.new("L", (100_000_000, 1)), "PNG"),
        "one.webp": save(Image.new("RGB", (16_000, 6_000)), "WEBP"),
        "rle.bmp": rle(10_000, 10_000, b"\1\5\0\0" * 10_000),
        "scans.jpg": scans(20_000, 10_000),
        "good.png": save(picture(0), "PNG"),
    }
    reasons = check(run(tmp_path, files), files)
    assert str(reasons.pop("scans.jpg")).startswith("decoding takes longer than the limit of 3")  # 30 s, and its length
    assert set(reasons.values()) == {None}
