"""hashret dupes and verdict: copies of one image, and what a person says of them."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashret.cli.common import CollectionFolder, Json, Quiet, Radius, Target, chosen_radius, item_id, say, usage

if TYPE_CHECKING:
    from hashret.results import Group, Item

Judged = Annotated[str | None, typer.Argument(metavar="PATH|id:N", help="An indexed image.", show_default=False)]


def dupes(
    collection: CollectionFolder = None,
    radius: Radius = "3",
    target: Target = None,
    by: Annotated[
        str, typer.Option(help="connected: chains of links within the radius; star: all within it of the kept one.")
    ] = "connected",
    keep: Annotated[
        str, typer.Option(metavar="largest|oldest|FOLDER", help="The copy to keep; the largest in a FOLDER.")
    ] = "largest",
    as_json: Json = False,
    script: Annotated[
        bool, typer.Option("--script", help="A shell script that removes the others; nothing runs it.")
    ] = False,
    quiet: Quiet = False,
) -> int:
    """Print groups of near-duplicates: distance in bits from the one to keep, which comes first, and path."""
    from hashret.collection import Collection, locate
    from hashret.results import BLOBS

    if as_json and script:
        raise typer.BadParameter("give one of --json and --script")
    with Collection.open(locate(collection), read_only=True) as photos:
        bits = chosen_radius(radius, target, photos, quiet)
        assert bits is not None  # there is a default
        with usage("--by"):
            groups = photos.dupes(bits, by=by, keep=keep)
        blobs = photos.path / BLOBS
    if as_json:
        documents = [[_document(item, d) for item, d in zip(*group, strict=True)] for group in groups]
        print(json.dumps({"radius": bits, "by": by, "keep": keep, "groups": documents}))
    elif script:
        _print_script(groups, bits, by, blobs)
    else:
        _print_groups(groups)
    count, paths = len(groups), sum(len(item.paths) for group in groups for item in group.items)
    found = f"{count:,} group{'s' * (count != 1)} of {paths:,} images within {bits} bits"
    say(f"{found}: {paths - count:,} could go", quiet)
    return 0


def _print_groups(groups: "list[Group]") -> None:
    for number, group in enumerate(groups):
        print(end="\n" if number else "")
        for item, distance in zip(*group, strict=True):
            print(*(f"{distance:4d}  {path}" for path in item.paths), sep="\n")


def _print_script(groups: "list[Group]", radius: int, by: str, blobs: Path) -> None:
    print("#!/bin/sh")
    print(f"# Written by hashret dupes -r {radius} --by {by}. Read it before you run it: it removes files.")
    print("# Afterwards, hashret index SOURCE --prune forgets them.")
    for group in groups:
        print(*_script(group, radius, blobs), sep="\n")


def verdict(
    a: Judged = None,
    b: Judged = None,
    said: Annotated[str | None, typer.Argument(metavar="same|different", show_default=False)] = None,
    export: Annotated[
        Path | None, typer.Option("--export", metavar="FILE", help="Write all as CSV: path_a,path_b,verdict.")
    ] = None,
    collection: CollectionFolder = None,
    quiet: Quiet = False,
) -> int:
    """Remember that two images are the same, or different; query, dupes, calibrate and train know it from then on."""
    from hashret.collection import Collection, locate
    from hashret.collection.pairs import write_pairs

    if (a is None) != (export is not None) or (a is not None and said is None):
        raise typer.BadParameter("give two images and same or different, or --export FILE")
    if export is not None:
        with Collection.open(locate(collection), read_only=True) as there:
            verdicts = [(there.get(a).paths[0], there.get(b).paths[0], said) for a, b, said in there.verdicts()]
        write_pairs(export, verdicts)
        say(f"{len(verdicts):,} verdicts in {export}", quiet)
        return 0
    assert a is not None and b is not None and said is not None
    with Collection.open(locate(collection)) as there, usage("verdict"):
        first, second = (item_id(text) if text.startswith("id:") else text for text in (a, b))
        there.verdict(first, second, said)
    return 0


def _script(group: "Group", radius: int, blobs: Path) -> list[str]:
    """The lines for a group. What is said in a comment stays in its line, whatever is in a name."""

    def is_file(item: "Item", path: str) -> bool:
        """Whether a file that nobody else looks after lies there, as long as it was when it was indexed."""
        return Path(path).parent != blobs and Path(path).is_file() and Path(path).stat().st_size == item.bytes

    kept = next((path for path in group.items[0].paths if is_file(group.items[0], path)), None)
    if kept is None:
        first = json.dumps(group.items[0].paths[0], ensure_ascii=False)
        return ["", f"# nothing to do: the one to keep is no file, or not the one that was indexed: {first}"]
    lines, removed = ["", f"# keep {json.dumps(kept, ensure_ascii=False)}"], []
    for item, distance in zip(*group, strict=True):
        for path in item.paths:
            told = json.dumps(path, ensure_ascii=False)
            if distance > radius:
                lines.append(f"# {distance} bits from the kept one, so look first: {told}")
            elif not is_file(item, path):
                lines.append(f"# no file, or not the one that was indexed: {told}")
            elif not Path(path).samefile(kept):
                removed.append(f"rm -- {shlex.quote(path)}")
            elif path != kept:
                lines.append(f"# the same file: {told}")
    return [*lines, f"if [ -f {shlex.quote(kept)} ]; then", *removed, "fi"] if removed else lines


def _document(item: "Item", distance: int) -> dict[str, Any]:
    return {"distance": distance} | {
        name: getattr(item, name) for name in ("id", "paths", "label", "width", "height", "bytes")
    }
