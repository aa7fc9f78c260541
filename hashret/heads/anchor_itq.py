"""Anchor-graph coordinates and principal components in one code: the default head of the default model. Ours."""

import numpy as np

from hashret.heads.anchor_graph import AnchorGraph, fit_graph, orthogonal_projection
from hashret.heads.head import Head, blocks, threshold_projection
from hashret.heads.linear import Linear, centre, mean_of, principal_components, row_norms, subsample
from hashret.heads.products import Floats

MIN_SEPARABILITY = 0.075  # of a graph with clusters; another is not used
MIN_WEIGHT = 0.3  # of the coordinates in a graph with clusters


def anchor_itq(values: Floats, bits: int, seed: int) -> Head:
    """Fit a head of anchor-graph coordinates and principal components, rotated together by iterative quantisation. The
    coordinates assign images to clusters; the components order them within a cluster.

    The coordinates have the graph's separability as norm (see `graph_coordinates`), but at least `MIN_WEIGHT`: they
    dominate if the images form clear clusters, and the components do otherwise. The components are scaled by √⅓, and
    with fewer than 64 bits by √(bits / 192), because short codes have no bits to spare for the order within clusters.
    A graph below `MIN_SEPARABILITY` is not used. If there are as many outputs as bits, the rotation then starts at the
    outputs themselves, because a network trained for binary codes has brought them near to their signs.
    """
    rng = np.random.default_rng(seed)
    mean = mean_of(values)
    min_norm = np.array(max(float(row_norms(values - mean.astype(np.float32)).mean()) / 4, 1e-6), np.float32)
    x = centre(values, mean.astype(np.float32), min_norm)
    sample = subsample(x, bits, rng)
    graph = fit_graph(x, bits // 2, sample, rng)
    coordinates = graph.coordinates[:, :0]
    if graph.separability > MIN_SEPARABILITY:
        coordinates = graph.coordinates * max(graph.separability, MIN_WEIGHT)
    r = coordinates.shape[1]
    centroid, directions = principal_components(x, bits - r, seed)
    start = directions.T.astype(np.float32) if not r and values.shape[1] == bits else None
    directions = directions * (min(1.0, bits / 64) / 3) ** 0.5
    features = (sample - centroid.astype(np.float32)) @ directions.astype(np.float32)
    if r:
        single = coordinates.astype(np.float32)
        embedding = np.concatenate([graph.anchors.embed(rows, single) for rows in blocks(sample)])
        features = np.concatenate([embedding, features], 1)
    rotation = orthogonal_projection(features, bits, rng, start).astype(np.float64)
    detail, min_norm = directions @ rotation[r:], min_norm.astype(np.float64)
    if not r:
        return threshold_projection(Linear(mean, detail, min_norm), values, offset=centroid @ detail)
    anchors = graph.anchors.to(np.float64)
    return threshold_projection(
        AnchorGraph(mean, anchors, coordinates @ rotation[:r], min_norm, detail), values, offset=centroid @ detail
    )
