"""Heads as tensors by name, as models store them. The names, shapes and types are a file format."""

from collections.abc import Mapping
from math import prod
from typing import Any, Protocol

from numpy.typing import NDArray

from hashret.heads.anchor_graph import AnchorGraph, Anchors
from hashret.heads.head import Head, Projection
from hashret.heads.linear import Linear


class HasShape(Protocol):
    """An array, or the description of a stored one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


POSITIVE = {"scale", "reach", "length"}  # tensors of positive numbers


def stored_head(tensors: Mapping[str, NDArray[Any]]) -> Head:
    """Return the head with these tensors, whose names and shapes are those of `head_shapes`."""
    projection: Projection | None = None
    min_norm = tensors.get("length")
    if "anchors" in tensors:
        anchors = Anchors(tensors["anchors"], tensors["reach"])
        projection = AnchorGraph(tensors["mean"], anchors, tensors["projection"], min_norm, tensors.get("detail"))
    elif "projection" in tensors:
        projection = Linear(tensors["mean"], tensors["projection"], min_norm)
    return Head(tensors["threshold"], tensors["scale"], projection)


def head_shapes(tensors: Mapping[str, HasShape], dim: int, bits: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a stored head's tensors must have, by name, for outputs of `dim` numbers.

    `tensors`, not yet checked, determine the type of the head. All tensors are float64.
    """
    shapes: dict[str, tuple[int, ...]] = {"threshold": (bits,), "scale": (bits,)}
    if "anchors" in tensors:
        m = prod(tensors["anchors"].shape) // dim
        shapes |= {"mean": (dim,), "anchors": (m, dim), "reach": (), "projection": (m, bits)}
        return shapes | ({"length": (), "detail": (dim, bits)} if "detail" in tensors else {})
    if dim == bits and not {"mean", "projection"} & tensors.keys():
        return shapes
    shapes |= {"mean": (dim,), "projection": (dim, bits)}
    return shapes | ({"length": ()} if "length" in tensors else {})
