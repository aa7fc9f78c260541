"""Anchor graph and principal components in one code: the default head of the default model. Ours."""

import numpy as np

from hashret.heads.anchor_graph import AnchorGraph, fitted_graph, lifted_rotation
from hashret.heads.head import Head, blocks, projected_by
from hashret.heads.linear import Linear, centred, drawn, lengths_of, mean_of, principal_components
from hashret.heads.products import Floats

CLEAR = 0.075  # the least that says of a graph that there are kinds of images
COUNTED = 0.3  # the least that the coordinates in such a graph count for


def anchor_itq(values: Floats, bits: int, seed: int) -> Head:
    """Signs of two kinds of numbers, rotated together by iterative quantisation: coordinates in an anchor graph, which
    put images that are connected at one place, and principal components, which tell them apart there.

    The coordinates are as long as the graph is clear (see `graph_coordinates`), but at least `COUNTED`, so that they
    lead where there are kinds of images, and the components do where there are hardly any. Those have a third of the
    square of a unit; of fewer than 64 bits there are none to spare for the order within a kind, and they get as much
    less. A graph that is not clear at all is left out; then the rotation begins with the numbers themselves, if they
    are as many as the bits, for a network that has learned them as bits has brought them near to their signs.
    """
    rng = np.random.default_rng(seed)
    mean = mean_of(values)
    length = np.array(max(float(lengths_of(values - mean.astype(np.float32)).mean()) / 4, 1e-6), np.float32)
    x = centred(values, mean.astype(np.float32), length)
    sample = drawn(x, bits, rng)
    graph = fitted_graph(x, bits // 2, sample, rng)
    coordinates = graph.coordinates[:, :0]
    if graph.clear > CLEAR:
        coordinates = graph.coordinates * max(graph.clear, COUNTED)
    r = coordinates.shape[1]
    middle, directions = principal_components(x, bits - r, seed)
    start = directions.T.astype(np.float32) if not r and values.shape[1] == bits else None
    directions = directions * (min(1.0, bits / 64) / 3) ** 0.5
    numbers = (sample - middle.astype(np.float32)) @ directions.astype(np.float32)
    if r:
        single = coordinates.astype(np.float32)
        placed = [graph.anchors.between(rows, single) for rows in blocks(sample)]
        numbers = np.concatenate([np.concatenate(placed), numbers], 1)
    rotation = lifted_rotation(numbers, bits, rng, start).astype(np.float64)
    detail, length = directions @ rotation[r:], length.astype(np.float64)
    if not r:
        return projected_by(Linear(mean, detail, length), values, around=middle @ detail)
    anchors = graph.anchors.to(np.float64)
    return projected_by(
        AnchorGraph(mean, anchors, coordinates @ rotation[:r], length, detail), values, around=middle @ detail
    )
