"""hashret query: find similar images."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from hashret.cli.common import (
    CollectionFolder,
    Json,
    Quiet,
    Radius,
    Target,
    UsageError,
    parse_item_id,
    parse_radius,
    say,
    usage,
    visible,
)
from hashret.errors import HashretError, format_count

if TYPE_CHECKING:
    from hashret.client import Client
    from hashret.collection import Collection
    from hashret.results import Hit

BATCH = 256  # queries answered in one search
BATCH_BYTES = 2**27  # of their images in memory at once, unless a single image has more


class _Query(NamedTuple):
    text: str
    type: str  # "image", "code", "item" or "unreadable"
    value: Any  # the file's bytes or an array, a code, an id, or the reason


_Answer = tuple[_Query, "list[Hit] | str"]  # hits, or what is wrong with the query


def query(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE…|-|hex:CODE|id:N",
            help="Image files, or folders, archives and other sources of images; - for an image on stdin, hex:CODE for "
            "a code, id:N for an item.",
        ),
    ],
    collection: CollectionFolder = None,
    k: Annotated[int | None, typer.Option("-k", help="Hits per query. [default: 10, or all with -r]", min=1)] = None,
    radius: Radius = None,
    target: Target = None,
    rank: Annotated[
        str,
        typer.Option(
            metavar="distance|asymmetric", help="The order of hits; asymmetric weighs bits by the query's margins."
        ),
    ] = "distance",
    where: Annotated[
        str | None, typer.Option("--where", metavar="SQL", help="Only items that match this filter: label = 'cat'")
    ] = None,
    as_json: Json = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="Print one JSON line per query.")] = False,
    paths: Annotated[bool, typer.Option("--paths", help="Print paths only.")] = False,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="Query this service (hashret serve) instead.")
    ] = None,
    quiet: Quiet = False,
) -> int:
    """Find the images most similar to each IMAGE.

    Prints for each hit its distance in bits and its path.
    """
    from hashret.client import Client
    from hashret.collection import Collection, locate
    from hashret.parallel import batches
    from hashret.results import QueryOptions

    with usage():
        QueryOptions(rank=rank)
    if as_json + jsonl + paths > 1:
        raise UsageError("give one of --json, --jsonl and --paths")
    k = 10 if k is None and radius is None else k
    output = _Output(k, "json" if as_json else "jsonl" if jsonl else "paths" if paths else "lines", len(images) > 1)
    token = os.environ.get("HASHRET_TOKEN")
    with Client(url, token=token) if url else Collection.open(locate(collection), read_only=True) as searched:
        if where is not None and isinstance(searched, Collection):
            searched.matching(where)  # raises the errors of the filter once, before the first query
        options = {"k": k, "max_distance": parse_radius(radius, target, searched, quiet), "where": where}
        for batch in batches(_queries(images, searched), BATCH, _weight):
            output.is_list |= len(batch) > 1
            for answered, hits in _answers(searched, batch, options, rank, quiet):
                output.put(answered, hits)
    output.finish()
    return 1 if output.failed else 0


@dataclass
class _Output:
    """Prints answers in one of four formats: "json" (one document), "jsonl", "paths" or "lines"."""

    k: int | None
    format: str
    is_list: bool  # whether there is more than one query
    failed: bool = False
    _documents: list[dict[str, Any]] = field(default_factory=list)

    def put(self, query: _Query, hits: "list[Hit] | str") -> None:
        """Print the hits of a query, or keep them for `finish`, or print the error of the query."""
        if isinstance(hits, str):
            self.failed = True
            say(visible(f"hashret: {query.text}: {hits}"))
        elif self.format == "json":
            self._documents.append(_document(query, self.k, hits))
        elif self.format == "jsonl":
            print(json.dumps(_document(query, self.k, hits)))
        elif self.format == "paths":
            print(*(hit.path for hit in hits), sep="\n", end="\n" if hits else "")
        else:
            if self.is_list:
                print(query.text)
            print(*(f"{hit.distance:4d}  {hit.path}" for hit in hits), sep="\n", end="\n" if hits else "")

    def finish(self) -> None:
        """Print the JSON document, if that is the format."""
        if self.format == "json":
            print(json.dumps(self._documents if self.is_list or self.failed else self._documents[0]))


def _queries(texts: list[str], collection: "Collection | Client") -> Iterator[_Query]:
    """Yield the queries in order, the unreadable ones too, so that the others are answered."""
    from hashret.data.contents import MAX_BYTES, read_file
    from hashret.data.images import SUFFIXES

    for text in texts:
        try:
            if text == "-":
                yield _Query(text, "image", sys.stdin.buffer.read(MAX_BYTES + 1))
            elif text.startswith("hex:"):
                yield _Query(text, "code", _parse_code(text, collection.bits))
            elif text.startswith("id:"):
                yield _Query(text, "item", parse_item_id(text))
            elif Path(text).suffix.lower() in SUFFIXES and not Path(text).is_dir():
                yield _Query(text, "image", read_file(text))
            else:
                yield from _source_queries(text)
        except HashretError as error:
            yield _Query(text, "unreadable", str(error))


def _weight(query: _Query) -> float:
    """Return the share of `BATCH_BYTES` that a query takes."""
    return len(query.value) / BATCH_BYTES if isinstance(query.value, bytes) else 0.0


def _source_queries(text: str) -> Iterator[_Query]:
    """Yield the images of a source. A file that is no source is taken for an image, whatever its suffix."""
    from hashret.data.contents import read_file
    from hashret.data.sources import open_source

    try:
        source = open_source(text)
    except HashretError:
        if not Path(text).is_file():
            raise
        yield _Query(text, "image", read_file(text))
        return
    is_empty = True
    for record in source:
        name, is_empty = source.root + record.name, False
        try:
            yield _Query(name, "image", record.read())
        except HashretError as error:
            yield _Query(name, "unreadable", str(error))
    if is_empty:
        raise HashretError(f"no images ({format_count(source.ignored, 'other file')} ignored)")


def _parse_code(text: str, bits: int) -> Any:
    from hashret.codes import from_hex

    try:
        return from_hex(text.removeprefix("hex:"), bits)
    except ValueError as error:
        raise HashretError(str(error)) from None


def _answers(
    collection: "Collection | Client", batch: list[_Query], options: dict[str, Any], rank: str, quiet: bool
) -> Iterator[_Answer]:
    """Yield each query of a batch with its hits, or with its error; consecutive queries of a type are one search."""
    for query_type, group in groupby(batch, lambda query: query.type):
        queries = list(group)
        if query_type in ("code", "item") and rank != "distance":
            refusal = f"--rank {rank} is for images: a code has no margins"
            yield from ((query, refusal) for query in queries)
        elif query_type == "code":
            import numpy as np

            codes = np.concatenate([query.value for query in queries])
            yield from zip(queries, collection.query_codes(codes, **options), strict=True)
        elif query_type == "image":
            yield from _image_answers(collection, queries, options | {"rank": rank}, quiet)
        elif query_type == "item":
            yield from (_item_answer(collection, query, options) for query in queries)
        else:
            yield from ((query, query.value) for query in queries)


def _item_answer(collection: "Collection | Client", query: _Query, options: dict[str, Any]) -> _Answer:
    try:
        return query, collection.query_item(query.value, **options)
    except HashretError as error:
        return query, str(error)


def _image_answers(
    collection: "Collection | Client", queries: list[_Query], options: dict[str, Any], quiet: bool
) -> Iterator[_Answer]:
    from hashret.collection import Collection

    images: Any = [query.value for query in queries]
    hasher = collection.hasher if isinstance(collection, Collection) else None  # raises if the model is damaged
    try:
        if hasher is not None:
            images = hasher.prepare(images)  # decoded once, for the search and for the warning
            hits = None
        else:
            hits = collection.query_batch(images, **options)
    except HashretError as error:
        if len(queries) == 1:
            yield queries[0], str(error)
        for query in queries if len(queries) > 1 else ():  # find the unreadable one by querying one at a time
            yield from _image_answers(collection, [query], options, quiet)
        return
    yield from zip(queries, collection.query_batch(images, **options) if hits is None else hits, strict=True)
    if hasher is not None and not quiet:
        _warn([query.text for query, outlier in zip(queries, hasher.outliers(images), strict=True) if outlier])


def _warn(outliers: list[str]) -> None:
    """Warn of queries that are unlike all training images."""
    if outliers:
        more = f" and {len(outliers) - 1:,} more" if outliers[1:] else ""
        say(f"hashret: {visible(outliers[0])}{more}: unlike all training images, so neighbours may mean little")


def _document(query: _Query, k: int | None, hits: "list[Hit]") -> dict[str, Any]:
    documents = [
        {"rank": rank, "distance": hit.distance, "id": hit.id, "path": hit.path, "label": hit.label}
        | ({} if hit.score is None else {"score": hit.score})
        for rank, hit in enumerate(hits, 1)
    ]
    return {"query": query.text, "k": k, "hits": documents}
