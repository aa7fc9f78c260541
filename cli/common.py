"""What commands share: options, and progress on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashret.errors import HashretError

if TYPE_CHECKING:
    from hashret.client import Client
    from hashret.collection import Collection
    from hashret.parallel import Progress

Source = Annotated[
    str, typer.Argument(metavar="SOURCE", help="Folder, .zip, .tar.gz, IDX, .npy, .npz, or data set such as digits.")
]
CollectionFolder = Annotated[
    Path | None,
    typer.Option(
        "-c", "--collection", metavar="DIR", help="The collection: default .hashret, here or in a folder above."
    ),
]
DataRoot = Annotated[
    Path | None, typer.Option("--root", metavar="DIR", help="Where the files of data sets by name are or go.")
]
Radius = Annotated[
    str | None, typer.Option("-r", metavar="DISTANCE|auto", help="Within this Hamming distance; auto: as calibrated.")
]
Target = Annotated[
    float | None,
    typer.Option("--target", metavar="PRECISION", min=0.01, max=1.0, help="That -r auto aims at. [default: 0.95]"),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Nothing on stderr but errors.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def say(text: str, quiet: bool = False) -> None:
    """A message for the person, on stderr."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """The same text in one line that commands no terminal, whatever characters the paths in it have."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


Show = Callable[["Progress"], None]


@contextmanager
def progress(quiet: bool) -> Iterator[Show]:
    """A bar on a terminal, a line every half minute elsewhere, nothing if `quiet`."""
    if quiet:
        yield lambda told: None
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _lines()


def _words(terms: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" if value % 1 else f"{value:,.0f} {name}" for name, value in terms.items())


@contextmanager
def _bars() -> Iterator[Show]:
    from rich import progress as rich
    from rich.console import Console

    columns: list[Any] = [rich.TextColumn("{task.description:<10}"), rich.BarColumn(), rich.MofNCompleteColumn()]
    columns += [rich.TimeRemainingColumn(compact=True), rich.TextColumn("{task.fields[words]}")]
    tasks: dict[str, Any] = {}
    with rich.Progress(*columns, console=Console(stderr=True), refresh_per_second=5) as bars:

        def show(told: "Progress") -> None:
            if told.stage not in tasks:
                tasks[told.stage] = bars.add_task(told.stage, words="")
            bars.update(tasks[told.stage], completed=told.done, total=told.total, words=_words(told.terms))

        yield show


def _lines(seconds: float = 30.0) -> Show:
    last = time.monotonic()

    def show(told: "Progress") -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            total = "" if told.total is None else f" of {told.total:,}"
            say(f"{told.stage} {told.done:,}{total}  {_words(told.terms)}".rstrip())

    return show


@contextmanager
def usage(option: str) -> Iterator[None]:
    """Turn the ValueError of an impossible value into a usage error that names the option."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def chosen_radius(text: str | None, target: float | None, collection: "Collection | Client", quiet: bool) -> int | None:
    """The radius that -r asks for; for "auto" that of the calibration."""
    from hashret.results import TARGET_PRECISION

    if text != "auto":
        if target is not None:
            raise typer.BadParameter("--target goes with -r auto")
        if text is not None and not (text.isascii() and text.isdecimal()):
            raise typer.BadParameter(f"a distance is a whole number of bits, or auto, not {text!r}", param_hint="-r")
        return None if text is None else int(text)
    wanted = TARGET_PRECISION if target is None else target
    radius = collection.radius(wanted)
    say(f"within {radius} bits, for a precision of {wanted:g}", quiet)
    return radius


def check_writable(folder: Path) -> None:
    """Raises HashretError now, rather than after long work, if nothing can be written at `folder`."""
    import os

    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise HashretError(f"{there} cannot be written to: choose another folder, or change its permissions")


def item_id(text: str) -> int:
    """The number in id:N; raises HashretError if it is none."""
    number = text.removeprefix("id:")
    if not number.isdecimal() or len(number) > 18:  # SQLite's are of 64 bits
        raise HashretError("an item is named by its number, such as id:7")
    return int(number)
