"""Anchor graphs: Liu, Wang, Kumar and Chang, "Hashing with Graphs", ICML 2011.

A similarity graph of all images is too large. An anchor graph connects each image to the nearest of a few hundred
anchors only, and its spectrum is that of a small matrix. Ours differs in three ways. An image's weight for an anchor
falls to 0 where another anchor takes its place among the nearest, so that weights are continuous and no kernel
bandwidth has to be chosen. The spectrum is damped, as in a diffusion, instead of cut off at a number of dimensions. And
the coordinates of the anchors, not those of the images, have unit norm; an image is embedded between its anchors.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hashret.heads.head import Exact, Head, blocks, threshold_projection
from hashret.heads.linear import centre, itq_rotation, mean_of, subsample
from hashret.heads.products import Floats, product

NEAREST_ANCHORS = 3  # with a weight above 0, per image
DIFFUSION_STEPS = 16
MIN_DAMPING = 0.01  # dimensions that the diffusion damps to less than this share of the first are left out
LLOYD_ITERATIONS = 10


@dataclass(frozen=True, eq=False)
class Anchors:
    """Anchors at `centres` (m, d), and the smallest total of an image's gaps, `min_gap` (), whose weights sum to 1."""

    centres: NDArray[Any]
    min_gap: NDArray[Any]

    def gaps(self, values: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Return the gaps of values (n, d) and the rows of their k nearest anchors, both (n, k), nearest first.

        A gap is by how much nearer, in squared distance, an anchor is than the (k + 1)-th nearest.
        """
        distances = product(-2 * values, self._transposed)  # less |x|², which is the same for all anchors
        distances += self._squared_norms
        images, count = np.arange(len(values)), min(NEAREST_ANCHORS + 1, len(self.centres))
        nearest, rows = np.empty((len(values), count), values.dtype), np.empty((len(values), count), np.int64)
        for j in range(count):  # a few passes over the distances are faster than a partial sort
            rows[:, j] = distances.argmin(1)
            nearest[:, j] = distances[images, rows[:, j]]
            distances[images, rows[:, j]] = np.inf
        return nearest[:, -1:] - nearest[:, :-1], rows[:, :-1]

    def nearest_weights(self, values: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """Return the weights of values (n, d) for their nearest anchors, and the rows of these, both (n, k).

        The weights of an image are proportional to its gaps and sum to 1, or to less if its gaps total less than
        `min_gap`: rounding errors would decide between anchors that are about equally near. They are continuous: the
        weight of an anchor approaches 0 as it ceases to be among the nearest.
        """
        gaps, rows = self.gaps(values)
        return gaps / np.maximum(gaps.sum(1, keepdims=True), self.min_gap), rows

    def weights(self, values: Floats) -> Floats:
        """Return the weights of values (n, d) for all anchors: the matrix Z of the paper, (n, m)."""
        weights, rows = self.nearest_weights(values)
        z = np.zeros((len(values), len(self.centres)), values.dtype)
        np.put_along_axis(z, rows, weights, 1)
        return z

    def embed(self, values: Floats, coordinates: Floats) -> Floats:
        """Return the weighted means (n, r), over the anchors of values (n, d), of the anchors' coordinates (m, r)."""
        weights, rows = self.nearest_weights(values)
        embedding: Floats = np.einsum("nt,ntr->nr", weights, coordinates[rows])
        return embedding

    def to(self, dtype: type[np.floating]) -> Self:
        return type(self)(self.centres.astype(dtype), self.min_gap.astype(dtype))

    @cached_property
    def _transposed(self) -> Floats:
        return np.ascontiguousarray(self.centres.T)

    @cached_property
    def _squared_norms(self) -> Floats:
        squares: Floats = np.einsum("md,md->m", self.centres, self.centres)
        return squares


@dataclass(frozen=True, eq=False)
class AnchorGraph:
    """The projection of an image, centred and normalised as by `Linear`, to the weighted mean of its anchors'
    `coordinates`; with `detail`, a linear projection is added."""

    mean: NDArray[Any]  # (d,)
    anchors: Anchors
    coordinates: NDArray[Any]  # (m, bits)
    min_norm: NDArray[Any] | None = None  # ()
    detail: NDArray[Any] | None = None  # (d, bits)

    def project(self, values: Floats) -> Floats:
        values = centre(values, self.mean, self.min_norm)
        projected = self.anchors.embed(values, self.coordinates)
        if self.detail is not None:
            projected += product(values, self.detail)
        return projected

    def tensors(self) -> dict[str, NDArray[Any]]:
        tensors = {"mean": self.mean, "anchors": self.anchors.centres, "reach": self.anchors.min_gap}
        tensors["projection"] = self.coordinates
        optional = (("length", self.min_norm), ("detail", self.detail))
        return tensors | {name: tensor for name, tensor in optional if tensor is not None}

    def to(self, dtype: type[np.floating]) -> Self:
        min_norm, detail = (None if part is None else part.astype(dtype) for part in (self.min_norm, self.detail))
        return type(self)(
            self.mean.astype(dtype), self.anchors.to(dtype), self.coordinates.astype(dtype), min_norm, detail
        )


class Graph(NamedTuple):
    """The embedding of a fitted anchor graph."""

    anchors: Anchors  # float32
    coordinates: Exact  # (m, r) of the anchors
    separability: float  # of the graph into clusters, from 0 to 1


def anchor_count(images: int, dim: int) -> int:
    """Return the number of anchors for images of `dim` numbers: one per ten images, at least 8 and at most 1,000, or as
    many as hold 2²⁴ numbers."""
    return max(8, min(1000, images // 10, 2**24 // dim))


def k_means(values: Floats, clusters: int, rng: np.random.Generator) -> Floats:
    """Return at most `clusters` distinct centres (m, d) by Lloyd's algorithm from randomly chosen values (n, d)."""
    centres = values[rng.permutation(len(values))[:clusters]]
    for _ in range(LLOYD_ITERATIONS):
        sums, counts = np.zeros_like(centres), np.zeros(len(centres), np.int64)
        squares = np.einsum("md,md->m", centres, centres)
        for x in blocks(values):
            nearest = (squares - 2 * x @ centres.T).argmin(1)
            order = nearest.argsort(kind="stable")
            used, starts = np.unique(nearest[order], return_index=True)
            sums[used] += np.add.reduceat(x[order], starts, axis=0)
            counts += np.bincount(nearest, minlength=len(centres))
        centres = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None].astype(np.float32), centres)
    return np.unique(centres, axis=0)


def graph_coordinates(values: Floats, anchors: Anchors, max_dim: int) -> tuple[Exact, float]:
    """Return unit vectors (m, r), r ≤ `max_dim`, for the anchors, and the separability of the graph into clusters.

    The vectors are the diffusion map (Coifman and Lafon 2006) of the graph in which two images are similar if they
    share anchors. The separability, from 0 to 1, is λ^(2 · `DIFFUSION_STEPS`) for the largest nontrivial eigenvalue λ:
    near 0 for random numbers, about two thirds for digits.
    """
    m = len(anchors.centres)
    degree, gram = np.zeros(m), np.zeros((m, m))
    for x in blocks(values):
        z = anchors.weights(x)
        degree += z.sum(0)
        gram += z.T @ z
    root = np.maximum(np.sqrt(degree), 1e-6)
    trivial = root / np.linalg.norm(root)  # the eigenvector with eigenvalue 1, equal for all images
    eigenvalues, vectors = np.linalg.eigh(gram / np.outer(root, root) - np.outer(trivial, trivial))
    eigenvalues, vectors = eigenvalues[::-1].clip(0, 1), vectors[:, ::-1]
    damping = eigenvalues**DIFFUSION_STEPS
    r = min(max(2, int((damping > MIN_DAMPING * damping[0]).sum())), max_dim)
    coordinates = vectors[:, :r] / root[:, None] * (damping / np.maximum(np.sqrt(eigenvalues), 1e-6))[:r]
    unit = coordinates / np.maximum(np.linalg.norm(coordinates, axis=1, keepdims=True), 1e-12)
    return unit, float(damping[0] ** 2)


def fit_graph(values: Floats, max_dim: int, sample: Floats, rng: np.random.Generator) -> Graph:
    """Fit an anchor graph with at most `max_dim` coordinates to values (n, d), and its anchors to a sample of them."""
    centres = k_means(sample, anchor_count(*values.shape), rng)
    gaps, _ = Anchors(centres, np.float32(0)).gaps(sample)  # type: ignore[arg-type]
    anchors = Anchors(centres, np.array(max(float(gaps.sum(1).mean()) / 4, 1e-6), np.float32))
    return Graph(anchors, *graph_coordinates(values, anchors, max_dim))


def orthogonal_projection(values: Floats, bits: int, rng: np.random.Generator, start: Floats | None = None) -> Floats:
    """Return the matrix (r, bits) with orthonormal rows that brings values (n, r) near to their signs, by iterative
    quantisation from `start`, or from a random matrix."""
    if start is None:
        start = np.linalg.qr(rng.normal(size=(bits, values.shape[1])))[0].T.astype(np.float32)
    return itq_rotation(values, start)


def anchor_graph(values: Floats, bits: int, seed: int) -> Head:
    """Fit a head of rotated coordinates in an anchor graph (Liu, Wang, Kumar and Chang 2011)."""
    rng = np.random.default_rng(seed)
    mean = mean_of(values)
    x = centre(values, mean.astype(np.float32))
    sample = subsample(x, bits, rng)
    graph = fit_graph(x, bits, sample, rng)
    coordinates = graph.coordinates.astype(np.float32)
    embedding = np.concatenate([graph.anchors.embed(rows, coordinates) for rows in blocks(sample)])
    rotation = orthogonal_projection(embedding, bits, rng).astype(np.float64)
    return threshold_projection(AnchorGraph(mean, graph.anchors.to(np.float64), graph.coordinates @ rotation), values)
