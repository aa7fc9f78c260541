"""hashret calibrate: what each radius means on one's own images."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hashret.cli.common import CollectionFolder, Json, Quiet, Target, check_writable, progress, say
from hashret.errors import HashretError

if TYPE_CHECKING:
    from hashret.results import Calibration


def calibrate(
    pairs: Annotated[
        Path | None, typer.Argument(metavar="PAIRS.csv", help="Judged pairs: lines of path_a,path_b,same|different.")
    ] = None,
    verdicts: Annotated[bool, typer.Option("--verdicts", help="From the verdicts in the collection instead.")] = False,
    images: Annotated[int, typer.Option(help="Images to make altered copies of, without pairs.", min=1)] = 500,
    seed: Annotated[int, typer.Option(help="Of all randomness.", min=0, max=2**31 - 1)] = 0,
    target: Target = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Write a picture of it.")] = None,
    collection: CollectionFolder = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure what each radius means on these images, for -r auto: how many of the images shown are right, and how many
    copies are found.

    From judged pairs, or from altered copies (cropped, resized, JPEG, brighter, turned) of the images that are indexed.
    """
    from hashret.collection import locate
    from hashret.results import TARGET_PRECISION

    if pairs is not None and verdicts:
        raise typer.BadParameter("give one of PAIRS.csv and --verdicts")
    place = locate(collection)
    if plot is not None:
        check_writable(plot.absolute().parent)
    found = _calibrated(place, pairs, verdicts, images, seed, quiet)
    wanted = TARGET_PRECISION if target is None else target
    radius, reason = None, ""
    try:
        radius = found.radius(wanted)
    except HashretError as error:
        reason = str(error)
    if as_json:
        curves = {"precision": found.precision().tolist(), "recall": found.recall.tolist()}
        print(json.dumps({"source": found.source, "items": found.items, "target": wanted, "radius": radius, **curves}))
    else:
        print(*_table(found), sep="\n")
    if plot is not None:
        _draw(found, plot, radius, wanted)
    _say_radius(found, wanted, radius, reason, quiet)
    return 0


def _calibrated(place: Path, pairs: Path | None, verdicts: bool, images: int, seed: int, quiet: bool) -> "Calibration":
    """What the radii mean, measured on pairs of a file, on verdicts, or on altered copies of so many images."""
    from hashret.collection import Collection
    from hashret.collection.pairs import read_pairs

    with Collection.open(place) as photos:
        if pairs is not None:
            return photos.calibrate(read_pairs(pairs), source=str(pairs))
        if verdicts:
            judged = [(a, b, verdict == "same") for a, b, verdict in photos.verdicts()]
            return photos.calibrate(judged, source="verdicts")
        with progress(quiet) as show:
            return photos.calibrate(images=images, seed=seed, progress=show)


def _say_radius(found: "Calibration", target: float, radius: int | None, reason: str, quiet: bool) -> None:
    copies = sum(map(sum, found.copies.values()))
    among = "" if found.items is None else f" among {found.items:,} items"
    say(f"measured with {copies:,} copies ({found.source}){among}", quiet)
    if radius is None:
        say(f"hashret: {reason}", quiet)
    else:
        share = found.recall[radius]
        say(f"-r auto is {radius} for a precision of {target:g}: it finds {share:.1%} of the copies", quiet)


def _table(found: "Calibration") -> list[str]:
    """A line for each radius that shows anything, until all copies are found or hardly anything shown is right."""
    precision, recall = found.precision(), found.recall
    lines = ["radius  precision  recall"]
    first = next(radius for radius in range(len(recall)) if recall[radius] > 0 or precision[radius] < 1)
    for radius in range(first, len(recall)):
        lines.append(f"{radius:6d}  {precision[radius]:9.3f}  {recall[radius]:6.3f}")
        if recall[radius] == 1 or precision[radius] < 0.01:
            break
    return lines


def _draw(found: "Calibration", path: Path, radius: int | None, target: float) -> None:
    from hashret import plots

    among = "" if found.items is None else f", among {found.items:,} items"
    title = f"what a radius means: {found.source}{among} (target {target:g})"
    plots.radii(found.precision(), found.recall, found.recalls, path, radius=radius, title=title)
