import math
import subprocess
import sys
from itertools import pairwise, product
from pathlib import Path
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
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Laplace,
    MultivariateNormal,
    Normal,
    RelaxedBernoulli,
    kl_divergence,
)
from torch.nn import functional as F

from hashret.hasher import Hasher
from hashret.models import MODELS, Member
from hashret.models.augment import augment, mirror_images_are_rarer, random_shift
from hashret.models.base import straight_through_sign
from hashret.models.bernoulli_vae import kl_to_fair_coin
from hashret.models.bihalf import halves
from hashret.models.contrastive import nt_xent
from hashret.models.denoising import CORRUPTIONS
from hashret.models.graph import GraphAutoencoder
from hashret.models.likelihoods import LIKELIHOODS
from hashret.models.twin import laplacian
from hashret.models.vae import Variational, kl_to_standard_normal

SIMPLE = ("mlp", "conv")  # the networks that every member is tested on; test_networks.py has the others
LEARNED = [name for name, member in MODELS.items() if member.trainable]
NETWORKED = [
    (name, network)
    for name in LEARNED
    for network in SIMPLE
    if "network" in MODELS[name].defaults() or network == "mlp"
    if (name, network) != ("stacked", "conv")  # it takes fully connected layers alone
]
SIZES = [(1, 1), (5, 7), (28, 28), (33, 17), (1, 64)]
STILL: dict[str, float] = {"crop": 1, "rotation": 0, "flip": 0, "light": 0, "erase": 0}  # views that change nothing
DIGITS = (load_digits().images / 16).astype(np.float32)  # (1797, 8, 8) in [0, 1]


def digits(channels: int, n: int = 200) -> Tensor:
    """Return digits (n, channels, 8, 8); in colour, each channel is another function of the grey value."""
    grey = torch.from_numpy(DIGITS[:n, None])
    return grey if channels == 1 else torch.cat([grey, 1 - grey, grey.square()], 1)


def supported(name: str, **settings: Any) -> dict[str, Any]:
    """Return the settings that the member has."""
    return {key: value for key, value in settings.items() if key in MODELS[name].defaults()}


def build(name: str, shape: tuple[int, int, int], bits: int = 16, **parts: Any) -> Member:
    torch.manual_seed(0)
    return MODELS[name](shape, bits, **parts)


def total(member: Member, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return torch.stack(list(member.loss(x).values())).sum()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "network"), NETWORKED)
def test_training_changes_all_weights_of_a_member(name: str, network: str, channels: int) -> None:
    x = digits(channels)
    member = build(name, (channels, 8, 8), **supported(name, network=network, width=8))
    least = float(member.likelihood.nll(x, x).mean()) if name == "linear" else 0.0  # the constants of a density
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
    assert losses[-1] - least < 0.9 * (losses[0] - least)


@pytest.mark.parametrize("name", LEARNED)
def test_members_train_in_bfloat16(name: str) -> None:
    x = digits(1)
    member = build(name, (1, 8, 8), **supported(name, network="mlp", width=8))
    member.on_train_start(x, None)
    exact = total(member, x)
    with torch.autocast("cpu", torch.bfloat16):
        loss = total(member, x)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.1)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in member.parameters())


@pytest.mark.parametrize("name", ["contrastive", "graph", "ortho"])
def test_a_decoder_of_weight_zero_is_not_evaluated(name: str) -> None:
    x, decoded = digits(1), list[str]()
    for weight in (2.0, 0.0):
        member = build(name, (1, 8, 8), **supported(name, network="mlp", width=4, classes=2, reconstruction=weight))
        member.on_train_start(x, None)
        member.decoder.register_forward_hook(lambda *_: decoded.append(name))
        assert ("reconstruction" in member.loss(x)) == (weight > 0)
        assert total(member, x).isfinite()
        assert decoded == [name] * 2


@pytest.mark.parametrize("name", LEARNED)
def test_a_loss_can_be_evaluated_without_gradients(name: str) -> None:
    x = digits(1)
    member = build(name, (1, 8, 8), **supported(name, network="mlp", width=4)).eval()
    with torch.inference_mode():
        measured = total(member, torch.from_numpy(DIGITS[:200, None]))
    assert measured.item() == pytest.approx(total(member, x).item(), rel=1e-6)


@pytest.mark.parametrize("name", ["sparse", "contractive", "binary", "bihalf", "twin", "contrastive"])
def test_outputs_of_normalised_encoders_are_standardised(name: str) -> None:
    features = build(name, (1, 8, 8), network="mlp", width=2).encoder(digits(1))
    assert torch.allclose(features.mean(0), torch.tensor(0.0), atol=1e-5)
    assert torch.allclose(features.var(0, correction=0), torch.tensor(1.0), atol=0.01)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.filterwarnings("ignore:a bottleneck of 24 numbers can copy:RuntimeWarning")
@pytest.mark.parametrize(("name", "network"), NETWORKED)
def test_a_member_takes_images_of_any_size(name: str, network: str, size: tuple[int, int], channels: int) -> None:
    x = torch.rand(3, channels, *size)
    for likelihood in LIKELIHOODS:
        member = build(name, (channels, *size), 24, **supported(name, network=network, width=2, likelihood=likelihood))
        assert all(term.shape == () and term.isfinite() for term in member.loss(x).values())
        member.eval()
        assert member.outputs(x).shape == (3, 64 if name == "contrastive" else 24) == (3, member.latent)
        reconstruction = member.reconstruct(x)
        assert reconstruction.shape == x.shape
        assert 0 <= reconstruction.min() <= reconstruction.max() <= 1


@pytest.mark.filterwarnings("ignore:a bottleneck of 1024 numbers can copy:RuntimeWarning")
@pytest.mark.parametrize("bits", [8, 1024])
@pytest.mark.parametrize("name", MODELS)
def test_members_support_8_and_1024_bits(name: str, bits: int) -> None:
    if MODELS[name].head in ("itq", "anchor-itq"):
        bits = min(bits, 512)  # rotations of 1,024 take ten seconds
    images = np.random.default_rng(0).integers(0, 256, (1100, 33, 33), np.uint8)
    if MODELS[name].trainable:
        labels: Any = [i % 3 for i in range(len(images))] if MODELS[name].labelled else False
        hasher = Hasher(name, bits, **supported(name, network="mlp", width=1)).fit(images, steps=30, labels=labels)
    else:
        hasher = Hasher(name, bits).fit(images, seed=2)
    codes = hasher.encode(images[:20])
    assert codes.shape == (20, bits // 8)
    # In a graph of noise a few anchors are next to every image: with half of all seeds, one.
    assert len(np.unique(codes, axis=0)) > (1 if name == "anchor-graph" else 7)


def test_a_registered_class_is_a_member(monkeypatch: pytest.MonkeyPatch) -> None:
    class ShortAutoencoder(Member):
        def __init__(self, *args: Any, weight: float = 1.0, **parts: Any) -> None:
            super().__init__(*args, **parts)
            self.weight = weight

        def bottleneck(self, features: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return features, {"length": self.weight * features.square().sum(1).mean()}

    monkeypatch.setitem(MODELS, "short", ShortAutoencoder)
    images = (DIGITS[:200] * 255).astype(np.uint8)
    hasher = Hasher("short", 16, network="mlp", width=4, weight=2).fit(images, steps=5)
    assert set(hasher.training["terms"]) == {"reconstruction", "length"}
    assert hasher.encode(images).shape == (200, 2)
    assert hasher.settings["weight"] == 2.0 and hasher.settings["likelihood"] == "bernoulli"


def test_unknown_or_unsuitable_parts_are_refused_with_a_list() -> None:
    for name, part, choices in (
        ("ae", "network", "mlp, conv"),
        ("ae", "likelihood", "gaussian, bernoulli, laplace, categorical"),
        ("denoising", "corruption", "gaussian, masking"),
        ("bernoulli-vae", "sample", "relaxed, straight-through"),
    ):
        unknown: dict[str, Any] = {part: "none"}
        with pytest.raises(ValueError, match=f"no {part} 'none'.*{choices}"):
            build(name, (1, 8, 8), **unknown)
    for name, wrong in (
        ("ae", {"latent": -1}),
        ("ae", {"width": 0}),
        ("ae", {"shift": -1}),
        ("ae", {"shift": 8}),
        ("vae", {"beta": -0.5}),
        ("vae", {"beta": math.nan}),
        ("linear", {"latent": -1}),
        ("sparse", {"rate": 0.0}),
        ("sparse", {"threshold": math.nan}),
        ("contractive", {"contraction": -1.0}),
        ("bernoulli-vae", {"temperature": 0.0}),
        ("bernoulli-vae", {"beta": -0.5}),
        ("bihalf", {"gamma": math.nan}),
        ("denoising", {"strength": 1.5}),
        ("denoising", {"strength": math.nan}),
        ("contrastive", {"temperature": 0.0}),
        ("contrastive", {"reconstruction": -2.0}),
        ("contrastive", {"rotation": -1.0}),
        ("contrastive", {"crop": 0.0}),
        ("contrastive", {"crop": 1.5}),
        ("contrastive", {"flip": 1.5}),
        ("contrastive", {"light": math.nan}),
        ("contrastive", {"erase": -0.1}),
        ("contrastive", {"grey": 1.5}),
        ("contrastive", {"signs": 1.5}),
        ("contrastive", {"whole": -0.5}),
        ("contrastive", {"remembered": math.nan}),
    ):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))}.* not .*{next(iter(wrong.values()))}"):
            build(name, (1, 8, 8), **wrong)
    with pytest.raises(ValueError, match="^model 'linear' has no setting 'network'; it has latent=0$"):
        Hasher("linear", 16, network="mlp")


def test_a_bottleneck_as_wide_as_the_image_warns() -> None:
    for latent in (64, 65):
        warning = f"^a bottleneck of {latent} numbers can copy an image of 64 and learn nothing: choose a smaller"
        with pytest.warns(RuntimeWarning, match=warning) as warnings:
            build("ae", (1, 8, 8), latent=latent)
        assert len(warnings) == 1
    build("ae", (1, 8, 8), latent=63)
    build("ae", (3, 8, 8), latent=64)
    Hasher("ae", 128, latent=128)  # of whose images nothing is known yet
    build("denoising", (1, 8, 8), latent=128)


def test_the_linear_member_spans_the_principal_subspace() -> None:
    x = digits(1, 1797).double()
    flat = x.flatten(1).numpy()
    member = build("linear", (1, 8, 8), 16, latent=10).double()
    optimiser = torch.optim.LBFGS(member.parameters(), max_iter=1000, history_size=50, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        loss = total(member, x)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item()

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    judge = PCA(10, svd_solver="full").fit(flat)
    components = torch.from_numpy(judge.components_).T
    (weight,) = (tensor.detach() for tensor in member.decoder.parameters() if tensor.ndim == 2)
    spanned = torch.linalg.qr(weight).Q
    outside = spanned - components @ (components.T @ spanned)
    assert torch.linalg.matrix_norm(outside, 2) < math.sin(math.radians(1))  # the sine of the largest angle
    halfway = (x + x.flip(0)) / 2
    assert torch.allclose(member.outputs(halfway), (member.outputs(x) + member.outputs(x.flip(0))) / 2)
    errors = np.square(flat - judge.inverse_transform(judge.transform(flat))).sum(1)
    assert total(member, x).item() == pytest.approx(errors.mean() / 2 + 32 * math.log(2 * math.pi), rel=1e-5)


def test_the_sparse_penalty_is_a_laplace_prior_on_shrunken_units() -> None:
    member = build("sparse", (1, 8, 8), network="mlp", width=2, rate=1.7, threshold=0.6)
    features = member.encoder(digits(1))
    z, penalties = member.bottleneck(features)
    assert torch.allclose(z, features.sign() * (features.abs() - 0.6).clamp(min=0), atol=1e-6)
    assert torch.allclose(penalties["sparsity"], -log_prob(Laplace(0.0, 1 / 1.7), z).sum(1).mean())
    active = sum(abs(value) > 0.6 for value in features.flatten().tolist())
    assert float(member.metrics(digits(1))["active"]) == pytest.approx(active / features.numel())


def test_fewer_units_are_active_at_a_higher_rate() -> None:
    shares = []
    for rate in (0.01, 3.0):
        member = build("sparse", (1, 8, 8), network="mlp", width=4, rate=rate)
        optimiser = torch.optim.Adam(member.parameters(), 3e-3)
        for _ in range(100):
            optimiser.zero_grad()
            total(member, digits(1)).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        shares.append(float(member.eval().metrics(digits(1))["active"]))
    assert shares[1] < 0.7 * shares[0]


def test_the_contraction_of_a_linear_encoder_is_the_norm_of_its_weights() -> None:
    member = build("contractive", (1, 8, 8), network="mlp", width=2, contraction=0.3)
    linear = torch.nn.Linear(64, 16)
    scales = torch.rand(16)
    with torch.no_grad():  # with orthogonal rows, each projection says the whole
        linear.weight.copy_(scales[:, None] * torch.linalg.qr(torch.randn(64, 16)).Q.T)
    member.encoder = torch.nn.Sequential(torch.nn.Flatten(), linear)
    assert member.loss(digits(1))["contraction"].item() == pytest.approx(0.3 * float(scales.square().sum()), rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_the_contraction_estimates_the_norm_of_the_jacobian(training: bool) -> None:
    x = digits(1, 5)
    member = build("contractive", (1, 8, 8), 8, network="mlp", width=1, contraction=0.3)
    for _ in range(20):
        member.encoder(digits(1))  # for statistics other than those it began with
    member.train(training)
    jacobian = torch.autograd.functional.jacobian(member.encoder, x)  # type: ignore[no-untyped-call]
    estimates = [member.loss(x)["contraction"].item() for _ in range(800)]
    assert np.mean(estimates) == pytest.approx(0.3 * float(jacobian.square().sum()) / 5, rel=0.05)
    assert np.std(estimates) > 0


def test_the_kl_equals_that_of_torch_distributions() -> None:
    mean, log_variance = torch.randn(2, 50, 7, dtype=torch.float64)
    posterior = Normal(mean, (0.5 * log_variance).exp())
    expected = kl_divergence(posterior, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(-1)
    assert torch.allclose(kl_to_standard_normal(mean, log_variance), expected)


def test_the_vae_samples_its_posterior_and_has_gradients_of_mean_and_variance() -> None:
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


def test_the_kl_of_bits_equals_that_of_torch_distributions() -> None:
    logits = 5 * torch.randn(50, 7, dtype=torch.float64)
    logits[0, :3] = torch.tensor([0.0, 80.0, -80.0])
    expected = kl_divergence(Bernoulli(logits=logits), Bernoulli(torch.full_like(logits, 0.5))).sum(-1)
    assert torch.allclose(kl_to_fair_coin(logits), expected)
    member = build("bernoulli-vae", (1, 8, 8), 8, network="mlp", width=1, beta=0.5)
    _, penalties = member.bottleneck(logits.float())
    assert torch.allclose(penalties["kl"], 0.5 * expected.mean().float())


def test_straight_through_bits_have_their_probability_and_its_gradient() -> None:
    logits = torch.tensor([-3.0, 0.0, 1.0]).repeat(20_000, 1).requires_grad_()
    member = build("bernoulli-vae", (1, 8, 8), 8, network="mlp", width=1, sample="straight-through")
    z, _ = member.bottleneck(logits)
    assert set(z.flatten().tolist()) == {0.0, 1.0}
    p = logits.detach().sigmoid()
    assert torch.allclose(z.mean(0), p[0], atol=0.02)
    z.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and torch.allclose(logits.grad, p * (1 - p))
    member.eval()
    assert member.bottleneck(logits)[0][0].tolist() == [0.0, 0.0, 1.0]  # the most probable bits
    drawn = member.sample_prior(1000)
    assert drawn is not None and drawn.shape == (1000, 8) and set(drawn.flatten().tolist()) == {0.0, 1.0}
    assert torch.allclose(drawn.mean(0), torch.tensor(0.5), atol=0.08)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
def test_relaxed_bits_have_the_concrete_distribution(temperature: float) -> None:
    logits = torch.tensor([-3.0, 0.0, 1.0]).repeat(20_000, 1).requires_grad_()
    member = build("bernoulli-vae", (1, 8, 8), 8, network="mlp", width=1, sample="relaxed", temperature=temperature)
    z, _ = member.bottleneck(logits)
    judge = RelaxedBernoulli(torch.tensor(temperature), logits=logits.detach()).sample()  # type: ignore[no-untyped-call]
    for ours, theirs in zip(z.T.detach(), judge.T, strict=True):
        both = torch.cat([ours, theirs]).sort().values
        shares = [torch.searchsorted(sample.sort().values, both) / len(sample) for sample in (ours, theirs)]
        assert (shares[0] - shares[1]).abs().max() < 0.025  # Kolmogorov and Smirnov's distance
    z.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None and torch.allclose(logits.grad, (z * (1 - z) / temperature).detach(), atol=1e-4)
    member.eval()
    assert member.bottleneck(logits)[0][0].tolist() == [0.0, 0.0, 1.0]


def log_prob(distribution: Distribution, x: Tensor) -> Tensor:
    return distribution.log_prob(x)


@pytest.mark.parametrize("shape", [(5, 1, 4, 3), (5, 3, 2, 2)])
def test_likelihoods_equal_those_of_torch_distributions(shape: tuple[int, ...]) -> None:
    numbers, x = 3 * torch.randn(shape), torch.rand(shape)
    expected = -log_prob(Normal(numbers, 1.0), x).sum((1, 2, 3))
    assert torch.allclose(LIKELIHOODS["gaussian"].nll(numbers, x), expected, rtol=1e-5)
    expected = -log_prob(Bernoulli(logits=numbers), x.round()).sum((1, 2, 3))
    assert torch.allclose(LIKELIHOODS["bernoulli"].nll(numbers, x.round()), expected, rtol=1e-5)
    assert (LIKELIHOODS["gaussian"].mean(numbers) == Normal(numbers, 1.0).mean).all()
    assert torch.allclose(LIKELIHOODS["bernoulli"].mean(numbers), Bernoulli(logits=numbers).mean)
    expected = -log_prob(Laplace(numbers, 1.0), x).sum((1, 2, 3))
    assert torch.allclose(LIKELIHOODS["laplace"].nll(numbers, x), expected, rtol=1e-5)
    assert (LIKELIHOODS["laplace"].mean(numbers) == Laplace(numbers, 1.0).mean).all()


@pytest.mark.parametrize("shape", [(5, 1, 4, 3), (5, 3, 2, 2)])
def test_the_categorical_likelihood_equals_that_of_torch_distributions(shape: tuple[int, ...]) -> None:
    n, channels, height, width = shape
    numbers, levels = 3 * torch.randn(n, 256 * channels, height, width), torch.randint(256, shape)
    levels[0, 0, 0, :2] = torch.tensor([0, 255])
    channelwise = torch.stack([numbers[:, j::channels] for j in range(channels)], 1).movedim(2, -1)  # (n, c, h, w, 256)
    distribution = Categorical(logits=channelwise)
    likelihood = LIKELIHOODS["categorical"]
    expected = -log_prob(distribution, levels).sum((1, 2, 3))
    assert torch.allclose(likelihood.nll(numbers, levels / 255), expected, rtol=1e-5)
    for near in ((levels / 255 + 0.0019).clamp(max=1), (levels / 255 - 0.0019).clamp(min=0)):
        assert torch.allclose(likelihood.nll(numbers, near), expected, rtol=1e-5)
    assert torch.allclose(likelihood.mean(numbers), (distribution.probs * torch.arange(256)).sum(-1) / 255, atol=1e-6)
    at_levels = 1e4 * torch.nn.functional.one_hot(levels, 256).movedim(-1, 1).flatten(1, 2).float()
    assert torch.allclose(likelihood.mean(at_levels), levels / 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_straight_through_sign_has_the_gradient_of_tanh(dtype: torch.dtype) -> None:
    h = torch.cat([torch.linspace(-4, 4, 1001), torch.tensor([0.0, -0.0])]).to(dtype).requires_grad_()
    signs = straight_through_sign(h)
    assert signs.dtype == dtype
    assert signs.tolist() == [1.0 if value > 0 else -1.0 for value in h.tolist()]  # to the last bit
    weights = torch.randn(len(h)).to(dtype)
    (gradient,) = torch.autograd.grad((weights * signs).sum(), h)
    (expected,) = torch.autograd.grad((weights * h.tanh()).sum(), h)
    assert (gradient == expected).all()


@pytest.mark.parametrize("name", ["binary", "contrastive"])
def test_the_bits_of_a_binary_member_are_the_inputs_of_its_decoder(name: str) -> None:
    member = build(name, (1, 8, 8), network="mlp", width=2)
    features = member.encoder(digits(1))
    assert torch.allclose(features.mean(0), torch.tensor(0.0), atol=1e-5)  # normalised: no bit is constant
    z, _ = member.bottleneck(features)
    assert ((z > 0) == (features > 0)).all()
    member.eval()
    assert (member.outputs(digits(1)) == member.encoder(digits(1))).all()


@settings(max_examples=60, deadline=None)
@given(arrays(np.int8, st.tuples(st.integers(1, 7), st.integers(1, 3)), elements=st.integers(-8, 8)))
def test_halves_are_the_nearest_balanced_signs(quarters: NDArray[np.int8]) -> None:
    h = quarters.astype(np.float32) / 4  # with many ties
    b = halves(torch.from_numpy(h)).numpy()
    n = len(h)
    balanced = [signs for signs in product([-1.0, 1.0], repeat=n) if signs.count(1.0) == n // 2]
    for ours, column in zip(b.T, h.T, strict=True):
        assert tuple(ours) in balanced
        least = min(float(np.square(column - signs).sum()) for signs in balanced)
        assert float(np.square(column - ours).sum()) == least


def test_the_bihalf_bits_have_the_gradient_of_the_paper() -> None:
    member = build("bihalf", (1, 8, 8), network="mlp", width=2, gamma=0.7)
    h = torch.randn(11, 16).requires_grad_()
    b, penalties = member.bottleneck(h)
    assert ((b == 1).sum(0) == 5).all() and ((b == -1).sum(0) == 6).all()
    weights = torch.randn(11, 16)
    ((weights * b).sum() + penalties["quantisation"]).backward()  # type: ignore[no-untyped-call]
    assert h.grad is not None and torch.allclose(h.grad, weights + 0.7 * (h - b).detach() / 11, atol=1e-6)
    member.eval()
    assert (member.bottleneck(h)[0] == h.sign()).all()


def test_the_laplacian_equals_that_of_a_plain_loop() -> None:
    codes = torch.randn(6, 16).sign()
    codes[5] = -codes[4]
    rows = codes.tolist()
    adjacency = [[sum(a == b for a, b in zip(u, v, strict=True)) / 16 for v in rows] for u in rows]
    degrees = [sum(row) for row in adjacency]
    expected = [[a / math.sqrt(degrees[i] * degrees[j]) for j, a in enumerate(row)] for i, row in enumerate(adjacency)]
    assert torch.allclose(laplacian(codes), torch.tensor(expected))


def test_a_twin_bottleneck_averages_over_images_of_similar_codes() -> None:
    member = build("twin", (1, 8, 8), network="mlp", width=2)
    h, z = torch.randn(2, 20, 16)
    h[:10], h[10:] = torch.ones(16), -torch.ones(16)  # two groups of images, with no bit in common
    features = torch.cat([h, z], 1).requires_grad_()
    mixed, penalties = member.bottleneck(features)
    assert not penalties
    weight, bias = member.convolution.parameters()  # type: ignore[union-attr]
    for group in (slice(0, 10), slice(10, 20)):
        expected = torch.sigmoid(z[group].mean(0) @ weight.T + bias)
        assert torch.allclose(mixed[group], expected.expand(10, 16), atol=1e-5)
    (gradient,) = torch.autograd.grad((mixed * torch.randn(20, 16)).sum(), features)
    assert gradient[:, :16].any() and gradient[:, 16:].any()
    member.eval()
    assert (member.outputs(digits(1)) == member.encoder(digits(1))[:, :16]).all()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_nt_xent_equals_that_of_a_plain_loop(temperature: float) -> None:
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
def test_the_contrastive_loss_compares_views_and_reconstructs_the_image(channels: int) -> None:
    x = digits(channels)
    member = build("contrastive", (channels, 8, 8), network="mlp", width=2, temperature=0.3, reconstruction=7.0)
    torch.manual_seed(3)
    terms = member.loss(x)
    torch.manual_seed(3)
    settings: dict[str, float] = {"rotation": 10.0, "flip": 0.5, "erase": 0.0}
    settings |= {"crop": 0.6, "light": 0.3} if channels == 3 else {"crop": 0.8, "light": 0.2}
    first = augment(x, **settings)
    if channels == 3:
        first = torch.where(torch.rand(len(x), 1, 1, 1) < 0.75, x, first)
        assert 0 < (first == x).all(3).all(2).all(1).sum() < len(x)
    second = augment(x, **settings)
    assert not torch.equal(first, second)
    a, b = member.encoder(torch.cat([first, second])).sign().chunk(2)
    assert torch.allclose(terms["contrast"], nt_xent(a, b, 0.3))
    nll = member.likelihood.nll(member.decoder(a), x).mean()
    assert torch.allclose(terms["reconstruction"], 7.0 * nll / (64 * channels))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (5,)])
def test_whole_is_the_share_of_first_views_that_are_the_images(shape: Any) -> None:
    x = torch.rand(300, *shape)
    parts: dict[str, Any] = {"network": "mlp", "likelihood": "gaussian", "width": 2}
    for whole, minimum, maximum in ((0.0, 0, 0), (0.3, 60, 120), (1.0, 300, 300)):
        first, second = build("contrastive", shape, whole=whole, **parts).two_views(x)  # type: ignore[operator]
        assert minimum <= sum(torch.equal(view, image) for view, image in zip(first, x, strict=True)) <= maximum
        assert not any(torch.equal(view, image) for view, image in zip(second, x, strict=True))


def test_defaults_for_colour_images_apply_only_to_these() -> None:
    grey, colour = (build("contrastive", shape, network="mlp") for shape in ((1, 8, 8), (3, 8, 8)))
    vectors = build("contrastive", (5,), network="mlp", likelihood="gaussian")  # type: ignore[arg-type]
    explicit = build("contrastive", (3, 8, 8), network="mlp", width=2)
    hidden = [next(member.encoder.parameters()).shape[0] for member in (grey, colour, vectors, explicit)]
    assert hidden == [16 * 16, 16 * 24, 16 * 16, 16 * 2]
    assert (
        grey.training_defaults
        == vectors.training_defaults
        == MODELS["ae"]((3, 8, 8), 16).training_defaults
        == (256, 2e-3, 1e-4, False)
    )
    assert colour.training_defaults == (128, 8e-3, 0.05, False)
    assert build("contrastive", (3, 8, 8), network="mlp", width=2, muon=True).training_defaults == (
        128,
        8e-3,
        0.05,
        True,
    )


def test_settings_are_recommended_only_for_many_colour_images() -> None:
    recommended = MODELS["contrastive"].recommended_settings
    assert recommended((3, 8, 8), 10_000) == recommended((3, 32, 32), 10**6) != {}
    assert recommended((3, 8, 8), 10_000).keys() <= MODELS["contrastive"].defaults().keys()
    assert [recommended(*others) for others in (((3, 8, 8), 9_999), ((1, 8, 8), 10**6), ((5,), 10**6))] == [{}] * 3
    assert all(MODELS[name].recommended_settings((3, 8, 8), 10**6) == {} for name in MODELS if name != "contrastive")


def test_remembered_is_the_share_of_a_batch_that_is_reconstructed() -> None:
    x = digits(3, 160)
    settings = {"network": "mlp", "width": 2, "signs": 0.0, "whole": 0.0, "reconstruction": 1.0, "grey": 0.1}
    member = build("contrastive", (3, 8, 8), remembered=1 / 8, **settings)  # type: ignore[arg-type]
    torch.manual_seed(3)
    terms = member.loss(x)
    torch.manual_seed(3)
    codes = member.encoder(torch.cat(member.two_views(x)))[:20].sign()  # type: ignore[operator]
    nll = member.likelihood.nll(member.decoder(codes), x[:20]).mean()
    assert torch.allclose(terms["reconstruction"], nll / (64 * 3))


@pytest.mark.parametrize("signs", [0.0, 0.3, 1.0])
def test_signs_is_the_weight_of_the_contrast_of_bits(signs: float) -> None:
    x = digits(1)
    member = build("contrastive", (1, 8, 8), network="mlp", width=2, signs=signs, reconstruction=0.0)
    torch.manual_seed(3)
    contrast = member.loss(x)["contrast"]
    torch.manual_seed(3)
    a, b = member.encoder(torch.cat(member.two_views(x))).chunk(2)  # type: ignore[operator]
    assert torch.allclose(contrast, signs * nt_xent(a.sign(), b.sign(), 0.1) + (1 - signs) * nt_xent(a, b, 0.1))


def test_views_are_flipped_unless_mirror_images_are_rarer() -> None:
    rng = np.random.default_rng(0)
    blobs = F.interpolate(torch.from_numpy(rng.random((400, 3, 5, 5), np.float32)), 16, mode="bilinear")
    for images, flip in ((digits(1, 400), 0.0), (blobs, 0.5), (digits(1, 400).repeat(1, 3, 1, 1), 0.0)):
        _, channels, *size = images.shape
        shape = channels, size[0], size[1]
        member = build("contrastive", shape, network="mlp", width=2)
        member.on_train_start(images, None)
        assert member.auto_settings()["view_flip"] == flip
        explicit = build("contrastive", shape, network="mlp", width=2, flip=0.25, crop=0.9, light=0.1, grey=0.2)
        explicit.on_train_start(images, None)
        views = {"view_crop": 0.9, "view_flip": 0.25, "view_light": 0.1, "view_grey": 0.2}
        assert explicit.auto_settings() == views


def test_mirror_images_of_one_or_of_equal_images_are_not_rarer() -> None:
    assert not mirror_images_are_rarer(torch.rand(1, 1, 8, 8))
    assert not mirror_images_are_rarer(torch.rand(1, 1, 8, 8).repeat(50, 1, 1, 1) * 0)


def test_strength_is_the_share_of_corrupted_pixels() -> None:
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
def test_a_denoising_member_reconstructs_the_clean_image(corruption: str) -> None:
    x = digits(1)
    member = build("denoising", (1, 8, 8), network="mlp", width=2, corruption=corruption, strength=0.4).eval()
    torch.manual_seed(3)
    reconstruction = member.loss(x)["reconstruction"]
    torch.manual_seed(3)
    seen = CORRUPTIONS[corruption](x, 0.4)
    assert not torch.equal(seen, x)
    assert reconstruction == member.likelihood.nll(member.decoder(member.encoder(seen)), x).mean()
    assert (member.outputs(x) == member.encoder(x)).all()  # codes are of clean images


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_views_keep_shape_and_range_and_are_the_identity_at_strength_zero(channels: int, size: tuple[int, int]) -> None:
    x = torch.rand(20, channels, *size)
    assert torch.allclose(augment(x, **STILL), x, atol=1e-5)
    view = augment(x, crop=0.3, rotation=90, flip=0.5, light=1, erase=1)
    assert view.shape == x.shape and view.dtype == x.dtype
    assert -1e-6 <= view.min() <= view.max() <= 1 + 1e-6
    for strength in ({"crop": 0.5}, {"light": 0.3}, {"erase": 1.0}, {"rotation": 30}):
        if min(size) > 4:  # a line of pixels hardly changes
            assert not torch.allclose(augment(x, **(STILL | strength)), x, atol=0.01), strength


def test_flips_give_mirror_images() -> None:
    x = torch.rand(50, 3, 5, 7)
    assert torch.allclose(augment(x, **(STILL | {"flip": 1.0})), x.flip(3), atol=1e-5)
    view = augment(x, **(STILL | {"flip": 0.5}))
    mirrored = [torch.allclose(a, b.flip(2), atol=1e-5) for a, b in zip(view, x, strict=True)]
    kept = [torch.allclose(a, b, atol=1e-5) for a, b in zip(view, x, strict=True)]
    assert all(m != k for m, k in zip(mirrored, kept, strict=True)) and 10 < sum(mirrored) < 40


@pytest.mark.parametrize("size", [(64, 64), (96, 48), (40, 80)])
def test_rotations_keep_a_disc(size: tuple[int, int]) -> None:
    height, width = size
    y, x = torch.meshgrid(torch.arange(height) - height / 2 + 0.5, torch.arange(width) - width / 2 + 0.5, indexing="ij")
    disc = (y.square() + x.square() < (min(size) / 3) ** 2).float().expand(30, 1, height, width)
    view = augment(disc, **(STILL | {"rotation": 90}))
    assert float((view - disc).abs().mean((1, 2, 3)).max()) < 0.02
    bar = ((y.abs() < 2) & (x.abs() < min(size) / 3)).float().expand(200, 1, height, width)
    upright = [float((view[0, :, width // 2]).sum()) for view in augment(bar, **(STILL | {"rotation": 90}))]
    assert min(upright) < 8 and max(upright) > min(size) / 2  # and a bar is turned by anything from 0 to 90 degrees


def test_grey_is_the_share_of_grey_views() -> None:
    x = torch.rand(400, 3, 4, 4)
    for grey, minimum, maximum in ((0.0, 0, 0), (0.3, 80, 160), (1.0, 400, 400)):
        view = augment(x, **(STILL | {"grey": grey}))
        changed = (view - x).abs().amax((1, 2, 3)) > 1e-5
        assert minimum <= int(changed.sum()) <= maximum
        assert torch.allclose(view[changed], x.mean(1, keepdim=True).expand_as(x)[changed], atol=1e-5)
    assert torch.allclose(augment(x[:, :1], **(STILL | {"grey": 1.0})), x[:, :1], atol=1e-5)


def test_light_bounds_changes_of_contrast_and_brightness() -> None:
    plain = augment(torch.full((500, 3, 4, 4), 0.5), **(STILL | {"light": 0.2}))
    brightness = plain[:, :, 0, 0] / 0.5
    assert torch.allclose(plain, 0.5 * brightness[:, :, None, None])
    assert 0.25 < (brightness - 1).abs().max() <= 1.2 * 1.1 - 1 + 1e-5 and (brightness - 1).abs().mean() > 0.08
    between = brightness[:, 0] / brightness[:, 1]  # whatever the brightness of both is
    assert 0.15 < (between - 1).abs().max() <= 1.1 / 0.9 - 1 + 1e-5 and (between - 1).abs().mean() > 0.04
    grey = augment(torch.full((500, 1, 4, 4), 0.5), **(STILL | {"light": 0.2}))[:, 0, 0, 0] / 0.5
    assert 0.15 < (grey - 1).abs().max() <= 0.2 + 1e-5
    halves = torch.full((500, 1, 2, 2), 0.4)
    halves[:, :, 0] = 0.6
    view = augment(halves, **(STILL | {"light": 0.2}))[:, 0]
    contrast = (view[:, 0, 0] - view[:, 1, 0]) / view.mean((1, 2)) * 2.5  # whatever the brightness is
    assert (contrast - 1).abs().max() <= 0.2 + 1e-5 and (contrast - 1).abs().mean() > 0.08


def test_erase_bounds_the_sides_of_the_erased_rectangle() -> None:
    erased = augment(torch.ones(500, 2, 40, 20), **(STILL | {"erase": 0.5})) == 0
    assert (erased[:, 0] == erased[:, 1]).all()
    rows, columns = erased[:, 0].any(2).sum(1), erased[:, 0].any(1).sum(1)
    assert 18 <= rows.max() <= 20 and 9 <= columns.max() <= 10
    assert (erased[:, 0].sum((1, 2)) == rows * columns).all()


def test_random_shifts_are_of_whole_pixels_and_bounded() -> None:
    x = torch.zeros(400, 2, 7, 9)
    x[:, 0, 3, 4] = 1
    x[:, 1, 0] = 1  # the upper edge
    view = random_shift(x, 2)
    assert view.shape == x.shape
    rows, columns = view[:, 0].flatten(1).argmax(1) // 9, view[:, 0].flatten(1).argmax(1) % 9
    assert (view[:, 0].sum((1, 2)) == 1).all()
    assert set((rows - 3).tolist()) == set((columns - 4).tolist()) == {-2, -1, 0, 1, 2}
    assert torch.equal(view[:, 1].sum((1, 2)), 9.0 * (rows - 3 + 1).clamp(min=0))
    assert torch.equal(random_shift(x, 0), x)


def test_images_are_shifted_only_in_training() -> None:
    x = digits(1)
    still, moving = (build("ae", (1, 8, 8), network="mlp", width=2, shift=shift).eval() for shift in (0, 1))
    moving.load_state_dict(still.state_dict())
    assert torch.equal(still.loss(x)["reconstruction"], moving.loss(x)["reconstruction"])
    for member in (still, moving):
        member.encoder.train(False)
        member.training = True
    torch.manual_seed(4)
    expected = still.loss(random_shift(x, 1))["reconstruction"]
    torch.manual_seed(4)
    assert torch.equal(moving.loss(x)["reconstruction"], expected)
    with pytest.raises(ValueError, match="shift must be from 0 to 7, and 0 for vectors, not 1"):
        build("ae", (5,), network="mlp", likelihood="gaussian", shift=1)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
def test_parsed_settings_equal_the_defaults_of_the_class(name: str) -> None:
    """In the same order: they are shown in it."""
    assert list(MODELS.settings(name).items()) == list(MODELS[name].defaults().items())
    assert all(type(value) in (bool, int, float, str) for value in MODELS.settings(name).values())


def test_settings_are_inherited_if_the_constructor_passes_them_on() -> None:
    assert MODELS.settings("lsh") == {} and MODELS.settings("linear") == {"latent": 0}
    plain = {"network": "conv", "likelihood": "bernoulli", "latent": 0, "width": 24, "weights": ""}
    assert MODELS.settings("binary") == plain and MODELS.settings("bihalf") == plain | {"gamma": 1.0}
    assert MODELS.settings("stacked")["network"] == "mlp"
    assert MODELS.settings("contrastive") | {"crop": -1.0, "width": 0, "flip": -1.0} == MODELS.settings("contrastive")


NAMES_ALONE = """
import sys
from hashret.models import DEFAULT_MODEL, MODELS
assert len(MODELS) > 15 and DEFAULT_MODEL in MODELS and not {"torch", "numpy"} & sys.modules.keys()
assert {name: MODELS.settings(name) for name in MODELS}["vae"]["beta"] == 1.0
assert not {"torch", "numpy"} & sys.modules.keys()
import hashret.heads, hashret.training.options, hashret.model_folder, hashret.runtime.rescue
MODELS.check("vae", 64, "itq", {"beta": 2})
from hashret.cli.app import run
for wrong in ("--model none", "--head none", "--bits 12", "--set none=1", "--set width=wide", "--set beta"):
    assert run(["train", "photos", *wrong.split()]) == 2
assert "torch" not in sys.modules
from hashret.models import Member
assert issubclass(MODELS["vae"], Member) and "torch" in sys.modules
"""


def test_names_and_settings_do_not_load_pytorch(tmp_path: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", NAMES_ALONE], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count(": see hashret train --help\n") == 6


def test_a_graph_encoder_learns_the_bits_of_its_teacher() -> None:
    images = (DIGITS * 255).astype(np.uint8)
    hasher = Hasher("graph", 16, network="mlp", width=16, reconstruction=0.5).fit(images, steps=200)
    teacher = Hasher("anchor-graph", 16).fit(images)
    assert set(hasher.training["terms"]) == {"teacher", "reconstruction"}
    member = hasher.member
    assert isinstance(member, GraphAutoencoder) and member.teacher is not None
    x = digits(1, len(DIGITS))
    taught = member.teacher.margins(x.flatten(1).numpy()) > 0
    learned = np.unpackbits(hasher.encode(images), axis=1)
    assert (taught == learned).mean(0).min() > 0.8
    by_chance = np.unpackbits(teacher.encode(images), axis=1)  # of another lot of images, so of other anchors
    assert (taught == learned).mean() > (taught == by_chance).mean()


def test_a_graph_encoder_learns_most_from_large_margins() -> None:
    member = build("graph", (1, 8, 8), network="mlp", width=2)
    x = digits(1)
    assert set(member.loss(x)) == {"reconstruction"}  # before it has a teacher
    member.on_train_start(x, None)
    assert isinstance(member, GraphAutoencoder) and member.teacher is not None
    member.eval()
    margins, h = torch.from_numpy(member.teacher.margins(x.flatten(1).numpy())), 2 * member.features(x)
    sure = 1 / (1 + (-member.sharpness * margins).exp())
    expected = -(sure * h.sigmoid().log() + (1 - sure) * (-h).sigmoid().log()).mean()
    assert member.loss(x)["teacher"].item() == pytest.approx(expected.item(), rel=1e-4)


def variational(name: str, **parts: Any) -> Variational:
    member = build(name, (1, 8, 8), 8, network="mlp", width=2, **parts).eval()
    assert isinstance(member, Variational)
    return member


@torch.no_grad()
@pytest.mark.parametrize("name", ["vae", "cvae", "bernoulli-vae"])
def test_log_weights_equal_those_of_torch_distributions(name: str) -> None:
    member, x = variational(name, **supported(name, classes=3)), digits(1, 50).round()
    condition = [torch.randint(-1, 3, (50,))] if name == "cvae" else []
    features = member.features(x, *condition) * 3
    z, log_ratio = member.draw_posterior(features)
    posterior: Distribution = Bernoulli(logits=features)
    log_prior = torch.full((50,), 8 * math.log(0.5))
    if name != "bernoulli-vae":
        mean, log_variance = features.chunk(2, 1)
        posterior, log_prior = Normal(mean, (log_variance / 2).exp()), log_prob(Normal(0.0, 1.0), z).sum(1)
    expected = log_prior - log_prob(posterior, z).sum(1)
    assert torch.allclose(log_ratio, expected, atol=1e-4)
    drawn = torch.stack([member.draw_posterior(features)[0] for _ in range(4000)])
    assert torch.allclose(drawn.mean(0), posterior.mean, atol=5 * float(posterior.variance.max() / 4000) ** 0.5)

    torch.manual_seed(3)
    weights = member.log_weights(x, 2, *condition)
    torch.manual_seed(3)
    for weight in weights:
        z, log_ratio = member.draw_posterior(member.features(x, *condition))
        likelihood = log_prob(Bernoulli(logits=member.decode(z, *condition)), x).sum((1, 2, 3))
        assert torch.allclose(weight, log_ratio + likelihood, rtol=1e-5)
    if condition:
        assert not torch.allclose(weights, member.log_weights(x, 2), atol=1)


@torch.no_grad()
def test_the_bounds_tighten_to_the_likelihood_of_a_linear_gaussian_model() -> None:
    member, x = variational("vae", latent=3, likelihood="gaussian").double(), digits(1, 20).double()
    loadings = torch.linalg.qr(torch.randn(64, 3, dtype=torch.float64)).Q * torch.tensor([3.0, 2.0, 1.0]).double()
    centre = torch.rand(64, dtype=torch.float64)
    member.decoder = nn.Sequential(nn.Linear(3, 64), nn.Unflatten(1, (1, 8, 8))).double()
    member.decoder[0].weight.copy_(loadings)  # type: ignore[operator]
    member.decoder[0].bias.copy_(centre)  # type: ignore[operator]
    marginal = MultivariateNormal(centre, loadings @ loadings.T + torch.eye(64))
    exact = log_prob(marginal, x.flatten(1))

    precision = 1 + loadings.square().sum(0)  # of the posterior, whose numbers are independent: loadings are orthogonal
    mean = (x.flatten(1) - centre) @ loadings / precision

    def posterior(shift: float, log_scale: float) -> None:
        features = torch.cat([mean + shift, 2 * log_scale - precision.log().expand(20, 3)], 1)
        member.features = lambda x: features.repeat(len(x) // 20, 1)  # type: ignore[method-assign]

    posterior(0, 0)
    assert torch.allclose(member.log_weights(x, 4), exact.expand(4, 20))  # every sample of the true posterior says it
    posterior(0.2, 0.15)
    wrong = Normal(mean + 0.2, math.exp(0.15) * precision.rsqrt())
    gap = kl_divergence(wrong, Normal(mean, precision.rsqrt())).sum(1)
    assert gap.min() > 0.1
    assert torch.allclose(member.elbo(x, 5000), exact - gap, atol=0.08)
    many = x.repeat(500, 1, 1, 1)
    gaps = [float(exact.mean() - member.log_likelihood(many, k).mean()) for k in (1, 3, 10, 30)]
    assert gaps[0] == pytest.approx(float(gap.mean()), rel=0.1)
    assert all(wider > 2 * narrower > 0 for wider, narrower in pairwise(gaps))
    assert torch.allclose(member.log_likelihood(x, 5000), exact, atol=0.05)


@torch.no_grad()
def test_the_likelihood_of_a_bernoulli_vae_is_the_sum_over_all_codes() -> None:
    member, x = variational("bernoulli-vae", latent=3).double(), digits(1, 20).round().double()
    joint = []
    for bits in product([0.0, 1.0], repeat=3):
        decoded = member.decode(torch.tensor(bits).double().expand(20, 3))
        joint.append(3 * math.log(0.5) + log_prob(Bernoulli(logits=decoded), x).sum((1, 2, 3)))
    exact = torch.stack(joint).logsumexp(0)
    assert torch.allclose(member.log_likelihood(x, 5_000), exact, atol=0.2)
    assert (member.elbo(x, 1_000) < exact).all()


@pytest.mark.parametrize("name", ["contrastive", "graph", "ortho"])
@pytest.mark.parametrize("wrong", [{"crop": 0.0}, {"crop": 1.1}, {"rotation": -1.0}])
def test_impossible_view_settings_are_refused(name: str, wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"crop must be above 0 and at most 1, rotation 0 or more, .* not crop "):
        Hasher(name, 16, **wrong)  # type: ignore[arg-type]
