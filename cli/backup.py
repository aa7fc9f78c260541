"""hashret backup: copy a collection that may be in use."""

from pathlib import Path
from typing import Annotated

import typer

from hashret.cli.common import CollectionFolder, Quiet, progress, say
from hashret.errors import HashretError, format_count


def backup(
    to: Annotated[Path, typer.Argument(metavar="TO", help="The folder to create.")],
    collection: CollectionFolder = None,
    quiet: Quiet = False,
) -> int:
    """Copy a collection, also while it is in use.

    The copy is a collection that can be opened where it is. Your own image files are not in it.
    """
    from hashret.collection import Collection, locate

    folder = locate(collection)
    with Collection.open(folder, read_only=True) as images, progress(quiet) as show:
        report = images.backup(to, show)
    say(f"copied {format_count(report.items, 'item')} and {format_count(report.files, 'file')} to {to}", quiet)
    if report.missing:
        raise HashretError(
            f"{format_count(len(report.missing), 'file')} of {folder} could not be copied, such as "
            f"{report.missing[0]}: hashret doctor lists them"
        )
    return 0
