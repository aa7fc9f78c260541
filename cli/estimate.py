"""hashret estimate: what so many images will need."""

import json
from typing import Annotated

import typer

from hashret.cli.common import Json, Quiet, say, usage


def estimate(
    images: Annotated[int, typer.Argument(metavar="N", help="How many images.", min=1)],
    bits: Annotated[int, typer.Option(help="Bits of a code: a multiple of 8 from 8 to 1024.")] = 64,
    source: Annotated[
        str | None, typer.Option("--source", metavar="SOURCE", help="Measure with images of yours, not made-up ones.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Say how long N images take to index here, and what disk and memory they need: measured in a few seconds."""
    from hashret.codes import check_bits
    from hashret.collection.capacity import estimate as measure
    from hashret.data.sources import open_source

    with usage("--bits"):
        check_bits(bits)
    if source is not None:
        open_source(source)
    say("measuring on this machine, for about ten seconds", quiet)
    told = measure(images, bits, source)
    if as_json:
        print(json.dumps(told._asdict()))
        return 0
    print(f"{images:,} images, codes of {bits} bits, with the default model on this machine:")
    for name, value in {
        "time": f"{told.seconds / 3600:,.2f} hours, besides the 2 minutes of training",
        "disk": f"{told.disk / 1e6:,.1f} MB, besides your images",
        "memory": f"{told.memory / 1e6:,.0f} MB",
        "measured": f"{told.images_per_second:,.0f} images a second, indexing {told.measured:,} {told.of} "
        f"in {told.measured_seconds:.1f} s",
        "": f"{told.database_bytes:,.0f} bytes of database and {told.index_bytes:,.0f} of index for each image, "
        f"{told.program_bytes / 1e6:,.0f} MB for the program",
    }.items():
        print(f"{name:<10}{value}")
    return 0
