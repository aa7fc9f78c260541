"""Heads with a linear projection: random projections, principal components, and rotated principal components."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hashret.heads.head import Exact, Head, threshold_projection
from hashret.heads.products import Floats, product

MAX_COVARIANCE_DIM = 4096  # beyond it, principal components come from a randomised decomposition
ITQ_ITERATIONS = 50


@dataclass(frozen=True, eq=False)
class Linear:
    """The projection x ↦ (x − `mean`) @ `matrix`. With `min_norm`, the centred x is first divided by its norm, or by
    `min_norm` if that is larger."""

    mean: NDArray[Any]  # (d,)
    matrix: NDArray[Any]  # (d, bits)
    min_norm: NDArray[Any] | None = None  # ()

    def project(self, values: Floats) -> Floats:
        return product(centre(values, self.mean, self.min_norm), self.matrix)

    def tensors(self) -> dict[str, NDArray[Any]]:
        tensors = {"mean": self.mean, "projection": self.matrix}
        return tensors if self.min_norm is None else tensors | {"length": self.min_norm}

    def to(self, dtype: type[np.floating]) -> Self:
        min_norm = None if self.min_norm is None else self.min_norm.astype(dtype)
        return type(self)(self.mean.astype(dtype), self.matrix.astype(dtype), min_norm)


def centre(values: Floats, mean: Floats, min_norm: Floats | None = None) -> Floats:
    """Return values (n, d) minus their mean (d,); with `min_norm`, divided by the larger of it and their norms."""
    values = values - mean
    if min_norm is not None:
        values /= np.maximum(row_norms(values), min_norm)
    return values


def row_norms(values: Floats) -> Floats:
    """Return the Euclidean norms of the rows of values (n, d), (n, 1)."""
    norms: Floats = np.sqrt(np.einsum("nd,nd->n", values, values))[:, None]
    return norms


def mean_of(values: Floats) -> Exact:
    """Return the mean (d,) of values (n, d) in float64."""
    mean: Exact = values.mean(axis=0, dtype=np.float64)
    return mean


def lsh(values: Floats, bits: int, seed: int) -> Head:
    """Fit a head of random projections of the centred values (Charikar 2002)."""
    matrix = np.random.default_rng(seed).normal(size=(values.shape[1], bits))
    return threshold_projection(Linear(mean_of(values), matrix / np.linalg.norm(matrix, axis=0)), values)


def pca(values: Floats, bits: int, seed: int) -> Head:
    """Fit a head of the leading principal components (Wang, Kumar and Chang 2010)."""
    return threshold_projection(Linear(*principal_components(values, bits, seed)), values)


def itq(values: Floats, bits: int, seed: int) -> Head:
    """Fit a head by iterative quantisation (Gong and Lazebnik 2011): the rotation of the leading principal components
    that brings them nearest to their signs, by 50 iterations on at most max(20,000, 20 · bits) of the images."""
    mean, directions = principal_components(values, bits, seed)
    rng = np.random.default_rng(seed)
    components = (subsample(values, bits, rng) - mean.astype(np.float32)) @ directions.astype(np.float32)
    rotation = itq_rotation(components, np.linalg.qr(rng.normal(size=(bits, bits)))[0].astype(np.float32))
    return threshold_projection(Linear(mean, directions @ rotation.astype(np.float64)), values)


def subsample(values: Floats, bits: int, rng: np.random.Generator) -> Floats:
    """Return at most max(20,000, 20 · bits) of the values (n, d), in random order, to fit a rotation to."""
    return values[rng.permutation(len(values))[: max(20_000, 20 * bits)]]


def itq_rotation(values: Floats, start: Floats) -> Floats:
    """Return the matrix (r, bits) with orthonormal rows that brings values (n, r) near to their signs, by iterative
    quantisation (Gong and Lazebnik 2011) from `start`."""
    matrix = start
    for _ in range(ITQ_ITERATIONS):
        u, _, vh = np.linalg.svd(values.T @ np.sign(values @ matrix), full_matrices=False)
        matrix = u @ vh
    return matrix


def principal_components(values: Floats, count: int, seed: int) -> tuple[Exact, Exact]:
    """Return the mean (d,) and the leading principal directions (d, count) of values (n, d)."""
    n, d = values.shape
    mean = mean_of(values)
    x = values - mean.astype(np.float32)
    if d <= MAX_COVARIANCE_DIM:
        return mean, np.ascontiguousarray(np.linalg.eigh((x.T @ x).astype(np.float64))[1][:, ::-1][:, :count])
    # A randomised decomposition (Halko, Martinsson and Tropp 2011) in place of a large covariance matrix.
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(x @ rng.normal(size=(d, min(count + 16, n, d))).astype(np.float32))[0]
    for _ in range(4):
        basis = np.linalg.qr(x @ np.linalg.qr(x.T @ basis)[0])[0]
    return mean, np.ascontiguousarray(np.linalg.svd(basis.T @ x, full_matrices=False)[2][:count].T.astype(np.float64))
