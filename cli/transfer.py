"""hashret export and import: items as files, for other programs and other machines."""

from pathlib import Path
from typing import Annotated

import typer

from hashret.cli.common import CollectionFolder, Quiet, check_writable, say, usage
from hashret.errors import HashretError


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    collection: CollectionFolder = None,
    kind: Annotated[
        str | None, typer.Option("--format", help="jsonl, numpy or parquet: default what OUT ends with.")
    ] = None,
    quiet: Quiet = False,
) -> int:
    """Write codes, ids, paths, labels and metadata of all items to a file."""
    from hashret.collection import Collection, locate
    from hashret.collection.export import format_of

    with usage("--format"):
        kind = format_of(out, kind)
    check_writable(out.absolute().parent)
    with Collection.open(locate(collection), read_only=True) as there:
        items = there.export(out, kind)
        model = there.path / "models" / there.fingerprint
    say(f"{items:,} items in {out}; their model is {model}", quiet)
    return 0


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .jsonl, .parquet or .npz file of hashret export.")],
    collection: CollectionFolder = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="MODEL_DIR", help="The model of the codes, for a new collection.")
    ] = None,
    quiet: Quiet = False,
) -> int:
    """Take the items of an exported file into a collection of the same model, or into a new one."""
    from hashret.collection import Collection, locate
    from hashret.collection.export import read
    from hashret.hasher import Hasher

    place = locate(collection)
    with usage("FILE"):
        header, _ = read(file)
    check_writable(place)
    if not Collection.exists(place):
        if model is None:
            raise HashretError(f"there is no collection at {place}: add --model MODEL_DIR to make one")
        hasher = Hasher.load(model)
        if hasher.fingerprint != header.fingerprint:
            raise HashretError(
                f"{file} holds codes of another model, {header.fingerprint[:16]}: give that one's folder"
            )
        Collection.create(place, hasher).close()
    with Collection.open(place) as there:
        added = there.import_items(file)
        say(f"{added:,} added; {len(there):,} items in {place}", quiet)
    return 0
