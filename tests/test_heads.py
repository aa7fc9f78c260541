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
from hashret.heads import heads
from hashret.heads.anchors import STEPS, anchors_for, graph_coordinates, k_means, lifted_rotation, ties
from hashret.heads.heads import CLEAR, HEADS, Head, check_head

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
    bits = head.margins(torch.from_numpy(values).double()) > 0
    for column, threshold, bit in zip(values.T.astype(np.float64), head.threshold.tolist(), bits.T, strict=True):
        distinct = sorted({float(value) for value in column})  # −0.0 is 0.0
        if len(distinct) == 1:
            assert threshold > distinct[0] and not bit.any()
            continue
        midpoints = [(a + b) / 2 for a, b in pairwise(distinct)]
        assert threshold in midpoints and threshold not in distinct
        assert (bit.numpy() == (column > threshold)).all()
        if name == "median":
            imbalance = [abs(int((column > m).sum()) - len(column) / 2) for m in midpoints]
            assert abs(int(bit.sum()) - len(column) / 2) == min(imbalance)
        elif distinct[0] <= 0 < distinct[-1]:
            assert (bit.numpy() == (column > 0)).all()


def test_the_unit_of_a_margin_is_a_standard_deviation() -> None:
    values = np.random.default_rng(0).normal(3, 5, (2000, 8)).astype(np.float32)
    head = HEADS["median"](values, 8, 0)
    assert np.allclose(head.margins(torch.from_numpy(values)).std(0), 1, atol=0.01)


@pytest.mark.parametrize("name", HEADS)
def test_a_constant_column_gives_a_constant_zero(name: str) -> None:
    values = np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32)
    values[:, 3] = values[:, 11] = 7.25
    if name in ("sign", "median"):
        bits = HEADS[name](values, 16, 0).margins(torch.from_numpy(values)) > 0
        assert not bits[:, [3, 11]].any() and bits[:, 2].any()
    head = HEADS[name](np.full((100, 16), 0.5, np.float32), 16, 0)
    assert not (head.margins(torch.full((2, 16), 0.5)) > 0).any()


@pytest.mark.parametrize(("images", "numbers"), [(300, 64), (60, 64), (80, 4800)])
def test_pca_is_that_of_scikit_learn(images: int, numbers: int) -> None:
    generator = np.random.default_rng(0)
    spectrum = 0.8 ** np.arange(min(images, numbers))  # components well apart, so that they are the same
    mixing = generator.normal(size=(len(spectrum), numbers))
    values = ((generator.normal(size=(images, len(spectrum))) * spectrum) @ mixing).astype(np.float32)
    head = HEADS["pca"](values, 8, 0)
    judge = PCA(8, svd_solver="full").fit(values)
    assert head.mean is not None and head.projection is not None
    assert np.allclose(head.mean, judge.mean_, atol=1e-5)
    cosines = (torch.from_numpy(judge.components_).double() * head.projection.T).sum(1)
    assert np.allclose(cosines.abs(), 1, atol=1e-4)
    expected = judge.transform(values) * cosines.sign().numpy()
    sure = np.abs(expected) > 1e-2 * expected.std(0)
    bits = (head.margins(torch.from_numpy(values)) > 0).numpy()
    assert (bits == (expected > 0))[sure].all()


def quantisation_error(values: Tensor, head: Head) -> float:
    assert head.mean is not None and head.projection is not None
    projected = (values.double() - head.mean) @ head.projection
    return float((projected - projected.sign()).square().mean())


def test_itq_rotates_the_components_nearer_to_their_signs() -> None:
    values = 3 * torch.from_numpy(DIGITS[:1000]).flatten(1)
    pca, itq = HEADS["pca"](values.numpy(), 16, 0), HEADS["itq"](values.numpy(), 16, 0)
    assert itq.projection is not None and pca.projection is not None
    at_random = replace(pca, projection=pca.projection @ torch.linalg.qr(torch.randn(16, 16).double()).Q)
    assert quantisation_error(values, itq) < 0.95 * quantisation_error(values, at_random)
    assert quantisation_error(values, itq) < 0.8 * quantisation_error(values, pca)
    assert torch.allclose(itq.projection.T @ itq.projection, torch.eye(16, dtype=torch.float64), atol=1e-5)
    inside = pca.projection @ (pca.projection.T @ itq.projection)  # in the space of the components
    assert torch.allclose(inside, itq.projection, atol=1e-5)


def test_lsh_halves_the_angle_into_bits() -> None:
    """The share of differing bits of two vectors is their angle over π (Charikar 2002)."""
    generator = np.random.default_rng(0)
    values = generator.normal(size=(4000, 24)).astype(np.float32)
    values -= values.mean(0)
    bits = (HEADS["lsh"](values, 1024, 0).margins(torch.from_numpy(values[:40])) > 0).numpy()
    unit = values[:40] / np.linalg.norm(values[:40], axis=1, keepdims=True)
    angles = np.arccos(np.clip(unit @ unit.T, -1, 1)) / np.pi
    shares = (bits[:, None] != bits[None]).mean(2)
    assert np.abs(shares - angles).max() < 0.1 and np.abs(shares - angles).mean() < 0.02


@pytest.mark.parametrize("name", HEADS)
def test_a_head_depends_on_its_values_and_seed_alone(name: str) -> None:
    values = np.random.default_rng(0).normal(size=(100, 16)).astype(np.float32)

    def fitted(seed: int) -> dict[str, list[float]]:
        torch.manual_seed(np.random.default_rng().integers(1000))
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
    head = Head(torch.tensor([0.5, 0.5, 0.5]).double(), torch.tensor([2.0, 2.0, 2.0]).double())
    steady = head.steadied(torch.tensor([1e-6, 1e-3, 1.0]), doubt=1e-4)
    assert steady.scale.tolist() == pytest.approx([2.0, 200.0, 2e5])
    assert steady.threshold.tolist() == pytest.approx([0.5, 0.5, 2e5 + 0.5])
    around = head.threshold + head.scale * torch.linspace(-5, 5, 21).double()[:, None]
    assert not (steady.margins(around)[:, 2] > -0.9).any()
    assert ((steady.margins(around)[:, :2] > 0) == (head.margins(around)[:, :2] > 0)).all()


# Anchor graphs


def digits(images: int = 1797) -> Tensor:
    return torch.from_numpy(DIGITS[:images]).flatten(1)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def some_anchors(m: int = 60) -> tuple[Tensor, Tensor]:
    """Anchors among the digits, and a reach that none of them is within."""
    return k_means(digits(), m, seeded()), torch.tensor(1e-9)


def test_centres_are_as_good_as_those_of_scikit_learn() -> None:
    anchors, _ = some_anchors()
    judge = KMeans(60, init="random", n_init=5, random_state=0).fit(DIGITS.reshape(-1, 64))
    inertia = euclidean_distances(digits(), anchors, squared=True).min(1).sum()
    assert anchors.shape == (60, 64) and inertia < 1.05 * judge.inertia_


def test_centres_are_distinct_whatever_the_values_are() -> None:
    few = torch.tensor([[0.0, 1], [2, 3], [4, 5]]).repeat(50, 1)
    assert k_means(few, 20, seeded()).tolist() == [[0, 1], [2, 3], [4, 5]]


def test_there_are_as_many_anchors_as_images_and_memory_allow() -> None:
    shapes = [(2, 64), (100, 64), (1797, 64), (60_000, 784), (10**6, 784), (60_000, 3 * 224 * 224), (9, 2**28)]
    assert [anchors_for(*shape) for shape in shapes] == [8, 10, 179, 1000, 1000, 111, 8]


def test_an_image_is_tied_to_its_nearest_anchors_by_how_much_nearer_they_are_than_the_next() -> None:
    anchors, reach = some_anchors()
    z = ties(digits(200).double(), anchors.double(), reach)
    for row, distances in zip(
        z.numpy(), euclidean_distances(digits(200).double(), anchors.double(), squared=True), strict=True
    ):
        nearest = np.argsort(distances)[:4]
        weights = distances[nearest[3]] - distances[nearest[:3]]
        expected = np.zeros(60)
        expected[nearest[:3]] = weights / weights.sum()
        assert np.allclose(row, expected, atol=1e-9)


def test_ties_do_not_jump_where_one_anchor_takes_the_place_of_another() -> None:
    anchors, _ = some_anchors()
    reach, patterns = torch.tensor(0.5), 0
    for start, end in ((0, 1), (5, 90), (17, 300)):
        way = torch.linspace(0, 1, 20_001, dtype=torch.float64)[:, None]
        z = ties(digits()[start] * (1 - way) + digits()[end] * way, anchors.double(), reach)
        assert z.diff(dim=0).abs().max() < 2e-3 and (z.sum(1) <= 1 + 1e-9).all()
        patterns += int((z > 0).diff(dim=0).any(1).sum())
    assert patterns > 10  # in which an image was tied, one after the other


def test_an_image_between_all_its_nearest_anchors_is_tied_to_none() -> None:
    """Rounding decides which of them are the nearest, and there must be nothing to decide."""
    anchors = torch.cat([torch.eye(6), -torch.eye(6)])
    centre = torch.zeros(1, 6)
    assert not ties(centre, anchors, torch.tensor(0.1)).any()
    near = ties(centre + 1e-6 * torch.randn(50, 6, generator=seeded()), anchors, torch.tensor(0.1))
    assert near.max() < 1e-3


def test_cosines_of_anchors_are_those_of_a_diffusion() -> None:
    """A walk from anchor to image to anchor, of as many steps, without any eigenvectors."""
    anchors, reach = some_anchors()
    z = ties(digits(), anchors, reach).double().numpy()
    degree = z.sum(0)
    walk = z.T @ z / degree[:, None]
    assert np.allclose(walk.sum(1), 1, atol=1e-5)
    arrived = np.linalg.matrix_power(walk, 2 * STEPS - 1) / degree - 1 / degree.sum()
    length = np.sqrt(np.diag(arrived))
    coordinates, clear = graph_coordinates(digits(), anchors, reach, 60)
    assert clear == pytest.approx(np.sort(np.linalg.eigvals(walk).real)[-2] ** (2 * STEPS), rel=1e-4)
    assert 4 < coordinates.shape[1] < 30
    assert np.allclose(coordinates @ coordinates.T, arrived / np.outer(length, length), atol=0.02)


def test_fewer_coordinates_are_the_first_eigenvectors_of_the_walk() -> None:
    anchors, reach = some_anchors()
    z = ties(digits(), anchors, reach).double().numpy()
    eigenvalues, vectors = np.linalg.eig(z.T @ z / z.sum(0)[:, None])
    first = np.argsort(-eigenvalues.real)[1:4]
    kept = vectors.real[:, first] / np.sqrt((vectors.real[:, first] ** 2 * z.sum(0)[:, None]).sum(0))
    kept *= eigenvalues.real[first] ** (STEPS - 0.5)
    kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    coordinates, _ = graph_coordinates(digits(), anchors, reach, 3)
    assert np.allclose(coordinates.abs(), np.abs(kept), atol=1e-4)  # the sign of an eigenvector is anyone's


def test_a_lifted_rotation_is_that_of_procrustes_in_as_many_dimensions_as_bits() -> None:
    values = torch.randn(400, 5, generator=seeded())
    lift = torch.linalg.qr(torch.randn(16, 5, generator=torch.Generator().manual_seed(1))).Q.T.double().numpy()
    at_random = lift.copy()
    for _ in range(50):
        lifted = values.double().numpy() @ lift
        lift = lift @ orthogonal_procrustes(lifted, np.sign(lifted))[0]
    found = lifted_rotation(values, 16, torch.Generator().manual_seed(1)).numpy()
    assert np.allclose(found @ found.T, np.eye(5), atol=1e-5)

    def quantisation(projection: NDArray[np.float64]) -> float:
        lifted = values.numpy() @ projection
        return float(np.abs(lifted).sum())  # which is larger, the nearer the signs are

    assert quantisation(found) == pytest.approx(quantisation(lift), rel=1e-2)
    assert quantisation(found) > 1.01 * quantisation(at_random)


def test_images_that_nothing_connects_have_codes_of_their_own() -> None:
    generator = np.random.default_rng(0)
    centres = 100 * generator.normal(size=(5, 20))
    values = np.concatenate([centre + generator.normal(size=(80, 20)) for centre in centres]).astype(np.float32)
    bits = (HEADS["anchor-graph"](values, 32, 0).margins(torch.from_numpy(values)) > 0).numpy().reshape(5, 80, 32)
    assert len(np.unique(bits[:, 0], axis=0)) == 5
    assert (bits == bits[:, :1]).mean() > 0.99


@pytest.mark.parametrize("name", ["anchor-graph", "anchor-itq"])
@pytest.mark.parametrize("images", [2, 3, 5, 12])
@pytest.mark.parametrize("bits", [8, 64, 128])
def test_a_graph_of_hardly_any_images_is_one(name: str, images: int, bits: int) -> None:
    values = digits(images).numpy()
    margins = HEADS[name](values, bits, 0).margins(torch.from_numpy(values))
    assert margins.shape == (images, bits) and margins.isfinite().all()
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


def both(values: Tensor, bits: int) -> tuple[Head, Tensor]:
    """The head `anchor-itq` of values (n, d), and what it projects: centred, and of unit length but for short ones."""
    head = HEADS["anchor-itq"](values.numpy(), bits, 0)
    assert head.mean is not None and head.length is not None
    centred = values.double() - head.mean
    lengths = centred.norm(dim=1, keepdim=True)
    return head, centred / torch.maximum(lengths, head.length)


@pytest.mark.parametrize(("bits", "weight"), [(64, 1 / 3), (96, 1 / 3), (16, 1 / 12)])
def test_distances_are_those_in_the_graph_and_of_the_components_together(bits: int, weight: float) -> None:
    head, units = both(digits(), bits)
    assert head.anchors is not None and head.reach is not None and head.projection is not None
    numbers = head.numbers(digits().double())
    r = int(torch.linalg.matrix_rank(head.projection))
    assert 4 < r <= bits // 2 and head.detail is not None
    _, clear = graph_coordinates(units.float(), head.anchors.float(), head.reach.float(), bits // 2)
    assert CLEAR < clear < 1
    assert torch.linalg.norm(head.projection, dim=1) == pytest.approx(np.full(len(head.anchors), clear), rel=1e-3)
    components = PCA(min(64, bits - r), svd_solver="full").fit(units)
    placed = ties(units, head.anchors, head.reach) @ head.projection
    details = weight**0.5 * torch.from_numpy(components.transform(units.numpy()))
    apart = torch.cdist(placed, placed).square() + torch.cdist(details, details).square()
    assert np.allclose(torch.cdist(numbers, numbers).square(), apart, atol=1e-5)


@pytest.mark.parametrize(("clear", "length"), [(0.9, 0.9), (0.31, 0.31), (0.29, 0.3), (0.08, 0.3), (0.07, None)])
def test_coordinates_in_a_faint_graph_count_for_a_little_and_in_one_that_shows_nothing_not_at_all(
    clear: float, length: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_clear_as_told(*asked: Any) -> tuple[Tensor, float]:
        return graph_coordinates(*asked)[0], clear

    monkeypatch.setattr(heads, "graph_coordinates", as_clear_as_told)
    head, _ = both(digits(), 64)
    if length is None:
        assert head.anchors is None
    else:
        assert head.anchors is not None and head.projection is not None
        lengths = torch.linalg.norm(head.projection, dim=1)
        assert lengths == pytest.approx(np.full(len(head.anchors), length), rel=1e-3)


def test_bits_are_signs_about_the_mean_of_the_components() -> None:
    head, units = both(digits(), 32)
    assert head.detail is not None and head.anchors is not None and head.reach is not None
    assert head.projection is not None
    placed = ties(units, head.anchors, head.reach) @ head.projection
    signs = placed + (units - units.mean(0)) @ head.detail > 0
    found = head.margins(digits().double()) > 0
    assert (signs == found).double().mean() > 0.9999  # but for numbers next to nothing


def test_vectors_about_the_mean_change_their_bits_gradually() -> None:
    head, _ = both(digits(), 32)
    assert head.mean is not None and head.length is not None
    way = torch.linspace(-1, 1, 4001).double()[:, None]
    step = head.margins(head.mean + way * head.length * torch.eye(64)[20]).diff(dim=0)
    assert step.abs().max() < 0.02


def test_where_there_are_no_kinds_of_images_the_graph_is_left_out() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32))
    head, units = both(values, 64)
    assert head.anchors is None and head.detail is None
    numbers = head.numbers(values.double())
    assert torch.allclose(torch.cdist(numbers, numbers), torch.cdist(units, units) / 3**0.5, atol=1e-6)


def test_bits_that_a_network_has_learned_are_kept() -> None:
    """But for the few whose numbers lie about zero; a random start forgets them."""
    rng = np.random.default_rng(0)
    learned = rng.choice([-1.0, 1.0], (3000, 64))
    values = torch.from_numpy((learned + rng.normal(size=learned.shape) / 3).astype(np.float32))
    for name, least, most in (("anchor-itq", 0.98, 1), ("itq", 0, 0.7)):
        found = HEADS[name](values.numpy(), 64, 0).margins(values).numpy() > 0
        assert least <= (found == (learned > 0)).mean() <= most


def test_a_head_without_its_graph_is_stored(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (500, 8, 8), np.uint8)
    hasher = Hasher("lsh", 64, "anchor-itq").fit(images)
    hasher.save(tmp_path / "model")
    assert hasher._parts()[2].anchors is None
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
            reach = 40 * (1 if i < 20 and j == 0 else 2)
            offsets[2 * j, [up, down]] = reach, -reach
            offsets[2 * j + 1, [down, up]] = reach, -reach
        anchors.append(image.reshape(1, 64) + offsets)
        images.append(image)
    assert head.mean is not None and head.projection is not None
    placed = torch.from_numpy(np.concatenate(anchors) / 255) - head.mean
    projection = torch.randn(len(placed), 32, generator=seeded()).double()
    hard = Hasher("anchor-graph", 32)
    hard._fitted = preprocessing, member, replace(head, anchors=placed, projection=projection)
    return hard, np.concatenate([np.stack(images).astype(np.uint8), PIXELS[100:300]])


def test_codes_are_the_same_with_images_on_ties_of_anchors(graph: Hasher) -> None:
    hard, images = tied(graph)
    _, member, head = hard._parts()
    assert head.mean is not None and head.anchors is not None
    outputs = member.outputs(torch.from_numpy(images[:40] / 255)[:, None]) - head.mean
    nearest = np.sort(euclidean_distances(outputs, head.anchors), axis=1)
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
        x = torch.from_numpy(images / 255).flatten(1)
        head = hasher._parts()[2]
        assert (head.margins(x.float()) - head.margins(x)).abs().max() < 1e-4


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
