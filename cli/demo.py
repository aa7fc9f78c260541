"""hashret demo: the main job on real images that come with scikit-learn."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hashret.cli.common import Quiet, progress, say, usage
from hashret.errors import HashretError

if TYPE_CHECKING:
    from hashret.data.records import Record
    from hashret.results import Hit

QUERIES = 200  # images that are not indexed, to ask for
NOTE = "Made by hashret demo, which begins anew here when it is run again.\n"


def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to put it all.")] = Path("hashret-demo"),
    budget: Annotated[str, typer.Option(help="How long to train.")] = "20s",
    seed: Annotated[int, typer.Option(help="Of all randomness.", min=0)] = 0,
    quiet: Quiet = False,
) -> int:
    """Train on handwritten digits, index them as PNG files, and find neighbours of some that were left out."""
    from hashret.collection import Collection
    from hashret.data.sources import open_source
    from hashret.hasher import Hasher
    from hashret.training.options import parse_duration

    with usage("--budget"):
        seconds = parse_duration(budget)
    begin_anew(out)
    photos, queries = out / "photos", out / "queries"
    records = list(open_source("digits"))
    say(f"1. writing {len(records):,} handwritten digits as PNG files under {out}", quiet)
    write_digits(records, photos, queries)
    say(f"2. hashret train {photos} --budget {budget}", quiet)
    hasher = Hasher(bits=64)
    with progress(quiet) as show:
        hasher.fit(photos, budget=seconds, seed=seed, progress=show)
    say(f"3. hashret index {photos}", quiet)
    with Collection.create(out / ".hashret", hasher) as collection:
        with progress(quiet) as show:
            report = collection.index(photos, progress=show)
        images = sorted(queries.rglob("*.png"))
        answers = collection.query_batch(images, k=10)
    say(f"4. hashret query {images[0]}\n", quiet)
    for hit in answers[0]:
        print(f"{hit.distance:4d}  {hit.path}")
    print(f"\n{report.added:,} images indexed. {measured(images, answers, out / 'neighbours.png')}")
    return 0


def begin_anew(out: Path) -> None:
    """Make the folder, without what an earlier demo left; raises HashretError if it holds anything else."""
    import shutil

    note = out / "README.txt"
    if out.is_dir() and any(out.iterdir()) and not (note.is_file() and note.read_text() == NOTE):
        raise HashretError(f"{out} holds files that hashret demo did not make: choose another place with --out DIR")
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(NOTE)
    shutil.rmtree(out / ".hashret", ignore_errors=True)


def write_digits(records: "list[Record]", photos: Path, queries: Path) -> None:
    """Write every image as a PNG file, in a folder of its label: the first `QUERIES` of them below `queries`."""
    from PIL import Image

    from hashret.data.images import decode

    for i, record in enumerate(records):
        folder = (queries if i < QUERIES else photos) / str(record.label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(decode(record.read()).pixels[..., 0]).save(folder / f"{i:04d}.png")


def measured(images: list[Path], answers: "list[list[Hit]]", sheet: Path) -> str:
    """The precision of the answers, in words, and where the picture of the first one is, which is written."""
    from hashret.evaluation.measures import precision
    from hashret.plots import contact_sheet

    right = [[hit.label == path.parent.name for hit in found] for path, found in zip(images, answers, strict=True)]
    contact_sheet(images[0], answers[0], sheet)
    return (
        f"Precision of 10 neighbours: {precision(right[:1]):.2f} for this image,\n"
        f"{precision(right):.3f} over all {len(images)} images that were left out. Picture: {sheet}"
    )
