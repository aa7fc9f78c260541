"""hashret export and import: items as files, for other programs and other machines."""

from pathlib import Path
from typing import Annotated

import typer

from hashret.cli.common import CollectionFolder, Quiet, check_parent, check_writable, say, usage
from hashret.errors import HashretError, format_count


def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    collection: CollectionFolder = None,
    file_format: Annotated[
        str | None,
        typer.Option("--format", help="jsonl, numpy or parquet. [default: by the suffix of OUT]"),
    ] = None,
    quiet: Quiet = False,
) -> int:
    """Write all items to a JSON Lines, Parquet or NumPy file.

    An item is its code, id, paths, labels and metadata.
    """
    from hashret.collection import Collection, locate
    from hashret.collection.export import format_of

    with usage("--format" if file_format else "OUT"):
        file_format = format_of(out, file_format)
    check_parent(out)
    with Collection.open(locate(collection), read_only=True) as images:
        items = images.export(out, file_format)
        model = images.path / "models" / images.fingerprint
    say(f"exported {format_count(items, 'item')} to {out}; their model is {model}", quiet)
    return 0


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .jsonl, .parquet or .npz file of hashret export.")],
    collection: CollectionFolder = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="MODEL_DIR", help="The model of the codes, to create a new collection with."),
    ] = None,
    quiet: Quiet = False,
) -> int:
    """Add the items of an exported file to a collection.

    The collection has the model of the codes, or is created with --model.
    """
    from hashret.collection import Collection, locate
    from hashret.collection.export import read
    from hashret.hasher import Hasher

    folder = locate(collection)
    with usage("FILE"):
        header, _ = read(file)
    check_writable(folder)
    if not Collection.exists(folder):
        if model is None:
            raise HashretError(f"there is no collection at {folder}: add --model MODEL_DIR to create one")
        hasher = Hasher.load(model)
        if hasher.fingerprint != header.fingerprint:
            raise HashretError(
                f"{file} holds codes of another model, {header.fingerprint[:16]}: give the folder of that model"
            )
        Collection.create(folder, hasher).close()
    with Collection.open(folder) as images:
        added = images.import_items(file)
        say(f"{added:,} added; {format_count(len(images), 'item')} in {folder}", quiet)
    return 0
