"""hashret estimate: the time, disk and memory that a number of images needs."""

import json
from typing import Annotated

import typer

from hashret.cli.common import Bits, Json, Quiet, say, usage
from hashret.errors import format_count


def estimate(
    images: Annotated[int, typer.Argument(metavar="N", help="The number of images.", min=1)],
    bits: Bits = 64,
    source: Annotated[
        str | None, typer.Option("--source", metavar="SOURCE", help="Measure with these images, not with random ones.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Estimate time, disk and memory for N images on this machine.

    The estimate extrapolates from a measurement of a few seconds.
    """
    from hashret.codes import check_bits
    from hashret.collection.capacity import estimate as measure
    from hashret.data.sources import open_source

    with usage():
        check_bits(bits)
    if source is not None:
        open_source(source)
    say("measuring on this machine, for about ten seconds", quiet)
    result = measure(images, bits, source)
    if as_json:
        print(json.dumps(result._asdict()))
        return 0
    print(f"{format_count(images, 'image')}, codes of {bits} bits, with the default model on this machine:")
    for name, value in {
        "time": f"{result.seconds / 3600:,.2f} hours, plus 2 minutes of training",
        "disk": f"{result.disk / 1e6:,.1f} MB, plus the images themselves",
        "memory": f"{result.memory / 1e6:,.0f} MB",
        "measured": f"{result.images_per_second:,.0f} images per second, over {result.measured:,} {result.of} "
        f"in {result.measured_seconds:.1f} s",
        "": f"{result.database_bytes:,.0f} bytes of database and {result.index_bytes:,.0f} of index per image, "
        f"{result.program_bytes / 1e6:,.0f} MB for the program",
    }.items():
        print(f"{name:<10}{value}")
    return 0
