"""Anchor graphs: Liu, Wang, Kumar and Chang, "Hashing with Graphs", ICML 2011.

A graph between all images is out of reach; a graph between images and a few hundred anchors, each image tied to the
nearest of them, is not, and its spectrum is that of a small matrix. Ours differs in three things. An image's tie to an
anchor fades to nothing where another anchor takes its place, so that nothing jumps and no bandwidth is to be chosen.
The spectrum is not cut off at a number of dimensions but damped, as a diffusion does it. And it is the anchors whose
coordinates have unit length, between which an image lies.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from hashret.heads.head import Exact, Head, blocks, projected_by
from hashret.heads.linear import centred, drawn, mean_of, rotated
from hashret.heads.products import Floats, product

TIED = 3  # anchors that an image is tied to
STEPS = 16  # of the diffusion
FAINT = 0.01  # a dimension that the diffusion damps to less than this is left out
ROUNDS = 10  # of Lloyd's algorithm


@dataclass(frozen=True, eq=False)
class Anchors:
    """Centres `places` (m, d) and the `reach` (), in squared distance, within which ties fade."""

    places: NDArray[Any]
    reach: NDArray[Any]

    def excess(self, values: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """For each of values (n, d), by how much its nearest anchors are nearer than the first to which it is not tied,
        in squared distance, and the rows of these anchors, both (n, tied), the nearest first."""
        distances = product(-2 * values, self._transposed)  # less |x|², which all anchors share
        distances += self._squares
        each, count = np.arange(len(values)), min(TIED + 1, len(self.places))
        nearest, rows = np.empty((len(values), count), values.dtype), np.empty((len(values), count), np.int64)
        for j in range(count):  # a few passes over the distances take less time than a partial sort
            rows[:, j] = distances.argmin(1)
            nearest[:, j] = distances[each, rows[:, j]]
            distances[each, rows[:, j]] = np.inf
        return nearest[:, -1:] - nearest[:, :-1], rows[:, :-1]

    def tied(self, values: Floats) -> tuple[Floats, NDArray[np.int64]]:
        """The ties of values (n, d) to their nearest anchors, and the rows of these, both (n, tied): each row of ties
        sums to 1, or to less where it is so near to a tie of all nearest anchors, as told by `reach`, that rounding
        would decide.

        They are continuous: the anchor that is about to lose its place to another one has a tie of 0.
        """
        weights, rows = self.excess(values)
        return weights / np.maximum(weights.sum(1, keepdims=True), self.reach), rows

    def ties(self, values: Floats) -> Floats:
        """The same to all anchors, (n, m)."""
        weights, rows = self.tied(values)
        ties = np.zeros((len(values), len(self.places)), values.dtype)
        np.put_along_axis(ties, rows, weights, 1)
        return ties

    def between(self, values: Floats, coordinates: Floats) -> Floats:
        """Where values (n, d) lie, (n, r), between the anchors that they are tied to, which have coordinates (m, r)."""
        weights, rows = self.tied(values)
        places: Floats = np.einsum("nt,ntr->nr", weights, coordinates[rows])
        return places

    def to(self, dtype: type[np.floating]) -> Self:
        return type(self)(self.places.astype(dtype), self.reach.astype(dtype))

    @cached_property
    def _transposed(self) -> Floats:
        return np.ascontiguousarray(self.places.T)

    @cached_property
    def _squares(self) -> Floats:
        squares: Floats = np.einsum("md,md->m", self.places, self.places)
        return squares


@dataclass(frozen=True, eq=False)
class AnchorGraph:
    """From where an image lies between its anchors to numbers, by the `coordinates` of the anchors, and besides, with
    `detail`, by the image itself; it is centred, and shortened by `length`, as by `Linear`."""

    mean: NDArray[Any]  # (d,)
    anchors: Anchors
    coordinates: NDArray[Any]  # (m, bits)
    length: NDArray[Any] | None = None  # ()
    detail: NDArray[Any] | None = None  # (d, bits)

    def project(self, values: Floats) -> Floats:
        values = centred(values, self.mean, self.length)
        numbers = self.anchors.between(values, self.coordinates)
        if self.detail is not None:
            numbers += product(values, self.detail)
        return numbers

    def tensors(self) -> dict[str, NDArray[Any]]:
        tensors = {"mean": self.mean, "anchors": self.anchors.places, "reach": self.anchors.reach}
        tensors["projection"] = self.coordinates
        return tensors | {k: v for k, v in (("length", self.length), ("detail", self.detail)) if v is not None}

    def to(self, dtype: type[np.floating]) -> Self:
        length, detail = (None if part is None else part.astype(dtype) for part in (self.length, self.detail))
        return type(self)(
            self.mean.astype(dtype), self.anchors.to(dtype), self.coordinates.astype(dtype), length, detail
        )


class Graph(NamedTuple):
    """The spectrum of an anchor graph, as fitted."""

    anchors: Anchors  # float32
    coordinates: Exact  # (m, r) of the anchors
    clear: float  # how clearly it falls into parts, from 0 to 1


def anchors_for(images: int, numbers: int) -> int:
    """How many anchors there are for so many images of so many numbers: one for ten images, at least 8, and at most
    1,000, or as many as hold 2²⁴ numbers."""
    return max(8, min(1000, images // 10, 2**24 // numbers))


def k_means(values: Floats, clusters: int, rng: np.random.Generator) -> Floats:
    """At most `clusters` distinct centres (m, d) by Lloyd's algorithm from randomly chosen values (n, d)."""
    centres = values[rng.permutation(len(values))[:clusters]]
    for _ in range(ROUNDS):
        sums, counts = np.zeros_like(centres), np.zeros(len(centres), np.int64)
        squares = np.einsum("md,md->m", centres, centres)
        for x in blocks(values):
            nearest = (squares - 2 * x @ centres.T).argmin(1)
            order = nearest.argsort(kind="stable")
            found, starts = np.unique(nearest[order], return_index=True)
            sums[found] += np.add.reduceat(x[order], starts, axis=0)
            counts += np.bincount(nearest, minlength=len(centres))
        centres = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None].astype(np.float32), centres)
    return np.unique(centres, axis=0)


def graph_coordinates(values: Floats, anchors: Anchors, most: int) -> tuple[Exact, float]:
    """Unit vectors (m, r) for the anchors, of at most `most` dimensions: those of the diffusion map (Coifman and Lafon
    2006) of the graph in which images are similar that are tied to the same anchors.

    Also how clearly the graph falls into parts, from 0 to 1: what is left of the dimension that fades most slowly,
    after as many steps from either side. Of numbers at random that is next to nothing, of digits two thirds.
    """
    m = len(anchors.places)
    degree, gram = np.zeros(m), np.zeros((m, m))
    for x in blocks(values):
        z = anchors.ties(x)
        degree += z.sum(0)
        gram += z.T @ z
    root = np.maximum(np.sqrt(degree), 1e-6)
    trivial = root / np.linalg.norm(root)  # the coordinate that all images share, with eigenvalue 1
    eigenvalues, vectors = np.linalg.eigh(gram / np.outer(root, root) - np.outer(trivial, trivial))
    eigenvalues, vectors = eigenvalues[::-1].clip(0, 1), vectors[:, ::-1]
    damping = eigenvalues**STEPS
    r = min(max(2, int((damping > FAINT * damping[0]).sum())), most)
    coordinates = vectors[:, :r] / root[:, None] * (damping / np.maximum(np.sqrt(eigenvalues), 1e-6))[:r]
    unit = coordinates / np.maximum(np.linalg.norm(coordinates, axis=1, keepdims=True), 1e-12)
    return unit, float(damping[0] ** 2)


def fitted_graph(values: Floats, most: int, sample: Floats, rng: np.random.Generator) -> Graph:
    """The graph of values (n, d), with at most `most` coordinates; its anchors are fitted to a sample of them."""
    places = k_means(sample, anchors_for(*values.shape), rng)
    excess, _ = Anchors(places, np.float32(0)).excess(sample)  # type: ignore[arg-type]
    anchors = Anchors(places, np.array(max(float(excess.sum(1).mean()) / 4, 1e-6), np.float32))
    return Graph(anchors, *graph_coordinates(values, anchors, most))


def lifted_rotation(values: Floats, bits: int, rng: np.random.Generator, start: Floats | None = None) -> Floats:
    """A matrix (r, bits) with orthonormal rows that brings values (n, r) near to their signs: `start` or a random one,
    rotated."""
    if start is None:
        start = np.linalg.qr(rng.normal(size=(bits, values.shape[1])))[0].T.astype(np.float32)
    return rotated(values, start)


def anchor_graph(values: Floats, bits: int, seed: int) -> Head:
    """Signs of the rotated coordinates in a graph between the images and their anchors (Liu, Wang, Kumar and Chang
    2011)."""
    rng = np.random.default_rng(seed)
    mean = mean_of(values)
    x = centred(values, mean.astype(np.float32))
    sample = drawn(x, bits, rng)
    graph = fitted_graph(x, bits, sample, rng)
    coordinates = graph.coordinates.astype(np.float32)
    numbers = np.concatenate([graph.anchors.between(rows, coordinates) for rows in blocks(sample)])
    rotation = lifted_rotation(numbers, bits, rng).astype(np.float64)
    return projected_by(AnchorGraph(mean, graph.anchors.to(np.float64), graph.coordinates @ rotation), values)
