"""Muon: Jordan, Jin, Boza, You, Cesista, Newhouse and Bernstein, "Muon: An optimizer for hidden layers in neural
networks", 2024, https://kellerjordan.github.io/posts/muon/. PyTorch has one from 2.9 on, for matrices alone; ours takes
the kernels of convolutions too, and what else a network has goes the way of AdamW."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.9
NS_STEPS = 4  # of `orthogonal`
FIRST, THIRD, FIFTH = 3.4445, -4.7750, 2.0315  # of an odd polynomial that takes all of (0, 1] near 1 in a few rounds
UPDATE_SCALE = 6.0  # an update of a matrix over AdamW's update of one weight, at the same learning rate


class Muon(torch.optim.AdamW):
    """AdamW, but weights that are a matrix, one row for each output, move by a matrix that has all singular values
    near 1: no direction waits for another that has the larger gradients. One learning rate does for both. The matrices
    are multiplied in `dtype`."""

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
                    self._move(weights, weights.grad, group["lr"], group["weight_decay"])
                    weights.grad = None  # which is how AdamW is told to leave it alone
        return super().step(closure)

    def _move(self, weights: Tensor, gradient: Tensor, rate: float, decay: float) -> None:
        state = self.state[weights]
        if not state:
            state |= {"step": torch.zeros(()), "momentum": torch.zeros_like(gradient)}
        state["step"] += 1
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(state["momentum"], MOMENTUM).flatten(1)  # Nesterov's
        update = orthogonal(ahead.to(self.dtype)).to(weights).view_as(weights)
        rows, columns = ahead.shape
        weights.mul_(1 - rate * decay).add_(update, alpha=-rate * UPDATE_SCALE * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix (n, m) with its singular values replaced by numbers from 0.5 to 1.21, if they were at least 1/270 of
    its norm: by Newton and Schulz's iteration, which needs products of matrices alone."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-30)
    for _ in range(NS_STEPS):
        gram = x @ x.T
        x = FIRST * x + (THIRD * gram + FIFTH * gram @ gram) @ x
    orthogonal: Tensor = x.T if tall else x
    return orthogonal
