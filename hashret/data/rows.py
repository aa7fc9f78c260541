"""The rows of an array as a source."""

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from hashret.data.arrays import LazyArray
from hashret.data.records import Record, Source
from hashret.results import Root

_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")  # a non-negative int64 without leading zeros


class ArrayRows(Source):
    """The rows of an IDX, .npy or .npz file, a data set, or an array in memory; names are row numbers.

    Contents are views into the blocks of the array.
    """

    arrays = True

    def __init__(self, root: Root, array: LazyArray, mtime_ns: int) -> None:
        self.root = root
        self.length, self.dim = array.length, array.dim
        self._array = array
        self._mtime_ns = mtime_ns

    def __iter__(self) -> Iterator[Record]:
        number = 0
        for block in self._array.blocks():
            for row in block:
                yield self._record(number, row)
                number += 1

    def find(self, name: str) -> Record | None:
        if not _NUMBER.fullmatch(name):
            return None
        number = offset = int(name)
        for block in self._array.blocks():  # skip whole blocks, without a record for each of their rows
            if offset < len(block):
                return self._record(number, block[offset])
            offset -= len(block)
        return None

    def _record(self, number: int, row: NDArray[np.uint8]) -> Record:
        label = None if self._array.labels is None else self._array.labels[number]
        return Record(str(number), row.nbytes, self._mtime_ns, label, row.view)  # view() returns the row without a copy
