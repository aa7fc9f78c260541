"""Heads by name: how real numbers become bits.

Every head is a linear map and a threshold per bit: bit j of a code is 1 where `(x − mean) @ projection` lies above
threshold j; the heads of an anchor graph project an image's ties to the anchors, instead of the image or besides. The
heads differ in how they are fitted. A threshold lies midway between two neighbouring training values, never on one, so
that no training image's bit hangs on a rounding error.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hashret.errors import HashretError, choose
from hashret.heads.anchors import anchors_for, blocks, excess, graph_coordinates, k_means, lifted_rotation, placed

Values = NDArray[np.float32]

CLEAR = 0.075  # the least that says of a graph that there are kinds of images (see `anchor_itq`)
COUNTED = 0.3  # the least that the coordinates in such a graph count for


@dataclass(frozen=True)
class Head:
    """`threshold` and `scale` (bits), with `mean` (d) and `projection` (d, bits), or neither for d = bits; for an
    anchor graph besides `anchors` (m, d) and `reach` (), and `projection` (m, bits). Where what is centred has unit
    length, or less if it is shorter than `length` (), it may be projected too, by `detail` (d, bits). All are
    float64."""

    threshold: Tensor
    scale: Tensor  # the standard deviation of the training values: the unit of a margin
    mean: Tensor | None = None
    projection: Tensor | None = None
    anchors: Tensor | None = None
    reach: Tensor | None = None
    length: Tensor | None = None
    detail: Tensor | None = None

    def numbers(self, values: Tensor) -> Tensor:
        """What the thresholds are for: from a member's outputs (n, d), (n, bits)."""
        if self.mean is None or self.projection is None:
            return values
        values, projection = values - self.mean.to(values), self.projection.to(values)
        if self.length is not None:
            values = values / torch.maximum(values.norm(dim=1, keepdim=True), self.length.to(values))
        if self.anchors is None or self.reach is None:
            return values @ projection
        numbers = placed(values, self.anchors.to(values), self.reach.to(values), projection)
        return numbers if self.detail is None else numbers + values @ self.detail.to(values)

    def margins(self, values: Tensor) -> Tensor:
        """How far each bit is from flipping, (n, bits), in training standard deviations; positive for a 1."""
        return (self.numbers(values) - self.threshold.to(values)) / self.scale.to(values)

    def steadied(self, error: Tensor, doubt: float) -> "Head":
        """The same head for a computer whose margins are wrong by up to `error` (bits): with wider units where it is
        more than a tenth of `doubt`, and a constant 0 where a bit would say little but how its numbers were rounded."""
        scale = self.scale * (10 * error / doubt).clamp(min=1)
        return replace(self, threshold=self.threshold + torch.where(error > 0.01, scale, 0.0), scale=scale)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in asdict(self).items() if tensor is not None}

    @staticmethod
    def shapes(tensors: Mapping[str, Tensor], numbers: int, bits: int) -> dict[str, tuple[int, ...]]:
        """The shapes that the tensors of a stored head, of which these may be some, must have."""
        shapes: dict[str, tuple[int, ...]] = {"threshold": (bits,), "scale": (bits,)}
        if "anchors" in tensors:
            m = tensors["anchors"].numel() // numbers
            shapes |= {"mean": (numbers,), "anchors": (m, numbers), "reach": (), "projection": (m, bits)}
            return shapes | ({"length": (), "detail": (numbers, bits)} if "detail" in tensors else {})
        if numbers == bits and not {"mean", "projection"} & tensors.keys():
            return shapes
        shapes |= {"mean": (numbers,), "projection": (numbers, bits)}
        return shapes | ({"length": ()} if "length" in tensors else {})


def _gap(column: Values, choose: Callable[[Values, NDArray[np.int64]], int]) -> float:
    """The midpoint of the gap below the distinct value that `choose(values, counts)` names."""
    values, counts = np.unique(column, return_counts=True)
    if len(values) == 1:
        return float(values[0]) + 1  # a constant unit: its bit is 0, and stays 0 under rounding
    i = min(max(choose(values, counts), 1), len(values) - 1)
    return (float(values[i - 1]) + float(values[i])) / 2


def _with_thresholds(projected: Values, choose: Callable[[Values, NDArray[np.int64]], int], **parts: Tensor) -> Head:
    threshold = torch.tensor([_gap(column, choose) for column in projected.T], dtype=torch.float64)
    scale = projected.std(axis=0, dtype=np.float64)
    scale[scale == 0] = 1
    return Head(threshold, torch.from_numpy(scale), **parts)


def _at_zero(values: Values, counts: NDArray[np.int64]) -> int:
    return int(np.searchsorted(values, 0.0, side="right"))


def _at_median(values: Values, counts: NDArray[np.int64]) -> int:
    below = counts.cumsum()
    return int(np.abs(below - below[-1] / 2).argmin()) + 1


def check_head(head: str, images: int, numbers: int, bits: int) -> None:
    """Raises HashretError if `head` cannot make `bits` bits of so many images with so many numbers each."""
    choose(HEADS, head, "head")
    if images < 2:
        raise HashretError("one image is not enough to learn from: give a source with at least two images")
    if head in ("sign", "median") and numbers != bits:
        raise HashretError(
            f"head {head!r} makes one bit of every number, and {numbers} numbers cannot give {bits} bits: "
            f"choose --head itq, or as many numbers as bits with --set latent={bits}"
        )
    if head in ("pca", "itq") and min(images, numbers) < bits:
        lack = f"{images} images" if images < bits else f"{numbers} numbers an image"
        raise HashretError(
            f"head {head!r} needs at least as many images, and numbers an image, as bits: {lack} cannot give "
            f"{bits} bits; choose fewer bits or --head lsh"
        )


def sign(values: Values, bits: int, seed: int) -> Head:
    """Positive or not."""
    return _with_thresholds(values, _at_zero)


def median(values: Values, bits: int, seed: int) -> Head:
    """Above the training median or not, so that every bit is balanced."""
    return _with_thresholds(values, _at_median)


def _projected(values: Values, *, around: Tensor | None = None, **parts: Tensor) -> Head:
    """Thresholds about zero, or about what `around` (bits) says."""
    bare = Head(torch.zeros(1), torch.ones(1), **parts)
    numbers = torch.cat([bare.numbers(rows) for rows in blocks(torch.from_numpy(values))])
    if around is None:
        return _with_thresholds(numbers.numpy(), _at_zero, **parts)
    head = _with_thresholds((numbers - around.float()).numpy(), _at_zero, **parts)
    return replace(head, threshold=head.threshold + around)


def _mean(values: Values) -> Tensor:
    return torch.from_numpy(values.mean(axis=0, dtype=np.float64))


def lsh(values: Values, bits: int, seed: int) -> Head:
    """Signs of random projections (Charikar 2002) of the centred values."""
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(values.shape[1], bits, dtype=torch.float64, generator=generator)
    return _projected(values, mean=_mean(values), projection=projection / projection.norm(dim=0))


def _principal_components(values: Values, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """The mean (d) and the leading principal directions (d, bits), float64."""
    n, d = values.shape
    mean = _mean(values)
    centred = torch.from_numpy(values) - mean.float()
    if d <= 4096:
        covariance = (centred.T @ centred).double()
        directions = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :bits]
    else:  # too wide for a covariance matrix: a randomised decomposition (Halko, Martinsson and Tropp 2011)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            directions = torch.svd_lowrank(centred, q=min(bits + 16, n, d), niter=4)[2][:, :bits].double()
    return mean, directions.contiguous()


def pca(values: Values, bits: int, seed: int) -> Head:
    """Signs of the leading principal components (Wang, Kumar and Chang 2010)."""
    mean, directions = _principal_components(values, bits, seed)
    return _projected(values, mean=mean, projection=directions)


def itq(values: Values, bits: int, seed: int) -> Head:
    """Iterative quantisation (Gong and Lazebnik 2011): the rotation of the leading principal components that brings
    them nearest to their signs, by 50 alternations on at most max(20,000, 20 · bits) of the images."""
    mean, directions = _principal_components(values, bits, seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(values), generator=generator)[: max(20_000, 20 * bits)].numpy()
    components = (torch.from_numpy(values[rows]) - mean.float()) @ directions.float()
    rotation = torch.linalg.qr(torch.randn(bits, bits, generator=generator)).Q
    for _ in range(50):
        signs = (components @ rotation).sign()
        u, _, vh = torch.linalg.svd(components.T @ signs)
        rotation = u @ vh
    return _projected(values, mean=mean, projection=directions @ rotation.double())


def _graph(values: Tensor, most: int, some: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, float]:
    """Of the graph of values (n, d), some of which are shown again: anchors (m, d), reach (), at most so many
    coordinates of the anchors (m, r), float64, and how clear they are."""
    anchors = k_means(some, anchors_for(*values.shape), generator)
    reach = (excess(some, anchors)[0].sum(1).mean() / 4).clamp(min=1e-6)
    return anchors, reach, *graph_coordinates(values, anchors, reach, most)


def anchor_graph(values: Values, bits: int, seed: int) -> Head:
    """Signs of the rotated coordinates in a graph between the images and their anchors (Liu, Wang, Kumar and Chang
    2011), as `hashret.heads.anchors` has it."""
    generator = torch.Generator().manual_seed(seed)
    mean = _mean(values)
    centred = torch.from_numpy(values) - mean.float()
    some = centred[torch.randperm(len(values), generator=generator)[: max(20_000, 20 * bits)]]
    anchors, reach, coordinates, _ = _graph(centred, bits, some, generator)
    found = torch.cat([placed(rows, anchors, reach, coordinates.float()) for rows in blocks(some)])
    projection = coordinates @ lifted_rotation(found, bits, generator).double()
    return _projected(values, mean=mean, anchors=anchors.double(), reach=reach.double(), projection=projection)


def anchor_itq(values: Values, bits: int, seed: int) -> Head:
    """Signs of two kinds of numbers, rotated together by iterative quantisation: coordinates in an anchor graph, which
    put images that are connected at one place, and principal components, which tell them apart there.

    Ours. The coordinates are as long as the graph is clear (see `graph_coordinates`), but at least `COUNTED`, so that
    they lead where there are kinds of images, and the components do where there are hardly any. Those have a third of
    the square of a unit; of fewer than 64 bits there are none to spare for the order within a kind, and they get as
    much less. A graph that is not clear at all is left out; then the rotation begins with the numbers themselves, if
    they are as many as the bits, for a network that has learned them as bits has brought them near to their signs.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = _mean(values)
    centred = torch.from_numpy(values) - mean.float()
    lengths = centred.norm(dim=1, keepdim=True)
    length = (lengths.mean() / 4).clamp(min=1e-6)
    centred /= torch.maximum(lengths, length)
    some = centred[torch.randperm(len(values), generator=generator)[: max(20_000, 20 * bits)]]
    anchors, reach, coordinates, clear = _graph(centred, bits // 2, some, generator)
    coordinates = coordinates[:, : coordinates.shape[1] if clear > CLEAR else 0] * max(clear, COUNTED)
    r = coordinates.shape[1]
    middle, directions = _principal_components(centred.numpy(), bits - r, seed)
    start = directions.T.float() if not r and values.shape[1] == bits else None
    directions = directions * (min(1.0, bits / 64) / 3) ** 0.5
    numbers = (some - middle.float()) @ directions.float()
    if r:
        found = torch.cat([placed(rows, anchors, reach, coordinates.float()) for rows in blocks(some)])
        numbers = torch.cat([found, numbers], 1)
    rotation = lifted_rotation(numbers, bits, generator, start).double()
    detail = directions @ rotation[r:]
    parts = {"around": middle @ detail, "mean": mean, "length": length.double()}
    if not r:
        return _projected(values, projection=detail, **parts)
    graph = {"anchors": anchors.double(), "reach": reach.double(), "projection": coordinates @ rotation[:r]}
    return _projected(values, detail=detail, **graph, **parts)


HEADS = {
    "sign": sign,
    "median": median,
    "lsh": lsh,
    "pca": pca,
    "itq": itq,
    "anchor-graph": anchor_graph,
    "anchor-itq": anchor_itq,
}
