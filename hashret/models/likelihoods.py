"""Likelihoods by name: what a decoder's numbers say about the pixels.

Each gives the negative log-likelihood of images `x` in [0, 1], in nats summed over the pixels of an image, with its
constants, and the mean image that the numbers stand for. Some are of any numbers, and do for vectors (n, d) too.
"""

from collections.abc import Callable
from math import log, pi
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 256


class Likelihood(NamedTuple):
    nll: Callable[[Tensor, Tensor], Tensor]  # numbers (n, numbers · c, h, w), x (n, c, h, w) -> (n,)
    mean: Callable[[Tensor], Tensor]  # numbers -> images in the scale of x
    n_params: int = 1  # that the decoder gives for each pixel
    vectors: bool = False  # whether it is of any numbers, and not of pixels alone


def gaussian_nll(mean: Tensor, x: Tensor) -> Tensor:
    """Unit variance: half the squared error, and ½ log 2π a pixel."""
    return (0.5 * (x - mean).square() + 0.5 * log(2 * pi)).flatten(1).sum(1)


def bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    """Cross-entropy of a pixel's intensity, taken as the probability of a one."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def laplace_nll(median: Tensor, x: Tensor) -> Tensor:
    """Unit scale: the absolute error, and log 2 a pixel."""
    return ((x - median).abs() + log(2)).flatten(1).sum(1)


def categorical_nll(logits: Tensor, x: Tensor) -> Tensor:
    """Cross-entropy of the nearest of 256 levels, as of PixelRNN (van den Oord et al. 2016,
    https://arxiv.org/abs/1601.06759); level l of channel j has its logit in channel l · c + j."""
    levels = (x * (LEVELS - 1)).round().long()
    return F.cross_entropy(torch.unflatten(logits, 1, (LEVELS, -1)), levels, reduction="none").flatten(1).sum(1)


def categorical_mean(logits: Tensor) -> Tensor:
    """The expected level as a share of the highest."""
    levels = torch.linspace(0, 1, LEVELS, device=logits.device, dtype=logits.dtype)
    return torch.einsum("nlchw,l->nchw", torch.unflatten(logits, 1, (LEVELS, -1)).softmax(1), levels)


LIKELIHOODS = {
    "gaussian": Likelihood(gaussian_nll, lambda mean: mean, vectors=True),
    "bernoulli": Likelihood(bernoulli_nll, torch.sigmoid),
    "laplace": Likelihood(laplace_nll, lambda median: median, vectors=True),
    "categorical": Likelihood(categorical_nll, categorical_mean, LEVELS),
}
