"""hashret remove: remove images from a collection."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from hashret.cli.common import CollectionFolder, Json, Quiet, UsageError, parse_item_id, say
from hashret.errors import format_count

if TYPE_CHECKING:
    from hashret.results import Indexed


def remove(
    targets: Annotated[
        list[str] | None, typer.Argument(metavar="PATH…|id:N…", help="Images, folders, archives, or items by number.")
    ] = None,
    collection: CollectionFolder = None,
    where: Annotated[
        str | None, typer.Option("--where", metavar="SQL", help="Also items that match this filter: label = 'cat'")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be removed, and remove nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Remove images from the collection; your files stay untouched.

    A path removes that file, a folder or archive all paths below it, and id:N an item with all its paths. An item goes
    with its last path.
    """
    from hashret.collection import Collection, locate

    if not targets and where is None:
        raise UsageError("give a PATH, id:N or --where")
    ids_and_paths = [parse_item_id(text) if text.startswith("id:") else text for text in targets or []]
    removed: list[Indexed] = []
    with Collection.open(locate(collection)) as images:
        if where is not None:
            ids_and_paths += images.matching(where)
        items = images.remove(ids_and_paths, dry_run=dry_run, committed=removed.extend)
    if as_json:
        print(json.dumps({"items": items, "paths": [line.path for line in removed], "dry_run": dry_run}))
    else:
        print(*(line.path for line in removed), sep="\n", end="\n" if removed else "")
    verb = "would remove" if dry_run else "removed"
    counts = f"{format_count(len(removed), 'path')} and {format_count(items, 'item')}"
    say(f"{verb} {counts}; your files are untouched", quiet)
    return 0
