"""`PendingRecord`, a record on its way into a collection, and the stages that read, hash and decode it."""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from hashret.data.contents import Content, Inputs, Prepared, sha256
from hashret.data.images import to_content
from hashret.data.preprocessing import Preprocessing
from hashret.data.records import Record, read, without_traceback
from hashret.errors import HashretError
from hashret.stores.protocol import KnownPath

BATCH_SECONDS = 1.0  # between two commits, at most
CHUNK_BYTES = 2**25  # of the files that a thread reads or decodes at a time, unless a single one is larger


@dataclass(slots=True)
class PendingRecord:
    """A record on its way into the collection; each stage fills in its results."""

    record: Record
    known_path: KnownPath | None = None  # the recorded state of its path
    content: Content | HashretError | None = None  # None before it is read, and after it is decoded or found stored
    sha256: str = ""
    pixels: Inputs | None = None  # preprocessed; None for a content that is stored already
    width: int = 0
    height: int = 0
    code: bytes | None = None

    @property
    def weight(self) -> float:
        """The size of its content as a fraction of `CHUNK_BYTES`."""
        return self.record.size / CHUNK_BYTES


def chunk_weight(chunk: list[PendingRecord]) -> float:
    """Return the size of a chunk in units of `CHUNK_BYTES`, at least 1."""
    return max(1.0, sum(pending.weight for pending in chunk))


def hash_contents(chunk: list[PendingRecord]) -> list[PendingRecord]:
    """Read the contents that are not in memory yet, and compute the SHA-256 of each."""
    for pending in chunk:
        if pending.content is None:
            pending.content = read(pending.record)
        if not isinstance(pending.content, HashretError):
            pending.sha256 = sha256(pending.content)
    return chunk


def decode(chunk: list[PendingRecord], preprocessing: Preprocessing) -> list[PendingRecord]:
    """Replace each content by preprocessed pixels, or by the error if it cannot be decoded."""
    size = preprocessing.height, preprocessing.width
    fitting = [pending for pending in chunk if _has_size(pending.content, size)]
    if fitting:  # rows of one array: preprocessed together they take a tenth of the time
        rows = np.stack([pending.content for pending in fitting])  # type: ignore[misc]
        for pending, pixels in zip(fitting, preprocessing.batch(rows.reshape(len(rows), *size, -1)), strict=True):
            pending.pixels, pending.content = pixels, None
            pending.height, pending.width = size
    for pending in chunk:
        if pending.content is not None and not isinstance(pending.content, HashretError):
            try:
                pending.pixels, pending.width, pending.height = preprocessing(pending.content)
                pending.content = None
            except HashretError as error:
                pending.content = without_traceback(error)
    return chunk


def _has_size(content: object, size: tuple[int, int]) -> bool:
    return isinstance(content, np.ndarray) and content.shape[:2] == size


def prepare_image(preprocessing: Preprocessing, image: object) -> tuple[Content, Prepared]:
    """Return the content and the preprocessed pixels of an image of any accepted type; a HashretError names it."""
    try:
        content = to_content(image)
        return content, preprocessing(content)
    except HashretError as error:
        name = os.fspath(image) if isinstance(image, str | os.PathLike) else f"a {type(image).__name__}"
        raise type(error)(f"{name}: {error}") from error


def timed_batches(chunks: Iterable[list[PendingRecord]], max_records: int) -> Iterator[list[PendingRecord]]:
    """Merge chunks into batches of at most `max_records`, each complete after at most `BATCH_SECONDS`."""
    batch, start = list[PendingRecord](), time.monotonic()
    for chunk in chunks:
        if len(batch) + len(chunk) > max_records:
            yield batch
            batch, start = [], time.monotonic()
        batch += chunk
        if len(batch) == max_records or time.monotonic() - start >= BATCH_SECONDS:
            yield batch
            batch, start = [], time.monotonic()
    if batch:
        yield batch
