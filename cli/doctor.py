"""hashret doctor: whether a collection is whole, and what can be saved of one that is not."""

import json
from typing import Annotated

import typer

from hashret.cli.common import CollectionFolder, Json, Quiet, say


def doctor(
    collection: CollectionFolder = None,
    recover: Annotated[
        bool, typer.Option("--recover", help="Save what can be read of a damaged collection; the old one is kept.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Check the database, the models, the contents kept in the collection and the index, and say what is wrong.

    Exits 1 if anything is.
    """
    from hashret.collection import Collection, locate, repair
    from hashret.results import Root

    folder = locate(collection)
    found = repair.check(folder)
    if recover and any(finding.part in ("database", "items") for finding in found):
        saved = repair.recover(folder)
        say(f"{saved.items:,} items saved, {saved.dropped:,} incomplete; the old database is {saved.backup}")
        for root in saved.roots:
            say(f"to bring back what was lost: hashret index {Root(root).location}")
        found = repair.check(folder)
    if recover and any(finding.part == "index" for finding in found):
        with Collection.open(folder) as there:
            there.rebuild_index()
        found = repair.check(folder)
    if as_json:
        print(json.dumps([finding._asdict() for finding in found]))
    else:
        print(*(f"{finding.part:<10}{finding.text}" for finding in found), sep="\n", end="\n" if found else "")
    if not found:
        with Collection.open(folder, read_only=True) as there:
            say(f"nothing is wrong with the {len(there):,} items in {folder}", quiet)
    return 1 if found else 0
