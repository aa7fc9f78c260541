"""hashret failures: the files that could not be read."""

import json
from typing import Annotated

import typer

from hashret.cli.common import CollectionFolder, Json, Quiet, progress, say
from hashret.errors import format_count


def failures(
    collection: CollectionFolder = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try to read and index them again first.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """List the files that could not be read, and why.

    hashret index reads them again only when they have changed.
    """
    from hashret.collection import Collection, locate

    with Collection.open(locate(collection), read_only=not retry) as images:
        if retry:
            with progress(quiet) as show:
                tried = images.retry(progress=show)
            read = sum(line.status != "failed" for line in tried)
            say(f"tried {format_count(len(tried), 'file')} again: {read:,} could be read", quiet)
        failed = images.failures()
    if as_json:
        print(json.dumps([failure._asdict() for failure in failed]))
    else:
        print(*(f"{failure.path}: {failure.reason}" for failure in failed), sep="\n", end="\n" if failed else "")
    return 0
