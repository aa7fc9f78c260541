"""Likelihoods by name: what a decoder's numbers say about the pixels.

Each gives the negative log-likelihood of images `x` in [0, 1], in nats summed over the pixels of an image, with its
constants, and the mean image that the numbers stand for.
"""

from collections.abc import Callable
from math import log, pi
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Likelihood(NamedTuple):
    nll: Callable[[Tensor, Tensor], Tensor]  # numbers (n, c, h, w), x (n, c, h, w) -> (n,)
    mean: Callable[[Tensor], Tensor]  # numbers -> images in the scale of x


def gaussian_nll(mean: Tensor, x: Tensor) -> Tensor:
    """Unit variance: half the squared error, and ½ log 2π a pixel."""
    return (0.5 * (x - mean).square() + 0.5 * log(2 * pi)).flatten(1).sum(1)


def bernoulli_nll(logits: Tensor, x: Tensor) -> Tensor:
    """Cross-entropy of a pixel's intensity, taken as the probability of a one."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


LIKELIHOODS = {
    "gaussian": Likelihood(gaussian_nll, lambda mean: mean),
    "bernoulli": Likelihood(bernoulli_nll, torch.sigmoid),
}
