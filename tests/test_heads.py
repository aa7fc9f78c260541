import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.linalg import orthogonal_procrustes
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import euclidean_distances
from torch import Tensor

from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.heads import HEADS, Head, check_head
from hashret.heads.anchor_graph import (
    DIFFUSION_STEPS,
    AnchorGraph,
    Anchors,
    anchor_count,
    graph_coordinates,
    k_means,
    orthogonal_projection,
)
from hashret.heads.anchor_itq import MIN_SEPARABILITY
from hashret.heads.linear import Linear
from hashret.heads.products import product

Floats = NDArray[np.float32 | np.float64]

DIGITS = (load_digits().images / 16).astype(np.float32)  # (1797, 8, 8) in [0, 1]
PIXELS = (load_digits().images * 15.9375).astype(np.uint8)
LABELS: NDArray[np.int64] = load_digits().target

small_floats = st.floats(-4, 4, width=32) | st.sampled_from([-1.0, 0.0, 1e-7, 1.0, 1e6])


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, st.tuples(st.integers(2, 40), st.just(8)), elements=small_floats),
    st.sampled_from(["sign", "median"]),
)
def test_thresholds_are_midpoints_between_values_and_never_values(values: NDArray[np.float32], name: str) -> None:
    head = HEADS[name](values, 8, 0)
    bits = head.margins(values.astype(np.float64)) > 0
    for column, threshold, bit in zip(values.T.astype(np.float64), head.threshold.tolist(), bits.T, strict=True):
        distinct = sorted({float(value) for value in column})  # −0.0 is 0.0
        if len(distinct) == 1:
            assert threshold > distinct[0] and not bit.any()
            continue
        midpoints = [(a + b) / 2 for a, b in pairwise(distinct)]
        assert threshold in midpoints and threshold not in distinct
        assert (bit == (column > threshold)).all()
        if name == "median":
            imbalance = [abs(int((column > m).sum()) - len(column) / 2) for m in midpoints]
            assert abs(int(bit.sum()) - len(column) / 2) == min(imbalance)
        elif distinct[0] <= 0 < distinct[-1]:
            assert (bit == (column > 0)).all()


def test_the_unit_of_a_margin_is_a_standard_deviation() -> None:
    values = np.random.default_rng(0).normal(3, 5, (2000, 8)).astype(np.float32)
    head = HEADS["median"](values, 8, 0)
    assert np.allclose(head.margins(values).std(0), 1, atol=0.01)


@pytest.mark.parametrize("name", HEADS)
def test_a_constant_column_gives_a_constant_zero(name: str) -> None:
    values = np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32)
    values[:, 3] = values[:, 11] = 7.25
    if name in ("sign", "median"):
        bits = HEADS[name](values, 16, 0).margins(values) > 0
        assert not bits[:, [3, 11]].any() and bits[:, 2].any()
    head = HEADS[name](np.full((100, 16), 0.5, np.float32), 16, 0)
    assert not (head.margins(np.full((2, 16), 0.5, np.float32)) > 0).any()


@pytest.mark.parametrize(("images", "dim"), [(300, 64), (60, 64), (80, 4800)])
def test_pca_equals_that_of_scikit_learn(images: int, dim: int) -> None:
    generator = np.random.default_rng(0)
    spectrum = 0.8 ** np.arange(min(images, dim))  # well-separated eigenvalues, which determine the components
    mixing = generator.normal(size=(len(spectrum), dim))
    values = ((generator.normal(size=(images, len(spectrum))) * spectrum) @ mixing).astype(np.float32)
    head = HEADS["pca"](values, 8, 0)
    reference = PCA(8, svd_solver="full").fit(values)
    linear = linear_of(head)
    assert np.allclose(linear.mean, reference.mean_, atol=1e-5)
    cosines = (reference.components_.astype(np.float64) * linear.matrix.T).sum(1)
    assert np.allclose(np.abs(cosines), 1, atol=1e-4)
    expected = reference.transform(values) * np.sign(cosines)
    is_clear = np.abs(expected) > 1e-2 * expected.std(0)
    bits = head.margins(values) > 0
    assert (bits == (expected > 0))[is_clear].all()


def linear_of(head: Head) -> Linear:
    assert isinstance(head.projection, Linear)
    return head.projection


def quantisation_error(values: Floats, linear: Linear) -> float:
    projected = linear.project(values.astype(np.float64))
    return float(np.square(projected - np.sign(projected)).mean())


def test_itq_rotates_the_components_nearer_to_their_signs() -> None:
    values = 3 * digits(1000)
    pca, itq = (linear_of(HEADS[name](values, 16, 0)) for name in ("pca", "itq"))
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    random = replace(pca, matrix=pca.matrix @ rotation)
    assert quantisation_error(values, itq) < 0.95 * quantisation_error(values, random)
    assert quantisation_error(values, itq) < 0.8 * quantisation_error(values, pca)
    assert np.allclose(itq.matrix.T @ itq.matrix, np.eye(16), atol=1e-5)
    projected = pca.matrix @ (pca.matrix.T @ itq.matrix)  # onto the span of the components
    assert np.allclose(projected, itq.matrix, atol=1e-5)


def test_the_share_of_differing_lsh_bits_is_the_angle() -> None:
    """The share of differing bits of two centred vectors is their angle over π (Charikar 2002)."""
    generator = np.random.default_rng(0)
    values = generator.normal(50, 1, size=(4000, 24)).astype(np.float32)
    bits = HEADS["lsh"](values, 1024, 0).margins(values[:40]) > 0
    centred = values[:40] - values.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    angles = np.arccos(np.clip(unit @ unit.T, -1, 1)) / np.pi
    shares = (bits[:, None] != bits[None]).mean(2)
    assert np.abs(shares - angles).max() < 0.1 and np.abs(shares - angles).mean() < 0.02


@pytest.mark.parametrize("name", HEADS)
def test_a_head_depends_only_on_its_values_and_seed(name: str) -> None:
    values = np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32)

    def fitted(seed: int) -> dict[str, list[float]]:
        np.random.seed(np.random.default_rng().integers(1000))  # noqa: NPY002
        return {key: tensor.tolist() for key, tensor in HEADS[name](values, 16, seed).tensors().items()}

    assert fitted(0) == fitted(0)
    assert (fitted(0) != fitted(1)) == (name in ("lsh", "itq", "anchor-graph", "anchor-itq"))


@pytest.mark.parametrize(
    ("head", "images", "dim", "bits", "reason"),
    [
        ("sign", 100, 64, 32, "64 numbers cannot give 32 bits.*--head itq"),
        ("median", 100, 32, 64, "32 numbers cannot give 64 bits"),
        ("pca", 100, 32, 64, "32 numbers an image cannot give 64 bits.*fewer bits or --head lsh"),
        ("itq", 63, 784, 64, "63 images cannot give 64 bits"),
        ("pca", 63, 784, 64, "63 images cannot give 64 bits"),
        ("lsh", 1, 784, 64, "one image is not enough"),
    ],
)
def test_impossible_combinations_are_refused(head: str, images: int, dim: int, bits: int, reason: str) -> None:
    with pytest.raises(HashretError, match=reason):
        check_head(head, images, dim, bits)


def test_possible_combinations_are_accepted() -> None:
    with pytest.raises(ValueError, match="no head 'none'; choose one of sign, median, lsh, pca, itq"):
        check_head("none", 100, 64, 64)
    for head in HEADS:
        check_head(head, 64, 64, 64)
    check_head("lsh", 2, 3, 1024)


def test_stabilising_zeroes_bits_of_large_errors_and_rescales_those_of_medium_ones() -> None:
    head = Head(np.full(3, 0.5), np.full(3, 2.0))
    stabilised = head.stabilised(np.array([1e-6, 1e-3, 1.0]), ambiguous_margin=1e-4)
    assert stabilised.scale.tolist() == pytest.approx([2.0, 200.0, 2e5])
    assert stabilised.threshold.tolist() == pytest.approx([0.5, 0.5, 2e5 + 0.5])
    values = head.threshold + head.scale * np.linspace(-5, 5, 21)[:, None]
    assert not (stabilised.margins(values)[:, 2] > -0.9).any()
    assert ((stabilised.margins(values)[:, :2] > 0) == (head.margins(values)[:, :2] > 0)).all()


def digits(images: int = 1797) -> NDArray[np.float32]:
    return np.ascontiguousarray(DIGITS[:images].reshape(images, -1))


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def make_anchors(m: int = 60, min_gap: float = 1e-9) -> Anchors:
    """Return anchors among the digits; the gaps of every digit exceed the default `min_gap`."""
    return Anchors(k_means(digits(), m, seeded()), np.array(min_gap, np.float32))


def test_the_inertia_of_centres_is_near_that_of_scikit_learn() -> None:
    anchors = make_anchors().centres
    reference = KMeans(60, init="random", n_init=5, random_state=0).fit(DIGITS.reshape(-1, 64))
    inertia = euclidean_distances(digits(), anchors, squared=True).min(1).sum()
    assert anchors.shape == (60, 64) and inertia < 1.05 * reference.inertia_


def test_centres_of_repeated_values_are_distinct() -> None:
    few = np.tile(np.array([[0.0, 1], [2, 3], [4, 5]], np.float32), (50, 1))
    assert k_means(few, 20, seeded()).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_the_number_of_anchors_is_bounded_by_images_and_memory() -> None:
    shapes = [(2, 64), (100, 64), (1797, 64), (60_000, 784), (10**6, 784), (60_000, 3 * 224 * 224), (9, 2**28)]
    assert [anchor_count(*shape) for shape in shapes] == [8, 10, 179, 1000, 1000, 111, 8]


def test_weights_are_proportional_to_the_gaps_to_the_next_nearest_anchor() -> None:
    anchors, images = make_anchors().to(np.float64), digits(200).astype(np.float64)
    z = anchors.weights(images)
    for row, distances in zip(z, euclidean_distances(images, anchors.centres, squared=True), strict=True):
        nearest = np.argsort(distances)[:4]
        weights = distances[nearest[3]] - distances[nearest[:3]]
        expected = np.zeros(60)
        expected[nearest[:3]] = weights / weights.sum()
        assert np.allclose(row, expected, atol=1e-9)


def test_weights_are_continuous_where_the_nearest_anchors_change() -> None:
    anchors, patterns = make_anchors(min_gap=0.5).to(np.float64), 0
    for start, end in ((0, 1), (5, 90), (17, 300)):
        t = np.linspace(0, 1, 20_001)[:, None]
        z = anchors.weights(digits()[start] * (1 - t) + digits()[end] * t)
        assert np.abs(np.diff(z, axis=0)).max() < 2e-3 and (z.sum(1) <= 1 + 1e-9).all()
        patterns += int(np.diff(z > 0, axis=0).any(1).sum())
    assert patterns > 10  # sets of nearest anchors, one after the other


def test_weights_vanish_at_equal_distance_from_all_nearest_anchors() -> None:
    """Rounding errors decide which of them are the nearest, so that their weights must be 0."""
    anchors = Anchors(np.concatenate([np.eye(6), -np.eye(6)]).astype(np.float32), np.array(0.1, np.float32))
    assert not anchors.weights(np.zeros((1, 6), np.float32)).any()
    near = anchors.weights((1e-6 * seeded().normal(size=(50, 6))).astype(np.float32))
    assert near.max() < 1e-3


def test_cosines_of_anchor_coordinates_equal_those_of_a_diffusion() -> None:
    """The reference is the power of the random walk from anchor to image to anchor, without eigenvectors."""
    anchors = make_anchors()
    z = anchors.weights(digits()).astype(np.float64)
    degree = z.sum(0)
    walk = z.T @ z / degree[:, None]
    assert np.allclose(walk.sum(1), 1, atol=1e-5)
    diffusion = np.linalg.matrix_power(walk, 2 * DIFFUSION_STEPS - 1) / degree - 1 / degree.sum()
    norms = np.sqrt(np.diag(diffusion))
    coordinates, separability = graph_coordinates(digits(), anchors, 60)
    assert separability == pytest.approx(np.sort(np.linalg.eigvals(walk).real)[-2] ** (2 * DIFFUSION_STEPS), rel=1e-4)
    assert 4 < coordinates.shape[1] < 30
    assert np.allclose(coordinates @ coordinates.T, diffusion / np.outer(norms, norms), atol=0.02)


def test_fewer_coordinates_are_the_first_eigenvectors_of_the_walk() -> None:
    anchors = make_anchors()
    z = anchors.weights(digits()).astype(np.float64)
    eigenvalues, vectors = np.linalg.eig(z.T @ z / z.sum(0)[:, None])
    first = np.argsort(-eigenvalues.real)[1:4]
    kept = vectors.real[:, first] / np.sqrt((vectors.real[:, first] ** 2 * z.sum(0)[:, None]).sum(0))
    kept *= eigenvalues.real[first] ** (DIFFUSION_STEPS - 0.5)
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    coordinates, _ = graph_coordinates(digits(), anchors, 3)
    assert np.allclose(np.abs(coordinates), np.abs(kept), atol=1e-4)  # the sign of an eigenvector is arbitrary


def test_the_orthogonal_projection_equals_that_of_iterated_procrustes() -> None:
    values = seeded().normal(size=(400, 5)).astype(np.float32)
    expected = np.linalg.qr(seeded(1).normal(size=(16, 5)))[0].T
    random = expected.copy()
    for _ in range(50):
        projected = values.astype(np.float64) @ expected
        expected = expected @ orthogonal_procrustes(projected, np.sign(projected))[0]
    found = orthogonal_projection(values, 16, seeded(1))
    assert np.allclose(found @ found.T, np.eye(5), atol=1e-5)

    def objective(projection: Floats) -> float:
        return float(np.abs(values @ projection).sum())  # larger if values are nearer to their signs

    assert objective(found) == pytest.approx(objective(expected), rel=1e-2)
    assert objective(found) > 1.01 * objective(random)


def test_clusters_far_apart_have_distinct_codes() -> None:
    generator = np.random.default_rng(0)
    centres = 100 * generator.normal(size=(5, 20))
    values = np.concatenate([centre + generator.normal(size=(80, 20)) for centre in centres]).astype(np.float32)
    bits = (HEADS["anchor-graph"](values, 32, 0).margins(values) > 0).reshape(5, 80, 32)
    assert len(np.unique(bits[:, 0], axis=0)) == 5
    assert (bits == bits[:, :1]).mean() > 0.99


@pytest.mark.parametrize("name", ["anchor-graph", "anchor-itq"])
@pytest.mark.parametrize("images", [2, 3, 5, 12])
@pytest.mark.parametrize("bits", [8, 64, 128])
def test_a_graph_can_be_fitted_to_very_few_images(name: str, images: int, bits: int) -> None:
    values = digits(images)
    margins = HEADS[name](values, bits, 0).margins(values)
    assert margins.shape == (images, bits) and np.isfinite(margins).all()
    assert len(np.unique(margins > 0, axis=0)) > 1


def retrieval(name: str, bits: int) -> float:
    """Return the mean average precision of digits outside the training data; relevant are those of the same label."""
    hasher = Hasher("lsh", bits, name).fit(PIXELS[:1400])
    items, queries = (2.0 * np.unpackbits(hasher.encode(p), axis=1) - 1 for p in (PIXELS[:1400], PIXELS[1400:]))
    found = zip(queries @ items.T, LABELS[1400:], strict=True)
    return float(np.mean([average_precision_score(LABELS[:1400] == label, score) for score, label in found]))


@pytest.mark.parametrize("bits", [16, 64])
def test_an_anchor_graph_has_a_far_higher_mAP_than_linear_heads(bits: int) -> None:
    graph, itq, lsh = (retrieval(name, bits) for name in ("anchor-graph", "itq", "lsh"))
    assert graph > itq + 0.1 and graph > lsh + 0.2 and graph > 0.7


def fit_anchor_itq(values: NDArray[np.float32], bits: int) -> tuple[Head, NDArray[np.float64]]:
    """Return the head `anchor-itq` for values (n, d), and the values that it projects: centred and normalised."""
    head = HEADS["anchor-itq"](values, bits, 0)
    assert isinstance(head.projection, AnchorGraph | Linear) and head.projection.min_norm is not None
    centred = values.astype(np.float64) - head.projection.mean
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    return head, centred / np.maximum(lengths, head.projection.min_norm)


def graph_of(head: Head) -> AnchorGraph:
    assert isinstance(head.projection, AnchorGraph)
    return head.projection


@pytest.mark.parametrize(("bits", "weight"), [(64, 1 / 3), (96, 1 / 3), (16, 1 / 12)])
def test_squared_distances_are_sums_of_those_in_the_graph_and_of_the_components(bits: int, weight: float) -> None:
    head, units = fit_anchor_itq(digits(), bits)
    graph = graph_of(head)
    projected = head.project(digits().astype(np.float64))
    r = int(np.linalg.matrix_rank(graph.coordinates))
    assert 4 < r <= bits // 2 and graph.detail is not None
    _, separability = graph_coordinates(units.astype(np.float32), graph.anchors.to(np.float32), bits // 2)
    assert MIN_SEPARABILITY < separability < 1
    norms = np.linalg.norm(graph.coordinates, axis=1)
    assert norms == pytest.approx(np.full(len(norms), separability), rel=1e-3)
    components = PCA(min(64, bits - r), svd_solver="full").fit(units)
    embedding = graph.anchors.weights(units) @ graph.coordinates
    details = weight**0.5 * components.transform(units)
    expected = euclidean_distances(embedding, squared=True) + euclidean_distances(details, squared=True)
    assert np.allclose(euclidean_distances(projected, squared=True), expected, atol=1e-5)


@pytest.mark.parametrize(("separability", "norm"), [(0.9, 0.9), (0.31, 0.31), (0.29, 0.3), (0.08, 0.3), (0.07, None)])
def test_the_norm_of_coordinates_is_the_separability_and_a_graph_without_clusters_is_not_used(
    separability: float, norm: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def patched(*arguments: Any) -> tuple[NDArray[np.float64], float]:
        return graph_coordinates(*arguments)[0], separability

    monkeypatch.setattr("hashret.heads.anchor_graph.graph_coordinates", patched)
    head, _ = fit_anchor_itq(digits(), 64)
    if norm is None:
        assert isinstance(head.projection, Linear)
    else:
        norms = np.linalg.norm(graph_of(head).coordinates, axis=1)
        assert norms == pytest.approx(np.full(len(norms), norm), rel=1e-3)


def test_bits_are_signs_relative_to_the_mean_of_the_components() -> None:
    head, units = fit_anchor_itq(digits(), 32)
    graph = graph_of(head)
    embedding = graph.anchors.weights(units) @ graph.coordinates
    assert graph.detail is not None
    signs = embedding + (units - units.mean(0)) @ graph.detail > 0
    found = head.margins(digits().astype(np.float64)) > 0
    assert (signs == found).mean() > 0.9999  # except for values near 0


def test_margins_are_continuous_near_the_mean() -> None:
    head, _ = fit_anchor_itq(digits(), 32)
    graph = graph_of(head)
    assert graph.min_norm is not None
    t = np.linspace(-1, 1, 4001)[:, None]
    step = np.diff(head.margins(graph.mean + t * graph.min_norm * np.eye(64)[20]), axis=0)
    assert np.abs(step).max() < 0.02


def test_the_graph_of_data_without_clusters_is_not_used() -> None:
    values = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    head, units = fit_anchor_itq(values, 64)
    assert isinstance(head.projection, Linear)
    projected = head.project(values.astype(np.float64))
    assert np.allclose(euclidean_distances(projected), euclidean_distances(units) / 3**0.5, atol=1e-6)


def test_bits_that_a_network_has_learned_are_preserved() -> None:
    """Except for a few with outputs near zero; a rotation from a random start changes many."""
    rng = np.random.default_rng(0)
    learned = rng.choice([-1.0, 1.0], (3000, 64))
    values = (learned + rng.normal(size=learned.shape) / 3).astype(np.float32)
    for name, lowest, highest in (("anchor-itq", 0.98, 1), ("itq", 0, 0.7)):
        found = HEADS[name](values, 64, 0).margins(values) > 0
        assert lowest <= (found == (learned > 0)).mean() <= highest


def test_an_anchor_itq_head_without_a_graph_is_stored(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (500, 8, 8), np.uint8)
    hasher = Hasher("lsh", 64, "anchor-itq").fit(images)
    hasher.save(tmp_path / "model")
    assert isinstance(hasher._parts()[2].projection, Linear)
    assert np.array_equal(Hasher.load(tmp_path / "model").encode(images), hasher.encode(images))


def test_anchor_itq_has_the_mAP_of_a_graph_and_far_more_distinct_codes() -> None:
    assert retrieval("anchor-itq", 64) > max(retrieval("itq", 64) + 0.1, retrieval("anchor-graph", 64) - 0.05)
    codes = {name: Hasher("lsh", 64, name).fit(PIXELS).encode(PIXELS) for name in ("anchor-graph", "anchor-itq")}
    distinct = {name: len(np.unique(found, axis=0)) for name, found in codes.items()}
    assert distinct["anchor-itq"] > max(5 * distinct["anchor-graph"], 0.6 * len(PIXELS))


@pytest.fixture(scope="module")
def graph() -> Hasher:
    return Hasher("anchor-graph", 32).fit(PIXELS)


def with_equidistant_anchors(graph: Hasher) -> tuple[Hasher, NDArray[np.uint8]]:
    """Return a graph and images: the first 20 are as near to their fourth anchor as to their third, the next 20 equally
    near to eight anchors, and the others arbitrary."""
    generator = np.random.default_rng(0)
    preprocessing, member, head = graph._parts()
    anchors, images = [], []
    for i, image in enumerate(PIXELS[:40].astype(np.float64)):
        directions = generator.permutation(64)[:8].reshape(4, 2)
        offsets = np.zeros((8, 64))
        for j, (up, down) in enumerate(directions):
            distance = 40 * (1 if i < 20 and j == 0 else 2)
            offsets[2 * j, [up, down]] = distance, -distance
            offsets[2 * j + 1, [down, up]] = distance, -distance
        anchors.append(image.reshape(1, 64) + offsets)
        images.append(image)
    mean, min_gap = graph_of(head).mean, graph_of(head).anchors.min_gap
    equidistant = Anchors(np.concatenate(anchors) / 255 - mean, min_gap)
    projection = AnchorGraph(mean, equidistant, seeded().normal(size=(len(equidistant.centres), 32)))
    hasher = Hasher("anchor-graph", 32)
    hasher._fitted = preprocessing, member, replace(head, projection=projection)
    return hasher, np.concatenate([np.stack(images).astype(np.uint8), PIXELS[100:300]])


def test_codes_of_images_equidistant_from_anchors_depend_on_no_batch(graph: Hasher) -> None:
    hasher, images = with_equidistant_anchors(graph)
    _, member, head = hasher._parts()
    outputs = member.outputs(torch.from_numpy(images[:40] / 255)[:, None]).numpy() - graph_of(head).mean
    nearest = np.sort(euclidean_distances(outputs, graph_of(head).anchors.centres), axis=1)
    assert np.allclose(nearest[:, 2], nearest[:, 3], atol=1e-9)
    expected = hasher.encode(images)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for size in (1, 7, 256):
                codes = [hasher.encode(images[i : i + size]) for i in range(0, len(images), size)]
                assert (np.concatenate(codes) == expected).all()
    finally:
        torch.set_num_threads(threads)


def test_float32_margins_are_near_float64_margins(graph: Hasher) -> None:
    """By less than an ambiguous margin, also for noise and for images equidistant from anchors."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8), np.uint8)
    for hasher, images in (with_equidistant_anchors(graph), (graph, PIXELS), (graph, noise)):
        x = (images / 255).reshape(len(images), -1)
        head = hasher._parts()[2]
        assert np.abs(head.margins(x.astype(np.float32)) - head.margins(x)).max() < 1e-4


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 70),
    st.sampled_from([1, 2, 7, 64, 300, 1100]),
    st.sampled_from([1, 2, 33, 64, 1000]),
    st.sampled_from([np.float32, np.float64]),
)
def test_a_product_in_blocks_equals_that_of_the_whole_matrices(n: int, d: int, m: int, dtype: type[Any]) -> None:
    rng = np.random.default_rng(0)
    # Sums of integers are exact.
    x, w = rng.integers(-9, 9, (n, d)).astype(dtype), rng.integers(-9, 9, (d, m)).astype(dtype)
    assert product(x, w).dtype == dtype and np.array_equal(product(x, w), x @ w)
    assert np.array_equal(product(x, np.asfortranarray(w)), x @ w)


CPU_TIME_OF_OTHER_THREADS = """
import time
import numpy as np
from hashret.heads.products import product
rng = np.random.default_rng(0)
shapes = [(1000, 64, 64), (1000, 64, 1000), (1, 784, 1000), (300, 784, 1000), (1000, 3072, 64), (5, 300, 1)]
pairs = [(rng.random((n, d), np.float32), rng.random((d, m), np.float32)) for n, d, m in shapes]
began, own = time.process_time(), time.thread_time()
while time.thread_time() - own < 0.5:
    for x, w in pairs:
        product(x, w)
print(time.process_time() - began - (time.thread_time() - own))
"""


def test_a_product_uses_no_other_threads() -> None:
    """NumPy's own product takes as much CPU time again in other threads, on two cores."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    ran = subprocess.run(
        [sys.executable, "-c", CPU_TIME_OF_OTHER_THREADS], capture_output=True, text=True, check=True, env=environment
    )
    assert float(ran.stdout) < 0.05  # seconds, besides 0.5 of the calling thread


WRONG: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any]]] = {
    "no reach": ("head.reach is None", lambda tensors: tensors.pop("head.reach")),
    "no mean": ("head.mean is None", lambda tensors: tensors.pop("head.mean")),
    "no anchors": ("head.projection is", lambda tensors: tensors.pop("head.anchors")),
    "anchors in a row": ("head.anchors is", lambda tensors: tensors["head.anchors"].resize_(179 * 64)),
    "one anchor less": ("head.projection is", lambda tensors: tensors["head.anchors"].resize_(178, 64)),
    "anchors of less": ("head.anchors is", lambda tensors: tensors["head.anchors"].resize_(179, 63)),
    "no anchor at all": ("head.anchors is", lambda tensors: tensors.update({"head.anchors": torch.tensor(1.0)})),
    "a negative reach": ("head.reach has numbers that are not positive", lambda tensors: tensors["head.reach"].neg_()),
}


@pytest.mark.parametrize(("reason", "change"), WRONG.values(), ids=WRONG)
def test_a_damaged_graph_is_refused(
    tmp_path: Path, graph: Hasher, reason: str, change: Callable[[dict[str, Tensor]], Any]
) -> None:
    graph.save(tmp_path / "model")
    stored = Hasher.load(tmp_path / "model")
    assert stored.fingerprint == graph.fingerprint and (stored.encode(PIXELS) == graph.encode(PIXELS)).all()
    tensors = {name: tensor.clone() for name, tensor in load_file(tmp_path / "model" / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(HashretError, match=rf"is damaged \({reason}"):
        Hasher.load(tmp_path / "model")
