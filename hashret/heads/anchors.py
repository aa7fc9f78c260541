"""Anchor graphs: Liu, Wang, Kumar and Chang, "Hashing with Graphs", ICML 2011.

A graph between all images is out of reach; a graph between images and a few hundred anchors, each image tied to the
nearest of them, is not, and its spectrum is that of a small matrix. Ours differs in three things. An image's tie to an
anchor fades to nothing where another anchor takes its place, so that nothing jumps and no bandwidth is to be chosen.
The spectrum is not cut off at a number of dimensions but damped, as a diffusion does it. And it is the anchors whose
coordinates have unit length, between which an image lies.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

TIED = 3  # anchors that an image is tied to
STEPS = 16  # of the diffusion
FAINT = 0.01  # a dimension that the diffusion damps to less than this is left out


def blocks(values: Tensor) -> Iterator[Tensor]:
    """The rows of `values`, some thousands at a time, for what takes far more memory than they do."""
    return (values[start : start + 4096] for start in range(0, len(values), 4096))


def anchors_for(images: int, numbers: int) -> int:
    """How many anchors there are for so many images of so many numbers: one for ten images, at least 8, and at most
    1,000, or as many as hold 2²⁴ numbers."""
    return max(8, min(1000, images // 10, 2**24 // numbers))


def k_means(values: Tensor, clusters: int, generator: torch.Generator, rounds: int = 10) -> Tensor:
    """At most `clusters` distinct centres (m, d), float32, by Lloyd's algorithm from randomly chosen values (n, d)."""
    centres = values[torch.randperm(len(values), generator=generator)[:clusters]]
    for _ in range(rounds):
        nearest = torch.cat([(centres.square().sum(1) - 2 * x @ centres.T).argmin(1) for x in blocks(values)])
        counts = nearest.bincount(minlength=len(centres))[:, None]
        sums = torch.zeros_like(centres).index_add_(0, nearest, values)
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    distinct: Tensor = torch.unique(centres, dim=0)
    return distinct


def excess(values: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """For each of values (n, d), by how much its nearest anchors are nearer than the first to which it is not tied, in
    squared distance, and the rows of these anchors, both (n, tied), the nearest first."""
    distances = torch.addmm(anchors.square().sum(1), values, anchors.T, alpha=-2)  # less |x|², which all anchors share
    nearest, rows = distances.topk(min(TIED + 1, len(anchors)), dim=1, largest=False)
    return nearest[:, -1:] - nearest[:, :-1], rows[:, :-1]


def tied(values: Tensor, anchors: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """The ties of values (n, d) to their nearest anchors, and the rows of these, both (n, tied): each row of ties sums
    to 1, or to less where it is so near to a tie of all nearest anchors, as told by `reach`, that rounding would
    decide.

    They are continuous: the anchor that is about to lose its place to another one has a tie of 0.
    """
    weights, rows = excess(values, anchors)
    return weights / torch.maximum(weights.sum(1, keepdim=True), reach), rows


def ties(values: Tensor, anchors: Tensor, reach: Tensor) -> Tensor:
    """The same to all anchors, (n, m)."""
    weights, rows = tied(values, anchors, reach)
    return values.new_zeros(len(values), len(anchors)).scatter_(1, rows, weights)


def placed(values: Tensor, anchors: Tensor, reach: Tensor, coordinates: Tensor) -> Tensor:
    """Where values (n, d) lie, (n, r), between the anchors that they are tied to, which have coordinates (m, r)."""
    weights, rows = tied(values, anchors, reach)
    if not rows.shape[1]:  # of a single anchor, which gives its place to no other
        return values.new_zeros(len(values), coordinates.shape[1])
    return F.embedding_bag(rows, coordinates, per_sample_weights=weights, mode="sum")


def graph_coordinates(values: Tensor, anchors: Tensor, reach: Tensor, most: int) -> tuple[Tensor, float]:
    """Unit vectors (m, r), float64, for the anchors, of at most `most` dimensions: those of the diffusion map (Coifman
    and Lafon 2006) of the graph in which images are similar that are tied to the same anchors.

    Also how clearly the graph falls into parts, from 0 to 1: what is left of the dimension that fades most slowly,
    after as many steps from either side. Of numbers at random that is next to nothing, of digits two thirds.
    """
    degree, gram = torch.zeros(len(anchors)).double(), torch.zeros(len(anchors), len(anchors)).double()
    for x in blocks(values):
        z = ties(x, anchors, reach)
        degree += z.sum(0)
        gram += z.T @ z
    root = degree.sqrt().clamp(min=1e-6)
    trivial = root / root.norm()  # the coordinate that all images share, with eigenvalue 1
    eigenvalues, vectors = torch.linalg.eigh(gram / torch.outer(root, root) - torch.outer(trivial, trivial))
    eigenvalues, vectors = eigenvalues.flip(0).clamp(0, 1), vectors.flip(1)
    damping = eigenvalues**STEPS
    r = min(max(2, int((damping > FAINT * damping[0]).sum())), most)
    coordinates = vectors[:, :r] / root[:, None] * (damping / eigenvalues.sqrt().clamp(min=1e-6))[:r]
    unit: Tensor = coordinates / coordinates.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return unit, float(damping[0] ** 2)


def lifted_rotation(values: Tensor, bits: int, generator: torch.Generator, start: Tensor | None = None) -> Tensor:
    """A matrix (r, bits) with orthonormal rows that brings values (n, r) near to their signs: `start` or a random one,
    then 50 alternations of iterative quantisation (Gong and Lazebnik 2011), whose rotations it takes in."""
    lift = start
    if lift is None:
        lift = torch.linalg.qr(torch.randn(bits, values.shape[1], generator=generator)).Q.T
    for _ in range(50):
        u, _, vh = torch.linalg.svd(values.T @ (values @ lift).sign(), full_matrices=False)
        lift = u @ vh
    return lift
