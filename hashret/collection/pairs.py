"""Judged pairs of images as a CSV file: path_a,path_b,same|different."""

import csv
from collections.abc import Iterable
from pathlib import Path

from hashret.errors import HashretError

VERDICTS = ("same", "different")
TITLES = ("path_a", "path_b", "verdict")


def read_pairs(path: Path) -> list[tuple[str, str, bool]]:
    """The two paths of each pair of a file, with or without a line of titles, and whether they are the same.

    Raises HashretError for a line that is no such pair.
    """
    pairs = []
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                verdict = row[2].strip() if len(row) == 3 else None
                if verdict in VERDICTS:
                    pairs.append((row[0], row[1], verdict == "same"))
                elif row and (number, verdict) != (1, TITLES[2]):
                    raise HashretError(
                        f"{path}, line {number}: a line is path_a,path_b,same or path_a,path_b,different"
                    )
    except OSError as error:
        raise HashretError(f"{path} cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise HashretError(f"{path} is no CSV file: {error}") from error
    return pairs


def write_pairs(path: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Write a file that `read_pairs` reads."""
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        csv.writer(file).writerows([TITLES, *rows])
