"""Heads that project linearly: random projections, principal components, and these rotated."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from hashret.heads.head import Exact, Head, projected_by
from hashret.heads.products import Floats, product

WIDEST = 4096  # numbers of which the covariance matrix is taken
ROTATIONS = 50  # alternations of iterative quantisation


@dataclass(frozen=True, eq=False)
class Linear:
    """x ↦ (x − `mean`) @ `matrix`; with `length`, what is centred first gets unit length, or less if it is shorter
    than `length`."""

    mean: NDArray[Any]  # (d,)
    matrix: NDArray[Any]  # (d, bits)
    length: NDArray[Any] | None = None  # ()

    def project(self, values: Floats) -> Floats:
        return product(centred(values, self.mean, self.length), self.matrix)

    def tensors(self) -> dict[str, NDArray[Any]]:
        tensors = {"mean": self.mean, "projection": self.matrix}
        return tensors if self.length is None else tensors | {"length": self.length}

    def to(self, dtype: type[np.floating]) -> Self:
        length = None if self.length is None else self.length.astype(dtype)
        return type(self)(self.mean.astype(dtype), self.matrix.astype(dtype), length)


def centred(values: Floats, mean: Floats, length: Floats | None = None) -> Floats:
    """Floats (n, d) less their mean (d,), over their lengths where these are more than `length`, and over that
    otherwise."""
    values = values - mean
    if length is not None:
        values /= np.maximum(lengths_of(values), length)
    return values


def lengths_of(values: Floats) -> Floats:
    """The Euclidean lengths of the rows of values (n, d), (n, 1)."""
    lengths: Floats = np.sqrt(np.einsum("nd,nd->n", values, values))[:, None]
    return lengths


def mean_of(values: Floats) -> Exact:
    """The mean (d,) of values (n, d)."""
    mean: Exact = values.mean(axis=0, dtype=np.float64)
    return mean


def lsh(values: Floats, bits: int, seed: int) -> Head:
    """Signs of random projections (Charikar 2002) of the centred values."""
    matrix = np.random.default_rng(seed).normal(size=(values.shape[1], bits))
    return projected_by(Linear(mean_of(values), matrix / np.linalg.norm(matrix, axis=0)), values)


def pca(values: Floats, bits: int, seed: int) -> Head:
    """Signs of the leading principal components (Wang, Kumar and Chang 2010)."""
    return projected_by(Linear(*principal_components(values, bits, seed)), values)


def itq(values: Floats, bits: int, seed: int) -> Head:
    """Iterative quantisation (Gong and Lazebnik 2011): the rotation of the leading principal components that brings
    them nearest to their signs, by 50 alternations on at most max(20,000, 20 · bits) of the images."""
    mean, directions = principal_components(values, bits, seed)
    rng = np.random.default_rng(seed)
    components = (drawn(values, bits, rng) - mean.astype(np.float32)) @ directions.astype(np.float32)
    rotation = rotated(components, np.linalg.qr(rng.normal(size=(bits, bits)))[0].astype(np.float32))
    return projected_by(Linear(mean, directions @ rotation.astype(np.float64)), values)


def drawn(values: Floats, bits: int, rng: np.random.Generator) -> Floats:
    """The values that a rotation is fitted to: at most max(20,000, 20 · bits) of them, in random order."""
    return values[rng.permutation(len(values))[: max(20_000, 20 * bits)]]


def rotated(values: Floats, start: Floats) -> Floats:
    """The matrix (r, bits) with orthonormal rows that brings values (n, r) near to their signs, by alternations of
    iterative quantisation (Gong and Lazebnik 2011) that begin with `start`."""
    matrix = start
    for _ in range(ROTATIONS):
        u, _, vh = np.linalg.svd(values.T @ np.sign(values @ matrix), full_matrices=False)
        matrix = u @ vh
    return matrix


def principal_components(values: Floats, count: int, seed: int) -> tuple[Exact, Exact]:
    """The mean (d,) and the leading principal directions (d, count) of values (n, d)."""
    n, d = values.shape
    mean = mean_of(values)
    x = values - mean.astype(np.float32)
    if d <= WIDEST:
        return mean, np.ascontiguousarray(np.linalg.eigh((x.T @ x).astype(np.float64))[1][:, ::-1][:, :count])
    # Too wide for a covariance matrix: a randomised decomposition (Halko, Martinsson and Tropp 2011).
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(x @ rng.normal(size=(d, min(count + 16, n, d))).astype(np.float32))[0]
    for _ in range(4):
        basis = np.linalg.qr(x @ np.linalg.qr(x.T @ basis)[0])[0]
    return mean, np.ascontiguousarray(np.linalg.svd(basis.T @ x, full_matrices=False)[2][:count].T.astype(np.float64))
