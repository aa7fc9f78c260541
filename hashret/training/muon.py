"""Muon: Jordan, Jin, Boza, You, Cesista, Newhouse and Bernstein, "Muon: An optimizer for hidden layers in neural
networks", 2024, https://kellerjordan.github.io/posts/muon/. PyTorch 2.9 and later have one for matrices only; ours
updates convolution kernels too, and all other weights by AdamW."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.9
NS_STEPS = 4  # iterations of Newton and Schulz
NS_COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of x, x³ and x⁵: a polynomial whose iterates map (0, 1] to near 1
UPDATE_SCALE = 6.0  # an update of a matrix over AdamW's update of one weight, at the same learning rate


class Muon(torch.optim.AdamW):
    """AdamW, except that a weight matrix (one row per output) is updated by a matrix whose singular values are all near
    1, so that directions of small gradients are learned as fast as others. One learning rate serves both. Matrix
    products are computed in `dtype`."""

    def __init__(
        self, weights: Iterable[Tensor], learning_rate: float, *, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(weights, learning_rate, weight_decay=weight_decay)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.ndim > 1 and weights.grad is not None:
                    self._update(weights, weights.grad, group["lr"], group["weight_decay"])
                    weights.grad = None  # so that AdamW skips it
        return super().step(closure)

    def _update(self, weights: Tensor, gradient: Tensor, learning_rate: float, weight_decay: float) -> None:
        state = self.state[weights]
        if not state:
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(gradient)}
        state["step"] += 1
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        nesterov = gradient.lerp(state["momentum"], MOMENTUM).flatten(1)
        update = orthogonalise(nesterov.to(self.dtype)).to(weights).view_as(weights)
        rows, columns = nesterov.shape
        alpha = -learning_rate * UPDATE_SCALE * max(1.0, rows / columns) ** 0.5
        weights.mul_(1 - learning_rate * weight_decay).add_(update, alpha=alpha)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return the matrix (n, m) with singular values from 0.5 to 1.21 in place of those of at least 1/270 of its norm.

    The iteration of Newton and Schulz needs only matrix products.
    """
    first, third, fifth = NS_COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=1e-30)
    for _ in range(NS_STEPS):
        gram = x @ x.T
        x = first * x + (third * gram + fifth * gram @ gram) @ x
    orthogonal: Tensor = x.T if is_tall else x
    return orthogonal
