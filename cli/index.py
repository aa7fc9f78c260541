"""hashret index and reindex: add images to a collection, and switch it to another model."""

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
from hashret.errors import HashretError, format_count

if TYPE_CHECKING:
    from hashret.data import records
    from hashret.results import Indexed, IndexReport


def index(
    source: Source,
    collection: CollectionFolder = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove paths under SOURCE that are gone.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Let --prune remove more than half of the paths.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if an image could not be read.")] = False,
    index: Annotated[
        str | None, typer.Option("--index", metavar="INDEX", help="The search index: bitflip, or faiss:FACTORY.")
    ] = None,
    meta: Annotated[
        Path | None,
        typer.Option(
            "--meta", metavar="FILE", help="Metadata by path, .csv or .jsonl. [default: metadata.* in SOURCE]"
        ),
    ] = None,
    root: DataRoot = None,
    as_json: Json = False,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Print a JSON line for each path once it is stored durably.")
    ] = False,
    quiet: Quiet = False,
) -> int:
    """Add the images of SOURCE that are new or have changed.

    If the collection has no model yet, the default model is trained on SOURCE first, for two minutes.
    """
    from hashret.collection import Collection, locate
    from hashret.data.sources import open_source

    folder = locate(collection)
    if index is not None:
        _check_index(index)
    opened = open_source(source, data_root=root, exclude=folder)  # before a model is trained on it
    check_writable(folder)
    if not Collection.exists(folder) and not _train_default(folder, source, opened, meta, index, quiet):
        return 130
    with Collection.open(folder) as images:
        if index is not None:
            images.use_index(index)
        with progress(quiet) as show:
            report = images.index(
                source,
                prune=prune,
                force=force,
                metadata=meta,
                data_root=root,
                progress=show,
                committed=_print_lines if jsonl else None,
            )
        items = len(images)
    _report(report, source, folder, items, as_json, quiet)
    return 1 if strict and report.failed else 0


def _check_index(name: str) -> None:
    from hashret.indexes import from_spec

    with usage("--index"):
        from_spec(64, name)


def _train_default(
    folder: Path, name: str, source: "records.Source", metadata: Path | None, index: str | None, quiet: bool
) -> bool:
    """Train the default model on a source called `name` and create the collection with it; return False if the
    training was interrupted."""
    from hashret.cli.fitting import fit
    from hashret.cli.train import CHECKPOINT, store_model
    from hashret.collection import Collection
    from hashret.data.metadata import open_metadata
    from hashret.hasher import Hasher
    from hashret.training.options import TrainingOptions

    open_metadata(metadata, source.root)  # to raise its errors before the training
    say(f"no model in {folder} yet: training the default one first", quiet)
    hasher = Hasher()
    interrupted = fit(hasher, source, name, TrainingOptions(checkpoint=folder / CHECKPOINT), quiet)
    if not Collection.exists(folder):  # another process may have been faster
        store_model(folder, hasher, index)
    if interrupted:
        say(f"hashret: interrupted at {interrupted}; the model is usable: run the same command to index with it")
    return not interrupted


def _print_lines(batch: "list[Indexed]") -> None:
    """Print a JSON line for each path of a batch that was committed."""
    for line in batch:
        print(json.dumps({key: value for key, value in line._asdict().items() if value is not None}))
    sys.stdout.flush()


def _report(report: "IndexReport", source: str, folder: Path, items: int, as_json: bool, quiet: bool) -> None:
    """Print the report of indexing; raise HashretError if the source has no images."""
    from hashret.cli.train import CHECKPOINT

    if items:
        (folder / CHECKPOINT).unlink(missing_ok=True)  # a collection with items accepts no other training
    for path, reason in report.failures:
        say(visible(f"hashret: skipped {path}: {reason}"))
    if as_json:
        print(json.dumps({"items": items, **report._asdict()}))
    counts = {name: getattr(report, name) for name in ("added", "updated", "unchanged", "removed", "failed")}
    ignored = format_count(report.ignored, "other file")
    if not any(counts.values()):
        raise HashretError(f"{source} has no images ({ignored} ignored)")
    summary = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count or name == "added")
    note = f"; {ignored} ignored" if report.ignored else ""
    say(f"{summary}; {format_count(items, 'item')} in {folder}{note}", quiet)
    if report.described or report.unmatched:
        unmatched = f"; no image here for {format_count(report.unmatched, 'row')}" if report.unmatched else ""
        say(f"changed the metadata of {format_count(report.described, 'item')}{unmatched}", quiet)


def reindex(
    model: Annotated[Path, typer.Argument(metavar="MODEL_DIR", help="A folder written by hashret train -o.")],
    collection: CollectionFolder = None,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Remove items whose images can no longer be read.")
    ] = False,
    quiet: Quiet = False,
) -> int:
    """Encode the whole collection with another model.

    The collection switches to the new model at the end, in one commit.
    """
    from hashret.collection import Collection, MissingContents, locate
    from hashret.hasher import Hasher

    with Collection.open(locate(collection)) as images:
        hasher = Hasher.load(model)
        try:
            with progress(quiet) as show:
                dropped = images.reindex(hasher, drop_missing=drop_missing, progress=show)
        except MissingContents as error:
            for path in error.paths:
                say(visible(f"hashret: missing {path}"))
            raise
        removed = f"; {dropped:,} removed" if dropped else ""
        description = f"{hasher.model}, {hasher.bits} bits, {hasher.fingerprint[:16]}"
        say(f"encoded {format_count(len(images), 'item')} with {description}{removed}", quiet)
    return 0
