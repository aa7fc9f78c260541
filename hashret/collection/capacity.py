"""Estimate the time, disk and memory that a collection needs, from a short measurement on this machine.

The measurement indexes images for a few seconds, and fills a database and an index. The estimate is linear in the
number of images. That is slightly too much for the index, whose tables take less space per item the more items it has.
"""

import hashlib
import io
import resource
import shutil
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hashret.collection.collection import Collection
from hashret.collection.ingest import BATCH_ITEMS
from hashret.data.contents import is_vector
from hashret.data.sources import open_source
from hashret.errors import HashretError, check_count
from hashret.hasher import Hasher
from hashret.indexes import BitFlipIndex
from hashret.results import Root
from hashret.stores.protocol import ItemRow
from hashret.stores.sqlite import SqliteStore

MIN_SECONDS = 3.0  # of timed indexing
WARM_UP_IMAGES, BATCH_IMAGES = 32, 300
ROWS, CODES = 20_000, 200_000  # in the database and the index that are measured
WIDTH, HEIGHT = 1024, 768  # of synthetic images


class Estimate(NamedTuple):
    """The needs of a collection of `images` images, and the measurements that they are derived from."""

    images: int
    bits: int
    seconds: float  # to index them
    disk: int  # bytes
    memory: int  # bytes
    images_per_second: float
    measured: int  # images
    measured_seconds: float  # to index `measured` images
    of: str  # a description of the measured images
    database_bytes: float  # per image
    index_bytes: float  # per image, on disk and, while searching, in memory
    program_bytes: int  # of memory, independent of the number of images


def estimate(images: int, bits: int = 64, source: Any = None) -> Estimate:
    """Estimate what `images` images need, encoded with the default model; takes about ten seconds.

    The measurement uses images of `source`, or synthetic ones if it is None. Raise ValueError for invalid `images` or
    `bits`, and HashretError for an invalid or unreadable source.
    """
    check_count(images, 1, "images")
    hasher = Hasher(bits=bits)
    with tempfile.TemporaryDirectory(prefix="hashret-estimate-") as name:
        folder = Path(name)
        contents = [_synthetic_jpeg(i) for i in range(8)] if source is None else _sample_contents(source)
        _write_files(folder / "first", contents, 0, WARM_UP_IMAGES)
        hasher.fit(folder / "first", steps=1)
        measured, seconds = 0, 0.0
        with Collection.create(folder / "c", hasher) as collection:
            collection.index(folder / "first")
            while seconds < MIN_SECONDS:
                _write_files(folder / "then", contents, WARM_UP_IMAGES + measured, BATCH_IMAGES)
                start = time.perf_counter()
                report = collection.index(folder / "then")
                seconds += time.perf_counter() - start
                measured += BATCH_IMAGES
                if report.failed:
                    raise HashretError(f"{source}: {report.failures[0][1]}: estimate with images that can be read")
                shutil.rmtree(folder / "then")
        database, index = _database_bytes_per_item(folder, bits), _index_bytes_per_item(folder, bits)
    program = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Estimate(
        images,
        bits,
        seconds=images * seconds / measured,
        disk=round(images * (database + index)),
        memory=round(images * index) + program,
        images_per_second=measured / seconds,
        measured=measured,
        measured_seconds=seconds,
        of=f"made-up JPEGs of {WIDTH} × {HEIGHT}" if source is None else f"images of {source}",
        database_bytes=database,
        index_bytes=index,
        program_bytes=program,
    )


def _synthetic_jpeg(seed: int) -> bytes:
    """Return a JPEG of soft shapes with a little noise, which takes as long to decode as a photo."""
    random = np.random.default_rng(seed)
    shapes = Image.fromarray(random.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), np.uint8))
    pixels = np.asarray(shapes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
    noisy = np.clip(pixels + random.integers(-6, 7, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=85)
    return file.getvalue()


def _sample_contents(source: Any) -> list[bytes]:
    """Return the first images of a source as the bytes of files."""
    contents, opened = [], open_source(source)
    for record in islice(opened, 64):
        content = record.read()
        if not isinstance(content, bytes) and is_vector(content):
            raise HashretError(f"{source} has {opened.describe()}, which need no decoding: estimate with images")
        if not isinstance(content, bytes):
            file = io.BytesIO()
            Image.fromarray(np.squeeze(content)).save(file, "PNG")
            content = file.getvalue()
        contents.append(content)
    if not contents:
        raise HashretError(f"{source} has no images: estimate with others")
    return contents


def _write_files(folder: Path, contents: list[bytes], start: int, count: int) -> None:
    """Write `count` files of distinct contents: bytes after the end of an image are not decoded."""
    folder.mkdir()
    for i in range(start, start + count):
        (folder / f"{i}.jpg").write_bytes(contents[i % len(contents)] + i.to_bytes(4))


def _database_bytes_per_item(folder: Path, bits: int) -> float:
    """Measure the size of an item with one path in the database."""
    (folder / "store").mkdir()
    store = SqliteStore.create(folder / "store", {"fingerprint": "0" * 64, "bits": str(bits), "index": "bitflip"})
    random = np.random.default_rng(0)
    root = Root.of_folder("/home/ada/photos")
    for start in range(0, ROWS, BATCH_ITEMS):
        rows = [
            ItemRow(root, f"2026/trip {i // 500}/IMG_{i:06}.jpg", f"trip {i // 500}", 10**6, 10**18,
                    hashlib.sha256(b"%d" % i).hexdigest(), 10**6, WIDTH, HEIGHT, random.bytes(bits // 8))
            for i in range(start, start + BATCH_ITEMS)
        ]  # fmt: skip
        with store.transaction() as transaction:
            transaction.put(rows)
    store.close()  # moves the write-ahead log into the file
    return store.path.stat().st_size / ROWS


def _index_bytes_per_item(folder: Path, bits: int) -> float:
    """Measure the size of a code in the index, at its maximum: all codes are distinct."""
    index = BitFlipIndex(bits)
    codes = np.random.default_rng(0).integers(0, 256, (CODES, bits // 8), np.uint8)
    index.add(codes, np.arange(CODES, dtype=np.int64))
    index.save(folder / "codes")
    return (folder / "codes").stat().st_size / CODES
