"""What a collection of so many images will need, from a short measurement on this machine.

The measurement does in small what a collection does: it indexes some images for a few seconds, fills a database and an
index, and looks at what that took and left. What it says grows in proportion, which is a little much for the index: its
tables become fewer, for each item, the more items there are.
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

SECONDS = 3.0  # of indexing, at least
FIRST, TOGETHER = 32, 300  # images to warm up with, and images that are timed together
ROWS, CODES = 20_000, 200_000
WIDTH, HEIGHT = 1024, 768  # of images that are made up


class Estimate(NamedTuple):
    """What `images` images need: seconds to be indexed, bytes of disk and of memory; and what that was made of."""

    images: int
    bits: int
    seconds: float
    disk: int
    memory: int
    images_per_second: float
    measured: int  # images, in so many seconds:
    measured_seconds: float
    of: str  # what images
    database_bytes: float  # for each image
    index_bytes: float  # for each image, on disk and, when it is searched, in memory
    program_bytes: int  # of memory, however many images there are


def estimate(images: int, bits: int = 64, source: Any = None) -> Estimate:
    """What so many images need, coded with the default model; measured with images of a SOURCE, or with made-up ones.

    Takes some ten seconds. Raises ValueError for impossible numbers, HashretError for a SOURCE that is none.
    """
    check_count(images, 1, "images")
    hasher = Hasher(bits=bits)
    with tempfile.TemporaryDirectory(prefix="hashret-estimate-") as name:
        folder = Path(name)
        contents = [_made_up(i) for i in range(8)] if source is None else _some(source)
        _write(folder / "first", contents, 0, FIRST)
        hasher.fit(folder / "first", steps=1)
        measured, seconds = 0, 0.0
        with Collection.create(folder / "c", hasher) as collection:
            collection.index(folder / "first")
            while seconds < SECONDS:
                _write(folder / "then", contents, FIRST + measured, TOGETHER)
                began = time.perf_counter()
                report = collection.index(folder / "then")
                seconds += time.perf_counter() - began
                measured += TOGETHER
                if report.failed:
                    raise HashretError(f"{source}: {report.failures[0][1]}: estimate with images that can be read")
                shutil.rmtree(folder / "then")
        database, index = _bytes_of_database(folder, bits), _bytes_of_index(folder, bits)
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


def _made_up(seed: int) -> bytes:
    """A JPEG of soft shapes with a little noise, which takes as long to decode as a photo."""
    random = np.random.default_rng(seed)
    shapes = Image.fromarray(random.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), np.uint8))
    pixels = np.asarray(shapes.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
    noisy = np.clip(pixels + random.integers(-6, 7, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=85)
    return file.getvalue()


def _some(source: Any) -> list[bytes]:
    """A few images of a source, as files."""
    found, opened = [], open_source(source)
    for record in islice(opened, 64):
        content = record.read()
        if not isinstance(content, bytes) and is_vector(content):
            raise HashretError(f"{source} has {opened.describe()}, which need no decoding: estimate with images")
        if not isinstance(content, bytes):
            file = io.BytesIO()
            Image.fromarray(np.squeeze(content)).save(file, "PNG")
            content = file.getvalue()
        found.append(content)
    if not found:
        raise HashretError(f"{source} has no images: estimate with others")
    return found


def _write(folder: Path, contents: list[bytes], start: int, count: int) -> None:
    """Files of so many different contents: what follows an image's end is not decoded."""
    folder.mkdir()
    for i in range(start, start + count):
        (folder / f"{i}.jpg").write_bytes(contents[i % len(contents)] + i.to_bytes(4))


def _bytes_of_database(folder: Path, bits: int) -> float:
    """What an item with one path takes in the store."""
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
    store.close()  # which moves the log into the file
    return store.path.stat().st_size / ROWS


def _bytes_of_index(folder: Path, bits: int) -> float:
    """What a code takes in the index: at most, as no two of these are equal."""
    index = BitFlipIndex(bits)
    codes = np.random.default_rng(0).integers(0, 256, (CODES, bits // 8), np.uint8)
    index.add(codes, np.arange(CODES, dtype=np.int64))
    index.save(folder / "codes")
    return (folder / "codes").stat().st_size / CODES
