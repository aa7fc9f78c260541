from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from torch import Tensor

from hashret.errors import HashretError
from hashret.models.heads import HEADS, Head, check_head

DIGITS = (load_digits().images / 16).astype(np.float32)  # (1797, 8, 8) in [0, 1]

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
    assert (fitted(0) != fitted(1)) == (name in ("lsh", "itq"))


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
