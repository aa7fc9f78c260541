"""hashret remove: forget images."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from hashret.cli.common import CollectionFolder, Json, Quiet, item_id, say

if TYPE_CHECKING:
    from hashret.results import Indexed


def remove(
    what: Annotated[
        list[str] | None, typer.Argument(metavar="PATH…|id:N…", help="Images, folders, archives, or items by number.")
    ] = None,
    collection: CollectionFolder = None,
    where: Annotated[
        str | None, typer.Option("--where", metavar="SQL", help="The items that this holds for, as in hashret query.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be forgotten.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Forget images: a path, everything below a folder, or an item with all its paths. Your files are left alone."""
    from hashret.collection import Collection, locate

    if not what and where is None:
        raise typer.BadParameter("give a PATH, id:N or --where")
    asked: list[int | str] = [item_id(text) if text.startswith("id:") else text for text in what or []]
    lines: list[Indexed] = []
    with Collection.open(locate(collection)) as there:
        if where is not None:
            asked += there.matching(where)
        items = there.remove(asked, dry_run=dry_run, committed=lines.extend)
    if as_json:
        print(json.dumps({"items": items, "paths": [line.path for line in lines], "dry_run": dry_run}))
    else:
        print(*(line.path for line in lines), sep="\n", end="\n" if lines else "")
    verb = "would be forgotten" if dry_run else "forgotten"
    say(f"{len(lines):,} paths and {items:,} items {verb}; your files are as they were", quiet)
    return 0
