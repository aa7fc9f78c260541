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
    STEPS,
    AnchorGraph,
    Anchors,
    anchors_for,
    graph_coordinates,
    k_means,
    lifted_rotation,
)
from hashret.heads.anchor_itq import CLEAR
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
def test_thresholds_lie_midway_between_values_and_never_on_one(values: NDArray[np.float32], name: str) -> None:
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


@pytest.mark.parametrize(("images", "numbers"), [(300, 64), (60, 64), (80, 4800)])
def test_pca_is_that_of_scikit_learn(images: int, numbers: int) -> None:
    generator = np.random.default_rng(0)
    spectrum = 0.8 ** np.arange(min(images, numbers))  # components well apart, so that they are the same
    mixing = generator.normal(size=(len(spectrum), numbers))
    values = ((generator.normal(size=(images, len(spectrum))) * spectrum) @ mixing).astype(np.float32)
    head = HEADS["pca"](values, 8, 0)
    judge = PCA(8, svd_solver="full").fit(values)
    linear = linear_of(head)
    assert np.allclose(linear.mean, judge.mean_, atol=1e-5)
    cosines = (judge.components_.astype(np.float64) * linear.matrix.T).sum(1)
    assert np.allclose(np.abs(cosines), 1, atol=1e-4)
    expected = judge.transform(values) * np.sign(cosines)
    sure = np.abs(expected) > 1e-2 * expected.std(0)
    bits = head.margins(values) > 0
    assert (bits == (expected > 0))[sure].all()


def linear_of(head: Head) -> Linear:
    assert isinstance(head.projection, Linear)
    return head.projection


def quantisation_error(values: Floats, linear: Linear) -> float:
    projected = linear.project(values.astype(np.float64))
    return float(np.square(projected - np.sign(projected)).mean())


def test_itq_rotates_the_components_nearer_to_their_signs() -> None:
    values = 3 * digits(1000)
    pca, itq = (linear_of(HEADS[name](values, 16, 0)) for name in ("pca", "itq"))
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    at_random = replace(pca, matrix=pca.matrix @ turn)
    assert quantisation_error(values, itq) < 0.95 * quantisation_error(values, at_random)
    assert quantisation_error(values, itq) < 0.8 * quantisation_error(values, pca)
    assert np.allclose(itq.matrix.T @ itq.matrix, np.eye(16), atol=1e-5)
    inside = pca.matrix @ (pca.matrix.T @ itq.matrix)  # in the space of the components
    assert np.allclose(inside, itq.matrix, atol=1e-5)


def test_lsh_halves_the_angle_into_bits() -> None:
    """The share of differing bits of two vectors is their angle over π (Charikar 2002), seen from their mean."""
    generator = np.random.default_rng(0)
    values = generator.normal(50, 1, size=(4000, 24)).astype(np.float32)
    bits = HEADS["lsh"](values, 1024, 0).margins(values[:40]) > 0
    centred = values[:40] - values.mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    angles = np.arccos(np.clip(unit @ unit.T, -1, 1)) / np.pi
    shares = (bits[:, None] != bits[None]).mean(2)
    assert np.abs(shares - angles).max() < 0.1 and np.abs(shares - angles).mean() < 0.02


@pytest.mark.parametrize("name", HEADS)
def test_a_head_depends_on_its_values_and_seed_alone(name: str) -> None:
    values = np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32)

    def fitted(seed: int) -> dict[str, list[float]]:
        np.random.seed(np.random.default_rng().integers(1000))  # noqa: NPY002
        return {key: tensor.tolist() for key, tensor in HEADS[name](values, 16, seed).tensors().items()}

    assert fitted(0) == fitted(0)
    assert (fitted(0) != fitted(1)) == (name in ("lsh", "itq", "anchor-graph", "anchor-itq"))


@pytest.mark.parametrize(
    ("head", "images", "numbers", "bits", "reason"),
    [
        ("sign", 100, 64, 32, "64 numbers cannot give 32 bits.*--head itq"),
        ("median", 100, 32, 64, "32 numbers cannot give 64 bits"),
        ("pca", 100, 32, 64, "32 numbers an image cannot give 64 bits.*fewer bits or --head lsh"),
        ("itq", 63, 784, 64, "63 images cannot give 64 bits"),
        ("pca", 63, 784, 64, "63 images cannot give 64 bits"),
        ("lsh", 1, 784, 64, "one image is not enough"),
    ],
)
def test_impossible_combinations_are_refused(head: str, images: int, numbers: int, bits: int, reason: str) -> None:
    with pytest.raises(HashretError, match=reason):
        check_head(head, images, numbers, bits)


def test_possible_combinations_are_not_refused() -> None:
    with pytest.raises(ValueError, match="no head 'none'; choose one of sign, median, lsh, pca, itq"):
        check_head("none", 100, 64, 64)
    for head in HEADS:
        check_head(head, 64, 64, 64)
    check_head("lsh", 2, 3, 1024)


def test_a_column_of_rounding_errors_becomes_a_constant_zero_and_a_rough_one_wider() -> None:
    head = Head(np.full(3, 0.5), np.full(3, 2.0))
    steady = head.stabilised(np.array([1e-6, 1e-3, 1.0]), doubt=1e-4)
    assert steady.scale.tolist() == pytest.approx([2.0, 200.0, 2e5])
    assert steady.threshold.tolist() == pytest.approx([0.5, 0.5, 2e5 + 0.5])
    around = head.threshold + head.scale * np.linspace(-5, 5, 21)[:, None]
    assert not (steady.margins(around)[:, 2] > -0.9).any()
    assert ((steady.margins(around)[:, :2] > 0) == (head.margins(around)[:, :2] > 0)).all()


# Anchor graphs


def digits(images: int = 1797) -> NDArray[np.float32]:
    return np.ascontiguousarray(DIGITS[:images].reshape(images, -1))


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def some_anchors(m: int = 60, reach: float = 1e-9) -> Anchors:
    """Anchors among the digits, and a reach that none of them is within."""
    return Anchors(k_means(digits(), m, seeded()), np.array(reach, np.float32))


def test_centres_are_as_good_as_those_of_scikit_learn() -> None:
    anchors = some_anchors().places
    judge = KMeans(60, init="random", n_init=5, random_state=0).fit(DIGITS.reshape(-1, 64))
    inertia = euclidean_distances(digits(), anchors, squared=True).min(1).sum()
    assert anchors.shape == (60, 64) and inertia < 1.05 * judge.inertia_


def test_centres_are_distinct_whatever_the_values_are() -> None:
    few = np.tile(np.array([[0.0, 1], [2, 3], [4, 5]], np.float32), (50, 1))
    assert k_means(few, 20, seeded()).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_there_are_as_many_anchors_as_images_and_memory_allow() -> None:
    shapes = [(2, 64), (100, 64), (1797, 64), (60_000, 784), (10**6, 784), (60_000, 3 * 224 * 224), (9, 2**28)]
    assert [anchors_for(*shape) for shape in shapes] == [8, 10, 179, 1000, 1000, 111, 8]


def test_an_image_is_tied_to_its_nearest_anchors_by_how_much_nearer_they_are_than_the_next() -> None:
    anchors, images = some_anchors().to(np.float64), digits(200).astype(np.float64)
    z = anchors.ties(images)
    for row, distances in zip(z, euclidean_distances(images, anchors.places, squared=True), strict=True):
        nearest = np.argsort(distances)[:4]
        weights = distances[nearest[3]] - distances[nearest[:3]]
        expected = np.zeros(60)
        expected[nearest[:3]] = weights / weights.sum()
        assert np.allclose(row, expected, atol=1e-9)


def test_ties_do_not_jump_where_one_anchor_takes_the_place_of_another() -> None:
    anchors, patterns = some_anchors(reach=0.5).to(np.float64), 0
    for start, end in ((0, 1), (5, 90), (17, 300)):
        way = np.linspace(0, 1, 20_001)[:, None]
        z = anchors.ties(digits()[start] * (1 - way) + digits()[end] * way)
        assert np.abs(np.diff(z, axis=0)).max() < 2e-3 and (z.sum(1) <= 1 + 1e-9).all()
        patterns += int(np.diff(z > 0, axis=0).any(1).sum())
    assert patterns > 10  # in which an image was tied, one after the other


def test_an_image_between_all_its_nearest_anchors_is_tied_to_none() -> None:
    """Rounding decides which of them are the nearest, and there must be nothing to decide."""
    anchors = Anchors(np.concatenate([np.eye(6), -np.eye(6)]).astype(np.float32), np.array(0.1, np.float32))
    assert not anchors.ties(np.zeros((1, 6), np.float32)).any()
    near = anchors.ties((1e-6 * seeded().normal(size=(50, 6))).astype(np.float32))
    assert near.max() < 1e-3


def test_cosines_of_anchors_are_those_of_a_diffusion() -> None:
    """A walk from anchor to image to anchor, of as many steps, without any eigenvectors."""
    anchors = some_anchors()
    z = anchors.ties(digits()).astype(np.float64)
    degree = z.sum(0)
    walk = z.T @ z / degree[:, None]
    assert np.allclose(walk.sum(1), 1, atol=1e-5)
    arrived = np.linalg.matrix_power(walk, 2 * STEPS - 1) / degree - 1 / degree.sum()
    length = np.sqrt(np.diag(arrived))
    coordinates, clear = graph_coordinates(digits(), anchors, 60)
    assert clear == pytest.approx(np.sort(np.linalg.eigvals(walk).real)[-2] ** (2 * STEPS), rel=1e-4)
    assert 4 < coordinates.shape[1] < 30
    assert np.allclose(coordinates @ coordinates.T, arrived / np.outer(length, length), atol=0.02)


def test_fewer_coordinates_are_the_first_eigenvectors_of_the_walk() -> None:
    anchors = some_anchors()
    z = anchors.ties(digits()).astype(np.float64)
    eigenvalues, vectors = np.linalg.eig(z.T @ z / z.sum(0)[:, None])
    first = np.argsort(-eigenvalues.real)[1:4]
    kept = vectors.real[:, first] / np.sqrt((vectors.real[:, first] ** 2 * z.sum(0)[:, None]).sum(0))
    kept *= eigenvalues.real[first] ** (STEPS - 0.5)
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    coordinates, _ = graph_coordinates(digits(), anchors, 3)
    assert np.allclose(np.abs(coordinates), np.abs(kept), atol=1e-4)  # the sign of an eigenvector is anyone's


def test_a_lifted_rotation_is_that_of_procrustes_in_as_many_dimensions_as_bits() -> None:
    values = seeded().normal(size=(400, 5)).astype(np.float32)
    lift = np.linalg.qr(seeded(1).normal(size=(16, 5)))[0].T
    at_random = lift.copy()
    for _ in range(50):
        lifted = values.astype(np.float64) @ lift
        lift = lift @ orthogonal_procrustes(lifted, np.sign(lifted))[0]
    found = lifted_rotation(values, 16, seeded(1))
    assert np.allclose(found @ found.T, np.eye(5), atol=1e-5)

    def quantisation(projection: Floats) -> float:
        return float(np.abs(values @ projection).sum())  # which is larger, the nearer the signs are

    assert quantisation(found) == pytest.approx(quantisation(lift), rel=1e-2)
    assert quantisation(found) > 1.01 * quantisation(at_random)


def test_images_that_nothing_connects_have_codes_of_their_own() -> None:
    generator = np.random.default_rng(0)
    centres = 100 * generator.normal(size=(5, 20))
    values = np.concatenate([centre + generator.normal(size=(80, 20)) for centre in centres]).astype(np.float32)
    bits = (HEADS["anchor-graph"](values, 32, 0).margins(values) > 0).reshape(5, 80, 32)
    assert len(np.unique(bits[:, 0], axis=0)) == 5
    assert (bits == bits[:, :1]).mean() > 0.99


@pytest.mark.parametrize("name", ["anchor-graph", "anchor-itq"])
@pytest.mark.parametrize("images", [2, 3, 5, 12])
@pytest.mark.parametrize("bits", [8, 64, 128])
def test_a_graph_of_hardly_any_images_is_one(name: str, images: int, bits: int) -> None:
    values = digits(images)
    margins = HEADS[name](values, bits, 0).margins(values)
    assert margins.shape == (images, bits) and np.isfinite(margins).all()
    assert len(np.unique(margins > 0, axis=0)) > 1


def retrieval(name: str, bits: int) -> float:
    """Mean average precision of digits that were not learned from, where like is what has the same label."""
    hasher = Hasher("lsh", bits, name).fit(PIXELS[:1400])
    items, queries = (2.0 * np.unpackbits(hasher.encode(p), axis=1) - 1 for p in (PIXELS[:1400], PIXELS[1400:]))
    found = zip(queries @ items.T, LABELS[1400:], strict=True)
    return float(np.mean([average_precision_score(LABELS[:1400] == label, score) for score, label in found]))


@pytest.mark.parametrize("bits", [16, 64])
def test_an_anchor_graph_finds_far_more_than_projections_do(bits: int) -> None:
    graph, itq, lsh = (retrieval(name, bits) for name in ("anchor-graph", "itq", "lsh"))
    assert graph > itq + 0.1 and graph > lsh + 0.2 and graph > 0.7


# Both kinds of numbers


def both(values: NDArray[np.float32], bits: int) -> tuple[Head, NDArray[np.float64]]:
    """The head `anchor-itq` of values (n, d), and what it projects: centred, and of unit length but for short ones."""
    head = HEADS["anchor-itq"](values, bits, 0)
    assert isinstance(head.projection, AnchorGraph | Linear) and head.projection.length is not None
    centred = values.astype(np.float64) - head.projection.mean
    lengths = np.linalg.norm(centred, axis=1, keepdims=True)
    return head, centred / np.maximum(lengths, head.projection.length)


def graph_of(head: Head) -> AnchorGraph:
    assert isinstance(head.projection, AnchorGraph)
    return head.projection


@pytest.mark.parametrize(("bits", "weight"), [(64, 1 / 3), (96, 1 / 3), (16, 1 / 12)])
def test_distances_are_those_in_the_graph_and_of_the_components_together(bits: int, weight: float) -> None:
    head, units = both(digits(), bits)
    graph = graph_of(head)
    numbers = head.project(digits().astype(np.float64))
    r = int(np.linalg.matrix_rank(graph.coordinates))
    assert 4 < r <= bits // 2 and graph.detail is not None
    _, clear = graph_coordinates(units.astype(np.float32), graph.anchors.to(np.float32), bits // 2)
    assert CLEAR < clear < 1
    lengths = np.linalg.norm(graph.coordinates, axis=1)
    assert lengths == pytest.approx(np.full(len(lengths), clear), rel=1e-3)
    components = PCA(min(64, bits - r), svd_solver="full").fit(units)
    placed = graph.anchors.ties(units) @ graph.coordinates
    details = weight**0.5 * components.transform(units)
    apart = euclidean_distances(placed, squared=True) + euclidean_distances(details, squared=True)
    assert np.allclose(euclidean_distances(numbers, squared=True), apart, atol=1e-5)


@pytest.mark.parametrize(("clear", "length"), [(0.9, 0.9), (0.31, 0.31), (0.29, 0.3), (0.08, 0.3), (0.07, None)])
def test_coordinates_in_a_faint_graph_count_for_a_little_and_in_one_that_shows_nothing_not_at_all(
    clear: float, length: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_clear_as_given(*arguments: Any) -> tuple[NDArray[np.float64], float]:
        return graph_coordinates(*arguments)[0], clear

    monkeypatch.setattr("hashret.heads.anchor_graph.graph_coordinates", as_clear_as_given)
    head, _ = both(digits(), 64)
    if length is None:
        assert isinstance(head.projection, Linear)
    else:
        lengths = np.linalg.norm(graph_of(head).coordinates, axis=1)
        assert lengths == pytest.approx(np.full(len(lengths), length), rel=1e-3)


def test_bits_are_signs_about_the_mean_of_the_components() -> None:
    head, units = both(digits(), 32)
    graph = graph_of(head)
    placed = graph.anchors.ties(units) @ graph.coordinates
    assert graph.detail is not None
    signs = placed + (units - units.mean(0)) @ graph.detail > 0
    found = head.margins(digits().astype(np.float64)) > 0
    assert (signs == found).mean() > 0.9999  # but for numbers next to nothing


def test_vectors_about_the_mean_change_their_bits_gradually() -> None:
    head, _ = both(digits(), 32)
    graph = graph_of(head)
    assert graph.length is not None
    way = np.linspace(-1, 1, 4001)[:, None]
    step = np.diff(head.margins(graph.mean + way * graph.length * np.eye(64)[20]), axis=0)
    assert np.abs(step).max() < 0.02


def test_where_there_are_no_kinds_of_images_the_graph_is_left_out() -> None:
    values = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    head, units = both(values, 64)
    assert isinstance(head.projection, Linear)
    numbers = head.project(values.astype(np.float64))
    assert np.allclose(euclidean_distances(numbers), euclidean_distances(units) / 3**0.5, atol=1e-6)


def test_bits_that_a_network_has_learned_are_kept() -> None:
    """But for the few whose numbers lie about zero; a random start forgets them."""
    rng = np.random.default_rng(0)
    learned = rng.choice([-1.0, 1.0], (3000, 64))
    values = (learned + rng.normal(size=learned.shape) / 3).astype(np.float32)
    for name, least, most in (("anchor-itq", 0.98, 1), ("itq", 0, 0.7)):
        found = HEADS[name](values, 64, 0).margins(values) > 0
        assert least <= (found == (learned > 0)).mean() <= most


def test_a_head_without_its_graph_is_stored(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (500, 8, 8), np.uint8)
    hasher = Hasher("lsh", 64, "anchor-itq").fit(images)
    hasher.save(tmp_path / "model")
    assert isinstance(hasher._parts()[2].projection, Linear)
    assert np.array_equal(Hasher.load(tmp_path / "model").encode(images), hasher.encode(images))


def test_what_is_connected_is_found_first_and_yet_told_apart() -> None:
    assert retrieval("anchor-itq", 64) > max(retrieval("itq", 64) + 0.1, retrieval("anchor-graph", 64) - 0.05)
    codes = {name: Hasher("lsh", 64, name).fit(PIXELS).encode(PIXELS) for name in ("anchor-graph", "anchor-itq")}
    distinct = {name: len(np.unique(found, axis=0)) for name, found in codes.items()}
    assert distinct["anchor-itq"] > max(5 * distinct["anchor-graph"], 0.6 * len(PIXELS))


# A code depends on the image and the model alone


@pytest.fixture(scope="module")
def graph() -> Hasher:
    return Hasher("anchor-graph", 32).fit(PIXELS)


def tied(graph: Hasher) -> tuple[Hasher, NDArray[np.uint8]]:
    """Images, and a graph in which the first of them lie as near to the fourth anchor as to the third, others amid
    eight, and the rest wherever they do."""
    generator = np.random.default_rng(0)
    preprocessing, member, head = graph._parts()
    anchors, images = [], []
    for i, image in enumerate(PIXELS[:40].astype(np.float64)):
        away = generator.permutation(64)[:8].reshape(4, 2)
        offsets = np.zeros((8, 64))
        for j, (up, down) in enumerate(away):
            far = 40 * (1 if i < 20 and j == 0 else 2)
            offsets[2 * j, [up, down]] = far, -far
            offsets[2 * j + 1, [down, up]] = far, -far
        anchors.append(image.reshape(1, 64) + offsets)
        images.append(image)
    mean, reach = graph_of(head).mean, graph_of(head).anchors.reach
    placed = Anchors(np.concatenate(anchors) / 255 - mean, reach)
    projection = AnchorGraph(mean, placed, seeded().normal(size=(len(placed.places), 32)))
    hard = Hasher("anchor-graph", 32)
    hard._fitted = preprocessing, member, replace(head, projection=projection)
    return hard, np.concatenate([np.stack(images).astype(np.uint8), PIXELS[100:300]])


def test_codes_are_the_same_with_images_on_ties_of_anchors(graph: Hasher) -> None:
    hard, images = tied(graph)
    _, member, head = hard._parts()
    outputs = member.outputs(torch.from_numpy(images[:40] / 255)[:, None]).numpy() - graph_of(head).mean
    nearest = np.sort(euclidean_distances(outputs, graph_of(head).anchors.places), axis=1)
    assert np.allclose(nearest[:, 2], nearest[:, 3], atol=1e-9)
    expected = hard.encode(images)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for size in (1, 7, 256):
                codes = [hard.encode(images[i : i + size]) for i in range(0, len(images), size)]
                assert (np.concatenate(codes) == expected).all()
    finally:
        torch.set_num_threads(threads)


def test_float32_is_never_far_from_float64(graph: Hasher) -> None:
    """By less than what makes a bit doubtful: images of all kinds, and images amid their anchors."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8), np.uint8)
    for hasher, images in (tied(graph), (graph, PIXELS), (graph, noise)):
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
def test_a_product_in_blocks_is_that_of_matrices(n: int, d: int, m: int, dtype: type[Any]) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.integers(-9, 9, (n, d)).astype(dtype), rng.integers(-9, 9, (d, m)).astype(dtype)  # whose sums are exact
    assert product(x, w).dtype == dtype and np.array_equal(product(x, w), x @ w)
    assert np.array_equal(product(x, np.asfortranarray(w)), x @ w)


ALONE = """
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


def test_a_product_takes_no_time_of_other_threads() -> None:
    """Of which NumPy's own product takes as much again, on two cores."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "2"}
    ran = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True, env=environment)
    assert float(ran.stdout) < 0.05  # seconds of processors, beside 0.5 of the calling thread's own


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
