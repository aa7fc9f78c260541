"""A fitted head: a projection with a threshold for each bit, and how thresholds are fitted.

The heads without a projection, `sign` and `median`, are here too.
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
    """A map from outputs (n, d) to one number per bit, (n, bits), in the precision of its tensors."""

    def project(self, values: Floats) -> Floats:
        """Return the projection of values (n, d), (n, bits). Only the calling thread works."""
        ...

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the tensors by their names in a stored model."""
        ...

    def to(self, dtype: type[np.floating]) -> Self:
        """Return the same projection in another precision."""
        ...


@dataclass(frozen=True, eq=False)
class Head:
    """A fitted head: bit j is 1 if projected number j lies above `threshold` j. Tensors are float64."""

    threshold: NDArray[Any]  # (bits,)
    scale: NDArray[Any]  # (bits,), the standard deviation of the training values: the unit of margins
    projection: Projection | None = None  # None if the outputs themselves are thresholded

    def project(self, values: Floats) -> Floats:
        """Return the numbers (n, bits) that the thresholds apply to, for outputs (n, d), in their precision."""
        if self.projection is None:
            return values
        projection = self.projection if values.dtype == np.float64 else self._single.projection
        assert projection is not None
        return projection.project(values)

    def margins(self, values: Floats) -> Floats:
        """Return the signed distances (n, bits) of outputs (n, d) from the thresholds in training standard deviations,
        positive for a 1, in the precision of the outputs. Only the calling thread works."""
        head = self if values.dtype == np.float64 else self._single
        margins: Floats = (self.project(values) - head.threshold) / head.scale
        return margins

    def stabilised(self, error: Floats, ambiguous_margin: float) -> "Head":
        """Return the head for margins that are computed with errors of up to `error` (bits).

        Bits whose error exceeds a tenth of `ambiguous_margin` get a larger scale, so that it does not. Bits whose error
        exceeds 0.01 would mostly encode rounding errors, and become constantly 0.
        """
        scale = self.scale * np.maximum(10 * error / ambiguous_margin, 1)
        return replace(self, threshold=self.threshold + np.where(error > 0.01, scale, 0.0), scale=scale)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the tensors by their names in a stored model."""
        return {"threshold": self.threshold, "scale": self.scale} | (
            {} if self.projection is None else self.projection.tensors()
        )

    @cached_property
    def _single(self) -> "Head":
        """The same head in float32."""
        projection = None if self.projection is None else self.projection.to(np.float32)
        return Head(self.threshold.astype(np.float32), self.scale.astype(np.float32), projection)


def fit_thresholds(projected: Floats, choose: Callable[[Floats, NDArray[np.int64]], int]) -> Head:
    """Return a head without a projection for projected values (n, bits).

    `choose(values, counts)` returns, for the sorted distinct values of a column, the index of the first above the
    threshold, which is the midpoint between it and the one before.
    """
    threshold = np.array([_midpoint(column, choose) for column in projected.T], np.float64)
    scale = projected.std(axis=0, dtype=np.float64)
    scale[scale == 0] = 1
    return Head(threshold, scale)


def threshold_projection(projection: Projection, values: Floats, offset: Exact | None = None) -> Head:
    """Return the head with this projection and thresholds near zero, or near `offset` (bits), for values (n, d)."""
    single = projection.to(np.float32)
    projected: Floats = np.concatenate([single.project(rows) for rows in blocks(values)])
    if offset is None:
        return replace(fit_thresholds(projected, at_zero), projection=projection)
    head = fit_thresholds(projected - offset.astype(np.float32), at_zero)
    return replace(head, threshold=head.threshold + offset, projection=projection)


def blocks(values: Floats) -> list[Floats]:
    """Return the rows of `values` in blocks, for computations that take far more memory than the rows do."""
    return [values[start : start + 4096] for start in range(0, len(values), 4096)]


def at_zero(values: Floats, counts: NDArray[np.int64]) -> int:
    """Return the index of the first of the sorted distinct values above zero."""
    return int(np.searchsorted(values, 0.0, side="right"))


def _at_median(values: Floats, counts: NDArray[np.int64]) -> int:
    below = counts.cumsum()
    return int(np.abs(below - below[-1] / 2).argmin()) + 1


def _midpoint(column: Floats, choose: Callable[[Floats, NDArray[np.int64]], int]) -> float:
    values, counts = np.unique(column, return_counts=True)
    if len(values) == 1:
        return float(values[0]) + 1  # a constant unit: its bit is 0, and stays 0 under rounding errors
    i = min(max(choose(values, counts), 1), len(values) - 1)
    return (float(values[i - 1]) + float(values[i])) / 2


def sign(values: Floats, bits: int, seed: int) -> Head:
    """Fit thresholds near zero."""
    return fit_thresholds(values, at_zero)


def median(values: Floats, bits: int, seed: int) -> Head:
    """Fit thresholds near the training medians, so that every bit is balanced."""
    return fit_thresholds(values, _at_median)
