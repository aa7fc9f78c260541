"""hashret failures: what could not be read."""

import json
from typing import Annotated

import typer

from hashret.cli.common import CollectionFolder, Json, Quiet, progress, say


def failures(
    collection: CollectionFolder = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try again to read them first.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Print the files that could not be read, and why. They are tried again only when they change, or with --retry."""
    from hashret.collection import Collection, locate

    with Collection.open(locate(collection), read_only=not retry) as there:
        if retry:
            with progress(quiet) as show:
                tried = there.retry(progress=show)
            good = sum(line.status != "failed" for line in tried)
            say(f"tried {len(tried):,} again: {good:,} could be read", quiet)
        found = there.failures()
    if as_json:
        print(json.dumps([failure._asdict() for failure in found]))
    else:
        print(*(f"{failure.path}: {failure.reason}" for failure in found), sep="\n", end="\n" if found else "")
    return 0
