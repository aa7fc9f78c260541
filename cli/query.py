"""hashret query: similar images."""

import json
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
    chosen_radius,
    item_id,
    say,
    usage,
    visible,
)
from hashret.errors import HashretError

if TYPE_CHECKING:
    from hashret.client import Client
    from hashret.collection import Collection
    from hashret.results import Hit

TOGETHER = 256  # queries answered in one search


class _Query(NamedTuple):
    text: str
    kind: str  # "image", "code", "item" or "broken"
    value: Any


def query(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE…|-|hex:CODE|id:N", help="Images (or sources of them), - for stdin.")
    ],
    collection: CollectionFolder = None,
    k: Annotated[int | None, typer.Option("-k", help="How many. [default: 10, or all with -r]", min=1)] = None,
    radius: Radius = None,
    target: Target = None,
    rank: Annotated[
        str, typer.Option(metavar="ORDER", help="By distance, or asymmetric: by the query's certainty of each bit.")
    ] = "distance",
    where: Annotated[
        str | None, typer.Option("--where", metavar="SQL", help="Only items for which this holds: label = 'cat'")
    ] = None,
    as_json: Json = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="One JSON document a query, a line each.")] = False,
    paths: Annotated[bool, typer.Option("--paths", help="Only the paths.")] = False,
    url: Annotated[str | None, typer.Option("--url", metavar="URL", help="Ask the service there.")] = None,
    quiet: Quiet = False,
) -> int:
    """Print the images most similar to each IMAGE: distance in bits, and path."""
    import os

    from hashret.client import Client
    from hashret.collection import Collection, locate
    from hashret.parallel import batches
    from hashret.results import QueryOptions

    with usage("--rank"):
        QueryOptions(rank=rank)
    if as_json + jsonl + paths > 1:
        raise typer.BadParameter("give one of --json, --jsonl and --paths")
    k = 10 if k is None and radius is None else k
    output = _Output(k, "json" if as_json else "jsonl" if jsonl else "paths" if paths else "lines", len(images) > 1)
    token = os.environ.get("HASHRET_TOKEN")
    with Client(url, token=token) if url else Collection.open(locate(collection), read_only=True) as photos:
        if where is not None and isinstance(photos, Collection):
            photos.matching(where)  # says now, and once, what is wrong with it
        options = {"k": k, "max_distance": chosen_radius(radius, target, photos, quiet), "where": where}
        for batch in batches(_queries(images, photos), TOGETHER, _weight):
            output.several |= len(batch) > 1
            for asked, hits in _answers(photos, batch, options, rank, quiet):
                output.put(asked, hits)
    output.finish()
    return 1 if output.failed else 0


@dataclass
class _Output:
    """Answers as they are printed: in a form of "json", all as one document, "jsonl", "paths" or "lines"."""

    k: int | None
    form: str
    several: bool  # whether there is more than one query
    failed: bool = False
    _documents: list[dict[str, Any]] = field(default_factory=list)

    def put(self, asked: _Query, hits: "list[Hit] | str") -> None:
        """Print, or keep, the hits of a query, or say what is wrong with it."""
        if isinstance(hits, str):
            self.failed = True
            say(visible(f"hashret: {asked.text}: {hits}"))
        elif self.form == "json":
            self._documents.append(_document(asked, self.k, hits))
        elif self.form == "jsonl":
            print(json.dumps(_document(asked, self.k, hits)))
        elif self.form == "paths":
            print(*(hit.path for hit in hits), sep="\n", end="\n" if hits else "")
        else:
            if self.several:
                print(asked.text)
            print(*(f"{hit.distance:4d}  {hit.path}" for hit in hits), sep="\n", end="\n" if hits else "")

    def finish(self) -> None:
        if self.form == "json":
            print(json.dumps(self._documents if self.several or self.failed else self._documents[0]))


def _queries(texts: list[str], collection: "Collection | Client") -> Iterator[_Query]:
    """What is asked for, one after the other; what cannot be read is a query too, so that the others are answered."""
    from hashret.data.contents import MAX_BYTES, read_file
    from hashret.data.images import SUFFIXES

    for text in texts:
        try:
            if text == "-":
                yield _Query(text, "image", sys.stdin.buffer.read(MAX_BYTES + 1))
            elif text.startswith("hex:"):
                yield _Query(text, "code", _code(text, collection.bits))
            elif text.startswith("id:"):
                yield _Query(text, "item", item_id(text))
            elif Path(text).suffix.lower() in SUFFIXES and not Path(text).is_dir():
                yield _Query(text, "image", read_file(text))
            else:
                yield from _records(text)
        except HashretError as error:
            yield _Query(text, "broken", str(error))


def _weight(asked: _Query) -> float:
    """The share of what is kept in memory at once, 128 megabytes unless a single image has more, that a query takes."""
    return len(asked.value) / 2**27 if isinstance(asked.value, bytes) else 0.0


def _records(text: str) -> Iterator[_Query]:
    """The images of a source; a file that is no source is an image, or will be said to be none."""
    from hashret.data.contents import read_file
    from hashret.data.sources import open_source

    try:
        source = open_source(text)
    except HashretError:
        if not Path(text).is_file():
            raise
        yield _Query(text, "image", read_file(text))
        return
    empty = True
    for record in source:
        name, empty = source.root + record.name, False
        try:
            yield _Query(name, "image", record.read())
        except HashretError as error:
            yield _Query(name, "broken", str(error))
    if empty:
        raise HashretError(f"no images ({source.ignored:,} other files were passed over)")


def _code(text: str, bits: int) -> Any:
    from hashret.codes import from_hex

    try:
        return from_hex(text.removeprefix("hex:"), bits)
    except ValueError as error:
        raise HashretError(str(error)) from None


def _answers(
    collection: "Collection | Client", batch: list[_Query], how: dict[str, Any], rank: str, quiet: bool
) -> "Iterator[tuple[_Query, list[Hit] | str]]":
    """Each query with its hits, or with what is wrong with it."""
    for kind, group in groupby(batch, lambda asked: asked.kind):
        queries = list(group)
        if kind in ("code", "item") and rank != "distance":
            refusal = f"--rank {rank} is for images: a code does not tell how sure its bits are"
            yield from ((asked, refusal) for asked in queries)
        elif kind == "code":
            import numpy as np

            codes = np.concatenate([asked.value for asked in queries])
            yield from zip(queries, collection.query_codes(codes, **how), strict=True)
        elif kind == "image":
            yield from _image_answers(collection, queries, how | {"rank": rank}, quiet)
        else:
            for asked in queries:
                try:
                    broken = kind == "broken"
                    yield asked, asked.value if broken else collection.query_item(asked.value, **how)
                except HashretError as error:
                    yield asked, str(error)


def _image_answers(
    collection: "Collection | Client", queries: list[_Query], how: dict[str, Any], quiet: bool
) -> "Iterator[tuple[_Query, list[Hit] | str]]":
    from hashret.collection import Collection

    images: Any = [query.value for query in queries]
    hasher = collection.hasher if isinstance(collection, Collection) else None  # if it is damaged, that is said once
    try:
        if hasher is not None:
            images = hasher.prepare(images)  # decoded once, for the search and for the warning
            hits = None
        else:
            hits = collection.query_batch(images, **how)
    except HashretError as error:
        if len(queries) == 1:
            yield queries[0], str(error)
        for query in queries if len(queries) > 1 else ():  # one of them is broken: find it by asking one at a time
            yield from _image_answers(collection, [query], how, quiet)
        return
    yield from zip(queries, collection.query_batch(images, **how) if hits is None else hits, strict=True)
    if hasher is not None and not quiet:
        _warn([query.text for query, unusual in zip(queries, hasher.outliers(images), strict=True) if unusual])


def _warn(unusual: list[str]) -> None:
    """Say which queries the model knows nothing of."""
    if unusual:
        more = f" and {len(unusual) - 1:,} more" if unusual[1:] else ""
        say(f"hashret: {visible(unusual[0])}{more}: unlike all images of the training, so neighbours may mean little")


def _document(asked: _Query, k: int | None, hits: "list[Hit]") -> dict[str, Any]:
    found = [
        {"rank": rank, "distance": hit.distance, "id": hit.id, "path": hit.path, "label": hit.label}
        | ({} if hit.score is None else {"score": hit.score})
        for rank, hit in enumerate(hits, 1)
    ]
    return {"query": asked.text, "k": k, "hits": found}
