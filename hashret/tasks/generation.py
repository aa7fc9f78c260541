"""Reconstruct images, sample new ones, and interpolate between two, with members of the family.

Every function takes a fitted `Hasher` and returns images as uint8 (n, height, width, channels), of the model's input
size. It raises HashretError for a model without a network or without the ability, and names one that has it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hashret.data.contents import Inputs
from hashret.errors import HashretError
from hashret.hasher import Hasher
from hashret.models.base import Member
from hashret.models.cvae import ConditionalVariationalAutoencoder
from hashret.models.vae import VariationalAutoencoder
from hashret.runtime import batch_slices
from hashret.runtime.inputs import default_device, to_input

Pixels = NDArray[np.uint8]


def reconstruct(hasher: Hasher, pixels: Inputs) -> Pixels:
    """Return the reconstructions of images, both uint8 (n, height, width, channels), as `Hasher.preprocessing` gives
    them."""
    member = _network(hasher)
    with torch.inference_mode():
        parts = [_to_pixels(member.reconstruct(x)) for x in _batches(pixels)]
    return np.concatenate(parts) if parts else np.empty((0, *hasher.preprocessing.shape), np.uint8)


def latents(hasher: Hasher, pixels: Inputs) -> NDArray[np.float32]:
    """Return the outputs, float32 (n, latent), that the head turns into bits."""
    with torch.inference_mode():
        parts = [hasher.member.outputs(x) for x in _batches(pixels)]
    return np.asarray(torch.cat(parts).cpu().numpy(), np.float32)


def sample(hasher: Hasher, n: int, *, label: str | None = None, seed: int = 0) -> Pixels:
    """Return n new images, decoded from samples of the model's prior; of the class `label` for a conditional model."""
    member = _network(hasher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        z = member.sample_prior(n)
    if z is None:
        raise HashretError(f"model {hasher.model!r} has no prior to sample from: train vae, cvae or bernoulli-vae")
    return _decode(hasher, z, label)


def interpolate(hasher: Hasher, pair: Inputs, steps: int = 10, *, label: str | None = None) -> Pixels:
    """Return `steps` images decoded from linear interpolations between the latents of two images, uint8 (2, h, w,
    c)."""
    ends = _latents(hasher, pair)
    return _decode(hasher, torch.lerp(ends[:1], ends[1:], torch.linspace(0, 1, steps)[:, None]), label)


def traverse(
    hasher: Hasher, image: Inputs, dimensions: Sequence[int], steps: int = 9, *, label: str | None = None
) -> Pixels:
    """Return (len(dimensions) × steps) images. They are decoded from the latents of an image, uint8 (1, h, w, c), with
    one dimension at a time varied from −3 to 3."""
    member = _network(hasher)
    for dimension in dimensions:
        if not 0 <= dimension < member.latent:
            raise HashretError(f"there is no latent dimension {dimension}: choose from 0 to {member.latent - 1}")
    z = _latents(hasher, image).repeat(len(dimensions) * steps, 1)
    for i, dimension in enumerate(dimensions):
        z[i * steps : (i + 1) * steps, dimension] = torch.linspace(-3, 3, steps)
    return _decode(hasher, z, label)


def manifold(hasher: Hasher, steps: int = 20, *, label: str | None = None) -> Pixels:
    """Return (steps × steps) images, row by row, over the quantiles of the prior of a model with two latent
    dimensions."""
    member = _network(hasher)
    if member.latent != 2 or not isinstance(member, VariationalAutoencoder):
        raise HashretError(
            "a manifold needs two latent dimensions and a normal prior: train vae with --set latent=2 --head lsh"
        )
    quantiles = torch.special.ndtri(torch.linspace(0.02, 0.98, steps))
    return _decode(hasher, torch.cartesian_prod(-quantiles, quantiles).flip(1), label)


def _network(hasher: Hasher) -> Member:
    member = hasher.member
    hasher.preprocessing.require_images("decode")
    if not member.trainable:
        raise HashretError(f"model {hasher.model!r} has no network to decode with: train another one, such as vae")
    return member


def _batches(pixels: Inputs) -> Iterator[Tensor]:
    return (to_input(pixels[rows], default_device()) for rows in batch_slices(pixels))


def _latents(hasher: Hasher, pixels: Inputs) -> Tensor:
    """Return the decoder's inputs for images, (n, latent)."""
    member = _network(hasher)
    with torch.inference_mode():
        return torch.cat([member.bottleneck(member.features(x))[0] for x in _batches(pixels)]).cpu()


def _decode(hasher: Hasher, z: Tensor, label: str | None) -> Pixels:
    member = hasher.member
    with torch.inference_mode():
        if label is None:
            decoded = member.decode(z.to(default_device()))
        else:
            classes = hasher.training.get("classes", [])
            if not isinstance(member, ConditionalVariationalAutoencoder):
                raise HashretError(
                    f"model {hasher.model!r} is not conditional on labels: train cvae --labels, or leave --label out"
                )
            if label not in classes:
                raise HashretError(f"there is no label {label!r}; the model knows {', '.join(classes)}")
            labels = torch.full((len(z),), classes.index(label), device=default_device())
            decoded = member.decode(z.to(default_device()), labels)
        return _to_pixels(member.likelihood.mean(decoded).clamp(0, 1))


def _to_pixels(images: Tensor) -> Pixels:
    return np.asarray((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())
