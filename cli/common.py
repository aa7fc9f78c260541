"""What commands share: options, messages, and progress on stderr."""

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hashret.errors import HashretError, format_count

if TYPE_CHECKING:
    from hashret.client import Client
    from hashret.collection import Collection
    from hashret.parallel import Progress

# Typer's own exceptions derive from the UsageError and the ClickException of the click that it brings or depends on.
UsageError: Any = typer.BadParameter.__mro__[1]
ClickException: Any = typer.BadParameter.__mro__[2]

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="A folder, a .zip, .tar.gz, IDX, .npy or .npz file, or a data set such as digits."
    ),
]
CollectionFolder = Annotated[
    Path | None,
    typer.Option(
        "-c",
        "--collection",
        metavar="DIR",
        help="The collection. [default: $HASHRET_COLLECTION, or .hashret here or in a folder above]",
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--root", metavar="DIR", help="The folder of data sets by name. [default: hashret's cache]"),
]
Bits = Annotated[int, typer.Option(help="Bits of a code: a multiple of 8 from 8 to 1024.")]
Seed = Annotated[int, typer.Option(help="The random seed.", min=0, max=2**31 - 1)]
Radius = Annotated[
    str | None,
    typer.Option(
        "-r", metavar="DISTANCE|auto", help="Only images within this Hamming distance; auto: the calibrated radius."
    ),
]
Target = Annotated[
    float | None,
    typer.Option("--target", metavar="PRECISION", min=0.01, max=1.0, help="The precision for -r auto. [default: 0.95]"),
]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Print only results and errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def say(message: str, quiet: bool = False) -> None:
    """Print a message on stderr, unless `quiet`."""
    if not quiet:
        print(message, file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """Escape the characters of a text that would break the line or control the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def require_command(context: typer.Context) -> None:
    """Print the help of a group of commands and exit with 2 if no command of it was given."""
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(2)


def command_line(*words: object, collection: Path | None = None) -> str:
    """Return a hashret command that can be pasted into a shell; `collection` is for its -c option."""
    options = [] if collection is None else ["-c", str(collection)]
    return shlex.join(["hashret", *map(str, words), *options])


Show = Callable[["Progress"], None]


@contextmanager
def progress(quiet: bool) -> Iterator[Show]:
    """Yield a function that shows progress: as a bar on a terminal, as a line every half minute elsewhere, and not at
    all if `quiet`."""
    if quiet:
        yield lambda progress: None
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield _lines()


def _format_terms(terms: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" if value % 1 else f"{value:,.0f} {name}" for name, value in terms.items())


@contextmanager
def _bars() -> Iterator[Show]:
    from rich import progress as rich
    from rich.console import Console

    columns: list[Any] = [rich.TextColumn("{task.description:<10}"), rich.BarColumn(), rich.MofNCompleteColumn()]
    columns += [rich.TimeRemainingColumn(compact=True), rich.TextColumn("{task.fields[terms]}")]
    tasks: dict[str, Any] = {}
    with rich.Progress(*columns, console=Console(stderr=True), refresh_per_second=5) as bars:

        def show(progress: "Progress") -> None:
            stage = progress.stage
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, terms="")
            bars.update(
                tasks[stage], completed=progress.done, total=progress.total, terms=_format_terms(progress.terms)
            )

        yield show


def _lines(seconds: float = 30.0) -> Show:
    last = time.monotonic()

    def show(progress: "Progress") -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            total = "" if progress.total is None else f" of {progress.total:,}"
            say(f"{progress.stage} {progress.done:,}{total}  {_format_terms(progress.terms)}".rstrip())

    return show


@contextmanager
def usage(option: str | None = None) -> Iterator[None]:
    """Turn a ValueError into a usage error, which begins with the option if its message does not name it."""
    try:
        yield
    except ValueError as error:
        raise UsageError(f"{option}: {error}" if option else str(error)) from None


def parse_radius(text: str | None, target: float | None, collection: "Collection | Client", quiet: bool) -> int | None:
    """Return the radius that -r names: a number of bits, or for "auto" the calibrated radius at precision `target`."""
    from hashret.results import TARGET_PRECISION

    if text != "auto":
        if target is not None:
            raise UsageError("--target goes with -r auto")
        if text is not None and not (text.isascii() and text.isdecimal()):
            raise UsageError(f"-r: a distance is a whole number of bits, or auto, not {text!r}")
        return None if text is None else int(text)
    precision = TARGET_PRECISION if target is None else target
    radius = collection.radius(precision)
    say(f"-r auto is {format_count(radius, 'bit')}, for a precision of {precision:g}", quiet)
    return radius


def check_writable(folder: Path) -> None:
    """Raise HashretError if `folder` cannot be made or written to; so that this shows before long work, not after."""
    import os

    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise HashretError(f"{existing} cannot be written to: choose another folder, or change its permissions")


def check_parent(file: Path) -> None:
    """Raise HashretError if `file` cannot be written because of its folder, before long work."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise HashretError(f"{file} cannot be written: create the folder {folder} first")
    check_writable(folder)


def parse_item_id(text: str) -> int:
    """Return the number N of "id:N"; raise HashretError if it is not a number."""
    number = text.removeprefix("id:")
    if not number.isdecimal() or len(number) > 18:  # SQLite's ids have 64 bits
        raise HashretError("an item is named by its number, such as id:7")
    return int(number)
