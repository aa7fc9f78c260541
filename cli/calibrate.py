"""hashret calibrate: the precision and recall of each radius on the collection's own images."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hashret.cli.common import CollectionFolder, Json, Quiet, Seed, Target, UsageError, check_parent, progress, say
from hashret.errors import HashretError, format_count

if TYPE_CHECKING:
    from hashret.results import Calibration


def calibrate(
    pairs: Annotated[
        Path | None, typer.Argument(metavar="PAIRS.csv", help="Labelled pairs: lines of path_a,path_b,same|different.")
    ] = None,
    verdicts: Annotated[bool, typer.Option("--verdicts", help="Use the verdicts in the collection.")] = False,
    images: Annotated[int, typer.Option(help="Images to make augmented copies of.", min=1)] = 500,
    seed: Seed = 0,
    target: Target = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Plot the curves to this file.")] = None,
    collection: CollectionFolder = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> int:
    """Measure precision and recall at each radius, for -r auto.

    Near-duplicates are augmented copies (cropped, resized, JPEG, brightened, rotated) of indexed images, or the pairs
    in PAIRS.csv, or the verdicts. Precision is the share of near-duplicates among the images within a radius; recall is
    the share of near-duplicates that lie within it.
    """
    from hashret.collection import locate
    from hashret.results import TARGET_PRECISION

    if pairs is not None and verdicts:
        raise UsageError("give one of PAIRS.csv and --verdicts")
    folder = locate(collection)
    if plot is not None:
        check_parent(plot)
    calibration = _measure(folder, pairs, verdicts, images, seed, quiet)
    precision = TARGET_PRECISION if target is None else target
    radius, reason = None, ""
    try:
        radius = calibration.radius(precision)
    except HashretError as error:
        reason = str(error)
    if as_json:
        _print_json(calibration, precision, radius)
    else:
        print(*_table(calibration), sep="\n")
    if plot is not None:
        _plot(calibration, plot, radius, precision)
    _say_radius(calibration, precision, radius, reason, quiet)
    return 0


def _measure(folder: Path, pairs: Path | None, verdicts: bool, images: int, seed: int, quiet: bool) -> "Calibration":
    """Calibrate by the pairs of a file, by verdicts, or by augmented copies of at most `images` images."""
    from hashret.collection import Collection
    from hashret.collection.pairs import read_pairs

    with Collection.open(folder) as collection:
        if pairs is not None:
            return collection.calibrate(read_pairs(pairs), source=str(pairs))
        if verdicts:
            labelled = [(a, b, verdict == "same") for a, b, verdict in collection.verdicts()]
            return collection.calibrate(labelled, source="verdicts")
        with progress(quiet) as show:
            return collection.calibrate(images=images, seed=seed, progress=show)


def _say_radius(calibration: "Calibration", target: float, radius: int | None, reason: str, quiet: bool) -> None:
    pairs = format_count(sum(map(sum, calibration.copies.values())), "near-duplicate")
    among = "" if calibration.items is None else f" among {format_count(calibration.items, 'item')}"
    say(f"measured with {pairs} ({calibration.source}){among}", quiet)
    if radius is None:
        say(f"hashret: {reason}", quiet)
    else:
        bits, recall = format_count(radius, "bit"), calibration.recall[radius]
        say(f"-r auto is {bits}, for a precision of {target:g}: its recall is {recall:.3f}", quiet)


def _print_json(calibration: "Calibration", target: float, radius: int | None) -> None:
    curves = {"precision": calibration.precision().tolist(), "recall": calibration.recall.tolist()}
    origin = {"source": calibration.source, "items": calibration.items}
    print(json.dumps(origin | {"target": target, "radius": radius} | curves))


def _table(calibration: "Calibration") -> list[str]:
    """Return a line for each radius, from the first with any result to full recall or a precision below 1 %."""
    precision, recall = calibration.precision(), calibration.recall
    lines = ["radius  precision  recall"]
    first = next(radius for radius in range(len(recall)) if recall[radius] > 0 or precision[radius] < 1)
    for radius in range(first, len(recall)):
        lines.append(f"{radius:6d}  {precision[radius]:9.3f}  {recall[radius]:6.3f}")
        if recall[radius] == 1 or precision[radius] < 0.01:
            break
    return lines


def _plot(calibration: "Calibration", path: Path, radius: int | None, target: float) -> None:
    from hashret import plots

    among = "" if calibration.items is None else f", among {format_count(calibration.items, 'item')}"
    title = f"precision and recall by radius: {calibration.source}{among} (target {target:g})"
    plots.radii(calibration.precision(), calibration.recall, calibration.recalls, path, radius=radius, title=title)
