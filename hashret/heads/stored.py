"""Heads as tensors by name, as models store them. The names, shapes and types are a file format."""

from collections.abc import Mapping
from math import prod
from typing import Any, Protocol

from numpy.typing import NDArray

from hashret.heads.anchor_graph import AnchorGraph, Anchors
from hashret.heads.head import Head, Projection
from hashret.heads.linear import Linear


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


POSITIVE = {"scale", "reach", "length"}  # tensors whose numbers all are


def stored_head(tensors: Mapping[str, NDArray[Any]]) -> Head:
    """The head of which `Head.tensors` are these, which have the `head_shapes`."""
    projection: Projection | None = None
    length = tensors.get("length")
    if "anchors" in tensors:
        anchors = Anchors(tensors["anchors"], tensors["reach"])
        projection = AnchorGraph(tensors["mean"], anchors, tensors["projection"], length, tensors.get("detail"))
    elif "projection" in tensors:
        projection = Linear(tensors["mean"], tensors["projection"], length)
    return Head(tensors["threshold"], tensors["scale"], projection)


def head_shapes(tensors: Mapping[str, Shaped], numbers: int, bits: int) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors of a stored head, of which these may be some, must have, for outputs of so many
    numbers. All are float64."""
    shapes: dict[str, tuple[int, ...]] = {"threshold": (bits,), "scale": (bits,)}
    if "anchors" in tensors:
        m = prod(tensors["anchors"].shape) // numbers
        shapes |= {"mean": (numbers,), "anchors": (m, numbers), "reach": (), "projection": (m, bits)}
        return shapes | ({"length": (), "detail": (numbers, bits)} if "detail" in tensors else {})
    if numbers == bits and not {"mean", "projection"} & tensors.keys():
        return shapes
    shapes |= {"mean": (numbers,), "projection": (numbers, bits)}
    return shapes | ({"length": ()} if "length" in tensors else {})
