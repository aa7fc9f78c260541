"""How images get into a collection: the stages between a source and the database.

Records flow through generators. The caller's thread walks the source and reads the database, one pool of threads reads
and hashes, one decodes, and one runs the model; each holds a bounded number of records. Of arrays, with nothing to wait
for, the caller's thread does all but the model, and helps with that.
"""

import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from hashret.data.contents import Content, Inputs, Prepared, sha256
from hashret.data.images import to_content
from hashret.data.preprocessing import Preprocessing
from hashret.data.records import Record, Source, bare, read
from hashret.errors import HashretError
from hashret.parallel import batches, in_order
from hashret.stores.sqlite import Seen, Store

if TYPE_CHECKING:
    from hashret.hasher import Hasher

BATCH_ITEMS, BATCH_SECONDS = 1000, 1.0  # what is committed, and so acknowledged, together
MODEL_CHUNK = 1000  # images that the model is given at a time
FILE_CHUNK = 25  # files that a thread reads or decodes at a time
CHUNK_BYTES = 2**25  # and of how many bytes together, unless a single one has more


@dataclass(slots=True)
class Found:
    """A record on its way into the collection; each stage fills in what it finds out."""

    record: Record
    before: Seen | None = None  # what was known of its path
    content: Content | HashretError | None = None  # until it is decoded, or known to be there; or why it has none
    sha256: str = ""
    pixels: Inputs | None = None  # for the model; None for a content that is known already
    width: int = 0
    height: int = 0
    code: bytes | None = None


def encoded(
    source: Source,
    store: Store,
    hasher: "Callable[[], Hasher]",
    unchanged: Callable[[Seen], None],
    only: Set[str] | None = None,
) -> Generator[list[Found], None, None]:
    """The records that are new or have changed, with codes of the contents that are new, in batches to be committed.

    `unchanged` is called for every other record; `hasher` gives the model, and is not asked for it if nothing is new.
    `only` are the whole paths of the records to look at, if not all. Where the source breaks off, what it gave before
    comes first, and then the HashretError.
    """
    model: Hasher | None = None
    broken: list[HashretError] = []

    def mark_known(chunk: list[Found]) -> list[Found]:
        nonlocal model
        known = store.find([found.sha256 for found in chunk])
        for found in chunk:
            if found.sha256 in known:
                found.content = None
        if model is None and len(known) < len(chunk):
            model = hasher()  # here, in the caller's thread: the others have no connection to the database
            model.preprocessing.check_source(source)
        return chunk

    def decode_new(chunk: list[Found]) -> list[Found]:
        return chunk if model is None else decode(chunk, model.preprocessing)

    def encode(chunk: list[Found]) -> list[Found]:
        new = [found for found in chunk if found.pixels is not None]
        if new and model is not None:
            pixels = np.stack([found.pixels for found in new if found.pixels is not None])
            codes = model.encode_pixels(pixels, alone=True)  # the other cores have chunks of their own
            for found, code in zip(new, codes, strict=True):
                found.code = code.tobytes()
        return chunk

    def readable() -> Iterator[list[Found]]:
        try:
            yield from _changed(source, store, unchanged, only)
        except HashretError as error:
            broken.append(error)

    changed = chain.from_iterable(readable())
    decoded: Iterable[list[Found]]
    if source.arrays:  # nothing to wait for and little to compute: threads would only fight for the interpreter
        decoded = map(decode_new, map(mark_known, map(hash_contents, batches(changed, MODEL_CHUNK))))
    else:
        hashed = in_order(hash_contents, batches(changed, FILE_CHUNK, weight), ahead=4, weigh=weigh_chunk)
        decoded = in_order(decode_new, map(mark_known, hashed), ahead=4, weigh=weigh_chunk)
    yield from _timed(in_order(encode, _timed(decoded, MODEL_CHUNK), ahead=4, helping=source.arrays), BATCH_ITEMS)
    if broken:
        raise broken[0]


def _changed(
    source: Source, store: Store, unchanged: Callable[[Seen], None], only: Set[str] | None
) -> Iterator[list[Found]]:
    looked_at = only is not None or store.knows(source.root)
    wanted = source if only is None else (record for record in source if source.root + record.name in only)
    for records in batches(wanted, 1 if source.streaming else MODEL_CHUNK):
        known = store.seen(source.root, [record.name for record in records]) if looked_at else {}
        changed = list[Found]()
        for record in records:
            seen = known.get(record.name)
            if seen is not None and (seen.size, seen.mtime_ns) == (record.size, record.mtime_ns):
                unchanged(seen)
            else:
                changed.append(Found(record, seen, read(record) if source.streaming else None))
        yield changed


def hash_contents(chunk: list[Found]) -> list[Found]:
    """Read the contents that were not read yet, and find out what they are known by."""
    for found in chunk:
        if found.content is None:
            found.content = read(found.record)
        if not isinstance(found.content, HashretError):
            found.sha256 = sha256(found.content)
    return chunk


def decode(chunk: list[Found], preprocessing: Preprocessing) -> list[Found]:
    """Turn contents into the pixels that the model sees, or into the reason why that cannot be done."""
    size = preprocessing.height, preprocessing.width
    fitting = [found for found in chunk if isinstance(found.content, np.ndarray) and found.content.shape[:2] == size]
    if fitting:  # the rows of one array: all at once costs a tenth
        rows = np.stack([found.content for found in fitting])  # type: ignore[misc]
        for found, pixels in zip(fitting, preprocessing.batch(rows.reshape(len(rows), *size, -1)), strict=True):
            found.pixels, found.content = pixels, None
            found.height, found.width = size
    for found in chunk:
        if found.content is not None and not isinstance(found.content, HashretError):
            try:
                found.pixels, found.width, found.height = preprocessing(found.content)
                found.content = None
            except HashretError as error:
                found.content = bare(error)
    return chunk


def weight(found: Found) -> float:
    """The share of a chunk's bytes that a record takes while its content is in memory."""
    return found.record.size / CHUNK_BYTES


def weigh_chunk(chunk: list[Found]) -> float:
    """How many full chunks a chunk is as heavy as, but at least one."""
    return max(1.0, sum(map(weight, chunk)))


def prepare(preprocessing: Preprocessing, image: Any) -> tuple[Content, Prepared]:
    """An image as anyone may give it, and its pixels; a HashretError names it."""
    try:
        content = to_content(image)
        return content, preprocessing(content)
    except HashretError as error:
        where = os.fspath(image) if isinstance(image, str | os.PathLike) else f"a {type(image).__name__}"
        raise type(error)(f"{where}: {error}") from error


def _timed(chunks: Iterable[list[Found]], most: int) -> Iterator[list[Found]]:
    """Chunks put together while they make at most so many records and a second is not over."""
    batch, began = list[Found](), time.monotonic()
    for chunk in chunks:
        if len(batch) + len(chunk) > most:
            yield batch
            batch, began = [], time.monotonic()
        batch += chunk
        if len(batch) == most or time.monotonic() - began >= BATCH_SECONDS:
            yield batch
            batch, began = [], time.monotonic()
    if batch:
        yield batch
