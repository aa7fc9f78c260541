"""What all heads share: projections with a threshold for each bit, and how thresholds are fitted.

The heads that do not project, `sign` and `median`, are here too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from hashret.heads.products import Floats

Exact = NDArray[np.float64]


class Projection(Protocol):
    """From outputs (n, d) to one number for each bit, (n, bits), in the precision of its tensors."""

    def project(self, values: Floats) -> Floats:
        """All the work is the calling thread's."""
        ...

    def tensors(self) -> dict[str, NDArray[Any]]:
        """By the names that a stored model has them under."""
        ...

    def to(self, dtype: type[np.floating]) -> Self:
        """The same projection in another precision."""
        ...


@dataclass(frozen=True, eq=False)
class Head:
    """A fitted head: bit j is 1 where the j-th projected number lies above `threshold` j. Tensors are float64."""

    threshold: NDArray[Any]  # (bits,)
    scale: NDArray[Any]  # (bits,), the standard deviation of the training values: the unit of a margin
    projection: Projection | None = None  # None where the outputs themselves are compared

    def project(self, values: Floats) -> Floats:
        """From a member's outputs (n, d) the numbers (n, bits) that are compared with the thresholds, in the outputs'
        precision."""
        if self.projection is None:
            return values
        projection = self.projection if values.dtype == np.float64 else self._single.projection
        assert projection is not None
        return projection.project(values)

    def margins(self, values: Floats) -> Floats:
        """How far each bit is from flipping, (n, bits), in training standard deviations; positive for a 1. The result
        has the precision of the outputs (n, d). The calling thread does all the work."""
        head = self if values.dtype == np.float64 else self._single
        margins: Floats = (self.project(values) - head.threshold) / head.scale
        return margins

    def stabilised(self, error: Floats, doubt: float) -> "Head":
        """The same head for a computer whose margins are wrong by up to `error` (bits): with wider units where it is
        more than a tenth of `doubt`, and a constant 0 where a bit would say little but how its numbers were rounded."""
        scale = self.scale * np.maximum(10 * error / doubt, 1)
        return replace(self, threshold=self.threshold + np.where(error > 0.01, scale, 0.0), scale=scale)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """By the names that a stored model has them under."""
        return {"threshold": self.threshold, "scale": self.scale} | (
            {} if self.projection is None else self.projection.tensors()
        )

    @cached_property
    def _single(self) -> "Head":
        """The same head in float32."""
        projection = None if self.projection is None else self.projection.to(np.float32)
        return Head(self.threshold.astype(np.float32), self.scale.astype(np.float32), projection)


def with_thresholds(projected: Floats, choose: Callable[[Floats, NDArray[np.int64]], int]) -> Head:
    """A head of which only the projection is missing: for each column of `projected` (n, bits), the threshold is the
    midpoint of the gap below the distinct value that `choose(values, counts)` names."""
    threshold = np.array([_gap(column, choose) for column in projected.T], np.float64)
    scale = projected.std(axis=0, dtype=np.float64)
    scale[scale == 0] = 1
    return Head(threshold, scale)


def projected_by(projection: Projection, values: Floats, around: Exact | None = None) -> Head:
    """The head that projects by `projection`, with thresholds about zero, or about `around` (bits), fitted to values
    (n, d)."""
    single = projection.to(np.float32)
    numbers: Floats = np.concatenate([single.project(rows) for rows in blocks(values)])
    if around is None:
        return replace(with_thresholds(numbers, at_zero), projection=projection)
    head = with_thresholds(numbers - around.astype(np.float32), at_zero)
    return replace(head, threshold=head.threshold + around, projection=projection)


def blocks(values: Floats) -> list[Floats]:
    """The rows of `values`, some thousands at a time, for what takes far more memory than they do."""
    return [values[start : start + 4096] for start in range(0, len(values), 4096)]


def at_zero(values: Floats, counts: NDArray[np.int64]) -> int:
    """Of the distinct values, the first above zero."""
    return int(np.searchsorted(values, 0.0, side="right"))


def _at_median(values: Floats, counts: NDArray[np.int64]) -> int:
    below = counts.cumsum()
    return int(np.abs(below - below[-1] / 2).argmin()) + 1


def _gap(column: Floats, choose: Callable[[Floats, NDArray[np.int64]], int]) -> float:
    values, counts = np.unique(column, return_counts=True)
    if len(values) == 1:
        return float(values[0]) + 1  # a constant unit: its bit is 0, and stays 0 under rounding
    i = min(max(choose(values, counts), 1), len(values) - 1)
    return (float(values[i - 1]) + float(values[i])) / 2


def sign(values: Floats, bits: int, seed: int) -> Head:
    """Positive or not."""
    return with_thresholds(values, at_zero)


def median(values: Floats, bits: int, seed: int) -> Head:
    """Above the training median or not, so that every bit is balanced."""
    return with_thresholds(values, _at_median)
