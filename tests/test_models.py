import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

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
from torch.distributions import Bernoulli, Distribution, Normal, kl_divergence

from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.models import MODELS, Member
from hashret.models.augment import augment
from hashret.models.base import straight_through_sign
from hashret.models.contrastive import nt_xent
from hashret.models.denoising import CORRUPTIONS
from hashret.models.heads import HEADS, Head, check_head
from hashret.models.likelihoods import LIKELIHOODS
from hashret.models.networks import NETWORKS, folded
from hashret.models.vae import kl_to_standard_normal

LEARNED = [name for name, member in MODELS.items() if member.trainable]
SIZES = [(1, 1), (5, 7), (28, 28), (33, 17), (1, 64)]
STILL: dict[str, float] = {"crop": 1, "rotation": 0, "flip": 0, "light": 0, "erase": 0}  # views that change nothing
DIGITS = (load_digits().images / 16).astype(np.float32)  # (1797, 8, 8) in [0, 1]


def digits(channels: int, n: int = 200) -> Tensor:
    """Digits (n, channels, 8, 8); in colour, each channel is another function of them."""
    grey = torch.from_numpy(DIGITS[:n, None])
    return grey if channels == 1 else torch.cat([grey, 1 - grey, grey.square()], 1)


def build(name: str, shape: tuple[int, int, int], bits: int = 16, **parts: Any) -> Member:
    torch.manual_seed(0)
    return MODELS[name](shape, bits, **parts)


def total(member: Member, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return torch.stack(list(member.loss(x).values())).sum()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", LEARNED)
def test_a_member_learns_with_all_its_weights(name: str, network: str, channels: int) -> None:
    x = digits(channels)
    member = build(name, (channels, 8, 8), network=network, width=8)
    optimiser = torch.optim.Adam(member.parameters(), 3e-3)
    losses = []
    for step in range(30):
        loss = total(member, x)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if step == 0:
            for weight, tensor in member.named_parameters():
                assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), weight
        optimiser.step()
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", LEARNED)
def test_a_member_takes_images_of_any_size(name: str, network: str, size: tuple[int, int], channels: int) -> None:
    x = torch.rand(3, channels, *size)
    for likelihood in LIKELIHOODS:
        member = build(name, (channels, *size), 24, network=network, width=2, likelihood=likelihood)
        assert all(term.shape == () and term.isfinite() for term in member.loss(x).values())
        member.eval()
        assert member.outputs(x).shape == (3, 24) == (3, member.latent)
        remembered = member.reconstruct(x)
        assert remembered.shape == x.shape
        assert 0 <= remembered.min() <= remembered.max() <= 1


@pytest.mark.parametrize("bits", [8, 1024])
@pytest.mark.parametrize("name", MODELS)
def test_a_member_makes_the_narrowest_and_the_widest_codes(name: str, bits: int) -> None:
    bits = min(bits, 512) if MODELS[name].head == "itq" else bits  # its 1,024 take ten seconds
    images = np.random.default_rng(0).integers(0, 256, (1100, 33, 33), np.uint8)
    if MODELS[name].trainable:
        hasher = Hasher(name, bits, network="mlp", width=1).fit(images, steps=30)
    else:
        hasher = Hasher(name, bits).fit(images)
    codes = hasher.encode(images[:20])
    assert codes.shape == (20, bits // 8)
    assert len(np.unique(codes, axis=0)) > 7


def test_a_new_member_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class SparseAutoencoder(Member):
        def __init__(self, *args: Any, weight: float = 1.0, **parts: Any) -> None:
            super().__init__(*args, **parts)
            self.weight = weight

        def bottleneck(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return features, {"sparsity": self.weight * features.abs().sum(1).mean()}

    monkeypatch.setitem(MODELS, "sparse", SparseAutoencoder)
    images = (DIGITS[:200] * 255).astype(np.uint8)
    hasher = Hasher("sparse", 16, network="mlp", width=4, weight=2).fit(images, steps=5)
    assert set(hasher.training["terms"]) == {"reconstruction", "sparsity"}
    assert hasher.encode(images).shape == (200, 2)
    assert hasher.settings["weight"] == 2.0 and hasher.settings["likelihood"] == "bernoulli"


@pytest.mark.parametrize("network", NETWORKS)
def test_a_folded_network_gives_the_same_with_fewer_layers(network: str) -> None:
    model = NETWORKS[network].encoder((3, 10, 9), 16, 4)
    x = torch.rand(32, 3, 10, 9, dtype=torch.float64)
    model.double().train()(x)  # which gives the normalisations statistics that are not the ones they began with
    for norm in (layer for layer in model if isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d)):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    model.eval()
    quick = folded(model)
    assert not any(isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d) for layer in quick)
    torch.testing.assert_close(quick(x), model(x), rtol=1e-12, atol=1e-12)
    assert any(isinstance(layer, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d) for layer in model)  # it was not changed


def test_parts_that_do_not_exist_or_cannot_be_are_refused_with_those_that_can() -> None:
    for part, known in (("network", "mlp, conv"), ("likelihood", "gaussian, bernoulli"), ("corruption", "masking")):
        unknown: dict[str, Any] = {part: "none"}
        with pytest.raises(ValueError, match=f"no {part} 'none'.*{known}"):
            build("denoising", (1, 8, 8), **unknown)
    for name, wrong in (
        ("ae", {"latent": -1}),
        ("ae", {"width": 0}),
        ("vae", {"beta": -0.5}),
        ("vae", {"beta": math.nan}),
        ("denoising", {"strength": 1.5}),
        ("denoising", {"strength": math.nan}),
        ("contrastive", {"temperature": 0.0}),
        ("contrastive", {"reconstruction": -1.0}),
        ("contrastive", {"rotation": -1.0}),
        ("contrastive", {"crop": 0.0}),
        ("contrastive", {"crop": 1.5}),
        ("contrastive", {"flip": 1.5}),
        ("contrastive", {"light": math.nan}),
        ("contrastive", {"erase": -0.1}),
    ):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}.* not .*{next(iter(wrong.values()))}"):
            build(name, (1, 8, 8), **wrong)


# The variational autoencoder


def test_kl_is_that_of_the_distributions() -> None:
    mean, log_variance = torch.randn(2, 50, 7, dtype=torch.float64)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(-1)
    assert torch.allclose(kl_to_standard_normal(mean, log_variance), expected)


def test_the_vae_samples_its_posterior_and_can_learn_both_of_its_numbers() -> None:
    member = build("vae", (1, 8, 8), 8, network="mlp", width=1, beta=0.5)
    features = torch.tensor([3.0] * 8 + [math.log(4.0)] * 8).repeat(20_000, 1).requires_grad_()
    z, penalties = member.bottleneck(features)
    assert torch.allclose(z.mean(0), torch.tensor(3.0), atol=0.1)
    assert torch.allclose(z.std(0), torch.tensor(2.0), atol=0.1)
    kl = kl_divergence(Normal(3.0, 2.0), Normal(0.0, 1.0)) * 8
    assert torch.allclose(penalties["kl"], 0.5 * kl)
    z.sum().backward()  # type: ignore[no-untyped-call]
    assert features.grad is not None
    assert (features.grad[:, :8] == 1).all()
    assert torch.allclose(features.grad[:, 8:], (z - 3).detach() / 2, atol=1e-5)  # of 3 + exp(v / 2) · noise
    member.eval()
    assert (member.bottleneck(features)[0] == 3).all()


# Likelihoods


def log_prob(distribution: Distribution, x: Tensor) -> Tensor:
    return distribution.log_prob(x)


@pytest.mark.parametrize("shape", [(5, 1, 4, 3), (5, 3, 2, 2)])
def test_likelihoods_are_those_of_the_distributions(shape: tuple[int, ...]) -> None:
    numbers, x = 3 * torch.randn(shape), torch.rand(shape)
    expected = -log_prob(Normal(numbers, 1.0), x).sum((1, 2, 3))
    assert torch.allclose(LIKELIHOODS["gaussian"].nll(numbers, x), expected, rtol=1e-5)
    expected = -log_prob(Bernoulli(logits=numbers), x.round()).sum((1, 2, 3))
    assert torch.allclose(LIKELIHOODS["bernoulli"].nll(numbers, x.round()), expected, rtol=1e-5)
    assert (LIKELIHOODS["gaussian"].mean(numbers) == Normal(numbers, 1.0).mean).all()
    assert torch.allclose(LIKELIHOODS["bernoulli"].mean(numbers), Bernoulli(logits=numbers).mean)


# Binary bottlenecks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_sign_passes_the_gradient_of_tanh(dtype: torch.dtype) -> None:
    h = torch.cat([torch.linspace(-4, 4, 1001), torch.tensor([0.0, -0.0])]).to(dtype).requires_grad_()
    signs = straight_through_sign(h)
    assert signs.dtype == dtype
    assert signs.tolist() == [1.0 if value > 0 else -1.0 for value in h.tolist()]  # to the last bit
    weights = torch.randn(len(h)).to(dtype)
    (gradient,) = torch.autograd.grad((weights * signs).sum(), h)
    (expected,) = torch.autograd.grad((weights * h.tanh()).sum(), h)
    assert (gradient == expected).all()


@pytest.mark.parametrize("name", ["binary", "contrastive"])
def test_the_bits_of_a_binary_member_are_what_its_decoder_saw(name: str) -> None:
    member = build(name, (1, 8, 8), network="mlp", width=2)
    features = member.encoder(digits(1))
    assert torch.allclose(features.mean(0), torch.tensor(0.0), atol=1e-5)  # normalised: no bit is constant
    z, _ = member.bottleneck(features)
    assert ((z > 0) == (features > 0)).all()
    member.eval()
    assert (member.outputs(digits(1)) == member.encoder(digits(1))).all()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_is_that_of_a_plain_loop(temperature: float) -> None:
    a, b = torch.randn(2, 6, 5).tolist()

    def similarity(u: list[float], v: list[float]) -> float:
        product = sum(x * y for x, y in zip(u, v, strict=True))
        return product / math.hypot(*u) / math.hypot(*v) / temperature

    views = a + b
    terms = []
    for i, view in enumerate(views):
        others = [math.exp(similarity(view, other)) for j, other in enumerate(views) if j != i]
        terms.append(-math.log(math.exp(similarity(view, views[(i + 6) % 12])) / sum(others)))
    assert float(nt_xent(torch.tensor(a), torch.tensor(b), temperature)) == pytest.approx(sum(terms) / 12, rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_contrastive_loss_is_of_two_views_and_of_the_image_itself(channels: int) -> None:
    x = digits(channels)
    member = build("contrastive", (channels, 8, 8), network="mlp", width=2, temperature=0.3, reconstruction=7.0)
    torch.manual_seed(3)
    terms = member.loss(x)
    torch.manual_seed(3)
    how: dict[str, float] = {"crop": 0.8, "rotation": 5.0, "flip": 0.5 * (channels == 3), "light": 0.2, "erase": 0.0}
    first, second = augment(x, **how), augment(x, **how)
    assert not torch.equal(first, second)
    a, b = member.encoder(torch.cat([first, second])).sign().chunk(2)
    assert torch.allclose(terms["contrast"], nt_xent(a, b, 0.3))
    nll = member.likelihood.nll(member.decoder(a), x).mean()
    assert torch.allclose(terms["reconstruction"], 7.0 * nll / (64 * channels))


# Corruptions


def test_corruptions_destroy_the_share_they_say() -> None:
    x = 0.25 + 0.5 * torch.rand(100, 1, 40, 40)
    for name in ("masking", "salt-and-pepper"):
        seen = CORRUPTIONS[name](x, 0.3)
        destroyed = seen != x
        assert float(destroyed.float().mean()) == pytest.approx(0.3, abs=0.01)
        black = float((seen[destroyed] == 0).float().mean())
        assert black == 1 if name == "masking" else black == pytest.approx(0.5, abs=0.01)
        assert ((seen[destroyed] == 0) | (seen[destroyed] == 1)).all()
        assert (CORRUPTIONS[name](x, 0.0) == x).all()
    noise = CORRUPTIONS["gaussian"](x, 0.3) - x
    assert float(noise.mean()) == pytest.approx(0, abs=0.01) and float(noise.std()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_a_denoising_member_is_asked_for_the_clean_image(corruption: str) -> None:
    x = digits(1)
    member = build("denoising", (1, 8, 8), network="mlp", width=2, corruption=corruption, strength=0.4).eval()
    torch.manual_seed(3)
    reconstruction = member.loss(x)["reconstruction"]
    torch.manual_seed(3)
    seen = CORRUPTIONS[corruption](x, 0.4)
    assert not torch.equal(seen, x)
    assert reconstruction == member.likelihood.nll(member.decoder(member.encoder(seen)), x).mean()
    assert (member.outputs(x) == member.encoder(x)).all()  # codes are of clean images


# Views


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_views_keep_shape_and_range_and_change_nothing_at_strength_zero(channels: int, size: tuple[int, int]) -> None:
    x = torch.rand(20, channels, *size)
    assert torch.allclose(augment(x, **STILL), x, atol=1e-5)
    view = augment(x, crop=0.3, rotation=90, flip=0.5, light=1, erase=1)
    assert view.shape == x.shape and view.dtype == x.dtype
    assert -1e-6 <= view.min() <= view.max() <= 1 + 1e-6
    for strength in ({"crop": 0.5}, {"light": 0.3}, {"erase": 1.0}, {"rotation": 30}):
        if min(size) > 4:  # there is not much to change in a line
            assert not torch.allclose(augment(x, **(STILL | strength)), x, atol=0.01), strength


def test_a_mirror_image_is_one() -> None:
    x = torch.rand(50, 3, 5, 7)
    assert torch.allclose(augment(x, **(STILL | {"flip": 1.0})), x.flip(3), atol=1e-5)
    view = augment(x, **(STILL | {"flip": 0.5}))
    mirrored = [torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(view, x, strict=True)]
    kept = [torch.allclose(a, b, atol=1e-5) for a, b in zip(view, x, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True)) and 10 < sum(mirrored) < 40


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (40, 80)])
def test_a_turn_keeps_a_disc_a_disc(size: tuple[int, int]) -> None:
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) - height / 2 + 0.5, torch.arange(width) - width / 2 + 0.5, indexing="ij")
    disc = (y.square() + x.square() < (min(size) / 3) ** 2).float().expand(30, 1, height, width)
    view = augment(disc, **(STILL | {"rotation": 90}))
    assert float((view - disc).abs().mean((1, 2, 3)).max()) < 0.02
    bar = ((y.abs() < 2) & (x.abs() < min(size) / 3)).float().expand(200, 1, height, width)
    upright = [float((view[0, :, width // 2]).sum()) for view in augment(bar, **(STILL | {"rotation": 90}))]
    assert min(upright) < 8 and max(upright) > min(size) / 2  # and a bar is turned by anything from 0 to 90 degrees


def test_light_changes_contrast_and_the_brightness_of_each_channel() -> None:
    plain = augment(torch.full((500, 3, 4, 4), 0.5), **(STILL | {"light": 0.2}))
    brightness = plain[:, :, 0, 0] / 0.5
    assert torch.allclose(plain, 0.5 * brightness[:, :, None, None])
    assert (brightness - 1).abs().max() <= 0.2 + 1e-5 and (brightness - 1).abs().mean() > 0.08
    assert not torch.allclose(brightness[:, 0], brightness[:, 1], atol=0.1)
    halves = torch.full((500, 1, 2, 2), 0.4)
    halves[:, :, 0] = 0.6
    view = augment(halves, **(STILL | {"light": 0.2}))[:, 0]
    contrast = (view[:, 0, 0] - view[:, 1, 0]) / view.mean((1, 2)) * 2.5  # whatever the brightness is
    assert (contrast - 1).abs().max() <= 0.2 + 1e-5 and (contrast - 1).abs().mean() > 0.08


def test_an_erased_rectangle_is_no_larger_than_asked() -> None:
    erased = augment(torch.ones(500, 2, 40, 20), **(STILL | {"erase": 0.5})) == 0
    assert (erased[:, 0] == erased[:, 1]).all()
    rows, columns = erased[:, 0].any(2).sum(1), erased[:, 0].any(1).sum(1)
    assert 18 <= rows.max() <= 20 and 9 <= columns.max() <= 10
    assert (erased[:, 0].sum((1, 2)) == rows * columns).all()


# Heads

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
    values = 3 * digits(1, 1000).flatten(1)
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
