"""hashret index and reindex: bring images into a collection, and move it to another model."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hashret.cli.common import (
    CollectionFolder,
    DataRoot,
    Json,
    Quiet,
    Source,
    check_writable,
    progress,
    say,
    usage,
    visible,
)
from hashret.errors import HashretError

if TYPE_CHECKING:
    from hashret.data import records
    from hashret.results import Indexed, IndexReport

CHECKPOINT = "training.checkpoint"  # in the collection, until it has items


def index(
    source: Source,
    collection: CollectionFolder = None,
    prune: Annotated[bool, typer.Option("--prune", help="Forget paths under SOURCE that are gone.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Prune even if more than half would go.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 if an image could not be read.")] = False,
    index: Annotated[
        str | None, typer.Option("--index", metavar="KIND", help="Search by bitflip, or faiss:FACTORY.")
    ] = None,
    meta: Annotated[
        Path | None,
        typer.Option("--meta", metavar="FILE", help="A .csv or .jsonl of metadata. [default: metadata.* in SOURCE]"),
    ] = None,
    root: DataRoot = None,
    as_json: Json = False,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="A line for each path once it is safely stored.")] = False,
    quiet: Quiet = False,
) -> int:
    """Add the images of SOURCE that are new or have changed.

    A collection without a model learns the default one from SOURCE first.
    """
    from hashret.collection import Collection, locate
    from hashret.data.metadata import open_metadata
    from hashret.data.sources import open_source
    from hashret.indexes import from_spec

    place = locate(collection)
    if index is not None:
        with usage("--index"):
            from_spec(64, index)
    opened = open_source(source, data_root=root, exclude=place)  # says now what is wrong with it
    check_writable(place)
    if not Collection.exists(place):
        open_metadata(meta, opened.root)  # likewise, before a model is learned
        if not _learn_default(place, source, opened, index, quiet):
            return 130
    committed = _print_lines if jsonl else None
    with Collection.open(place) as photos:
        if index is not None:
            photos.use_index(index)
        with progress(quiet) as show:
            report = photos.index(
                source, prune=prune, force=force, metadata=meta, data_root=root, progress=show, committed=committed
            )
        items = len(photos)
    if items:
        (place / CHECKPOINT).unlink(missing_ok=True)  # a collection with items takes no other training
    for path, reason in report.failures:
        say(visible(f"hashret: skipped {path}: {reason}"))
    if as_json:
        print(json.dumps({"items": items, **report._asdict()}))
    _say_report(report, source, f"{items:,} items in {place}", quiet)
    return 1 if strict and report.failed else 0


def _learn_default(place: Path, source: str, opened: "records.Source", index: str | None, quiet: bool) -> bool:
    """Learn the default model from a source, and make the collection with it; whether nobody interrupted that."""
    from hashret.cli.train import fit, put_model
    from hashret.collection import Collection
    from hashret.hasher import Hasher
    from hashret.training.options import TrainingOptions

    hasher = Hasher()
    say(f"no model yet: learning {hasher.bits}-bit codes with {hasher.model} from {source}, in 2 minutes", quiet)
    interrupted = fit(hasher, opened, TrainingOptions(checkpoint=place / CHECKPOINT), quiet)
    if not Collection.exists(place):  # as it does where another process was faster
        put_model(place, hasher, index)
    if interrupted:
        say(f"hashret: interrupted at {interrupted}; the model is usable: run the same command to index with it")
    return not interrupted


def _print_lines(batch: "list[Indexed]") -> None:
    """A line for each path of a batch, now that it is safely stored."""
    for line in batch:
        print(json.dumps({key: value for key, value in line._asdict().items() if value is not None}))
    sys.stdout.flush()


def _say_report(report: "IndexReport", source: str, holding: str, quiet: bool) -> None:
    """What was done. Raises HashretError if there was nothing to do it with."""
    counts = {name: getattr(report, name) for name in ("added", "updated", "unchanged", "removed", "failed")}
    if not any(counts.values()):
        raise HashretError(f"{source} has no images ({report.ignored:,} other files were passed over)")
    done = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == "added")
    ignored = f"; {report.ignored:,} files that are no images by name passed over" if report.ignored else ""
    say(f"{done}; {holding}{ignored}", quiet)
    if report.described or report.unmatched:
        unmatched = f"; {report.unmatched:,} rows name no image here" if report.unmatched else ""
        say(f"metadata of {report.described:,} items changed{unmatched}", quiet)


def reindex(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A folder that hashret train -o wrote.")],
    collection: CollectionFolder = None,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Forget items that cannot be read any more.")
    ] = False,
    quiet: Quiet = False,
) -> int:
    """Code the whole collection with another model, and switch to it when that is done."""
    from hashret.collection import Collection, MissingContents, locate
    from hashret.hasher import Hasher

    with Collection.open(locate(collection)) as there:
        hasher = Hasher.load(model)
        try:
            with progress(quiet) as show:
                dropped = there.reindex(hasher, drop_missing=drop_missing, progress=show)
        except MissingContents as error:
            for path in error.paths:
                say(visible(f"hashret: missing {path}"))
            raise
        lost = f"; {dropped:,} forgotten" if dropped else ""
        what = f"{hasher.model}, {hasher.bits} bits, {hasher.fingerprint[:16]}"
        say(f"{len(there):,} items coded with {what}{lost}", quiet)
    return 0
