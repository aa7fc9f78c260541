"""hashret demo: train, index and query on real images that come with scikit-learn."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hashret.cli.common import Quiet, Seed, command_line, progress, say, usage
from hashret.errors import HashretError, format_count

if TYPE_CHECKING:
    from hashret.collection import Collection
    from hashret.data.records import Record
    from hashret.results import Hit

QUERIES = 200  # images that are not indexed, but queried with
K = 10
AUTHOR = "Made by hashret demo"
NOTE = f"{AUTHOR}, which replaces the contents of this folder when it runs again.\n"


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The folder to write images, model and collection to.")
    ] = Path("hashret-demo"),
    budget: Annotated[str, typer.Option(help="Training time, such as 20s or 2m.")] = "20s",
    seed: Seed = 0,
    quiet: Quiet = False,
) -> int:
    """Try hashret on handwritten digits: train, index and query.

    The digits are written as PNG files, 200 of them as queries that are not indexed.
    """
    from hashret.collection import Collection
    from hashret.data.sources import open_source
    from hashret.hasher import Hasher
    from hashret.training.options import parse_duration

    with usage():
        seconds = parse_duration(budget)
    prepare_folder(out)
    photos, queries, folder = out / "photos", out / "queries", out / ".hashret"
    records = list(open_source("digits"))
    say(f"1. writing {len(records):,} handwritten digits as PNG files under {out}", quiet)
    write_digits(records, photos, queries)
    say(f"2. {command_line('train', photos, '--budget', budget, collection=folder)}", quiet)
    hasher = Hasher(bits=64)
    with progress(quiet) as show:
        hasher.fit(photos, budget=seconds, seed=seed, progress=show)
    say(f"3. {command_line('index', photos, collection=folder)}", quiet)
    with Collection.create(folder, hasher) as collection:
        with progress(quiet) as show:
            report = collection.index(photos, progress=show)
        images = sorted(queries.rglob("*.png"))
        say(f"4. {command_line('query', images[0], collection=folder)}\n", quiet)
        print_results(collection, images, report.added, out / "neighbours.png")
    print(f"\nQuery another image:\n  {command_line('query', images[len(images) // 2], collection=folder)}")
    return 0


def prepare_folder(out: Path) -> None:
    """Create the folder and remove the collection of an earlier demo; raise HashretError if it holds other files."""
    import shutil

    note = out / "README.txt"
    if out.exists() and not out.is_dir():
        raise HashretError(f"{out} is not a folder: choose another with --out DIR")
    if out.is_dir() and any(out.iterdir()) and not (note.is_file() and note.read_text().startswith(AUTHOR)):
        raise HashretError(f"{out} holds files that hashret demo did not make: choose another folder with --out DIR")
    out.mkdir(parents=True, exist_ok=True)
    note.write_text(NOTE)
    shutil.rmtree(out / ".hashret", ignore_errors=True)


def write_digits(records: "list[Record]", photos: Path, queries: Path) -> None:
    """Write every image as a PNG file in a folder named by its label: the first `QUERIES` below `queries`, the others
    below `photos`."""
    from PIL import Image

    from hashret.data.images import decode

    for i, record in enumerate(records):
        folder = (queries if i < QUERIES else photos) / str(record.label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(decode(record.read()).pixels[..., 0]).save(folder / f"{i:04d}.png")


def print_results(collection: "Collection", images: list[Path], indexed: int, sheet: Path) -> None:
    """Print the hits of the first image and the precision over all, and draw the hits to `sheet`."""
    from hashret.evaluation.measures import precision
    from hashret.plots import contact_sheet

    answers: list[list[Hit]] = collection.query_batch(images, k=K)
    relevant = [[hit.label == path.parent.name for hit in hits] for path, hits in zip(images, answers, strict=True)]
    for hit in answers[0]:
        print(f"{hit.distance:4d}  {hit.path}")
    contact_sheet(images[0], answers[0], sheet)
    print(
        f"\n{format_count(indexed, 'image')} indexed. Precision at {K}: {precision(relevant[:1]):.2f} for this query, "
        f"{precision(relevant):.3f} over {len(images)} queries.\n"
        f"This query and its neighbours as a picture: {sheet}"
    )
