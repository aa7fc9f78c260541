"""hashret doctor: check a collection for damage, and recover what can be read."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hashret.cli.common import CollectionFolder, Json, Quiet, command_line, say
from hashret.errors import format_count


def doctor(
    collection: CollectionFolder = None,
    recover: Annotated[
        bool, typer.Option("--recover", help="Recover what can be read of a damaged database; keep the old one.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Check a collection for damage, and recover what is readable.

    Checks the database, the models, the contents stored in the collection and the index. Exits with 1 if any is
    damaged.
    """
    from hashret.collection import Collection, locate, repair

    folder = locate(collection)
    findings = repair.check(folder)
    if recover and any(finding.part in ("database", "items") for finding in findings):
        _recover(folder, collection)
        findings = repair.check(folder)
    if recover and any(finding.part in ("blobs", "index", "leftover") for finding in findings):
        _mend({finding.part for finding in findings}, folder, quiet)
        findings = repair.check(folder)
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings]))
    else:
        print(*(f"{finding.part:<10}{finding.text}" for finding in findings), sep="\n", end="\n" if findings else "")
    if not findings:
        with Collection.open(folder, read_only=True) as images:
            absent = repair.absent_contents(folder)
            note = f"; the contents of {absent:,} are stored nowhere" if absent else ""
            say(f"nothing is wrong with the {format_count(len(images), 'item')} in {folder}{note}", quiet)
    return 1 if findings else 0


def _mend(parts: set[str], folder: Path, quiet: bool) -> None:
    """Mend faults that lose nothing by it, in these parts of the collection."""
    from hashret.collection import Collection, repair

    if "blobs" in parts:
        restored, absent = repair.restore_contents(folder)
        contents = format_count(restored, "stored content")
        say(f"restored {contents} from other paths; {absent:,} are recorded as absent", quiet)
    if "index" in parts:
        with Collection.open(folder) as images:
            images.rebuild_index()
    if "leftover" in parts:
        repair.clean(folder)


def _recover(folder: Path, collection: Path | None) -> None:
    from hashret.collection import repair
    from hashret.results import Root

    recovered = repair.recover(folder)
    items = format_count(recovered.items, "item")
    say(f"recovered {items}, and left out {recovered.dropped:,} incomplete; the old database is {recovered.backup}")
    for root in recovered.roots:
        say(f"to index the lost images again: {command_line('index', Root(root).location, collection=collection)}")
