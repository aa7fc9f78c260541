"""Labelled pairs of images as a CSV file: path_a,path_b,same|different."""

import csv
from collections.abc import Iterable
from pathlib import Path

from hashret.durable import Replacement
from hashret.errors import HashretError

VERDICTS = ("same", "different")
HEADER = ("path_a", "path_b", "verdict")


def read_pairs(path: Path) -> list[tuple[str, str, bool]]:
    """Read labelled pairs as (path, path, whether they are the same) from a file with or without a header line.

    Raise HashretError for a line that is not a labelled pair.
    """
    pairs = []
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                verdict = row[2].strip() if len(row) == 3 else None
                if verdict in VERDICTS:
                    pairs.append((row[0], row[1], verdict == "same"))
                elif row and (number, verdict) != (1, HEADER[2]):
                    raise HashretError(
                        f"{path}, line {number}: a line is path_a,path_b,same or path_a,path_b,different"
                    )
    except OSError as error:
        raise HashretError(f"{path} cannot be read: {error.strerror}") from error
    except csv.Error as error:
        raise HashretError(f"{path} is not a CSV file: {error}") from error
    return pairs


def write_pairs(path: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Write (path, path, verdict) to a file that `read_pairs` reads."""
    with Replacement(path) as new:
        with new.path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            csv.writer(file).writerows([HEADER, *rows])
        new.commit()
