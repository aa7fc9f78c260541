"""hashret dupes and verdict: find groups of near-duplicates, and record verdicts on pairs of images."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
)
from hashret.errors import format_count

if TYPE_CHECKING:
    from hashret.results import Group, Item

IndexedImage = Annotated[str | None, typer.Argument(metavar="PATH|id:N", help="An indexed image.", show_default=False)]


def dupes(
    collection: CollectionFolder = None,
    radius: Radius = "3",
    target: Target = None,
    by: Annotated[
        str,
        typer.Option(
            metavar="connected|star",
            help="connected: chains of images, each within the radius of the next (single linkage); star: images "
            "within the radius of the kept one.",
        ),
    ] = "connected",
    keep: Annotated[
        str,
        typer.Option(metavar="largest|oldest|FOLDER", help="The image to keep; for a FOLDER the largest one in it."),
    ] = "largest",
    as_json: Json = False,
    script: Annotated[
        bool, typer.Option("--script", help="Print a shell script that removes the others, without running it.")
    ] = False,
    quiet: Quiet = False,
) -> int:
    """Find groups of near-duplicates.

    Prints for each image its distance in bits from the image to keep, which comes first, and its path.
    """
    from hashret.collection import Collection, locate
    from hashret.results import BLOBS

    if as_json and script:
        raise UsageError("give one of --json and --script")
    with Collection.open(locate(collection), read_only=True) as images:
        bits = parse_radius(radius, target, images, quiet)
        assert bits is not None  # the option has a default
        with usage():
            groups = images.dupes(bits, by=by, keep=keep)
        blobs = images.path / BLOBS
    if as_json:
        documents = [[_document(item, d) for item, d in zip(*group, strict=True)] for group in groups]
        print(json.dumps({"radius": bits, "by": by, "keep": keep, "groups": documents}))
    elif script:
        _print_script(groups, bits, by, blobs)
    else:
        _print_groups(groups)
    paths = sum(len(item.paths) for group in groups for item in group.items)
    found = f"{format_count(len(groups), 'group')} of {format_count(paths, 'image')}"
    say(f"{found} within {format_count(bits, 'bit')}: {paths - len(groups):,} can be removed", quiet)
    return 0


def _print_groups(groups: "list[Group]") -> None:
    for number, group in enumerate(groups):
        print(end="\n" if number else "")
        for item, distance in zip(*group, strict=True):
            print(*(f"{distance:4d}  {path}" for path in item.paths), sep="\n")


def _print_script(groups: "list[Group]", radius: int, by: str, blobs: Path) -> None:
    print("#!/bin/sh")
    print(f"# Written by hashret dupes -r {radius} --by {by}. Read it before you run it: it removes files.")
    print("# Afterwards, hashret index SOURCE --prune removes them from the collection.")
    for group in groups:
        print(*_script(group, radius, blobs), sep="\n")


def _script(group: "Group", radius: int, blobs: Path) -> list[str]:
    """Return the lines for a group. Names in comments are quoted, so that no name can end the comment."""

    def is_file(item: "Item", path: str) -> bool:
        """Return whether `path` is a file of the user, not a blob, with the size it had when it was indexed."""
        return Path(path).parent != blobs and Path(path).is_file() and Path(path).stat().st_size == item.bytes

    kept = next((path for path in group.items[0].paths if is_file(group.items[0], path)), None)
    if kept is None:
        first = json.dumps(group.items[0].paths[0], ensure_ascii=False)
        return ["", f"# nothing to remove: the image to keep is not a file, or has changed since: {first}"]
    lines, removed = ["", f"# keep {json.dumps(kept, ensure_ascii=False)}"], []
    for item, distance in zip(*group, strict=True):
        for path in item.paths:
            quoted = json.dumps(path, ensure_ascii=False)
            if distance > radius:
                lines.append(f"# {format_count(distance, 'bit')} from the kept image, so look first: {quoted}")
            elif not is_file(item, path):
                lines.append(f"# not a file, or changed since: {quoted}")
            elif not Path(path).samefile(kept):
                removed.append(f"rm -- {shlex.quote(path)}")
            elif path != kept:
                lines.append(f"# the same file: {quoted}")
    return [*lines, f"if [ -f {shlex.quote(kept)} ]; then", *removed, "fi"] if removed else lines


def _document(item: "Item", distance: int) -> dict[str, Any]:
    return {"distance": distance} | {
        name: getattr(item, name) for name in ("id", "paths", "label", "width", "height", "bytes")
    }


def verdict(
    a: IndexedImage = None,
    b: IndexedImage = None,
    verdict: Annotated[
        str | None,
        typer.Argument(metavar="same|different", help="Whether they show the same.", show_default=False),
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Write all as CSV: path_a,path_b,verdict.")
    ] = None,
    collection: CollectionFolder = None,
    quiet: Quiet = False,
) -> int:
    """Record whether two images are the same or different.

    query and dupes respect it from then on, and calibrate and train can learn from it with --verdicts.
    """
    from hashret.collection import Collection, locate

    if (a is None) != (export is not None) or (a is not None and verdict is None):
        raise UsageError("give two images and same or different, or --export FILE")
    if export is not None:
        return _export_verdicts(export, collection, quiet)
    assert a is not None and b is not None and verdict is not None
    with Collection.open(locate(collection)) as images, usage():
        first, second = (parse_item_id(text) if text.startswith("id:") else text for text in (a, b))
        images.verdict(first, second, verdict)
    return 0


def _export_verdicts(file: Path, collection: Path | None, quiet: bool) -> int:
    from hashret.collection import Collection, locate
    from hashret.collection.pairs import write_pairs

    with Collection.open(locate(collection), read_only=True) as images:
        verdicts = [(images.get(a).paths[0], images.get(b).paths[0], label) for a, b, label in images.verdicts()]
    write_pairs(file, verdicts)
    say(f"exported {format_count(len(verdicts), 'verdict')} to {file}", quiet)
    return 0
