"""How images get into a collection: the stages between a source and the database.

Records flow through generators. The caller's thread walks the source and reads the database, one pool of threads reads
and hashes, one decodes, and one thread runs the model; each holds a bounded number of records.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hashret.errors import HashretError
from hashret.images import Content, Preprocessing, sha256
from hashret.sources import Record, Source, in_order
from hashret.store import Seen, Store

if TYPE_CHECKING:
    from hashret.hasher import Hasher

BATCH_ITEMS, BATCH_SECONDS = 1000, 1.0  # what is committed, and so acknowledged, together
CHUNK = 32  # files that a thread reads or decodes at a time; rows of an array cost less each
ARRAY_CHUNK = 8 * CHUNK


class Found(NamedTuple):
    """A record on its way into the collection, one field after the other."""

    record: Record
    before: Seen | None = None  # what was known of its path
    content: Content | HashretError | None = None  # None before it is read, or if it is known and was let go
    sha256: str = ""
    pixels: NDArray[np.uint8] | None = None  # for the model; None for a content that is known already
    width: int = 0
    height: int = 0
    code: bytes | None = None


def encoded(source: Source, store: Store, hasher: "Hasher", unchanged: Callable[[Seen], None]) -> Iterator[list[Found]]:
    """The records that are new or have changed, with codes of the contents that are new, in batches to be committed.

    `unchanged` is called for every other record.
    """
    chunk = ARRAY_CHUNK if source.arrays else CHUNK

    def mark_known(found: list[Found]) -> list[Found]:
        known = store.find([one.sha256 for one in found])
        return [one._replace(content=None) if one.sha256 in known else one for one in found]

    chunks = batches(_changed(source, store, unchanged), chunk)
    hashed = map(mark_known, in_order(hash_contents, chunks, ahead=4))
    decoded = in_order(lambda found: decode(found, hasher.preprocessing), hashed, ahead=4)
    yield from in_order(lambda found: _encode(found, hasher), _timed(decoded, BATCH_ITEMS - chunk), threads=1, ahead=2)


def _changed(source: Source, store: Store, unchanged: Callable[[Seen], None]) -> Iterator[Found]:
    for record in source:
        seen = store.seen(source.root, record.name)
        if seen is not None and (seen.size, seen.mtime_ns) == (record.size, record.mtime_ns):
            unchanged(seen)
        else:
            yield Found(record, seen, read(record) if source.streaming else None)


def read(record: Record) -> Content | HashretError:
    """The content of a record, or why it has none."""
    try:
        return record.read()
    except HashretError as error:
        return error


def hash_contents(chunk: list[Found]) -> list[Found]:
    """The records with their contents, unless they were read already, and what these are known by."""
    hashed = []
    for found in chunk:
        content = read(found.record) if found.content is None else found.content
        digest = "" if isinstance(content, HashretError) else sha256(content)
        hashed.append(found._replace(content=content, sha256=digest))
    return hashed


def decode(chunk: list[Found], preprocessing: Preprocessing) -> list[Found]:
    """The records with the pixels that the model sees; an image that cannot be decoded gives way to the reason."""
    decoded = []
    for found in chunk:
        content = found.content
        if content is not None and not isinstance(content, HashretError):
            try:
                pixels, width, height = preprocessing(content)
                decoded.append(found._replace(content=None, pixels=pixels, width=width, height=height))
            except HashretError as error:
                decoded.append(found._replace(content=error))
        else:
            decoded.append(found)
    return decoded


def _encode(batch: list[Found], hasher: "Hasher") -> list[Found]:
    pixels = [found.pixels for found in batch if found.pixels is not None]
    codes = iter(hasher.encode_pixels(np.stack(pixels)) if pixels else ())
    return [found if found.pixels is None else found._replace(code=next(codes).tobytes()) for found in batch]


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _timed(chunks: Iterable[list[Found]], enough: int) -> Iterator[list[Found]]:
    """Chunks put together until there are `enough` records or a second is over."""
    batch, began = list[Found](), time.monotonic()
    for chunk in chunks:
        batch += chunk
        if len(batch) >= enough or time.monotonic() - began >= BATCH_SECONDS:
            yield batch
            batch, began = [], time.monotonic()
    if batch:
        yield batch
